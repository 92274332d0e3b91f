"""The complete configuration of one training. The command line and YAML files fill the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from crosslens.activations import TokenPolicy
from crosslens.coder import Activation, BatchTopK, Crosscoder, WiringConfig
from crosslens.coder.activations import check_fits
from crosslens.device import resolve_dtype
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec
from crosslens.text import TextConfig
from crosslens.training.objective import Objective


@dataclass(frozen=True, kw_only=True)
class CoderConfig:
    """The shape of the coder and how it starts."""

    latents: int = 4096
    activation: Activation = BatchTopK()
    decoder_norm: float = 0.1
    """Initial norm of each latent's decoder at each site."""
    bias: Literal["mean", "zero"] = "mean"
    """Start with the data's mean in the decoder bias and taken out of the encoder's, or at 0."""
    center: bool = False
    """Subtract the decoder bias from the input before encoding."""

    def __post_init__(self) -> None:
        if self.latents < 1:
            raise UsageError(f"coder.latents must be at least 1, found {self.latents}.")
        if self.decoder_norm <= 0:
            raise UsageError(f"coder.decoder_norm must be positive, found {self.decoder_norm}.")
        check_fits(self.activation, self.latents)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Adam with warm-up, a flat stretch, and linear decay to 0."""

    lr: float = 8e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    """As in Gao et al. 2024: rare latents have gradients far below Adam's usual 1e-8."""
    warmup: int = 20
    """Steps of linear warm-up."""
    decay: float = 0.2
    """Share of the run, at its end, over which the rate falls linearly to 0."""
    clip: float = 1.0
    """Gradients beyond this norm are scaled down to it."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip <= 0 or self.eps <= 0:
            raise UsageError("optimizer.lr, clip and eps must be positive.")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise UsageError("optimizer.beta1 and beta2 must be in [0, 1).")
        if self.warmup < 0 or not 0 <= self.decay <= 1:
            raise UsageError("optimizer.warmup must be ≥ 0 and decay a share in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The loop."""

    steps: int = 600
    batch: int = 2048
    """Rows per step."""
    dtype: str = "bfloat16"
    """Format of the large products; the weights themselves are float32."""
    device: str = "auto"
    dead_after: int = 200_000
    """A latent that has not fired for so many rows is dead."""
    buffer_gb: float = 2.5
    """Memory for shuffling activations. Text that fits is harvested once."""
    harvest_tokens: int = 2048
    """Positions that go through the models in one forward pass."""
    calibration_tokens: int = 8192
    """Positions that estimate each site's norm before training."""
    log_every: int = 10
    heldout_every: int = 50
    """Steps between measurements on held-out rows."""
    heldout_rows: int = 4096
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "log_every",
            "heldout_every",
            "checkpoint_every",
            "harvest_tokens",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"fit.{name} must be at least 1, found {getattr(self, name)}.")
        resolve_dtype(self.dtype)
        if self.buffer_gb <= 0:
            raise UsageError(f"fit.buffer_gb must be positive, found {self.buffer_gb}.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a sparse coder on the activations of one model or several."""

    models: dict[str, ModelSpec] = field(default_factory=lambda: {"base": ModelSpec()})
    sites: tuple[str, ...] = (
        "resid_mid.5",
        "resid_mid.10",
        "resid_mid.15",
        "resid_mid.20",
        "resid_mid.25",
    )
    """Sites to read and write: names or globs such as `resid_post.*`."""
    wiring: WiringConfig = Crosscoder()
    """Which latents read and write which of the sites."""
    text: TextConfig = TextConfig()
    policy: TokenPolicy = TokenPolicy()
    coder: CoderConfig = CoderConfig()
    objective: Objective = Objective()
    optimizer: OptimizerConfig = OptimizerConfig()
    fit: FitConfig = FitConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("Name at least one model: --models.base.path PATH.")
        if not self.sites:
            raise UsageError("Name at least one site: --sites 'resid_post.*'.")
        if self.optimizer.warmup > self.fit.steps:
            raise UsageError(
                f"optimizer.warmup ({self.optimizer.warmup}) is longer than the run "
                f"({self.fit.steps} steps)."
            )
