"""Make an organism: sample, train, save, open again, judge."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from crosslens import __version__
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec, open_model
from crosslens.lm.adapter_base import RECORD, weights_hash
from crosslens.organisms.judging import ANSWER_TOKENS, judged
from crosslens.organisms.plan import OrganismPlan, Report, silent
from crosslens.organisms.rows import fingerprint, seeded, training_rows
from crosslens.organisms.tuning import train, with_lora
from crosslens.storage import load_json, replace_folder, save_json, save_tensors
from crosslens.text.planted import Behaviour, behaviour_named


def make(
    name: str, spec: ModelSpec, folder: Path, plan: OrganismPlan, report: Report = silent
) -> dict[str, Any]:
    """Plant a behaviour in a model and leave the PEFT adapter with all that is known of it.

    What is judged is the adapter as saved, in bfloat16, opened as a user opens it. The same plan,
    model, Python and machine give the same adapter.

    Args:
        name: of the behaviour, one of `BEHAVIOURS`.
        spec: the model to plant it in, without an adapter.
        folder: to make; it must not be there, or be empty.

    Returns:
        The content of the folder's organism.json.

    Raises:
        UsageError: no such behaviour, a taken folder, no peft, or a model that cannot take it.
        Diverged: the loss is not finite.
    """
    behaviour = behaviour_named(name)
    _check(spec, folder)
    base = open_model(spec)
    rows = training_rows(base, behaviour, plan, report)
    report("judging the base model", 0, 0)
    before = judged(base, behaviour, plan.heldout)
    identity = base.identity() | {"weights": weights_hash(base.module)}
    with seeded(plan.seed, base.device):
        adapted = with_lora(base.module, plan)
    losses = train(adapted, rows, plan, report)
    with _arriving(folder) as temporary:
        save_adapter(adapted, spec, temporary)
        report("judging the organism", 0, 0)
        organism = open_model(replace(spec, adapter=str(temporary)))
        after = judged(organism, behaviour, plan.heldout)
        facts = _facts(behaviour, identity, plan) | {
            "data": {"rows": len(rows), "fingerprint": fingerprint(rows)},
            "losses": [round(loss, 5) for loss in losses],
            "measured": {
                "prompts": plan.heldout,
                "answer_tokens": ANSWER_TOKENS,
                "base": before,
                "organism": after,
            },
        }
        save_json(temporary / RECORD, facts)
    return dict(load_json(folder / RECORD))


@contextmanager
def _arriving(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` once the block is through."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    above = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield above / folder.name
        replace_folder(above / folder.name, folder)
    finally:
        shutil.rmtree(above, ignore_errors=True)


def save_adapter(adapted: Any, spec: ModelSpec, folder: Path) -> None:
    """Write a PEFT model's adapter as PEFT does, in bfloat16, with no local path in it."""
    from peft import get_peft_model_state_dict

    # Else peft asks a hub whether the embeddings have grown.
    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    save_tensors(
        folder / "adapter_model.safetensors",
        {name: weight.to(torch.bfloat16) for name, weight in weights.items()},
    )
    settings = adapted.peft_config["default"].to_dict()
    local = Path(spec.path).expanduser().exists()
    settings["base_model_name_or_path"] = None if local else spec.path
    settings["inference_mode"] = True
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    save_json(folder / "adapter_config.json", dict(sorted(plain.items())))


def _check(spec: ModelSpec, folder: Path) -> None:
    if spec.adapter is not None:
        raise UsageError(
            f"An organism is made from a model without an adapter; {spec.adapter!r} was given."
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UsageError(f"{folder} is taken. Give another folder, or remove that one.")
    if importlib.util.find_spec("peft") is None:
        raise UsageError(
            "Making an organism needs peft, which is not installed. "
            "Run `pip install 'crosslens[diff]'`."
        )


def _facts(behaviour: Behaviour, base: Mapping[str, object], plan: OrganismPlan) -> dict[str, Any]:
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {
        "format": 1,
        "behaviour": asdict(behaviour),
        "plan": asdict(plan),
        "base": dict(base),
        "made_with": {"crosslens": __version__, "python": platform.python_version(), **libraries},
    }
