"""The objective: terms, and the one place where they are summed."""

from crosslens.training.objective.delta import Delta
from crosslens.training.objective.interaction import Beside, Interaction
from crosslens.training.objective.objective import Objective
from crosslens.training.objective.reconstruction import AuxK, Matryoshka, MultiTopK, Recon
from crosslens.training.objective.sparsity import NormL1, PAnneal, QuadraticTanh, Tanh
from crosslens.training.objective.term import Norm, Term, weight_at
from crosslens.training.objective.threshold import L0, GatedAux, GatedL1, PreAct

__all__ = [
    "L0",
    "AuxK",
    "Beside",
    "Delta",
    "GatedAux",
    "GatedL1",
    "Interaction",
    "Matryoshka",
    "MultiTopK",
    "Norm",
    "NormL1",
    "Objective",
    "PAnneal",
    "PreAct",
    "QuadraticTanh",
    "Recon",
    "Tanh",
    "Term",
    "weight_at",
]
