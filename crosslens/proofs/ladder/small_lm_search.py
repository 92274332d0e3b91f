"""The search for a small language model's hints: regions, likely answers, directions, and which
positions to spend a budget on. The checker trusts none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.proofs.families import small_lm as family
from crosslens.proofs.families.parts import Asked
from crosslens.proofs.ladder.small_lm import SmallLM, forward
from crosslens.proofs.ladder.small_lm_coder import Features, clustered, encoded, nearest
from crosslens.proofs.ledger import Cost

BOX, NEAR, FULL = 0, 1, 2
TIER = {"0 rest": "box", "1 near": "regions", "2 full": "distinct"}
"""Groups of a mixture, by the numbers above."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many hints there are."""

    contexts_each: int
    """Contexts for each region, on average."""
    answers: int
    directions: int


SHAPES = (
    Shape(contexts_each=64, answers=32, directions=4),
    Shape(contexts_each=16, answers=32, directions=8),
    Shape(contexts_each=16, answers=64, directions=16),
    Shape(contexts_each=8, answers=64, directions=24),
)


@dataclass(frozen=True)
class Truth:
    """The model run on all of the data in float64."""

    rows_PND: Tensor
    """The stream at every site."""
    final_ND: Tensor
    """Normalised."""
    unembed_DV: Tensor
    logits_NV: Tensor
    label_N: Tensor

    @property
    def loss_N(self) -> Tensor:
        return torch.nn.functional.cross_entropy(self.logits_NV, self.label_N, reduction="none")

    @property
    def accuracy(self) -> float:
        return float((self.logits_NV.argmax(1) == self.label_N).double().mean())


@torch.no_grad()
def truth(weights: Mapping[str, Tensor], data: Mapping[str, Tensor]) -> Truth:
    """Brute force."""
    exact = {name: tensor.double() for name, tensor in weights.items()}
    logits, found = forward(exact, data["tokens"])
    rows = torch.stack([site.flatten(0, 1) for site in found])
    final = rows[-1] / rows[-1].square().mean(1, keepdim=True).sqrt()
    return Truth(rows, final, exact["W_U"], logits.flatten(0, 1), data["labels"].flatten())


@torch.no_grad()
def unknown(weights: Mapping[str, Tensor], label_N: Tensor) -> float:
    """The smallest mean loss that weights alone rule out to be exceeded: for every label
    log(1 + Σ_{v≠y} exp(√D ‖u_v − u_y‖)). Where the baseline starts, as if it were free."""
    U_VD = weights["W_U"].double().T
    reach_VV = torch.cdist(U_VD, U_VD) * U_VD.shape[1] ** 0.5
    return float(reach_VV.logsumexp(1)[label_N].mean())


