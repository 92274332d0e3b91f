"""The complete configuration of one training. The command line and YAML files fill the same."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from crosslens.activations import Scale, TokenPolicy
from crosslens.coder import (
    Activation,
    BatchTopK,
    Bias,
    Crosscoder,
    InitConfig,
    JumpReLU,
    ReLU,
    Transpose,
    WiringConfig,
)
from crosslens.coder.activations import check_fits
from crosslens.config import kind_of
from crosslens.device import resolve_dtype
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec
from crosslens.text import TextConfig
from crosslens.training.objective import Objective
from crosslens.training.optimizers import Adam, OptimizerConfig, SignSGD
from crosslens.training.schedule import check_fits_run, length_in_steps, share_of_run


@dataclass(frozen=True, kw_only=True)
class CoderConfig:
    """The shape of the coder and how it starts."""

    latents: int = 4096
    activation: Activation = BatchTopK()
    init: InitConfig = Transpose(decoder_norm=0.4)
    """How encoder and decoder directions are drawn."""
    bias: Bias = "mean"
    """Start with the data's mean (or geometric median) in the decoder bias and taken out of the
    encoder's, or at 0."""
    scale: Scale = "root_width"
    """What sites are scaled to: a mean norm of √d, or a mean squared norm of 1 (`unit_square`, as
    DeepMind's thresholds and penalties are stated)."""
    center: bool = False
    """Subtract the decoder bias from the input before encoding."""
    firing_rate: float | None = None
    """Start with encoder biases such that each latent fires on this share of a sample of rows."""
    shared_start: float = 0.0
    """Share of the latents that start with the same weights for both models."""
    zero_decoder: bool = False
    """Start with no latent writing anything: a skip does all there is, and latents add to it."""
    unit_norm: bool = False
    """Hold each latent's decoder, over all sites, at norm 1."""

    def __post_init__(self) -> None:
        if self.latents < 1:
            raise UsageError(f"coder.latents must be at least 1, found {self.latents}.")
        check_fits(self.activation, self.latents)
        self._check_start()

    def _check_start(self) -> None:
        if self.firing_rate is not None:
            if not 0 < self.firing_rate < 1:
                raise UsageError(f"coder.firing_rate is in (0, 1), found {self.firing_rate}.")
            if not isinstance(self.activation, ReLU | JumpReLU):
                raise UsageError(
                    "coder.firing_rate needs coder.activation relu or jumprelu: with "
                    f"{kind_of(type(self.activation))} it is k that says how many latents fire."
                )
        if not 0 <= self.shared_start <= 1:
            raise UsageError(f"coder.shared_start is a share in [0, 1], found {self.shared_start}.")
        if self.zero_decoder and (self.unit_norm or isinstance(self.activation, BatchTopK)):
            raise UsageError(
                "coder.zero_decoder cannot go with coder.unit_norm, nor with a BatchTopK, which "
                "ranks latents by their decoder's norm: none would ever fire."
            )


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """The loop."""

    steps: int = 600
    batch: int = 2048
    """Rows per step."""
    dtype: str = "bfloat16"
    """Format of the large products; the weights themselves are float32."""
    sparse_below: float | None = None
    """Share of a code's entries that are not zero, below which a step holds and multiplies those
    only; None: as is fastest on this machine (`crosslens doctor --calibrate`); 0: never."""
    device: str = "auto"
    dead_after: int = 60_000
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
    resample_every: int = 0
    """Steps between fresh starts of dead latents on rows that are badly reconstructed; 0: never."""

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
        if self.sparse_below is not None and self.sparse_below < 0:
            raise UsageError(
                "fit.sparse_below is a share of a code's entries, or 0 for never, found "
                f"{self.sparse_below}."
            )
        if self.resample_every < 0:
            raise UsageError(
                f"fit.resample_every is a number of steps, or 0, found {self.resample_every}."
            )
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
    optimizer: OptimizerConfig = Adam()
    fit: FitConfig = FitConfig()
    align: bool = False
    """Pair models with different tokenizers by their decoded text: rows are the tokens of the first
    model at whose end every other model has a token that ends there too."""
    shuffle_models: bool = False
    """Two models exchange their activations on a random half of the tokens, everywhere in this run.
    What a diff finds then, it finds where there is nothing to find."""
    seed: int = 0
    start: str | None = None
    """Folder of a coder (or of a finished run) to go on from, scales included, instead of drawing
    weights: same wiring and activation, sites of the same widths. The schedule begins anew."""

    def __post_init__(self) -> None:
        if not self.models:
            raise UsageError("Name at least one model: --models.base.path PATH.")
        if not self.sites:
            raise UsageError("Name at least one site: --sites 'resid_post.*'.")
        self.objective.check(self.coder.activation, self.wiring)
        self._check_schedules()
        if self.coder.unit_norm and isinstance(self.optimizer, SignSGD):
            raise UsageError(
                "coder.unit_norm cannot go with optimizer signsgd, which averages weights: use "
                "--optimizer adam or muon."
            )
        if self.coder.shared_start and len(self.models) != 2:
            raise UsageError(
                f"coder.shared_start is for two models; there are {len(self.models)}: "
                f"{', '.join(self.models)}."
            )
        if self.shuffle_models and len(self.models) != 2:
            raise UsageError(
                "shuffle_models exchanges the activations of two models; there are "
                f"{len(self.models)}: {', '.join(self.models)}."
            )

    def _check_schedules(self) -> None:
        steps, batch = self.fit.steps, self.fit.batch
        warmup = length_in_steps(self.optimizer.warmup, batch, "optimizer.warmup")
        check_fits_run(warmup, steps, "optimizer.warmup", self.optimizer.warmup)
        share_of_run(self.optimizer.decay, steps, batch, "optimizer.decay")
        if self.fit.resample_every:
            every = self.fit.resample_every
            check_fits_run(every, steps, "fit.resample_every", every)
        self.objective_in_shares()

    def objective_in_shares(self) -> Objective:
        """The objective with every ramp told as a share of this run.

        Raises:
            UsageError: a ramp is longer than the run.
        """
        changed = {}
        for part in fields(self.objective):
            term = getattr(self.objective, part.name)
            if isinstance(term.ramp, str):
                name = f"objective.{part.name}.ramp"
                share = share_of_run(term.ramp, self.fit.steps, self.fit.batch, name)
                changed[part.name] = replace(term, ramp=share)
        return replace(self.objective, **changed)
