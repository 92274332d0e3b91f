"""A term on the difference between two models."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crosslens import functional as F
from crosslens.coder import (
    Activation,
    Crosscoder,
    Dedicated,
    DesignatedShared,
    Pass,
    Wiring,
    WiringConfig,
)
from crosslens.errors import UsageError
from crosslens.training.objective.term import check_weight
from crosslens.training.schedule import Span


@dataclass(frozen=True, kw_only=True)
class Delta:
    """‖Δx − Δb − (W_B − W_A) z_Δ‖²: latents that are not shared explain by themselves how model B
    differs from model A (Delta-Crosscoder, 2603.04426).

    z_Δ is the code without its shared groups: tied ones, and those that write both models where
    other groups write one. Without such groups, as in a plain crosscoder, it is the whole code.
    """

    weight: float = 0.0
    ramp: Span = 0.0
    """Share of the run, or length, over which the weight rises linearly from 0."""
    normalize: bool = True
    """Divide by the variance of the whole target, as the reconstruction's term does, so that the
    ratio of their weights means the same with and without."""

    def __post_init__(self) -> None:
        check_weight(self, "objective.delta")

    def __call__(self, step: Pass) -> Tensor:
        coder = step.coder
        half = coder.wiring.write.width // 2
        rest_BY = step.target_BY - coder.b_dec
        runs = F.split_columns(step.code, [group.n_latents for group in coder.wiring.groups])
        for i in unshared_groups(coder.wiring):
            rest_BY = rest_BY - F.upcast(step.decode_run(runs[i], i))
        error = (rest_BY[:, half:] - rest_BY[:, :half]).square().sum(-1).mean()
        return error / F.variance(step.target_BY) if self.normalize else error

    def check(self, activation: Activation, wiring: WiringConfig) -> None:
        if not isinstance(wiring, Crosscoder | Dedicated | DesignatedShared):
            raise UsageError(
                "objective.delta compares what is written to two models: it needs the wiring "
                f"crosscoder, dedicated or designatedshared, found {type(wiring).__name__}."
            )

    def check_wiring(self, wiring: Wiring) -> None:
        first, second = model_halves(wiring)
        if wiring.write.pick(first).widths != wiring.write.pick(second).widths:
            raise UsageError(
                "objective.delta subtracts one model's activations from the other's, and their "
                "widths differ."
            )


def model_halves(wiring: Wiring) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The sites written of the first model and of the second, which are the same places."""
    sites = wiring.write.sites
    half = len(sites) // 2
    first, second = sites[:half], sites[half:]
    names = [{site.rpartition("/")[0] for site in part} for part in (first, second)]
    places = [[site.rpartition("/")[2] for site in part] for part in (first, second)]
    if not (len(names[0]) == len(names[1]) == 1) or places[0] != places[1] or names[0] == names[1]:
        raise UsageError(
            f"objective.delta needs two models with the same sites; written are {', '.join(sites)}."
        )
    return first, second


def unshared_groups(wiring: Wiring) -> tuple[int, ...]:
    """Numbers of the groups of latents that may tell the models apart."""
    whole = set(wiring.write.sites)
    some_exclusive = any(set(group.writes) != whole for group in wiring.groups)
    return tuple(
        i
        for i, group in enumerate(wiring.groups)
        if group.copies == 1 and not (some_exclusive and set(group.writes) == whole)
    )
