"""Training: what is minimised, the loop, what is kept on disk."""

from crosslens.training.config import CoderConfig, FitConfig, OptimizerConfig, TrainConfig
from crosslens.training.objective import AuxK, NormL1, Objective, Recon
from crosslens.training.run import Run, create_run, open_run, refuse_taken
from crosslens.training.train import open_models, run_source, silent, train

__all__ = [
    "AuxK",
    "CoderConfig",
    "FitConfig",
    "NormL1",
    "Objective",
    "OptimizerConfig",
    "Recon",
    "Run",
    "TrainConfig",
    "create_run",
    "open_models",
    "open_run",
    "refuse_taken",
    "run_source",
    "silent",
    "train",
]
