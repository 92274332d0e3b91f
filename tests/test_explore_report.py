"""The report: one file, safe with any text, complete without anything that is missing."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from crosslens.errors import CrosslensError, UsageError
from crosslens.explore import build, figures, write_report
from crosslens.explore.payload import LEVELS, choose_latents
from crosslens.explore.report import render
from crosslens.training import Run, open_models, open_run
from tests.explore_run import FOREIGN, HOSTILE, make_run

EVALUATION = {
    "tokens": 900,
    "l0": 4.2,
    "dead": 0.25,
    "fvu": 0.31,
    "sites": {
        "resid_post.1": {"fvu": 0.4321, "explained_variance": 0.5},
        "resid_post.3": {"fvu": 1.7, "explained_variance": None},
    },
    "splice": {"resid_post.1": {"ce": 3.21, "recovered_mean": 0.87, "kl": math.nan}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder) -> Run:
    return make_run(tmp_path_factory.mktemp("report"), tiny_model_folder)


@pytest.fixture(scope="module")
def built(run):
    return build(run, tokens=2000)


@pytest.fixture(scope="module")
def page(built) -> str:
    return built.report.read_text(encoding="utf-8")


def unpacked(page: str) -> dict:
    packed = re.search(r'id="payload">([^<]*)</script>', page)
    assert packed
    return json.loads(gzip.decompress(base64.b64decode(packed[1])))


class Tags(HTMLParser):
    """All tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data


def test_no_text_becomes_markup(page):
    tags = Tags(page)
    assert not [tag for tag, _ in tags.tags if tag in ("img", "b>", "run", "iframe", "object")]
    assert not [a for _, attributes in tags.tags for a in attributes if a.startswith("on")]
    assert "a <run>" in tags.text
    assert page.count("</script>") == page.count("<script") == 2
    data = unpacked(page)
    text = "".join(data["pieces"][piece] for piece in data["text"] if piece >= 0)
    assert HOSTILE[:9] in text
    assert any("<b>" in name for name in data["documents"])


