"""Pairs of which one model has no chat template: which is taken, and what is said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from crosslens.cli import main
from crosslens.lm import LanguageModel, ModelSpec, open_model
from crosslens.text import Blocks
from crosslens.training.chat import template_told, text_tokenizer
from tests.test_cli_diff import flags
from tests.test_organisms import TEMPLATE
from tests.test_training_aligned import other_bytes

CHAT = ["--text.corpora.main.source", "stdlib-chat"]


@pytest.fixture(scope="module")
def talking(tmp_path_factory, tiny_pair) -> dict[str, Path]:
    """The tiny pair; the second one's tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(tiny_pair["chat"], folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {"base": tiny_pair["base"], "chat": folder}


def blocks_of(folder: Path) -> list[list[int]]:
    return Blocks.load(folder / "data", "train").tokens_NT.tolist()


@pytest.mark.parametrize("first", ["base", "chat"])
def test_both_read_what_the_one_template_writes_and_it_is_said(talking, tmp_path, capsys, first):
    order = [first, *(name for name in talking if name != first)]
    models = {name: talking[name] for name in order}
    loud = [flag for flag in flags(models, tmp_path / "run") if flag != "--quiet"]
    assert main(["train", *loud, *CHAT]) == 0
    said = "no chat template: base; where text is chat, all models read it as chat's template"
    assert said in capsys.readouterr().err
    alone = {"base": talking["chat"]}
    assert main(["train", *flags(alone, tmp_path / "alone"), *CHAT]) == 0
    assert blocks_of(tmp_path / "run") == blocks_of(tmp_path / "alone")


def test_where_none_has_one_it_is_refused(tiny_pair, tmp_path, capsys):
    assert main(["train", *flags(tiny_pair, tmp_path / "run"), *CHAT]) == 2
    assert "no chat template (base models often have none)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def opened(talking) -> dict[str, LanguageModel]:
    specs = {n: ModelSpec(path=str(p), dtype="float32", device="cpu") for n, p in talking.items()}
    return {name: open_model(spec) for name, spec in specs.items()}


def test_a_tokenizer_is_lent_its_template_only(opened):
    base, chat = opened["base"], opened["chat"]
    assert text_tokenizer({"base": base}) is base.tokenizer
    assert text_tokenizer({"chat": chat, "base": base}) is chat.tokenizer
    lent = text_tokenizer({"base": base, "chat": chat})
    assert lent.chat_template == TEMPLATE
    assert lent.bos_token_id == base.tokenizer.bos_token_id
    assert not base.tokenizer.chat_template, "the model's own is as it was"


def test_nothing_is_said_or_lent_where_it_makes_no_difference(opened):
    base, chat = opened["base"], opened["chat"]
    for models in ({"base": base}, {"a": base, "b": base}, {"a": chat, "b": chat}):
        assert template_told(models) is None
    tokenizer = other_bytes()
    tokenizer.chat_template = TEMPLATE
    foreign = replace(chat, tokenizer=tokenizer)
    assert text_tokenizer({"base": base, "foreign": foreign}) is base.tokenizer
    assert template_told({"base": base, "foreign": foreign}) is None
