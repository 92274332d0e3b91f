"""What a crosscoder should be compared with: simpler ways to find what differs, on the same tokens.

Each gives a `Baseline`, which `judged` judges by the conditions of `diffing.planted`.
"""

from crosslens.diffing.baselines.baseline import Baseline, judged
from crosslens.diffing.baselines.diff_sae import diff_sae, diff_sae_config
from crosslens.diffing.baselines.mean_difference import Task, mean_difference, steering
from crosslens.diffing.baselines.moments import Moments, moments
from crosslens.diffing.baselines.pca import pca
from crosslens.diffing.baselines.place import Place, places
from crosslens.diffing.baselines.stagewise import StagewisePlan, stagewise, train_stages
from crosslens.diffing.baselines.token_kl import TokenKL, read_kl, token_kl

__all__ = [
    "Baseline",
    "Moments",
    "Place",
    "StagewisePlan",
    "Task",
    "TokenKL",
    "diff_sae",
    "diff_sae_config",
    "judged",
    "mean_difference",
    "moments",
    "pca",
    "places",
    "read_kl",
    "stagewise",
    "steering",
    "token_kl",
    "train_stages",
]
