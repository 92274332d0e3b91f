"""Latents that interact mostly among themselves."""
