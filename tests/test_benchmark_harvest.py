"""The harvest benchmark: everybody reads the same activations; ratios are told turn by turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import harvest
from benchmarks.arena import Result
from benchmarks.harvesters import Job, crosslens, plain
from benchmarks.task import Task
from crosslens.lm import ModelSpec

SITES = ["resid_mid.1", "resid_post.2"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_model_folder) -> Path:
    folder = tmp_path_factory.mktemp("job")
    spec = ModelSpec(path=str(tiny_model_folder), dtype="bfloat16", device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harvest, "BLOCK", 32)
        patch.setattr(harvest, "CHUNKS", 2)
        harvest.prepare(folder, spec, SITES)
    return folder


class Enough(Exception):
    """As many steps as were wanted."""


def steps(train, folder: Path, wanted: int) -> None:
    left = iter(range(wanted))

    def tick() -> None:
        if next(left, None) is None:
            raise Enough

    task = Task(entry="", setting="bfloat16", shape=harvest.A_CHUNK, folder=str(folder))
    with pytest.raises(Enough):
        train(task, tick)


def test_the_job_says_what_everybody_reads(prepared, tiny_model_folder):
    job = Job.read(str(prepared))
    assert job.model == str(tiny_model_folder)
    assert (job.sites, job.layers) == (tuple(SITES), 3)
    tokens = job.tokens()
    assert tokens.shape == (2 * harvest.CHUNK, 32)
    chunks = job.chunks()
    first = [next(chunks) for _ in range(3)]
    assert first[0].equal(tokens[: harvest.CHUNK])
    assert first[2].equal(first[0])


def test_contestants_without_peers_take_their_steps(prepared):
    steps(crosslens.train, prepared, 5)
    steps(plain.train, prepared, 3)
    norms = json.loads((prepared / "norms-crosslens-bfloat16.json").read_text())
    assert list(norms) == SITES
    assert min(norms.values()) > 0


def test_who_reads_something_else_is_refused(prepared, tmp_path):
    for who, value in (("a", 1.0), ("b", 1.01)):
        (tmp_path / f"norms-{who}.json").write_text(json.dumps({"s": value}))
    assert harvest._norms_differ(tmp_path) == pytest.approx(0.01)
    (tmp_path / "norms-c.json").write_text(json.dumps({"s": 1.05}))
    with pytest.raises(SystemExit, match=r"differ: mean norms by 5\.0%"):
        harvest._norms_differ(tmp_path)


def test_ratios_are_of_the_same_round(tmp_path):
    slow = Result(seconds=[2.0, 20.0, 3.0], whole_peak_bytes=7, facts={"version": "1"})
    fast = Result(seconds=[1.0, 10.0, 1.0], whole_peak_bytes=5, facts={"version": "2"})
    gone = Result(reason="ModuleNotFoundError: No module named 'transformer_lens'")
    results = {"crosslens": fast, "plain": slow, "bridge": slow, "bridge_float32": gone}
    found = harvest.summary(results, tmp_path)
    assert found["times"]["plain"] == {
        "median": 2.0, "least": 2.0, "most": 3.0, "goal": 0.95, "met": True
    }  # fmt: skip
    assert set(found["times"]) == {"plain", "bridge"}
    assert found["crosslens"]["median"] == harvest.A_CHUNK.batch / 1.0
    assert found["crosslens"]["peak_bytes"] == 5
    assert "No module named 'transformer_lens'" in found["bridge_float32"]["reason"]
    told = harvest.table(found)
    assert "crosslens 2.00 × (goal 1.9)" in told
    assert "--peers-python" in told


def test_sites_that_the_peers_do_not_have():
    with pytest.raises(SystemExit, match="only resid_pre, resid_mid and resid_post"):
        harvest._layers(["resid_mid.1", "mlp_act.2"])
    assert harvest._layers(["resid_post.0", "resid_pre.4"]) == 5
