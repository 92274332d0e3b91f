"""Triplets in two models: which changed, and through what."""
