"""By which model's template chat becomes text, where not all models have one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from crosslens.activations import other_tokenizers
from crosslens.lm import LanguageModel


def text_tokenizer(models: Mapping[str, LanguageModel]) -> Any:
    """The first model's tokenizer, by which text is cut into blocks.

    If it has no chat template it gets that of the first model that has one and cuts text alike: a
    base model is told what its chat version is told.
    """
    own = next(iter(models.values())).tokenizer
    lender = _lender(models)
    if own.chat_template or lender is None:
        return own
    lent = copy.copy(own)
    lent.chat_template = models[lender].tokenizer.chat_template
    return lent


def template_told(models: Mapping[str, LanguageModel]) -> str | None:
    """What a person should know where some models have no chat template; None where all have one,
    none has, or chat cannot be formatted."""
    without = [name for name, model in models.items() if not model.tokenizer.chat_template]
    lender = _lender(models)
    if not without or lender is None:
        return None
    return (
        f"no chat template: {', '.join(without)}; where text is chat, all models read it as "
        f"{lender}'s template writes it"
    )


def _lender(models: Mapping[str, LanguageModel]) -> str | None:
    """The first model with a chat template, of those that cut text as the first one does."""
    others = other_tokenizers(models)
    alike = (name for name in models if name not in others)
    return next((name for name in alike if models[name].tokenizer.chat_template), None)
