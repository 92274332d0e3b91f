"""The sparse coder: its wiring, its activation, its weights, its files."""

from crosslens.coder.activations import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GroupMax,
    JumpReLU,
    ReLU,
    TopK,
)
from crosslens.coder.artifact import Description, coder_hash, load, load_description, save
from crosslens.coder.biases import (
    Bias,
    center_at_median,
    center_biases,
    geometric_median,
    set_firing_rate,
)
from crosslens.coder.coder import Coder
from crosslens.coder.dense import dense_decoder, dense_encoder
from crosslens.coder.folding import fold, unfold
from crosslens.coder.gathering import Copies, RowGradients
from crosslens.coder.initialise import (
    DataPoint,
    InitConfig,
    Transpose,
    Uniform,
    share_start,
    transpose_init,
    zero_decoders,
)
from crosslens.coder.layout import Group, Layout, View, Wiring
from crosslens.coder.rows import Rows, all_rows, replacements, side_by_side, training_rows
from crosslens.coder.training_pass import Pass, train_pass
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
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "Bias",
    "Causal",
    "Coder",
    "Copies",
    "CrossLayer",
    "Crosscoder",
    "DataPoint",
    "Dedicated",
    "Description",
    "DesignatedShared",
    "Difference",
    "Gated",
    "Group",
    "GroupMax",
    "InitConfig",
    "JumpReLU",
    "LayerConditioned",
    "Layout",
    "Pass",
    "ReLU",
    "RowGradients",
    "Rows",
    "TopK",
    "Transcoder",
    "Transpose",
    "Uniform",
    "View",
    "Wiring",
    "WiringConfig",
    "all_rows",
    "center_at_median",
    "center_biases",
    "coder_hash",
    "dense_decoder",
    "dense_encoder",
    "fold",
    "geometric_median",
    "load",
    "load_description",
    "replacements",
    "save",
    "set_firing_rate",
    "share_start",
    "side_by_side",
    "train_pass",
    "training_rows",
    "transpose_init",
    "unfold",
    "zero_decoders",
]
