"""Chunks written into the ring's slots: outliers give theirs back, and working ahead changes
nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.activations import Ring
from crosslens.activations.filling import fill
from crosslens.errors import CrosslensError, Interrupted
from tests.test_activations import Numbered, named

OUTLIERS = {5, 17, 18, 90, 91, 92, 93, 119}


def ring_of(ahead: bool, capacity: int = 60, batch: int = 11, **kwargs) -> Ring:
    source = Numbered(10, 16, {3, 40}, blocks_per_chunk=1, outliers=OUTLIERS, **kwargs)
    return Ring(source, capacity, batch, seed=4, ahead=ahead)


def test_a_chunk_is_written_where_it_was_told():
    source = Numbered(4, 8, {1}, outliers={4, 15})
    rows = torch.full((40, 2), 7.0, dtype=torch.bfloat16)
    slots = torch.arange(30, 15, -1)
    filled = fill(source, 0, slots, rows)
    assert filled.row_R.tolist() == [0, 2, 3, *range(5, 15)]
    assert named(rows[filled.slot_R]) == filled.row_R.tolist()
    assert filled.unused_R.tolist() == [slots[3], slots[14]]
    untouched = sorted(set(range(40)) - set(slots.tolist()))
    assert (rows[untouched] == 7).all()
    assert filled.counts.outlier == 2


@pytest.mark.parametrize("capacity", [160, 60])
def test_outliers_never_come_out_and_all_others_do(capacity):
    ring = ring_of(ahead=False, capacity=capacity)
    kept = set(ring.source.kept) - OUTLIERS
    seen = [name for _ in range(len(kept) // ring.batch) for name in named(ring.next())]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= kept
    seen += [name for _ in range(2) for name in named(ring.next())]
    assert set(seen) == kept
    assert ring.usage() == {"tokens": len(kept), "least": 1, "most": 2}


def test_slots_of_outliers_are_not_lost():
    """However often outliers come by, every slot stays either free or waiting to be read."""
    ring = ring_of(ahead=False)
    for _ in range(100):
        ring.next()
        assert sorted([*ring.free.tolist(), *ring.order.tolist()]) == list(range(60))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 12), st.integers(4, 20), st.integers(1, 16), st.integers(1, 3), st.data())
def test_working_ahead_changes_no_batch_and_no_state(n_blocks, t, batch, per_chunk, data):
    rows = st.sets(st.integers(0, n_blocks * t - 1), max_size=n_blocks)
    dropped, outliers = data.draw(rows), data.draw(rows)

    def new(ahead: bool) -> Ring:
        source = Numbered(n_blocks, t, dropped, per_chunk, outliers)
        return Ring(source, capacity, batch, 0, ahead=ahead)

    kept = n_blocks * t - len(dropped | outliers)
    batch = min(batch, kept)
    capacity = batch + 2 * per_chunk * t
    plain, ahead = new(False), new(True)
    for _ in range(3 * kept // batch + 2):
        assert torch.equal(plain.next(), ahead.next())
        theirs = plain.state()
        assert all(torch.equal(value, theirs[name]) for name, value in ahead.state().items())
    assert plain.counts == ahead.counts


def test_it_does_work_ahead_in_one_thread_of_its_own():
    ring = ring_of(ahead=True)
    threads = set()
    stream = ring.source.stream

    def watched(index, receive):
        threads.add(threading.current_thread())
        return stream(index, receive)

    ring.source.stream = watched
    before = []
    for _ in range(40):
        began = set(ring.filler.jobs)
        ring.next(lambda done, total: None)
        before.append(bool(began))
    assert sum(before) > 10, "chunks are begun before the refill that needs them"
    assert len(threads) == 1
    assert threads != {threading.main_thread()}


@pytest.mark.parametrize("steps_before", [0, 3, 17, 31])
def test_restoring_beside_work_in_the_background(steps_before):
    ring, plain = ring_of(ahead=True), ring_of(ahead=False)
    for _ in range(steps_before):
        ring.next()
        plain.next()
    state = ring.state()
    after = [named(plain.next()) for _ in range(30)]
    for _ in range(7):
        ring.next()  # so that chunks of another place in the text are being filled in
    ring.restore(state)
    assert [named(ring.next()) for _ in range(30)] == after


def test_a_stop_while_refilling_leaves_the_state_as_it_was():
    ring, plain = ring_of(ahead=True), ring_of(ahead=False)
    for _ in range(20):
        state = ring.state()

        def stop(done, total):
            raise Interrupted("now")

        try:
            batch = ring.next(stop)
        except Interrupted:
            assert all(torch.equal(v, state[name]) for name, v in ring.state().items())
            batch = ring.next()
        assert torch.equal(batch, plain.next())


def test_what_goes_wrong_in_the_background_is_told():
    ring = ring_of(ahead=True)
    stream = ring.source.stream

    def failing(index, receive):
        if index == 6:
            raise CrosslensError("Activations at s hold NaN")
        return stream(index, receive)

    ring.source.stream = failing
    with pytest.raises(CrosslensError, match="hold NaN"):
        [ring.next() for _ in range(40)]


def test_the_end_of_the_text_may_fill_less_than_a_batch():
    """32 rows in batches of 11 from 19 slots: the last refill of an epoch brings too few."""
    ring = Ring(Numbered(8, 4, set(), blocks_per_chunk=1), 19, 11, seed=0)
    seen = [name for _ in range(32) for name in named(ring.next())]
    epochs = [sorted(seen[at : at + 32]) for at in range(0, len(seen), 32)]
    assert epochs == [list(range(32))] * 11


def test_text_that_fits_needs_no_thread():
    assert ring_of(ahead=True, capacity=160).filler is None
