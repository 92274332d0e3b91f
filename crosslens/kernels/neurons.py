"""How far neurons are from treating their inputs one by one, in C on the CPU: sums over rows.

Where `kernels.pairs.takes` says no, `interactions.neurons.inputs` gives the same with torch.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from jaxtyping import Float, Float32
from torch import Tensor

from crosslens.functional.gathers import Lists
from crosslens.functional.interactions import Kind
from crosslens.kernels.native import room, shared_out
from crosslens.kernels.pairs import KINDS

GROUP = 16
"""Rows that are summed in single precision; groups are added up in double."""
SUMS = ("interaction", "mass", "output", "of_error", "without_error", "mediated", "direct")
"""As neurons.c orders them; `SiteInteraction` says what they are."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reaching:
    """What goes into one branch of the neurons."""

    E_LN: Float32[Tensor, "l n"]
    """Per unit of a latent's strength."""
    moving_N: Float32[Tensor, " n"]
    """Of the biases, which the norm's scalar multiplies."""
    fixed_N: Float32[Tensor, " n"]
    """Of the biases, which it does not."""
    error_RN: Float32[Tensor, "r n"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Asked:
    """Which latents are active on each row, how strongly, and the neurons that they reach."""

    kind: Kind
    lists: Lists
    weight_E: Float32[Tensor, " e"]
    """Strength times the row's scalar."""
    reach_L: Float32[Tensor, " l"]
    """The largest contribution to what φ acts on, per unit of strength."""
    scalar_R: Float32[Tensor, " r"]
    through_R: Float32[Tensor, " r"]
    """What the parts of a row do to it by way of the norm's scalar."""
    w_N: Float32[Tensor, " n"]


class _Branch(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("table", "moving", "fixed", "error"))


def interaction_sums(
    asked: Asked, value: Reaching, gate: Reaching | None
) -> tuple[Float[Tensor, "7 n"], Float[Tensor, " r"], Float[Tensor, " r"]]:
    """Each of `SUMS` over the rows, in float64; and of each row the interaction and the mass, over
    neurons with weight w."""
    n_rows, width = len(asked.scalar_R), len(asked.w_N)
    n_groups = -(-n_rows // GROUP)
    found_GSN = room(n_groups, len(SUMS), width)
    made_R, mass_R = room(2, n_rows).zero_()
    branches = [None if each is None else _branch(each) for each in (value, gate)]
    fixed = (
        asked.lists.starts_I.contiguous(),
        asked.lists.index_N.contiguous(),
        asked.weight_E.contiguous(),
        asked.reach_L.contiguous(),
        asked.scalar_R.contiguous(),
        asked.through_R.contiguous(),
        asked.w_N.contiguous(),
        *(ctypes.c_void_p(None) if one is None else ctypes.byref(one[0]) for one in branches),
        n_rows,
        width,
        GROUP,
        KINDS.index(asked.kind),
        found_GSN,
        made_R,
        mass_R,
    )
    shared_out("neurons", n_groups, fixed)
    return found_GSN.double().sum(0), made_R, mass_R


def _branch(one: Reaching) -> tuple[_Branch, list[Tensor]]:
    """With what must live as long as it does."""
    kept = [t.contiguous() for t in (one.E_LN, one.moving_N, one.fixed_N, one.error_RN)]
    return _Branch(*(t.data_ptr() for t in kept)), kept
