"""The section about interactions: it holds what was found, and says what is missing."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from crosslens.diffing.tables import load_table, save_table
from crosslens.explore import build, rewrite
from crosslens.explore import interact_plots as plots
from crosslens.explore.figures import number, percent
from crosslens.explore.interact_read import Interacted, read_interact
from crosslens.explore.interact_section import PARTNERS, partners, section
from crosslens.explore.interact_tables import GLOSSARY, TOP, metric_rows
from crosslens.explore.saved import Unreadable
from crosslens.interactions.pairs.kinds import KINDS
from crosslens.training import open_run
from tests.explore_interacted import CHANGES, SITES, change, leave, toy
from tests.explore_run import make_run
from tests.test_explore_report import Tags, unpacked


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder) -> Path:
    run = make_run(tmp_path_factory.mktemp("interacted"), tiny_model_folder, out="run")
    coder = build(run, tokens=2000).store.manifest.coder
    leave(toy(), run.folder, coder=coder)
    rewrite(run)
    return run.folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def page_of(run: Path) -> str:
    return (run / "report.html").read_text(encoding="utf-8")


def words(page: str) -> str:
    return " ".join(Tags(page).text.split())


def test_the_page_holds_what_interact_json_says(made):
    facts = json.loads((made / "interact" / "interact.json").read_text())
    page = page_of(made)
    text = words(page)
    for site, each in facts["sites"].items():
        told = (each["interaction_share"], each["output_share"], each["norm_mediated_share"])
        assert site in text
        for share in told:
            assert percent(share) in text
        kinds = ", ".join(
            f"{kind}: {percent(each['by_kind'][kind])}"
            for kind in sorted(each["by_kind"], key=plots.place_of)
            if each["by_kind"][kind]
        )
        assert any(a.get("aria-label") == kinds for tag, a in Tags(page).tags if tag == "svg")
    for each in facts["pairs"]["top"][:TOP]:
        assert number(each["strength"]) in text
    assert "12,345 pairs that meet" in text
    assert "10 have 1.23 %, 100 have 8.76 %, 1000 have 31.4 % of all interaction" in text
    assert "55.0 % of the whole is between latents, 15.0 % of the whole is with the biases" in text
    assert page.index('id="interact"') < page.index("<h2>Training</h2>")


def test_heads_clusters_effects_and_changes_are_told(run):
    change(run, changes=CHANGES, models=["base", "chat"], left_out={"screen": "for a reason"})
    rewrite(open_run(run))
    text = words(page_of(run))
    assert "Interactions: base, chat" in text
    # by variance × interaction: .2 × .6 is before .5 × .1
    assert text.index("L6.H1") < text.index("L6.H0")
    assert "60.0 % 55.0 % to 65.0 %" in text
    assert "25.0 %47.1 %" in text  # with error, binding
    assert "resid_mid.5: 7 clusters of 40 latents, modularity 0.512 (rewired: 0.234)" in text
    assert "between halves of the documents 0.345" in text
    assert "on 4,321 predictions. Mean size, nats: of the top 0.0321, at random 0.00123" in text
    assert "What changed between base and chat" in text
    assert "0.456 0.100 to 0.900" in text
    assert "of 2,345 pairs" in text
    assert "35.7 % of all change is by weights" in text
    assert "No screen: for a reason" in text


def test_every_figure_says_what_it_is_when_pointed_at(made):
    page = page_of(made)
    tags = Tags(page[page.index('id="interact"') : page.index("<h2>Training</h2>")]).tags
    told = {attributes["title"] for _, attributes in tags if attributes.get("title")}
    for word in ("interaction share", "strength", "frequency", "product", "sign", "spearman",
                 "coverage", "by kind", "bound"):  # fmt: skip
        assert GLOSSARY[word] in told, word


def test_latents_are_carried_and_link_to_their_cards(made):
    page = page_of(made)
    data = unpacked(page)
    found = read_interact(
        made, json.loads((made / "interact" / "interact.json").read_text())["coder"]
    )
    assert isinstance(found, Interacted)
    links = {int(h) for h in re.findall(r'class="latent" href="#latent=(\d+)"', page)}
    assert links == set(section(found).latents) & set(data["id"])
    assert links
    wanted = {int(t) for t in re.findall(r'data-tokens="(\d+)"', page)}
    assert wanted | {4, 9} == set(section(found).latents)  # those of heads stand alone
    assert data["interact"] == partners(found, data["id"])


def test_partners_are_the_strongest_of_each_latent():
    found = toy()
    pairs = found.pairs
    told = partners(found, range(48))
    for latent in range(48):
        own = [c for c in range(len(pairs["i"])) if latent in (pairs["i"][c], pairs["j"][c])]
        own.sort(key=lambda c: -pairs["product"][c])
        expected = [
            [int(pairs["i"][c] + pairs["j"][c] - latent), pairs["site"][c], pairs["kind"][c],
             pairs["strength"][c]]
            for c in own[:PARTNERS]
        ]  # fmt: skip
        assert told.get(str(latent), []) == expected
    assert set(partners(found, [3])) == {"3"}
    assert partners(Interacted({}, {}), [3]) == {}


def test_without_interactions_there_is_no_section(run):
    shutil.rmtree(run / "interact")
    rewrite(open_run(run))
    page = page_of(run)
    assert 'id="interact"' not in page
    assert "<h2>Interactions" not in page
    assert "interact" not in unpacked(page)


def test_parts_that_were_not_measured_are_absent(run):
    nothing = {"sites": {}, "prediction": {}, "attention": {}, "screen": []}
    change(run, **nothing, pairs=None, clusters=None, effects=None)
    rewrite(open_run(run))
    text = words(page_of(run))
    assert "Interactions" in text
    for word in ("Strongest pairs", "Strength and place", "What predicts", "seldom or never",
                 "Attention", "What changed", "clusters"):  # fmt: skip
        assert word not in text


def test_names_stay_text(run):
    hostile = "<img src=x>"
    found = toy()
    found.facts["pairs"]["top"][0]["kind"] = hostile
    coder = json.loads((run / "interact" / "interact.json").read_text())["coder"]
    prediction = {hostile: {"spearman": 0.5, "ci": None}}
    leave(found, run, coder=coder, prediction=prediction)
    rewrite(open_run(run))
    page = page_of(run)
    assert not [tag for tag, _ in Tags(page).tags if tag == "img"]
    assert hostile in words(page)


def spoil_json(folder: Path) -> None:
    path = folder / "interact.json"
    path.write_text(path.read_text()[:-20])


def lesser_table(folder: Path) -> None:
    columns = load_table(folder / "pairs.parquet")
    del columns["strength"]
    save_table(folder, "pairs", columns)


def shorter_table(folder: Path) -> None:
    columns = load_table(folder / "pairs.parquet")
    save_table(folder, "pairs", {name: column[1:] for name, column in columns.items()})


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (spoil_json, "damaged or not JSON"),
        (lambda folder: change(folder.parent, coder="0" * 64), "of another coder"),
        (lambda folder: change(folder.parent, tokens="many"), "it.tokens is 'many'"),
        (lambda folder: change(folder.parent, sites={"x": {}}), "it.sites.x lacks layer"),
        (lambda folder: (folder / "pairs.parquet").unlink(), "pairs.parquet is missing"),
        (lambda folder: (folder / "pairs.parquet").write_bytes(b"PAR1"), "missing or damaged"),
        (lesser_table, "lacks the column strength"),
        (shorter_table, "not of one measurement"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(run, spoil, told):
    coder = json.loads((run / "interact" / "interact.json").read_text())["coder"]
    spoil(run / "interact")
    found = read_interact(run, coder)
    assert isinstance(found, Unreadable)
    assert told in found.why
    assert found.why.endswith(f"`crosslens interact {run}` makes it anew.")
    rewrite(open_run(run))
    page = page_of(run)
    assert 'id="interact"' not in page
    assert " ".join(found.why.split()) in words(page)


# ── shapes ──


def test_every_kind_has_a_colour():
    assert set(KINDS) < set(plots.KINDS)
    css = (Path(plots.__file__).parent / "page" / "interact.css").read_text()
    for place in range(len(plots.KINDS)):
        assert f"--kind-{place}:" in css
        assert f".kind-{place} {{" in css
    assert plots.place_of("what nobody knows") == plots.place_of("mixed")


def test_a_bar_is_as_long_as_its_shares():
    shares = {"mixed": 0.25, "gating": 0.5, "conjunction": 0.25, "saturation": 0.0}
    bar = plots.stacked(shares)
    assert [each.kind for each in bar] == sorted(
        ["mixed", "gating", "conjunction"], key=plots.place_of
    )
    x = 0.0
    for each in bar:
        assert each.x == pytest.approx(x)
        assert each.wide == pytest.approx(plots.BAR * shares[each.kind])
        x += each.wide
    assert x == pytest.approx(plots.BAR)


def test_the_scatter_is_strength_against_place():
    found = toy()
    pairs = found.pairs
    pairs["strength"][7] = 0.0
    pairs["strength"][8] = math.nan
    top = found.facts["pairs"]["top"][:5]
    chart = plots.scatter(pairs, SITES, top)
    assert chart is not None
    inside = [c for c in range(len(pairs["i"])) if pairs["strength"][c] > 0]
    low, high = (f(pairs["strength"][inside]) for f in (np.min, np.max))

    def y(value: float) -> float:
        return plots.TALL * (1 - math.log(value / low) / math.log(high / low))

    assert sum(cloud.count for cloud in chart.clouds) == len(inside) == len(pairs["i"]) - 2
    column, lanes = plots.WIDE / 3, len(chart.clouds)
    for cloud in chart.clouds:
        mine = [c for c in inside if pairs["kind"][c] == cloud.kind]
        drawn = [tuple(map(float, d)) for d in re.findall(r"M([\d.]+),([\d.]+)h0", cloud.path)]
        assert len(drawn) == len(mine) == cloud.count
        lane = [each.kind for each in chart.clouds].index(cloud.kind)
        for c, (at_x, at_y) in zip(mine, drawn, strict=True):
            assert at_y == pytest.approx(y(pairs["strength"][c]), abs=0.06)
            within = at_x - column * SITES.index(pairs["site"][c])
            share = (within / column - 0.06) / 0.88 * lanes
            assert lane <= share <= lane + 1
    for mark, each in zip(chart.marks, top, strict=True):
        assert mark.latent == each["i"]
        assert mark.y == pytest.approx(y(each["strength"]))
        (cloud,) = [each for each in chart.clouds if each.place == mark.place]
        assert f"M{mark.x:.1f},{mark.y:.1f}h0" in cloud.path
        assert f"Latents {each['i']} and {each['j']} at {each['site']}" in mark.words
    assert [label for _, label in chart.ticks_x] == list(SITES)


def test_where_nothing_is_strong_there_is_no_scatter():
    found = toy()
    assert plots.scatter({**found.pairs, "strength": np.zeros(120)}, SITES, []) is None
    one = {"site": ["a"], "i": [1], "j": [2], "kind": ["gating"], "strength": [2.0]}
    chart = plots.scatter(one, ["a"], [])
    assert chart is not None
    assert f",{plots.TALL / 2:.1f}h0" in chart.clouds[0].path


def test_a_cloud_too_large_is_thinned_and_says_so():
    many = 4 * plots.DOTS
    pairs = {"site": ["a"] * many, "i": np.zeros(many), "j": np.arange(many)}
    pairs |= {"kind": ["gating"] * many, "strength": np.linspace(1, 2, many)}
    (cloud,) = plots.scatter(pairs, ["a"], []).clouds
    assert cloud.path.count("M") == plots.DOTS
    assert cloud.count == many


def test_predictions_are_told_the_best_first():
    rows = metric_rows(toy().facts["prediction"])
    assert [row.name for row in rows] == ["decoder cosine", "strength", "random"]
    assert (rows[1].figure, rows[1].ends) == ("0.610", "0.500 to 0.700")
    assert rows[1].drawn.x == pytest.approx(plots.REACH * 1.61 / 2)
    assert rows[1].drawn.whisker == f"M{plots.REACH * 0.75:.1f},0H{plots.REACH * 0.85:.1f}"
    assert rows[2].drawn.x is None
