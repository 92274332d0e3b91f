"""`crosslens prove local`, what it leaves, and the section of the report that shows it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from crosslens.cli.prove_local import run_local
from crosslens.errors import UsageError
from crosslens.explore import build
from crosslens.explore.build import rewrite
from crosslens.explore.figures import HEIGHT, WIDTH, number
from crosslens.explore.prove_plots import climb, place_of, plane
from crosslens.explore.prove_read import Proved, read_prove
from crosslens.explore.prove_section import section
from crosslens.storage import save_json
from crosslens.training import open_run
from tests.proofs_local_run import make_local_run
from tests.test_explore_report import Tags


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A run with a store, proved once; its stdout beside it."""
    run = make_local_run(
        tmp_path_factory.mktemp("local"), tiny_model_folder, "resid_mid.1", "resid_mid.2"
    )
    build(run, tokens=1500)
    assert run_local([str(run.folder), "--tokens", "40", "--keep", "--quiet"]) == 0
    return run.folder


@pytest.fixture
def proved(made: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def facts_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "prove" / "local.json").read_text())


def words(page: str) -> str:
    return " ".join(Tags(page).text.split())


def test_the_figures_are_sound_and_whole(made: Path) -> None:
    facts = facts_of(made)
    assert [site["site"] for site in facts["sites"]] == ["resid_mid.1", "resid_mid.2"]
    assert facts["tokens"] == 40
    for site in facts["sites"]:
        assert site["checked"] is True
        for tier in (*site["tiers"], site["transition"], site["coder"]):
            assert tier["bound"] >= tier["true"] * (1 - 1e-12)
        for tier in site["tiers"]:
            assert tier["ratio"] == pytest.approx(tier["bound"] / site["output"])
        assert site["estimate"]["is_bound"] is False
    steps = facts["recursion"]["steps"]
    assert steps[0]["after"] == 0.0
    assert all(step["after"] >= step["true"] * (1 - 1e-6) for step in steps)


def test_a_kept_certificate_is_accepted_by_prove_check(made: Path, capsys) -> None:
    from crosslens.cli import main

    for site in ("resid_mid.1", "resid_mid.2"):
        assert main(["prove", "check", str(made / "prove" / site)]) == 0
        assert "accepted: " in capsys.readouterr().out


def test_json_is_one_object_and_the_same_again(proved: Path, capsys) -> None:
    argv = [str(proved), "--tokens", "40", "--json"]
    assert run_local(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first = json.loads(out)
    assert first.keys() >= {"coder", "model", "tokens", "tier", "sites", "recursion"}
    assert run_local(argv) == 0
    assert json.loads(capsys.readouterr().out) == first


def test_people_read_a_table(proved: Path, capsys) -> None:
    assert run_local([str(proved), "--tokens", "24", "--quiet", "--no-recursion"]) == 0
    out = capsys.readouterr().out
    facts = facts_of(proved)
    assert facts["recursion"] is None
    for tier in facts["sites"][0]["tiers"]:
        assert tier["name"] in out
    assert "checked" in out
    assert "report.html" in out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--tokens", "0"], "at least 1"),
        (["--tier", "linear/exakt"], "linear/exact"),
        (["--model", "chat"], "the models base"),
    ],
)
def test_a_wrong_command_says_what_to_do(proved: Path, more: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        run_local([str(proved), *more, "--quiet"])


def test_the_page_holds_what_local_json_says(made: Path) -> None:
    facts = facts_of(made)
    page = (made / "report.html").read_text(encoding="utf-8")
    text = words(page)
    assert "Proofs: base" in text
    for site in facts["sites"]:
        for tier in site["tiers"]:
            assert f"{number(tier['ratio'])} {number(tier['true_ratio'])}" in text
        estimated = site["estimate"]["interaction"]["linear"]
        assert number(estimated) in text
        assert site["claim"] in text
    assert "An average-case estimate, never a bound" in text
    assert number(facts["recursion"]["loss"]) in text
    labels = [a["aria-label"] or "" for t, a in Tags(page).tags if t == "svg" and "aria-label" in a]
    assert sum("Bound against cost at" in label for label in labels) == 2
    assert sum("Error by recursion" in label for label in labels) == 1
    assert page.index('id="prove"') < page.index("<h2>Training</h2>")


def test_the_plane_has_every_tier_within_it(made: Path) -> None:
    for site in facts_of(made)["sites"]:
        found = plane(site)
        assert len(found.dots) == 2 * len(site["tiers"])
        for dot in found.dots:
            assert 0 <= dot.x <= WIDTH
            assert 0 <= dot.y <= HEIGHT
        whole = [dot for dot in found.dots if dot.kind == "whole"]
        tiers = {tier["name"]: tier for tier in site["tiers"]}
        for dot in whole:
            own = tiers[dot.words.split(":")[0]]
            assert dot.place == place_of(own["name"])
            for other in whole:
                least = tiers[other.words.split(":")[0]]["bound"]
                assert (dot.y - other.y) * (least - own["bound"]) >= -1e-9  # higher is looser
        assert 0 < found.brute_x <= WIDTH
        assert found.ticks_x
        assert found.ticks_y


def test_the_climb_has_every_step(made: Path) -> None:
    facts = facts_of(made)["recursion"]
    found = climb(facts)
    assert found.certified.count(",") == len(facts["steps"])
    assert len(found.sites) == 2
    heights = [float(point.split(",")[1]) for point in found.certified[1:].split("L")]
    assert heights == sorted(heights, reverse=True)  # the error only grows
    assert math.isfinite(sum(heights))


def test_the_section_tells_a_refused_certificate(made: Path) -> None:
    facts = facts_of(made)
    assert section(Proved(facts)).refused == ()
    facts["sites"][0]["checked"] = False
    facts["recursion"] = {"left_out": "no sites"}
    found = section(Proved(facts))
    assert found.refused == ("resid_mid.1",)
    assert found.climb is None
    assert found.no_climb == "no sites"
    rows = [row for _, _, rows in found.groups for row in rows]
    assert len(rows) == len(facts["sites"][0]["tiers"])


SPOILT = {
    "another coder": (lambda f: f | {"coder": "c0de"}, "another coder"),
    "no sites": (lambda f: f | {"sites": []}, "no site"),
    "a hole": (lambda f: {k: v for k, v in f.items() if k != "tokens"}, "lacks tokens"),
    "no steps": (lambda f: f | {"recursion": f["recursion"] | {"steps": []}}, "no steps"),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_is_damaged_is_said_and_the_page_stands(proved: Path, fault: str) -> None:
    change, why = SPOILT[fault]
    save_json(proved / "prove" / "local.json", change(facts_of(proved)))
    assert rewrite(open_run(proved)) is not None
    text = words((proved / "report.html").read_text(encoding="utf-8"))
    assert why in text
    assert "prove local" in text
    assert "Layer by layer" not in text


def test_without_proofs_the_page_says_nothing_of_them(proved: Path) -> None:
    shutil.rmtree(proved / "prove")
    assert read_prove(proved, "c") is None
    assert rewrite(open_run(proved)) is not None
    assert 'id="prove"' not in (proved / "report.html").read_text(encoding="utf-8")
