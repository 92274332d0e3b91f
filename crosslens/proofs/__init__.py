"""Sound bounds on what a model does, from a coder's features, and what the proofs cost.

Trusted: `rounding`, `lemmas`, `certificate` (the reader) and `checker`. Everything else searches,
and what it finds is checked.
"""
