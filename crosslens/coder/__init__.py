"""The sparse coder: its wiring, its activation, its weights, its files."""

from crosslens.coder.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from crosslens.coder.artifact import Description, load, load_description, save
from crosslens.coder.coder import Coder, Pass
from crosslens.coder.folding import fold, unfold
from crosslens.coder.initialise import center_biases, transpose_init
from crosslens.coder.layout import Group, Layout, View, Wiring
from crosslens.coder.rows import Rows, all_rows, replacements, training_rows
from crosslens.coder.wirings import (
    Causal,
    Crosscoder,
    CrossLayer,
    Dedicated,
    DesignatedShared,
    Difference,
    LayerConditioned,
    Transcoder,
    WiringConfig,
)

__all__ = [
    "Activation",
    "BatchTopK",
    "Causal",
    "Coder",
    "CrossLayer",
    "Crosscoder",
    "Dedicated",
    "Description",
    "DesignatedShared",
    "Difference",
    "Group",
    "JumpReLU",
    "LayerConditioned",
    "Layout",
    "Pass",
    "ReLU",
    "Rows",
    "TopK",
    "Transcoder",
    "View",
    "Wiring",
    "WiringConfig",
    "all_rows",
    "center_biases",
    "fold",
    "load",
    "load_description",
    "replacements",
    "save",
    "training_rows",
    "transpose_init",
    "unfold",
]
