"""Training: what is minimised, the loop, what is kept on disk."""

from crosslens.training.config import CoderConfig, FitConfig, TrainConfig
from crosslens.training.objective import (
    L0,
    AuxK,
    Delta,
    GatedAux,
    GatedL1,
    Interaction,
    Matryoshka,
    MultiTopK,
    NormL1,
    Objective,
    PAnneal,
    PreAct,
    QuadraticTanh,
    Recon,
    Tanh,
)
from crosslens.training.optimizers import Adam, Muon, OptimizerConfig, SignSGD
from crosslens.training.run import Run, create_run, open_run, refuse_taken
from crosslens.training.train import open_models, run_source, silent, train

__all__ = [
    "L0",
    "Adam",
    "AuxK",
    "CoderConfig",
    "Delta",
    "FitConfig",
    "GatedAux",
    "GatedL1",
    "Interaction",
    "Matryoshka",
    "MultiTopK",
    "Muon",
    "NormL1",
    "Objective",
    "OptimizerConfig",
    "PAnneal",
    "PreAct",
    "QuadraticTanh",
    "Recon",
    "Run",
    "SignSGD",
    "Tanh",
    "TrainConfig",
    "create_run",
    "open_models",
    "open_run",
    "refuse_taken",
    "run_source",
    "silent",
    "train",
]
