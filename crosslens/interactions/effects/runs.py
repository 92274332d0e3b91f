"""The model run on without one latent of a pair, without the other, and without both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from crosslens.diffing.patching import entrance
from crosslens.diffing.stream import Progress
from crosslens.functional.blocks import split_rows
from crosslens.interactions.effects.choice import Chosen
from crosslens.interactions.effects.visits import Code, Visit
from crosslens.interactions.pairs.table import Ints
from crosslens.lm import LanguageModel, split_site
from crosslens.text import Blocks

FIGURES = (
    "delta_loss_i",
    "delta_loss_j",
    "delta_loss_ij",
    "interaction",
    "interaction_abs",
    "kl_i",
    "kl_j",
    "kl_ij",
    "kl_interaction",
    "kl_interaction_abs",
    "kl_from_additive",
)
"""Per prediction, in nats. Loss without i, without j, without both, each less that of the model as
it is; `interaction` = Δ_ij − Δ_i − Δ_j. KL(as it is ‖ without) likewise. `kl_from_additive` is
KL(without both ‖ softmax(z_i + z_j − z)), z being logits: 0 where what the two do to logits adds
up, which the other two are not (loss and KL are curved in logits)."""
AT_ONCE = 1 << 19
"""Logits of each pass that are looked at together: 2 MiB, what a cache holds."""


@contextmanager
def widened(model: LanguageModel) -> Iterator[None]:
    """Inside the block the model's weights are float32 where they are shorter.

    A difference of differences is smaller than what rounding to bfloat16 does to each of its parts.
    Afterwards the model has the very weights it had.
    """
    short = (torch.bfloat16, torch.float16)
    held = [*model.module.parameters(), *model.module.buffers()]
    kept = [(each, each.data) for each in held if each.dtype in short]
    try:
        for each, data in kept:
            each.data = data.float()
        yield
    finally:
        for each, data in kept:
            each.data = data


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """What all runs share."""

    model: LanguageModel
    blocks: Blocks
    told_NT: Ints
    """`told_documents` of the blocks."""
    code: Code
    decoders: Mapping[str, Float[Tensor, "l d"]]
    """Raw units, by site."""

    def contribution(self, site: str, latent: int, block: int, stop: int) -> Float[Tensor, "t d"]:
        """a_i d_i at the first `stop` positions of a block; 0 where the latent is not active."""
        place_E, value_E = self.code.of(latent)
        start = block * self.told_NT.shape[1]
        at = slice(*np.searchsorted(place_E, [start, start + stop]))
        d_D = self.decoders[site][latent]
        whole_TD = d_D.new_zeros(stop, len(d_D))
        value_e = torch.from_numpy(value_E[at]).to(d_D)
        whole_TD[torch.from_numpy(place_E[at] - start).to(d_D.device)] = value_e[:, None] * d_D
        return whole_TD


@dataclass(frozen=True, eq=False)
class Summed:
    """Sums of `FIGURES` over the predictions of each pair, by document."""

    count_CG: Int64[Tensor, "c g"]
    total_CGM: Float64[Tensor, "c g m"]

    @classmethod
    def blank(cls, n_pairs: int, n_documents: int) -> Summed:
        count_CG = torch.zeros(n_pairs, n_documents, dtype=torch.int64)
        shape = (n_pairs, n_documents, len(FIGURES))
        return cls(count_CG, torch.zeros(shape, dtype=torch.float64))

    def add(self, pair: int, document_P: Int64[Tensor, " p"], figure_PM: Tensor) -> None:
        """Take in some predictions of a pair."""
        self.count_CG[pair].index_add_(0, document_P, torch.ones_like(document_P))
        self.total_CGM[pair].index_add_(0, document_P, figure_PM)

    def total(self, name: str) -> Float64[Tensor, "c g"]:
        """Sums of one figure."""
        return self.total_CGM[:, :, FIGURES.index(name)]

    def mean(self, name: str) -> Float64[Tensor, " c"]:
        """Per prediction; NaN for a pair that has none."""
        return self.total(name).sum(1) / self.count_CG.sum(1)


@torch.no_grad()
def measure(
    bench: Bench,
    chosen: Chosen,
    todo: Mapping[int, Sequence[Visit]],
    at_once: int,
    report: Progress,
) -> tuple[Summed, Summed]:
    """All visits: sums over the positions here, and over the later ones."""
    documents, group_NT = np.unique(bench.told_NT, return_inverse=True)
    group_NT = group_NT.reshape(bench.told_NT.shape)
    here, later = (Summed.blank(len(chosen), len(documents)) for _ in range(2))
    done, total = 0, sum(map(len, todo.values()))
    for block, mine in todo.items():
        for visit, figure_PM in _of_block(bench, chosen, block, mine, at_once):
            group_P = torch.from_numpy(group_NT[block, visit.position_P])
            n = len(visit.here_P)
            here.add(visit.pair, group_P[:n], figure_PM[:n])
            later.add(visit.pair, group_P[n:], figure_PM[n:])
            done += 1
            report(done, total)
    return here, later


def _of_block(
    bench: Bench, chosen: Chosen, block: int, mine: Sequence[Visit], at_once: int
) -> Iterator[tuple[Visit, Tensor]]:
    """Each visit's figures [P, M]."""
    stop = 1 + max(int(visit.position_P.max()) for visit in mine)
    # One pass over the block as it is serves all sites.
    plain = [split_site(site)[1] for site in chosen.sites]
    entrances = dict.fromkeys(name for site in plain for name in entrance([site]))
    tokens_1T = bench.blocks.tokens_NT[block : block + 1, :stop]
    clean = bench.model.capture(tokens_1T, [*entrances, "logits"])
    sorted_by = {
        visit: (chosen.site_C[visit.pair], chosen.i_C[visit.pair], chosen.j_C[visit.pair])
        for visit in mine
    }
    ordered = sorted(mine, key=lambda visit: sorted_by[visit])
    for number, group in groupby(ordered, key=lambda visit: sorted_by[visit][0]):
        together = list(group)
        for start in range(0, len(together), at_once):
            some = together[start : start + at_once]
            pairs = [(int(chosen.i_C[v.pair]), int(chosen.j_C[v.pair])) for v in some]
            without = _without(bench, chosen.sites[number], block, clean, pairs)
            for visit, (i, j) in zip(some, pairs, strict=True):
                passes = [clean["logits"][0], without[i,], without[j,], without[i, j]]
                yield visit, _figures_at(bench, block, visit.position_P, passes)


