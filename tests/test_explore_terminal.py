"""A latent in the terminal, and the commands `show` and `report`."""

from __future__ import annotations

import json
import re

import pytest
from rich.cells import cell_len

from crosslens.cli import main, report, show
from crosslens.cli.show import terminal_style
from crosslens.errors import CrosslensError, UsageError
from crosslens.explore import build
from crosslens.explore.terminal import Style, described, harmless, plain
from crosslens.training import Run
from tests.explore_run import make_run

PLAIN = Style(color=False, width=90)
COLOUR = Style(color=True, width=90)
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model_folder) -> Run:
    return make_run(tmp_path_factory.mktemp("terminal"), tiny_model_folder, out="run")


@pytest.fixture(scope="module")
def store(run):
    return build(run, tokens=2000).store


@pytest.fixture(scope="module")
def latent(store) -> int:
    return int(store.statistics.count_L.argmax())


def lines_with_text(text: str) -> list[str]:
    return [line for line in text.split("\n") if "«" in line]


def test_without_colour_the_peak_is_marked_at_one_column(store, latent):
    text = described(store, latent, 6, PLAIN)
    assert "\x1b" not in text
    lines = lines_with_text(text)
    found = list(store.examples_of(latent))
    top = min(6, sum(e.section == 0 for e in found))
    assert len(lines) >= top > 2
    assert len({cell_len(line[: line.index("«")]) for line in lines}) == 1
    for line, example in zip(lines[:top], found, strict=False):
        assert float(line.split()[0]) == pytest.approx(example.value, rel=5e-3)
        pieces = store.vocabulary.pieces(example.token_ids)
        peak = next(p.text for p in pieces if p.start <= example.peak < p.end)
        assert peak.strip() in line[line.index("«") : line.index("»")]


def test_with_colour_the_text_is_the_same_and_fits(store, latent):
    text = described(store, latent, 6, COLOUR)
    bare = ANSI.sub("", text)
    assert bare == described(store, latent, 6, PLAIN).replace("«", "").replace("»", "")
    assert text.count("\x1b[1;4m") == len(lines_with_text(described(store, latent, 6, PLAIN)))
    assert all(cell_len(line) <= 90 + 6 for line in bare.split("\n") if not line.startswith("  "))


def test_the_strongest_token_has_the_end_of_the_ramp(store, latent):
    assert "\x1b[48;2;144;82;17m" in described(store, latent, 1, COLOUR)
    assert "\x1b[48;2;252;158;71m" in described(store, latent, 1, Style(color=True, light=True))


def test_figures_are_told(store, latent):
    text = described(store, latent, 0, PLAIN)
    assert f"latent {latent} of 48" in text
    assert f"{store.statistics.count_L[latent]:,} of {store.manifest.tokens:,} tokens" in text
    assert re.search(r"resid_post\.1 +█+ +0?\.?\d", text)
    assert "promotes directly, from resid_post.3" in text
    assert lines_with_text(text) == []


def test_no_token_can_command_the_terminal():
    assert harmless("a\x1b[31m\x07é🙂\u202e\u2028") == "a\\x1b[31m\\x07é🙂\\u202e\\u2028"


def test_a_dead_latent_is_one_sentence(store):
    dead = next((i for i in range(48) if not store.statistics.count_L[i]), None)
    store.statistics.count_L[5 if dead is None else dead] = 0
    text = described(store, 5 if dead is None else dead, 5, PLAIN)
    assert text.count("\n") == 1
    assert "is dead" in text


def test_json_holds_the_same(store, latent, run, capsys):
    assert show.run([str(run.folder), str(latent), "--json", "--examples", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(plain(store, latent, 3)))
    first = found["examples"][0]
    assert first["pieces"][first["peak"]][1] == pytest.approx(found["max"], rel=1e-3)
    assert set(found["norms"]) == {"resid_post.1", "resid_post.3"}
    assert len(found["top"]) == len(found["bottom"]) == 10


def test_show_needs_a_store_and_a_latent_that_exists(run, store, tmp_path, capsys):
    (tmp_path / "run.json").write_text((run.folder / "run.json").read_text())
    with pytest.raises(CrosslensError, match="crosslens report"):
        show.run([str(tmp_path), "3"])
    with pytest.raises(UsageError, match="numbered 0 to 47"):
        show.run([str(run.folder), "48"])
    with pytest.raises(UsageError, match="--examples"):
        show.run([str(run.folder), "3", "--examples", "-1"])
    assert main(["show", str(run.folder), "x"]) == 2
    assert "latent" in capsys.readouterr().err.lower()


def test_show_says_when_the_coder_has_moved_on(run, store, latent, capsys, monkeypatch):
    monkeypatch.setattr(Run, "summary", lambda self: {"steps": 99})
    assert show.run([str(run.folder), str(latent)]) == 0
    told = capsys.readouterr()
    assert "step 40" in told.err
    assert "step 99" in told.err
    assert f"latent {latent} of 48" in told.out


def test_report_prints_where_it_is(run, store, capsys):
    assert report.run([str(run.folder), "--tokens", "2000", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(run.folder / "report.html")
    assert found["gathered"] is False
    assert found["latents"] == 48
    assert report.run([str(run.folder), "--tokens", "2000", "--quiet"]) == 0
    assert str(run.folder / "report.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "environment", "style"),
    [
        (True, {}, (True, False)),
        (False, {}, (False, False)),
        (True, {"NO_COLOR": "1"}, (False, False)),
        (True, {"NO_COLOR": ""}, (True, False)),
        (True, {"TERM": "dumb"}, (False, False)),
        (True, {"COLORFGBG": "0;15"}, (True, True)),
        (True, {"COLORFGBG": "15;0"}, (True, False)),
    ],
)
def test_colour_depends_on_who_looks(wanted, environment, style):
    found = terminal_style(wanted, environment)
    assert (found.color, found.light) == style
