"""The sparse coder: its wiring, its activation, its weights, its files."""

from crosslens.coder.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from crosslens.coder.artifact import Description, load, load_description, save
from crosslens.coder.coder import Coder, Pass
from crosslens.coder.folding import fold, unfold
from crosslens.coder.initialise import transpose_init
from crosslens.coder.layout import Group, Layout, Wiring, crosscoder

__all__ = [
    "Activation",
    "BatchTopK",
    "Coder",
    "Description",
    "Group",
    "JumpReLU",
    "Layout",
    "Pass",
    "ReLU",
    "TopK",
    "Wiring",
    "crosscoder",
    "fold",
    "load",
    "load_description",
    "save",
    "transpose_init",
    "unfold",
]
