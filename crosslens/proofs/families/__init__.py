"""Kinds of model that something is proved about: what their tensors are, and which tiers there are.

Trusted with the checker; nothing here searches.
"""
