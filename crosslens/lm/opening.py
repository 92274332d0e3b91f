"""Open a language model or only its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crosslens.device import resolve_device, resolve_dtype
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm.adapter import (
    adapter_folder,
    leaves_weights_alone,
    sharing_weights,
    with_adapter,
)
from crosslens.lm.adapter_base import Base, check_base, weights_hash
from crosslens.lm.anatomy import find_anatomy
from crosslens.lm.loading import load_causal_lm, load_tokenizer, quiet_transformers, short
from crosslens.lm.model import LanguageModel
from crosslens.lm.source import Source, locate
from crosslens.lm.spec import ModelSpec


def open_model(spec: ModelSpec, name: str = "base") -> LanguageModel:
    """The model named by `spec`, in eval mode with frozen parameters, ready to capture from.

    Args:
        spec: where it comes from.
        name: what it is called in site names, as in `chat/resid_post.12`.

    Raises:
        UsageError: no such model, or something that is not a causal language model.
        CrosslensError: it cannot be fetched, is damaged, or is built in a way not understood.
    """
    return open_models({name: spec})[name]


def open_models(specs: Mapping[str, ModelSpec]) -> dict[str, LanguageModel]:
    """The models named by `specs`, each as `open_model` gives it.

    Those that differ in nothing but their adapters share the tokenizer and, where an adapter allows
    it, the weights beneath: a model and a LoRA fine-tune of it take little more room than one.
    """
    trunks: dict[ModelSpec, _Trunk] = {}
    return {name: _open(spec, name, trunks) for name, spec in specs.items()}


@dataclass(frozen=True, eq=False)
class _Trunk:
    """A model without adapters, opened as far as it is needed."""

    spec: ModelSpec

    @cached_property
    def source(self) -> Source:
        return locate(self.spec)

    @cached_property
    def tokenizer(self) -> Any:
        return _load_tokenizer(self.source.folder)

    @cached_property
    def module(self) -> nn.Module:
        return self.load()

    def load(self) -> nn.Module:
        """Its weights, read anew."""
        device, dtype = resolve_device(self.spec.device), resolve_dtype(self.spec.dtype)
        return _ready(_load_module(self.source.folder, dtype), device)

    def with_adapter(self, path: str) -> nn.Module:
        beneath = sharing_weights(self.module) if leaves_weights_alone(path) else self.load()
        weights = weights_hash(beneath)  # now: an adapter renames them, and may write into them
        adapted = with_adapter(beneath, path)
        base = Base(path=self.spec.path, revision=self.source.revision, weights=weights)
        check_base(path, adapter_folder(path), base)
        return _ready(adapted, resolve_device(self.spec.device))


def _open(spec: ModelSpec, name: str, trunks: dict[ModelSpec, _Trunk]) -> LanguageModel:
    plain = replace(spec, adapter=None)
    trunk = trunks.setdefault(plain, _Trunk(plain))
    module = trunk.module if spec.adapter is None else trunk.with_adapter(spec.adapter)
    with quiet_transformers():
        anatomy = find_anatomy(module)
    return LanguageModel(name, spec, module, trunk.tokenizer, anatomy, trunk.source.revision)


def _ready(module: nn.Module, device: torch.device) -> nn.Module:
    return module.to(device).eval().requires_grad_(False)


def open_tokenizer(spec: ModelSpec) -> Any:
    """The model's Hugging Face tokenizer, without loading weights.

    Raises:
        UsageError: no such model, or none with a tokenizer.
        CrosslensError: it cannot be fetched or is damaged.
    """
    return _load_tokenizer(locate(spec).folder)


def _load_module(folder: Path, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError

    _check_causal(folder)
    try:
        return load_causal_lm(folder, dtype=dtype)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CrosslensError(
            f"The weights in {folder} could not be loaded: {short(error)} The files may be "
            "damaged or incomplete; fetch or copy them again."
        ) from error


def _check_causal(folder: Path) -> None:
    """A config of an architecture that transformers knows and that predicts the next token."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UsageError(
            f"{folder / 'config.json'} describes no model that this version of transformers knows: "
            f"{short(error)}"
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"The model in {folder} is a {config.model_type!r}, which is not a causal language "
            "model. crosslens reads decoder-only models."
        )


def _load_tokenizer(folder: Path) -> Any:
    try:
        return load_tokenizer(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"No tokenizer could be loaded from {folder}: {short(error)} A model folder needs its "
            "tokenizer files too (tokenizer.json)."
        ) from error
