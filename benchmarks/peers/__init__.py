"""Other libraries as contestants: each adapter takes the training step that its library takes.

A crosscoder over several sites is given to the libraries that know SAEs only as one SAE over rows
of sites × width: the same products of the same size. Weights start as the library starts them; no
latent is dead, so that no auxiliary loss is at work. Nothing is compiled.
"""

PEERS = {
    "sae_lens": ("float32", "float32_sparse", "bfloat16", "bfloat16_weights"),
    "dictionary_learning": ("float32", "bfloat16"),
    "sparsify": ("float32", "bfloat16"),
    "crosscode": ("float32", "bfloat16_weights"),
}
"""Peer → settings, its default first. `bfloat16`: products in bfloat16 under torch's autocast,
weights in float32, as crosslens does; `bfloat16_weights`: weights and moments in bfloat16 too."""
