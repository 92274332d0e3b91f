"""How features interact through a model's nonlinearities."""
