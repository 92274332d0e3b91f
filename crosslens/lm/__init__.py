"""Open a language model; read its activations at named sites; run it with some replaced."""

from __future__ import annotations

from crosslens.lm.losses import next_token_loss
from crosslens.lm.model import LanguageModel
from crosslens.lm.opening import open_model, open_models, open_tokenizer
from crosslens.lm.sites import split_site
from crosslens.lm.spec import ModelSpec
from crosslens.lm.tokenizer import tokenizer_hash

__all__ = [
    "LanguageModel",
    "ModelSpec",
    "next_token_loss",
    "open_model",
    "open_models",
    "open_tokenizer",
    "split_site",
    "tokenizer_hash",
]
