"""`crosslens interact` as its users call it: what it prints, what it leaves, how it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosslens.cli import main
from crosslens.cli.interact import table
from crosslens.coder import coder_hash, load
from crosslens.diffing.tables import load_table
from crosslens.explore import rewrite
from crosslens.interactions.neurons.exact import interactions
from crosslens.training import open_models, open_run, run_source
from crosslens.training.run import first_blocks
from tests.test_cli_commands import refused
from tests.test_cli_diff import flags as pair_flags

QUICK = ["--tokens", "900", "--quiet"]


def flags(folder: Path, out: Path, *changed: str) -> list[str]:
    plain = pair_flags({"base": folder}, out)
    at = plain.index("--sites")
    return [*plain[:at], "--sites", "resid_mid.1", "resid_post.2", *plain[at + 3 :], *changed]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model_folder) -> Path:
    out = tmp_path_factory.mktemp("interact") / "tiny"
    assert main(["train", *flags(tiny_model_folder, out)]) == 0
    return out


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("measured") / "tiny"
    shutil.copytree(trained, out)
    assert main(["report", str(out), "--tokens", "900", "--quiet"]) == 0
    assert main(["interact", str(out), "--top", "7", *QUICK]) == 0
    return out, json.loads((out / "interact" / "interact.json").read_text())


def test_json_has_the_documented_shape(measured):
    out, found = measured
    assert {"tokens", "sites", "pairs", "prediction", "attention"} <= set(found)
    assert found["coder"] == coder_hash(load(out))
    assert set(found["sites"]) == {"resid_mid.1", "resid_post.2"}
    for each in found["sites"].values():
        assert {"interaction_share", "by_kind", "norm_mediated_share", "error_share"} <= set(each)
        assert sum(each["by_kind"].values()) == pytest.approx(1)
    assert {"measured", "top", "coverage"} <= set(found["pairs"])
    assert set(found["pairs"]["coverage"]) == {"10", "100", "1000"}
    assert len(found["pairs"]["top"]) == 7
    for each in found["pairs"]["top"]:
        assert {"i", "j", "site", "strength", "frequency", "sign", "ci"} <= set(each)
    assert found["prediction"]
    for each in found["prediction"].values():
        assert set(each) == {"spearman", "ci"}
    assert found["attention"]
    assert found["left_out"] == {}


def test_figures_are_the_librarys(measured):
    out, found = measured
    run = open_run(out)
    models = open_models(run.config())
    blocks, _ = first_blocks(run.blocks("heldout"), run.blocks("train"), 900)
    alone = interactions(run_source(run, models, blocks), load(out), models["base"])
    for site, each in alone.items():
        assert found["tokens"] == each.tokens
        told = found["sites"][site]
        assert told["interaction_share"] == pytest.approx(each.interaction_share, rel=1e-6)
        assert told["error_share"] == pytest.approx(each.error_share, rel=1e-6)
        low, high = told["ci"]
        assert low <= told["interaction_share"] <= high


def test_tables_agree_with_the_json(measured):
    out, found = measured
    pairs = load_table(out / "interact" / "pairs.parquet")
    assert len(pairs["i"]) == found["pairs"]["candidates"]
    order = np.argsort(-pairs["product"], kind="stable")[:7]
    told = [(each["i"], each["j"], each["site"], each["kind"]) for each in found["pairs"]["top"]]
    columns = zip(*(pairs[name][order] for name in ("i", "j", "site", "kind")), strict=True)
    assert told == list(columns)
    for name in ("neurons", "documents", "clusters", "effects", "attention", "screen"):
        assert len(load_table(out / "interact" / f"{name}.parquet")) > 2
        assert (out / "interact" / f"{name}.csv").is_file()


def test_no_figure_is_not_a_number(measured):
    def check(value: object) -> None:
        if isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                check(each)
        elif isinstance(value, float):
            assert math.isfinite(value)

    check(measured[1])


def test_it_is_the_same_again(measured, capsys):
    out, found = measured
    capsys.readouterr()
    assert main(["interact", str(out), "--top", "7", "--json", *QUICK[:2]]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_the_report_shows_it(measured):
    out, found = measured
    assert rewrite(open_run(out))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="interact"' in page
    for each in found["pairs"]["top"]:
        assert f'data-tokens="{each["i"]}"' in page


def test_words_for_people(trained, tmp_path, capsys):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["interact", str(out), "--parts", "effects", *QUICK]) == 0
    told = capsys.readouterr().out
    for word in ("resid_mid.1", "pairs met", "strength", "what predicts", "interact.json",
                 f"crosslens report {out}"):  # fmt: skip
        assert word in told


def test_sites_and_parts_are_chosen(trained, tmp_path, capsys):
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    capsys.readouterr()
    argv = ["interact", str(out), "--json", *QUICK[:2]]
    assert main([*argv, "--sites", "resid_m*", "--parts", "mlp"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["sites"]) == {"resid_mid.1"}
    assert found["attention"] == found["prediction"] == {}
    assert main([*argv, "--sites", "resid_mid.1,resid_post.2", "--parts", "mlp"]) == 0
    assert len(json.loads(capsys.readouterr().out)["sites"]) == 2
    assert main([*argv, "--parts", "attention"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["sites"], found["pairs"]) == ({}, None)
    assert found["attention"]


def test_of_two_models_what_changed_is_told(tmp_path, tiny_pair, capsys):
    out = tmp_path / "pair"
    assert main(["train", *pair_flags(tiny_pair, out)]) == 0
    capsys.readouterr()
    argv = ["interact", str(out), "--json", *QUICK[:2]]
    assert main([*argv, "--parts", "mlp,changes"]) == 0
    found = json.loads(capsys.readouterr().out)
    places = ("resid_post.1", "resid_post.2")
    assert set(found["sites"]) == {f"{m}/{place}" for m in ("base", "chat") for place in places}
    assert found["changes"]["triplets"] > 0
    words = table(found)
    assert "changed most between base and chat" in words
    first = found["changes"]["most"][0]
    assert re.search(rf"{first['i']}[* ] +{first['j']}[* ]  {first['sites'][-1]} ", words)
    assert found["models"] == ["base", "chat"]
    assert main([*argv, "--parts", "mlp,changes", "--model", "chat"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["sites"]) == {f"chat/{place}" for place in places}
    assert found["changes"] is None
    refused(capsys, ["interact", str(out), "--model", "chta"], 2, "chta", "Did you mean chat")