@torch.no_grad()
def hints(config: SmallLM, features: Features, true: Truth, shape: Shape) -> dict[str, Tensor]:
    """The coder's tensors as a certificate holds them.

    Regions are clusters of normalised rows; a region's code is the crosscoder's for the mean of its
    contexts; then each context goes to the region whose decoded row is nearest.
    """
    count = max(2, len(true.label_N) // shape.contexts_each)
    cluster_N, _ = clustered(true.final_ND, count, config.seed)
    mean_PCD = _means(true.rows_PND, cluster_N, count)
    index, strength = encoded(features, mean_PCD, config.coder.active)
    decoder, bias = features.decoder_PFD.double(), features.bias_PD.double()
    centre = bias[-1] + (strength[..., None] * decoder[-1][index]).sum(1)
    centre = centre / centre.square().mean(1, keepdim=True).sqrt()
    region_N = nearest(true.final_ND, centre)
    delta = true.final_ND - centre[region_N]
    return {
        "decoder": decoder,
        "decoder_bias": bias,
        "index": index,
        "strength": strength,
        "region": region_N.reshape(config.sequences, config.length),
        "answers": _answers(true, region_N, count, min(shape.answers, config.vocabulary)),
        "basis": _directions(true, delta, min(shape.directions, config.width)),
    }


def _means(rows_PND: Tensor, cluster_N: Tensor, count: int) -> Tensor:
    size_C = torch.bincount(cluster_N, minlength=count).clamp_min(1)
    total = torch.zeros(len(rows_PND), count, rows_PND.shape[2]).double()
    return total.index_add_(1, cluster_N, rows_PND) / size_C[:, None]


def _answers(true: Truth, region_N: Tensor, count: int, answers: int) -> Tensor:
    """Of each region, those that the model finds likeliest on average."""
    mean_CV = torch.zeros(count, true.logits_NV.shape[1]).double()
    mean_CV.index_add_(0, region_N, true.logits_NV.softmax(1))
    return mean_CV.topk(answers).indices.contiguous()


def _directions(true: Truth, delta_ND: Tensor, count: int) -> Tensor:
    """Where rows differ from their region's, and logits from each other: the largest eigenvectors
    of both covariances' sum, each divided by its trace."""
    U_DV = true.unembed_DV - true.unembed_DV.mean(1, keepdim=True)
    parts = (delta_ND.T @ delta_ND, U_DV @ U_DV.T)
    both = parts[0] / parts[0].trace() + parts[1] / parts[1].trace()
    found: Tensor = torch.linalg.eigh(both).eigenvectors[:, -count:]
    return found.contiguous()


@dataclass(frozen=True)
class Candidate:
    """Hints, and what each position costs in loss by each tier."""

    shape: Shape
    coder: Mapping[str, Tensor]
    box_N: Tensor
    near_N: Tensor
    full_N: Tensor


def mixture(
    asked: Asked, found: Candidate, most: int
) -> tuple[dict[str, str], dict[str, Tensor], float] | None:
    """Tiers by group, the coder with its groups, and the mean loss, for at most `most` flops; None
    where not even the box fits.

    Sequences go by regions where that gains most, as many as fit; what is left of the budget when
    all do is spent on the positions whose bound is loosest, one by one.
    """
    S, T = asked.data["tokens"].shape
    gain_S = (found.box_N - torch.minimum(found.near_N, found.box_N)).reshape(S, T).sum(1)
    order_S = gain_S.argsort(descending=True)
    worst_N = (found.near_N.minimum(found.box_N) - found.full_N).argsort(descending=True)

    def group(sequences: int, full: int) -> Tensor:
        chosen = torch.full((S, T), BOX)
        chosen[order_S[:sequences]] = NEAR
        chosen.view(-1)[worst_N[:full]] = FULL
        return chosen

    if _cost(asked, found, group(0, 0)).flops > most:
        return None
    sequences = _largest(S, lambda n: _cost(asked, found, group(n, 0)).flops <= most)
    full = 0
    if sequences == S:
        full = _largest(S * T, lambda n: _cost(asked, found, group(S, n)).flops <= most)
    chosen = group(sequences, full)
    loss = torch.stack([found.box_N, found.near_N.minimum(found.box_N), found.full_N])
    mean = float(loss.gather(0, chosen.reshape(1, -1)).mean())
    return *as_groups(found.coder, chosen), mean


def as_groups(
    coder: Mapping[str, Tensor], chosen_ST: Tensor
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Tiers by group, and the coder with `group`, where groups nobody is in are left out."""
    used, group = torch.unique(chosen_ST, return_inverse=True)
    names = [list(TIER)[int(number)] for number in used]
    if len(names) == 1:
        return {"all": TIER[names[0]]}, dict(coder)
    return {name: TIER[name] for name in names}, {**coder, "group": group.contiguous()}


def _cost(asked: Asked, found: Candidate, chosen_ST: Tensor) -> Cost:
    tiers, coder = as_groups(found.coder, chosen_ST)
    size = {**asked.size, **sizes_of(found.coder)}
    mine = Asked(tiers=tiers, size=size, weights=asked.weights, coder=coder, data=asked.data)
    return family.cost_of(mine, family.planned(mine))


def sizes_of(coder: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes that hints bring."""
    (C, K), (_, A), (_, R) = (coder[name].shape for name in ("index", "answers", "basis"))
    return {"C": C, "K": K, "A": A, "R": R, "F": coder["decoder"].shape[1]}


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest n ≤ most that fits, where every smaller one does too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
