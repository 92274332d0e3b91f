"""What pairs of latents do to neurons, in C on the CPU: steps of `functional.pairs` in one go.

Where `takes` says no, the callers' own steps in torch give the same.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from crosslens.functional.gathers import Lists
from crosslens.functional.interactions import Kind
from crosslens.kernels.build import built
from crosslens.kernels.native import check, room, shared_out

KINDS: tuple[Kind, ...] = ("relu", "relu2", "silu", "gelu", "gelu_tanh")
"""As pairs.c numbers them."""


@dataclass(frozen=True, eq=False)
class Listed:
    """Which latents are active on each row, how strongly, and the neurons that they reach."""

    kind: Kind
    lists: Lists
    weight_E: Float32[Tensor, " e"]
    w_N: Float32[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class Brought:
    """What goes into one branch of the neurons: per unit of a latent's strength, and on each row
    beside latents."""

    E_LN: Float32[Tensor, "l n"]
    always_RN: Float32[Tensor, "r n"]
    error_RN: Float32[Tensor, "r n"]


class _Branch(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("table", "always", "error"))


def takes(*tensors: Tensor) -> bool:
    """Whether there are compiled kernels, and the tensors are of the format that they know."""
    return built().compiled is not None and all(
        t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    )


def gating(
    listed: Listed, row_B: Int64[Tensor, " b"], gates: Brought, values: Brought
) -> tuple[Float[Tensor, "b m m"], Float[Tensor, " b"]]:
    """`functional.pairs.gating` for all members of some rows, either way together; and of each row
    Σ_n w (Σ|u|)(Σ|g|) over its latents.

    Members are the latents of a row, in order, padded to the longest list; then the always-on part
    and the error.
    """
    most = int(listed.lists.counts_I[row_B].max()) + 2
    found_BMM, alone_B = room(len(row_B), most, most), room(len(row_B))
    branches = [_branch(branch) for branch in (gates, values)]
    width = len(listed.w_N)
    fixed = (
        row_B.contiguous(),
        *_given(listed),
        *(ctypes.byref(branch) for branch, _ in branches),
        width,
        listed.w_N.contiguous(),
        KINDS.index(listed.kind),
        most,
        found_BMM,
        alone_B,
    )
    check(shared_out("gating", len(row_B), fixed))
    return found_BMM, alone_B


def sharing(
    listed: Listed, row_B: Int64[Tensor, " b"], values: Brought
) -> tuple[Float[Tensor, "b m m"], Float[Tensor, "b m m"], Float[Tensor, " b"]]:
    """`functional.pairs.shared` and `coupling` for all members of some rows, without a gate; and of
    each row, for relu2 only, Σ_n w ((Σ|y|)² − (Σ relu(−y))²) over its latents, in place of the
    coupling, which is 0. The diagonals mean nothing. Members are as `gating` has them."""
    most = int(listed.lists.counts_I[row_B].max()) + 2
    shared_BMM, coupled_BMM = (
        room(len(row_B), most, most),
        room(len(row_B), most, most).zero_(),
    )
    square_B, (branch, _kept) = room(len(row_B)), _branch(values)
    fixed = (
        row_B.contiguous(),
        *_given(listed),
        ctypes.byref(branch),
        len(listed.w_N),
        listed.w_N.contiguous(),
        KINDS.index(listed.kind),
        most,
        shared_BMM,
        coupled_BMM,
        square_B,
    )
    check(shared_out("sharing", len(row_B), fixed))
    return shared_BMM, coupled_BMM, square_B


def _branch(brought: Brought) -> tuple[_Branch, list[Tensor]]:
    """With what must live as long as it does."""
    kept = [t.contiguous() for t in (brought.E_LN, brought.always_RN, brought.error_RN)]
    return _Branch(*(t.data_ptr() for t in kept)), kept


def _given(listed: Listed) -> tuple[Tensor, Tensor, Tensor]:
    lists = listed.lists
    return lists.starts_I.contiguous(), lists.index_N.contiguous(), listed.weight_E.contiguous()


@dataclass(frozen=True, eq=False)
class Met:
    """Pairs of latents on rows, those of one row one after another."""

    row_Q: Int64[Tensor, " q"]
    place_Q: Int64[Tensor, " q"]
    """The row's number among those of which it is known what is there beside latents."""
    first_Q: Int64[Tensor, " q"]
    """The first latent's entry."""
    second_Q: Int64[Tensor, " q"]


@dataclass(frozen=True, eq=False)
class Inside:
    """Who is in each context."""

    entry_CE: Bool[Tensor, "c e"]
    error_CP: Bool[Tensor, "c p"]
    """By place."""


class _Inside(ctypes.Structure):
    _fields_ = (
        ("entry", ctypes.c_void_p), ("error", ctypes.c_void_p),
        ("contexts", ctypes.c_int64), ("entries", ctypes.c_int64), ("places", ctypes.c_int64),
    )  # fmt: skip


def in_context(
    listed: Listed, met: Met, gates: Brought, values: Brought | None, inside: Inside
) -> tuple[Float[Tensor, "q c 4"], Float[Tensor, "q 4"]]:
    """Of each meeting, in each context, Σ w|Δ|, Σ wΔ and Σ w|u_i (what the second does to φ)|, and
    the other way; and both dominances, the ratio and the reach.

    Args:
        gates: what φ acts on; what is beside latents, by place.
        values: what a gate multiplies; without one, the last two of a context are 0.
    """
    entry_CE, error_CP = inside.entry_CE.contiguous(), inside.error_CP.contiguous()
    n_contexts, n_entries = entry_CE.shape
    given = entry_CE.data_ptr(), error_CP.data_ptr(), n_contexts, n_entries, error_CP.shape[1]
    found = room(len(met.row_Q), n_contexts + 1, 4)
    branches = [None if each is None else _branch(each) for each in (gates, values)]
    fixed = (
        *(t.contiguous() for t in (met.row_Q, met.place_Q, met.first_Q, met.second_Q)),
        *_given(listed),
        *(ctypes.c_void_p(None) if one is None else ctypes.byref(one[0]) for one in branches),
        ctypes.byref(_Inside(*given)),
        len(listed.w_N),
        listed.w_N.contiguous(),
        KINDS.index(listed.kind),
        found,
    )
    check(shared_out("in_context", len(met.row_Q), fixed))
    return found[:, :-1], found[:, -1]
