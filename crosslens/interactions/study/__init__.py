"""The whole study of a run's interactions: planned, walked, tabled, saved."""
