"""Write chunks of rows into free slots of a buffer, at once or in the background."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from crosslens.activations.harvest import Receive, Verdict
from crosslens.activations.policy import Counts
from crosslens.coder import Layout


@runtime_checkable
class RowSource(Protocol):
    """Rows in chunks; a chunk asked for again is the same to the bit."""

    @property
    def layout(self) -> Layout: ...

    @property
    def n_chunks(self) -> int: ...

    @property
    def rows_per_chunk(self) -> int: ...

    @property
    def n_rows_at_most(self) -> int: ...

    @property
    def n_positions(self) -> int: ...

    def rows_of(self, index: int) -> Tensor: ...

    def stream(self, index: int, receive: Receive) -> Verdict: ...


@dataclass(frozen=True)
class Filled:
    """A chunk in the buffer."""

    slot_R: Tensor
    """Where each row lies that counts."""
    row_R: Tensor
    unused_R: Tensor
    """Slots that hold what turned out to be outliers: still free."""
    counts: Counts


def fill(source: RowSource, index: int, slot_R: Tensor, rows_NX: Tensor) -> Filled:
    """Harvest chunk `index` straight into `rows_NX`, a slot for each of its `rows_of`."""
    verdict = source.stream(index, writer(rows_NX, source.layout, slot_R))
    row_R, fine_R = source.rows_of(index), verdict.fine_R
    return Filled(slot_R[fine_R], row_R[fine_R], slot_R[~fine_R], verdict.counts)


def writer(rows_NX: Tensor, layout: Layout, slot_R: Tensor) -> Receive:
    """Writes a chunk's rows into their slots; a row whose slot is negative is left out."""

    def write(p: int, at_r: Tensor, rows_rD: Tensor) -> None:
        slot_r = slot_R[at_r]
        wanted_r = slot_r >= 0
        if not wanted_r.all():
            slot_r, rows_rD = slot_r[wanted_r], rows_rD[wanted_r.to(rows_rD.device)]
        rows_NX[:, layout.slices[p]].index_copy_(0, slot_r, rows_rD.to(rows_NX))

    return write


class Filler:
    """Fills free slots in a thread of its own, chunk after chunk, before they are asked for.

    All harvesting is done in that one thread: two passes through one model at the same time would
    run each other's hooks.
    """

    def __init__(self, source: RowSource, rows_NX: Tensor) -> None:
        self.source, self.rows_NX = source, rows_NX
        self.thread = ThreadPoolExecutor(1, "harvest")
        self.jobs: dict[int, Future[Filled]] = {}
        self.slots_given = 0

    @property
    def unfinished(self) -> int:
        """Chunks begun that are not there yet."""
        return sum(not job.done() for job in self.jobs.values())

    def begin(self, index: int, slot_R: Tensor) -> None:
        """Have chunk `index` filled into these slots, which nobody may read meanwhile."""
        self.slots_given += len(slot_R)
        self.jobs[index] = self.thread.submit(
            fill, self.source, index, slot_R.clone(), self.rows_NX
        )

    def result(self, index: int, slot_R: Tensor) -> Filled:
        """Chunk `index`, once it is there; begun now if it was not."""
        if index not in self.jobs:
            self.begin(index, slot_R)
        return self.jobs[index].result()

    def forget(self) -> None:
        """Nothing has been begun any more, and nothing is being written."""
        wait(self.jobs.values())
        self.jobs.clear()
        self.slots_given = 0
