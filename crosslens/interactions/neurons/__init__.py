"""What every latent contributes to every neuron, and the exact interaction there."""
