"""What is minimised: a weighted sum of terms, summed in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from torch import Tensor

from crosslens import functional as F
from crosslens.coder import Pass
from crosslens.errors import UsageError


@runtime_checkable
class Term(Protocol):
    """One summand: its weight over the run, and its value for one pass."""

    @property
    def weight(self) -> float: ...

    @property
    def ramp(self) -> float: ...

    def __call__(self, step: Pass) -> Tensor: ...


def _check(term: Term) -> None:
    name = type(term).__name__
    if term.weight < 0:
        raise UsageError(f"{name}'s weight must not be negative, found {term.weight}.")
    if not 0 <= term.ramp <= 1:
        raise UsageError(f"{name}'s ramp is a share of the run in [0, 1], found {term.ramp}.")


@dataclass(frozen=True, kw_only=True)
class Recon:
    """Squared error of the reconstruction, summed over sites, averaged over rows."""

    weight: float = 1.0
    ramp: float = 0.0
    """Share of the run over which the weight rises linearly from 0."""
    normalize: bool = True
    """Divide by the batch's variance, so that the term is the FVU."""

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: Pass) -> Tensor:
        error = F.squared_error(step.target_BY, step.recon_BY)
        return error / F.variance(step.target_BY) if self.normalize else error


@dataclass(frozen=True, kw_only=True)
class NormL1:
    """Σ_l f_l Σ_s ‖W_dec[l, s]‖ (Anthropic, October 2024)."""

    weight: float = 0.0
    ramp: float = 0.05
    """Share of the run over which the weight rises linearly from 0."""

    def __post_init__(self) -> None:
        _check(self)

    def __call__(self, step: Pass) -> Tensor:
        return F.l1_of_norms(step.z_BL.float(), step.coder.decoder_norms())


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """Dead latents explain what the live ones leave (Gao et al. 2024, section A.2).

    The residual is detached and decoded without the bias, so that only dead latents learn.
    """

    weight: float = 1 / 32
    ramp: float = 0.0
    """Share of the run over which the weight rises linearly from 0."""
    k: int = 128
    """Dead latents used per row, at most."""

    def __post_init__(self) -> None:
        _check(self)
        if self.k < 1:
            raise UsageError(f"AuxK's k must be at least 1, found {self.k}.")

    def __call__(self, step: Pass) -> Tensor:
        if step.dead_L is None:
            return step.recon_BY.new_zeros(())
        dead = step.dead_L.nonzero().squeeze(-1)
        if not len(dead):
            return step.recon_BY.new_zeros(())
        code_BD = F.topk(step.pre_BL[:, dead], min(self.k, len(dead)))
        error_BY = (step.target_BY - step.recon_BY).detach()
        return F.residual_error(error_BY, step.coder.decode_scaled(code_BD, dead).float())


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The terms; a weight of 0 switches one off."""

    recon: Recon = Recon()
    l1: NormL1 = NormL1()
    aux: AuxK = AuxK()

    def __call__(self, step: Pass) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and each term's unweighted value: what is logged is what is trained."""
        loss = step.recon_BY.new_zeros(())
        parts = {}
        for field in fields(self):
            term: Term = getattr(self, field.name)
            if term.weight == 0:
                continue
            value = term(step)
            loss = loss + weight_at(term, step.progress) * value
            parts[field.name] = value.detach()
        return loss, parts


def weight_at(term: Term, progress: float) -> float:
    """The term's weight when `progress` of the run is done."""
    return term.weight * (min(1.0, progress / term.ramp) if term.ramp > 0 else 1.0)
