"""Models of rising difficulty, each trained from a seed, on which proofs are tried."""