def test_the_page_asks_nothing_of_a_network(page):
    tags = Tags(page)
    addresses = [v for _, a in tags.tags for k, v in a.items() if k in ("src", "href") and v]
    assert all(address.startswith(("#", "data:")) for address in addresses)
    assert "url(" not in page
    assert "@import" not in page
    policy = next(a["content"] for _, a in tags.tags if a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")


def test_an_example_reads_as_its_document(built, page):
    data, store = unpacked(page), built.store
    assert data["id"] == store.alive_L.tolist()
    checked = 0
    for index, latent in enumerate(data["id"]):
        examples = list(store.examples_of(latent))
        assert len(examples) == len(data["examples"][index])
        for example, packed in zip(examples, data["examples"][index], strict=True):
            place, length, peak, section, value, repeats, row, document, pairs = packed
            pieces = [data["pieces"][p] for p in data["text"][place : place + length] if p >= 0]
            begin = example.position - peak
            block = store.vocabulary.pieces(store.blocks.tokens_NT[example.block].tolist())
            inside = [p.text for p in block if begin <= p.start < begin + length]
            assert pieces == inside
            assert (section, repeats) == (example.section, example.repeats)
            assert value == pytest.approx(example.value, rel=1e-3)
            assert divmod(row, 64) == (example.block, example.position)
            assert data["documents"][document] == example.document
            found = dict(zip(pairs[::2], pairs[1::2], strict=True))
            extra = length - len(example.token_ids)  # the window begins with a whole piece
            for offset, activation in enumerate(example.activations):
                level = found.get(offset + extra, 0)
                share = activation / store.statistics.max_L[latent]
                assert share * LEVELS - 0.1 <= level <= share * LEVELS + 1
                assert (level > 0) == (activation > 0)
            checked += 1
    assert checked > 100


def test_bytes_are_joined_into_characters(page):
    data = unpacked(page)
    text = "".join(data["pieces"][piece] for piece in data["text"] if piece >= 0)
    for character in FOREIGN.replace(" ", ""):
        assert character in text
    assert "�" not in text
    # only where a block begins or ends within a character are there bytes
    assert len(re.findall(r"(\\x[0-9A-F]{2})+", text)) <= 2 * 32


def test_labels_are_the_commonest_peaks(built, page):
    data, store = unpacked(page), built.store
    for index, latent in enumerate(data["id"]):
        peaks = []
        for example in store.examples_of(latent):
            if example.section == 0:
                row = store.blocks.tokens_NT[example.block].tolist()
                pieces = store.vocabulary.pieces(row)
                at = example.position
                peaks.append(next(p.text for p in pieces if p.start <= at < p.end))
        first = data["pieces"][data["label"][index][0]]
        assert peaks.count(first) == max(map(peaks.count, peaks))


def test_the_same_store_gives_the_same_page(run, built, page):
    assert render(run, built.store, None) == page


def test_what_is_missing_is_said_with_the_command_that_fills_it(page, run):
    tags = Tags(page)
    assert f"crosslens evaluate {run.folder}" in tags.text
    assert "recovered against" not in tags.text


def test_evaluation_fills_the_table(run, built):
    text = " ".join(Tags(render(run, built.store, EVALUATION)).text.split())
    assert "0.432" in text
    assert "1.70" in text
    assert "87.0 %" in text
    assert "3.21" in text
    assert "recovered against" in text
    assert "crosslens evaluate" not in text
    assert "norm ratio" not in text  # nobody measured it


def test_a_run_without_metrics_has_no_curves(run, built, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "metrics", lambda self: [])
    assert "No curves" in Tags(render(run, built.store, None)).text


def test_dead_latents_are_apart(run, built, page):
    dead = sorted(set(range(48)) - set(built.store.alive_L.tolist()))
    count_L = built.store.statistics.count_L.copy()
    count_L[[3, 11]] = 0
    store = replace(built.store, statistics=replace(built.store.statistics, count_L=count_L))
    text = Tags(render(run, store, None)).text
    assert f"{len({*dead, 3, 11})} dead latents" in text
    assert ", ".join(map(str, sorted({*dead, 3, 11}))) in text
    assert 3 not in unpacked(render(run, store, None))["id"]


def test_latents_are_chosen_for_strength_and_evenly_over_density(built):
    n = 400
    count_L = np.arange(n, dtype=np.int32)[::-1].copy()
    figures_ = replace(built.store.statistics, count_L=count_L,
                       max_L=np.linspace(1, 2, n, dtype=np.float32))  # fmt: skip
    store = replace(built.store, statistics=figures_, norm_LP=np.ones((n, 2), np.float32))
    assert choose_latents(store, 1000).tolist() == list(range(n - 1))  # the last is dead
    chosen = choose_latents(store, 80)
    assert len(chosen) == len(set(chosen.tolist())) == 80
    assert set(range(379, 399)) <= set(chosen.tolist())  # a quarter: the strongest
    others = np.setdiff1d(chosen, np.arange(379, 399))
    assert others[0] == 0
    assert others[-1] == 378
    assert np.diff(others).max() <= 8


def test_gathering_happens_once_per_coder_and_tokens(run, built):
    assert built.gathered
    assert not build(run, tokens=2000).gathered
    assert build(run, tokens=2000, refresh=True).gathered
    models = open_models(run.config())
    seen = []
    assert build(run, models, 1000, lambda done, total: seen.append((done, total))).gathered
    assert seen == [(n, len(seen)) for n in range(1, len(seen) + 1)]
    assert build(run, models, 2000).gathered  # and what the fixtures left is there again


def test_held_out_tokens_are_told_apart(built):
    known = built.store.manifest.provenance
    assert (known["blocks"], known["asked"]) == (32, 2000)
    assert known["heldout_blocks"] == 15
    assert known["step"] == 40


def test_refusals(run, built, tmp_path, tiny_model_folder):
    with pytest.raises(UsageError, match="--tokens"):
        build(run, tokens=0)
    (tmp_path / "run.json").write_text((run.folder / "run.json").read_text())
    with pytest.raises(CrosslensError, match="crosslens resume"):
        build(open_run(tmp_path))


def test_the_page_is_written_whole_or_not_at_all(run, built, monkeypatch):
    before = built.report.read_bytes()
    monkeypatch.setattr("crosslens.explore.report.packed", lambda value: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run, built.store, None)
    assert built.report.read_bytes() == before


def test_curves_leave_out_what_is_missing():
    metrics = [
        {"step": 10, "loss": 1.0, "fvu": 0.9, "l0": 30.0},
        {"step": 20, "loss": math.nan, "fvu": 0.09},
        {"step": 20, "heldout": {"fvu": 0.3, "dead": None}},
    ]
    found = {curve.title: curve for curve in figures.curves(metrics)}
    assert set(found) == {"FVU", "Loss", "L0"}
    train, heldout = found["FVU"].lines
    assert (train.kind, heldout.kind) == ("train", "heldout")
    assert train.points == ((140.0, pytest.approx(0)), (280.0, pytest.approx(figures.HEIGHT)))
    # halfway in the logarithm
    middle = math.log(0.9 / 0.3) / math.log(0.9 / 0.09)
    assert heldout.points[0][1] == pytest.approx(figures.HEIGHT * middle)
    assert found["FVU"].summary == (
        "FVU over 20 steps: training from 0.900 to 0.0900; held out from 0.300 to 0.300."
    )
    assert len(found["Loss"].lines[0].points) == 1


def test_density_bars_count_the_living(built):
    bars = figures.density_histogram(built.store)
    heights = [high for *_, high in bars.bars]
    most = int(bars.most)
    assert sum(round(h / figures.HEIGHT * most) for h in heights) == len(built.store.alive_L)


def test_the_strip_is_the_norms(built):
    store = replace(built.store, norm_LP=np.tile(np.array([[1.0, 4.0]], np.float32), (48, 1)))
    strip = figures.norm_strip(store)
    (first, n_first, _, cells), (second, n_second, share, _) = strip.rows
    assert (first, second) == store.manifest.sites
    assert (n_first, n_second, share) == (0, len(store.alive_L), 1.0)
    assert {v for _, _, v in cells} == {0.25}
    assert "1.0 of 2 sites" in strip.summary


def test_numbers_have_three_digits():
    values = [0.0, 0.5, 12.0, 1234.5, 0.000123, 123456789.0, math.nan, -0.0456]
    told = [figures.number(value) for value in values]
    assert told == ["0", "0.500", "12.0", "1234", "1.2e-4", "1.2e8", "–", "-0.0456"]


def test_hostile_text_is_in_the_text_that_is_shown(built):
    vocabulary = built.store.vocabulary
    blocks = [vocabulary.pieces(block) for block in built.store.blocks.tokens_NT.tolist()]
    assert any(HOSTILE in "".join(piece.text for piece in block) for block in blocks)
