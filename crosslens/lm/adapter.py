"""PEFT adapters, put on a model without merging them into its weights."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from pathlib import Path

from torch import nn

from crosslens.errors import CrosslensError, UsageError, suggestion
from crosslens.lm.adapter_base import RECORD
from crosslens.lm.loading import quiet_transformers, short
from crosslens.lm.source import from_hub

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SHIPPED = Path(__file__).parent / "adapters"


def built_in_adapters() -> dict[str, Path]:
    """Name -> folder of the adapters that come with the package, for the built-in model."""
    return {config.parent.name: config.parent for config in sorted(_SHIPPED.glob(f"*/{_CONFIG}"))}


def with_adapter(model: nn.Module, path: str) -> nn.Module:
    """The same Hugging Face model, with a PEFT adapter's layers inside its own.

    Args:
        model: the base model the adapter was trained on.
        path: folder of the adapter, else the name of a built-in one, else a hub id.

    Raises:
        UsageError: peft is not installed, there is no such adapter, or it does not fit the model.
        CrosslensError: the adapter cannot be fetched or is damaged.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            f"Opening the adapter {path!r} needs peft, which is not installed. "
            "Run `pip install 'crosslens[diff]'`."
        )
    folder = adapter_folder(path)
    _refuse_other_kinds(folder)
    return _attached(model, folder)


def leaves_weights_alone(path: str) -> bool:
    """Whether putting the adapter on writes into none of the model's own weights.

    True of plain LoRA. Others may bring embeddings or biases of their own, or start by taking their
    part out of the model's matrices (PiSSA, OLoRA, LoftQ). An adapter that cannot be read is not
    known to: `with_adapter` says what is wrong with it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        folder = adapter_folder(path)
        settings = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            only_lora = all(".lora_" in key for key in file.keys())  # noqa: SIM118  # no mapping
        plain_start = settings.get("init_lora_weights", True) in (True, False, "gaussian")
        return only_lora and plain_start and not settings.get("target_parameters")
    except (CrosslensError, SafetensorError, OSError, ValueError, AttributeError):
        return False


def sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of a model in modules of its own, whose weights are the same tensors."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def adapter_folder(path: str) -> Path:
    """Where an adapter lies: a folder, else a built-in one, else what a hub has; complete.

    Raises:
        UsageError: there is no such adapter, or it is not saved as safetensors.
        CrosslensError: it cannot be fetched.
    """
    local = Path(path).expanduser()
    folder = local if local.exists() else built_in_adapters().get(path) or _fetched(path)
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            raise UsageError(
                f"{path} is not a PEFT adapter saved as safetensors: it has no {file}. (Pickled "
                "adapters are refused, because opening them can run code.)"
            )
    return folder


def _fetched(path: str) -> Path:
    try:
        return from_hub(path, None, [_CONFIG, _WEIGHTS, RECORD])
    except CrosslensError as error:
        names = built_in_adapters()
        raise type(error)(
            f"{error} As an adapter, {path!r} is none of the built-in ones either: "
            f"{', '.join(names)}.{suggestion(path, names)}"
        ) from error


def _refuse_other_kinds(folder: Path) -> None:
    """Prompt tuning and the like change the model's input, not its layers."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        kind = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CrosslensError(f"{folder / _CONFIG} is damaged: {error!r}.") from error
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind)
    if known is None or known().is_prompt_learning:
        raise UsageError(
            f"The adapter {folder} is of the kind {kind}, which is not made of layers inside the "
            "model. Adapters such as LoRA can be opened."
        )


def _attached(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            saved = set(file.keys())
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say about missing keys is checked below
            # Without autocast the adapter computes in the model's own dtype.
            adapted = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
            # Else peft asks a hub whether the embeddings have grown.
            expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    except (ValueError, RuntimeError) as error:  # no target module found; shapes differ
        raise UsageError(
            f"The adapter {folder} does not fit {type(model).__name__}: {short(error)} Is it for "
            "another base model?"
        ) from error
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CrosslensError(f"The adapter {folder} is damaged: {short(error)}") from error
    _check_complete(folder, model, saved, expected)
    base: nn.Module = adapted.get_base_model()
    return base


def _check_complete(folder: Path, model: nn.Module, saved: set[str], expected: set[str]) -> None:
    """Every adapter weight found its place, and every place its weight."""
    homeless = {key for key in saved - expected if ".lora_" in key}
    empty = expected - saved
    if homeless or empty:
        some = sorted(homeless or empty)[0]
        what = "has weights for layers that are not there" if homeless else "lacks weights"
        raise UsageError(
            f"The adapter {folder} does not fit {type(model).__name__}: it {what} (such as {some})."
            " Is it for another base model?"
        )
