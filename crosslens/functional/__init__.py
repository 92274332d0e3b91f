"""The mathematics: pure functions on tensors. Each names its equation."""

from crosslens.functional.activations import (
    above_threshold,
    abs_topk,
    batch_topk,
    gated,
    group_max,
    relu,
    signed_topk,
    topk,
)
from crosslens.functional.blocks import split_rows, sum_rows, upcast
from crosslens.functional.code import (
    Code,
    SparseCode,
    count_entries,
    fires,
    split_columns,
    sum_by_latent,
    sum_entries,
)
from crosslens.functional.jumprelu import count_active, count_active_entries, jumprelu, jumprelu_log
from crosslens.functional.losses import nested_error, share_of_residual, squared_error, variance
from crosslens.functional.penalties import (
    l1_of_norms,
    power_of_norms,
    preactivation_gap,
    quadratic_frequency,
    rectified_l1,
    tanh_frequency,
    tanh_of_norms,
)

__all__ = [
    "Code",
    "SparseCode",
    "above_threshold",
    "abs_topk",
    "batch_topk",
    "count_active",
    "count_active_entries",
    "count_entries",
    "fires",
    "gated",
    "group_max",
    "jumprelu",
    "jumprelu_log",
    "l1_of_norms",
    "nested_error",
    "power_of_norms",
    "preactivation_gap",
    "quadratic_frequency",
    "rectified_l1",
    "relu",
    "share_of_residual",
    "signed_topk",
    "split_columns",
    "split_rows",
    "squared_error",
    "sum_by_latent",
    "sum_entries",
    "sum_rows",
    "tanh_frequency",
    "tanh_of_norms",
    "topk",
    "upcast",
    "variance",
]
