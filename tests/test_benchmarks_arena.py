"""Contestants take turns, sleep meanwhile, and are told of when they cannot run."""

from __future__ import annotations

import pytest

from benchmarks.arena import WARM_UP, Arena, Contestant, likely_bytes
from benchmarks.task import Shape

TINY = Shape(sites=1, width=4, latents=8, k=2, batch=2)
PLENTY = 10**10


@pytest.fixture
def stub(tmp_path):
    """Makes contestants that write to one log."""

    def make(setting, **more):
        return Contestant(
            name="stub",
            setting=setting,
            entry="tests.benchmarks_stub",
            folder=str(tmp_path),
            **more,
        )

    return make


def run(contestants, repeats=2, steps=1, memory=PLENTY, likely=1.0):
    arena = Arena(contestants, TINY, memory, likely)
    arena.compete(repeats, steps, lambda _: None)
    return arena.results


def logged(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_they_alternate(stub, tmp_path):
    a, b = stub("a"), stub("b", pace=2)
    results = run([a, b], repeats=2)
    warm = [["a starts"] + ["a"] * WARM_UP, ["b starts"] + ["b"] * WARM_UP]
    assert logged(tmp_path) == [*warm[0], "a", *warm[1], "b", "b", "a", "b", "b"]
    assert len(results[a].seconds) == 2
    assert len(results[b].seconds) == 4
    assert all(seconds > 0 for seconds in results[a].seconds)
    assert 0 < results[a].peak_bytes < results[a].whole_peak_bytes
    assert results[a].reason is None


def test_one_that_cannot_run_is_told_of_and_the_others_go_on(stub):
    a, broken, fragile = stub("a"), stub("broken"), stub("fragile")
    results = run([broken, a, fragile])
    assert results[broken].reason == "this library needs a GPU"
    assert results[fragile].reason == "ValueError: it overflowed"
    assert len(results[a].seconds) == 2


def test_an_interpreter_that_is_not_there(stub):
    absent = stub("a", python="/no/such/python")
    assert (
        run([absent])[absent].reason == "/no/such/python cannot be run: No such file or directory"
    )


def test_where_memory_is_short_workers_are_ended_and_started_again(stub, tmp_path):
    alone = run([stub("first")])[stub("first")].whole_peak_bytes
    (tmp_path / "log").unlink()
    a, b = stub("a"), stub("b")
    results = run([a, b], repeats=2, memory=1.5 * alone, likely=1.2 * alone)
    assert [line for line in logged(tmp_path) if "starts" in line] == [
        "a starts",
        "b starts",
        "a starts",
        "b starts",
    ]
    assert [len(result.seconds) for result in results.values()] == [2, 2]


def test_one_that_cannot_fit_is_not_started(stub, tmp_path):
    a = stub("a")
    result = run([a], memory=2e9, likely=3e9)[a]
    assert result.reason == "may take 3.0 GB, more than the 2.0 GB allowed"
    assert not (tmp_path / "log").exists()


def test_likely_memory_grows_with_every_size():
    for change in ({"sites": 2}, {"latents": 16}, {"batch": 4}, {"k": 4}):
        assert likely_bytes(Shape(**{**vars(TINY), **change})) > likely_bytes(TINY)
