"""The interaction penalty on a small language model's crosscoder, and its measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.coder import Coder, Pass, all_rows, train_pass
from crosslens.functional.interaction_penalty import Neurons
from crosslens.lm.mlp import Norm
from crosslens.proofs.lemmas.stream import FLOOR
from crosslens.training import Interaction
from crosslens.training.objective.interaction import Beside, Form
from crosslens.training.objective.term import weight_at
from crosslens.training.readers import Reader


@dataclass(frozen=True)
class Penalty:
    """The term as it is added to a squared error."""

    term: Interaction
    beside: Beside
    variance: float
    """What the squared error of the mean row is: the weight stands beside an FVU."""

    def __call__(self, step: Pass) -> Tensor:
        weight = weight_at(self.term, step.progress)
        return self.variance * weight * self.term(step, self.beside)


def penalty(
    how: tuple[float, Form], readers: tuple[Reader, ...], variance: float, seed: int
) -> Penalty:
    """The term with a weight and a form, all neurons of a quarter of a step's rows; the weight
    rises over the first fifth. It draws from a generator of its own."""
    weight, form = how
    term = Interaction(weight=weight, form=form, ramp=0.2, share=0.25, neurons=1.0)
    return Penalty(term, Beside(readers, torch.Generator().manual_seed(seed)), variance)


def readers_of(weights: Mapping[str, Tensor], scale_P: Tensor) -> tuple[Reader, ...]:
    """Each layer's MLP, as it reads rows whose sites are multiplied by `scale_P`. An RMSNorm does
    not see the scale, once its floor is scaled along."""
    found = []
    for layer, (W_in_DN, W_out_ND) in enumerate(
        zip(weights["W_in"], weights["W_out"], strict=True)
    ):
        eps = FLOOR * float(scale_P[2 * layer + 1]) ** 2
        norm = Norm(kind="rms", gain_D=torch.ones(len(W_in_DN)), bias_D=None, eps=eps)
        neurons = Neurons(
            kind="relu",
            through_DW=W_in_DN,
            fixed_W=torch.zeros(len(W_out_ND)),
            out_norm_N=W_out_ND.norm(dim=1),
        )
        found.append(Reader(site=f"resid_mid.{layer}", norm=norm, blocks=(neurons,)))
    return tuple(found)


@torch.no_grad()
def interaction(coder: Coder, rows_BX: Tensor, readers: tuple[Reader, ...]) -> float:
    """The exact form over all neurons and rows (scaled), mean over MLPs: in [0, 1]."""
    whole = Interaction(weight=1.0, share=1.0, neurons=1.0)
    step = train_pass(coder, all_rows(coder.wiring, rows_BX))
    return float(whole(step, Beside(readers, torch.Generator().manual_seed(0))))
