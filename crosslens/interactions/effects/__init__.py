"""What ablating pairs does to the model, and how well what was measured predicts it."""
