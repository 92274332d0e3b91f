"""The training step's benchmark: its roofline, its figures, and a small run of it all."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import train_step
from benchmarks.arena import Contestant, Result
from benchmarks.page import page, write_page
from benchmarks.peers import PEERS
from benchmarks.roofline import COPIED, roofline
from benchmarks.task import SHAPES, Shape, Task, read_task

ALMOST = pytest.approx


def test_the_roofline_by_hand():
    # 10 rows of 2 × 3 = 6, 100 latents, 5 active; 1,306 parameters.
    shape = Shape(sites=2, width=3, latents=100, k=5, batch=10)
    assert shape.parameters == 6 * 100 + 100 * 6 + 100 + 6
    least = roofline(shape, flop_per_s=1000.0, bytes_per_s=100.0)
    assert least.encoder == ALMOST(2 * 10 * 6 * 100 / 1000)  # 12 s
    assert least.sparse == ALMOST(4 * 10 * 5 * 6 * 2 / 100)  # 24 s
    assert least.optimizer == ALMOST(1306 * 28 / 100)  # 365.68 s
    assert least.tokens_per_s == ALMOST(10 / 401.68)


def test_the_roofline_of_the_first_shape():
    """0.121 s for the product, 0.074 for the gathers, 0.065 for Adam, on the machine that the
    project was planned on (1.6 TFLOP/s, 41 GB/s)."""
    assert roofline(SHAPES["wide"], 1.6e12, 41e9).tokens_per_s == ALMOST(7900, rel=0.01)


def test_a_task_survives_the_way_to_its_worker():
    task = Task(entry="benchmarks.ours", setting="float32", shape=SHAPES["pair"], folder="x")
    assert read_task(task.to_json()) == task


def test_rows_are_the_same_for_all_and_exact_in_bfloat16():
    task = Task(entry="", setting="", shape=Shape(sites=2, width=3, latents=4, k=1, batch=5))
    rows = task.rows()
    assert rows.shape == (5, 6)
    assert rows.equal(task.rows())
    assert rows.equal(rows.bfloat16().float())


def results_of(ours, peer, product, copy):
    """Results with these seconds; a peer may have a reason instead."""
    float32 = Contestant(name="crosslens", setting="float32", entry="", pace=2)
    peers = Contestant(name="sparsify", setting="float32", entry="")
    lost = Result(reason=peer) if isinstance(peer, str) else Result(seconds=peer, peak_bytes=7)
    return {
        train_step.PRODUCT: Result(seconds=product),
        train_step.COPY: Result(seconds=copy),
        train_step.OURS: Result(seconds=ours, peak_bytes=5),
        float32: Result(seconds=[9.0]),
        peers: lost,
    }


SMALL = Shape(sites=2, width=3, latents=100, k=5, batch=12)


def test_the_figures_of_a_shape():
    results = results_of([2.0, 3.0, 1.0], [24.0], [0.5], [1.0, 4.0, 2.0])
    found = train_step.summary(SMALL, results, ["sparsify", "crosscode"])
    assert found["crosslens"]["bfloat16"] == {"median": 6.0, "least": 4.0, "most": 12.0, "steps": 3}
    assert found["peers"]["sparsify"]["float32"]["median"] == 0.5
    assert found["times_fastest_peer"] == ALMOST(12.0)
    assert found["roofline_from"]["flop_per_s"] == ALMOST(2 * 12 * 6 * 100 / 0.5)
    assert found["roofline_from"]["copy_bytes_per_s"] == ALMOST(2 * COPIED / 2.0)
    assert found["fraction_of_roofline"] == ALMOST(6.0 / found["roofline"])
    assert found["peak_bytes"]["crosslens"]["bfloat16"] == 5
    assert found["peak_bytes"]["sparsify"]["float32"] == 7
    assert "--crosscode" in found["peers"]["crosscode"]["reason"]


def test_figures_where_nothing_can_be_compared():
    results = results_of([2.0], "it has no CPU path", [], [])
    found = train_step.summary(SMALL, results, ["sparsify"])
    assert found["peers"]["sparsify"]["float32"] == {"reason": "it has no CPU path"}
    assert found["times_fastest_peer"] is None
    assert found["roofline"] is None
    assert found["fraction_of_roofline"] is None
    assert "it has no CPU path" in train_step.table(found)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--shapes", "demo,wyde"], "wyde is none of demo, wide, pair, tall"),
        (["--peers", "saelens"], "saelens is none of sae_lens"),
        (["--crosscode", "."], "holds no crosscode/models/acausal_crosscoder.py"),
    ],
)
def test_what_is_not_known_is_refused(argv, told, capsys):
    with pytest.raises(SystemExit) as refusal:
        train_step.parse(argv)
    assert refusal.value.code == 2
    assert told in capsys.readouterr().err


def test_crosscode_takes_part_where_its_folder_is_named(tmp_path):
    (tmp_path / "crosscode" / "models").mkdir(parents=True)
    (tmp_path / train_step.CROSSCODE_HAS).touch()
    asked = train_step.parse(["--crosscode", str(tmp_path), "--peers", "crosscode"])
    found = [each for each in train_step.lineup(asked) if each.name == "crosscode"]
    assert [each.setting for each in found] == list(PEERS["crosscode"])
    assert all(each.folder == str(tmp_path) for each in found)


@pytest.fixture(scope="module")
def small_run():
    """Everything at a tiny shape, with a peer that is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PEERS, "absent", ("float32",))
        argv = ["--repeats", "1", "--peers", "absent,crosscode"]
        asked = train_step.parse([*argv, "--peers-python", sys.executable])
        return train_step.measure(SMALL, asked)


def test_a_small_run(small_run):
    assert {
        "crosslens",
        "peers",
        "roofline",
        "fraction_of_roofline",
        "peak_bytes",
    } <= small_run.keys()
    for dtype in ("bfloat16", "float32"):
        rate = small_run["crosslens"][dtype]
        assert 0 < rate["least"] <= rate["median"] <= rate["most"]
        assert small_run["peak_bytes"]["crosslens"][dtype] > 0
    assert small_run["roofline"] > 0
    json.dumps(small_run)


def test_a_peer_that_is_missing_is_told_of(small_run):
    reason = small_run["peers"]["absent"]["float32"]["reason"]
    assert reason.startswith("ModuleNotFoundError: No module named")
    assert "--peers-python" in reason
    assert "not on the package index" in small_run["peers"]["crosscode"]["reason"]


def test_it_goes_on_the_page(small_run, tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", SMALL)
    step = {"shapes": {"tiny": small_run}, "command": ["python", "it"], "minutes": 1.0}
    facts = {
        "cpu": "A CPU",
        "usable_cores": 2,
        "flags": ["avx2"],
        "memory_gb": 8,
        "system": "Linux",
        "python": "3",
    }
    found = {"machine": facts, "benchmarks": {"train_step": step, "harvest": {"reason": "broken"}}}
    write_page(tmp_path, found)
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    text = (tmp_path / "bench.md").read_text()
    assert text == page(found)
    rate = small_run["crosslens"]["bfloat16"]["median"]
    assert f"| crosslens | bfloat16 | {rate:,.0f} |" in text
    assert "| absent | float32 | ModuleNotFoundError" in text
    assert "Not measured: broken." in text
