"""Judge a coder: reconstruction, sparsity, and the model's loss with it spliced in."""

from crosslens.evaluation.evaluate import Evaluation, evaluate
from crosslens.evaluation.reconstruction import Reconstruction, SiteFigures, reconstruction
from crosslens.evaluation.splice import SpliceFigures, kl_divergence, splice

__all__ = [
    "Evaluation",
    "Reconstruction",
    "SiteFigures",
    "SpliceFigures",
    "evaluate",
    "kl_divergence",
    "reconstruction",
    "splice",
]