def _without(
    bench: Bench,
    site: str,
    block: int,
    clean: Mapping[str, Tensor],
    pairs: Sequence[tuple[int, int]],
) -> dict[tuple[int, ...], Tensor]:
    """Logits [T, V] without each latent of the pairs, and without both of each."""
    sets: list[tuple[int, ...]] = [(latent,) for latent in sorted({k for ij in pairs for k in ij})]
    stop = clean["logits"].shape[1]
    part = {k: bench.contribution(site, k, block, stop) for (k,) in sets}
    sets += pairs
    removed_STD = torch.stack([torch.stack([part[k] for k in each]).sum(0) for each in sets])
    tokens_ST = bench.blocks.tokens_NT[block, :stop].expand(len(sets), -1)
    entering = {name: x for name, x in clean.items() if name != "logits"}
    logits_STV = bench.model.run(
        tokens_ST,
        {split_site(site)[1]: lambda x_STD: x_STD - removed_STD.to(x_STD)},
        {name: x_1TD.expand(len(sets), -1, -1) for name, x_1TD in entering.items()},
    )
    return dict(zip(sets, logits_STV, strict=True))


def _figures_at(
    bench: Bench, block: int, position_P: Ints, passes: Sequence[Float[Tensor, "t v"]]
) -> Float64[Tensor, "p m"]:
    """`FIGURES` at some positions, on the CPU."""
    at_P = torch.from_numpy(position_P)
    next_P = bench.blocks.tokens_NT[block, at_P + 1].long()
    at_P, next_P = at_P.to(passes[0].device), next_P.to(passes[0].device)
    size = max(1, AT_ONCE // passes[0].shape[-1])
    parts = [
        _figures([logits_TV[at_p] for logits_TV in passes], next_p)
        for at_p, next_p in zip(split_rows(at_P, size), split_rows(next_P, size), strict=True)
    ]
    return torch.cat(parts).cpu()


def _figures(passes: Sequence[Float[Tensor, "p v"]], next_P: Tensor) -> Float64[Tensor, "p m"]:
    """`FIGURES` from the logits of the model as it is, without i, without j and without both."""
    z_PV, z_i_PV, z_j_PV, _ = passes
    log_4PV = torch.stack(list(passes)).log_softmax(-1)
    index_4P1 = next_P.expand(len(log_4PV), -1)[..., None]
    loss_4P = -log_4PV.gather(-1, index_4P1)[..., 0].double()
    delta_i, delta_j, delta_ij = loss_4P[1:] - loss_4P[0]
    kl_i, kl_j, kl_ij = (_kl(log_4PV[0], log_PV) for log_PV in log_4PV[1:])
    additive_PV = (z_i_PV + z_j_PV - z_PV).log_softmax(-1)
    loss, kl = delta_ij - delta_i - delta_j, kl_ij - kl_i - kl_j
    of_loss = (delta_i, delta_j, delta_ij, loss, loss.abs())
    of_kl = (kl_i, kl_j, kl_ij, kl, kl.abs(), _kl(log_4PV[3], additive_PV))
    return torch.stack([*of_loss, *of_kl], -1)


def _kl(log_p_PV: Tensor, log_q_PV: Tensor) -> Float64[Tensor, " p"]:
    return (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(-1).double()
