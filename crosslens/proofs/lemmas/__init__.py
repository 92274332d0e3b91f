"""Inequalities over the reals, each one function: float64 in, a bound that holds out.

Arguments are exact unless they are a `Ball` or are said to be bounds themselves. Only torch and
`crosslens.proofs.rounding` are imported here.
"""
