"""Pairs of latents across positions: queries with keys, and where values go."""
