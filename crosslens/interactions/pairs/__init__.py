"""Pairs of latents at an MLP: what they do together, of what kind, and what they could do."""
