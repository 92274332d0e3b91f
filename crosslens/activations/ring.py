"""Rows in random order from a preallocated buffer, each token exactly once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple

import torch
from torch import Tensor

from crosslens.activations.filling import Filled, Filler, RowSource, fill, writer
from crosslens.activations.policy import Counts
from crosslens.errors import CrosslensError, UsageError

State = dict[str, Tensor]


class Ring:
    """Shuffled batches of rows [B, X] out of one bf16 buffer [N, X].

    The buffer is filled from the source, a random permutation of the *slots* in use is drawn, and
    batches are gathered by it; slots are given back as they are read and filled again when half
    are free. No row moves, so there is never a second copy. An epoch ends when less than a batch
    is left; those rows open the next one. Data that fits the buffer is harvested once and kept.

    With `ahead`, free slots are filled in the background while the rows in the others are read.
    Batches and `state` are the same to the bit.
    """

    def __init__(
        self, source: RowSource, capacity: int, batch: int, seed: int, ahead: bool = False
    ) -> None:
        needed = batch + 2 * source.rows_per_chunk
        self.resident = source.n_rows_at_most <= capacity
        if not self.resident and capacity < needed:
            raise UsageError(
                f"The activation buffer holds {capacity} rows; a batch of {batch} with chunks of "
                f"{source.rows_per_chunk} positions needs {needed}. Raise --fit.buffer-gb or "
                "lower --fit.batch."
            )
        self.source = source
        self.batch = batch
        n_slots = source.n_rows_at_most if self.resident else capacity
        self.rows_NX = torch.empty(n_slots, source.layout.width, dtype=torch.bfloat16)
        self.row_N = torch.full((n_slots,), -1)
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)  # slots still to be read, in order
        self.free = torch.arange(n_slots)
        self.next_chunk = 0
        self.uses_R = torch.zeros(source.n_positions, dtype=torch.int32)
        self.counts = Counts()
        self.filler = Filler(source, self.rows_NX) if ahead and not self.resident else None

    def next(self, on_harvest: Callable[[int, int], None] | None = None) -> Tensor:
        """The next batch [B, X], bf16. `on_harvest(chunks done, chunks)` hears of the filling."""
        if len(self.order) < self.batch or self._half_empty():
            self._refill(on_harvest)
        if len(self.order) < self.batch and not self.resident:
            self._refill(on_harvest)  # the text ended within the first: on from its beginning
        if len(self.order) < self.batch:
            raise UsageError(
                f"The text gives only {len(self.order)} rows, fewer than one batch of "
                f"{self.batch}. Raise --text.tokens or lower --fit.batch."
            )
        slots_B, self.order = self.order[: self.batch], self.order[self.batch :]
        self.uses_R.index_add_(0, self.row_N[slots_B], torch.ones(self.batch, dtype=torch.int32))
        if not self.resident:
            self.free = torch.cat([self.free, slots_B])
        batch_BX = self.rows_NX.index_select(0, slots_B)
        self._work_ahead()
        return batch_BX

    def usage(self) -> dict[str, int]:
        """How often each kept token was used: `{"tokens", "least", "most"}` since the start."""
        harvested_R = torch.zeros_like(self.uses_R, dtype=torch.bool)
        harvested_R[self.row_N[self.row_N >= 0]] = True
        uses_R = self.uses_R[(self.uses_R > 0) | harvested_R]
        if not len(uses_R):
            return {"tokens": 0, "least": 0, "most": 0}
        return {"tokens": len(uses_R), "least": int(uses_R.min()), "most": int(uses_R.max())}

    def state(self) -> State:
        """All that `restore` needs; the rows themselves are harvested again."""
        return {
            "row": self.row_N.clone(),
            "order": self.order.clone(),
            "free": self.free.clone(),
            "next_chunk": torch.tensor(self.next_chunk),
            "generator": self.generator.get_state(),
            "uses": self.uses_R.clone(),
            "counts": torch.tensor(astuple(self.counts)),
        }

    def restore(
        self, state: Mapping[str, Tensor], on_harvest: Callable[[int, int], None] | None = None
    ) -> None:
        """Go on exactly where `state` was taken: same rows in the same slots, same order."""
        if state["row"].shape != self.row_N.shape or state["uses"].shape != self.uses_R.shape:
            raise CrosslensError(
                "The checkpoint belongs to another text or buffer size than this run's."
            )
        if self.filler:
            self.filler.forget()
        self.row_N.copy_(state["row"])
        self.order, self.free = state["order"].clone(), state["free"].clone()
        self.next_chunk = int(state["next_chunk"])
        self.generator.set_state(state["generator"])
        self.uses_R.copy_(state["uses"])
        self.counts = Counts(*state["counts"].tolist())
        self._reload(on_harvest)

    def _half_empty(self) -> bool:
        more = self.next_chunk < self.source.n_chunks
        return more and len(self.free) >= max(len(self.row_N) // 2, self.source.rows_per_chunk)

    def _refill(self, on_harvest: Callable[[int, int], None] | None) -> None:
        """Fill free slots and shuffle. Should `on_harvest` raise, nothing has changed but the
        contents of free slots, so that `state` may still be saved."""
        left_over, waiting, next_chunk = self._opening()
        free, filled = self.free, list[Filled]()
        while next_chunk < self.source.n_chunks and len(free) >= self._room_needed():
            needed = len(self.source.rows_of(next_chunk))
            filled.append(self._filled(next_chunk, free[:needed]))
            free = free[needed:]
            next_chunk += 1
            if on_harvest:
                on_harvest(next_chunk, self.source.n_chunks)
        for chunk in filled:
            self.row_N[chunk.slot_R] = chunk.row_R
            self.counts += chunk.counts
        waiting = torch.cat([waiting, *(chunk.slot_R for chunk in filled)])
        mixed = waiting[torch.randperm(len(waiting), generator=self.generator)]
        self.order = torch.cat([left_over, mixed])
        self.free = torch.cat([free, *(chunk.unused_R for chunk in filled)])
        self.next_chunk = next_chunk
        if self.filler:
            self.filler.forget()

    def _opening(self) -> tuple[Tensor, Tensor, int]:
        """Slots to read first, slots to shuffle, and the chunk to go on with.

        Within an epoch nothing comes first. Between two, the rows left over do; then comes
        everything that is held (resident), or the text from its beginning.
        """
        if self.next_chunk < self.source.n_chunks:
            return self.order[:0], self.order, self.next_chunk
        if self.resident:
            return self.order, (self.row_N >= 0).nonzero().squeeze(-1), self.next_chunk
        return self.order, self.order[:0], 0

    def _room_needed(self) -> int:
        """A resident buffer has a slot for every row that can come; else leave room for a chunk."""
        return 0 if self.resident else self.source.rows_per_chunk

    def _filled(self, index: int, slot_R: Tensor) -> Filled:
        if self.filler:
            return self.filler.result(index, slot_R)
        return fill(self.source, index, slot_R, self.rows_NX)

    def _work_ahead(self) -> None:
        """Begin the chunks that the next refill will ask for, as far as slots are free.

        Chunks and slots are taken in the refill's own order, of which more can only be free by
        then: what is begun here is what it would do, and nothing is known of it until it does.
        """
        if self.filler is None:
            return
        first = self._opening()[2]
        few = 1 + -(-self.batch // self.source.rows_per_chunk)  # a stop waits for these
        while self.filler.unfinished < few:
            index = first + len(self.filler.jobs)
            free = self.free[self.filler.slots_given :]
            if index >= self.source.n_chunks or len(free) < self._room_needed():
                return
            self.filler.begin(index, free[: len(self.source.rows_of(index))])

    def _reload(self, on_harvest: Callable[[int, int], None] | None) -> None:
        live = (
            (self.row_N >= 0).nonzero().squeeze(-1) if self.resident else self.order.sort().values
        )
        chunk_of_live = self.row_N[live] // self.source.rows_per_chunk
        needed = sorted(set(chunk_of_live.tolist()))
        for done, index in enumerate(needed, 1):
            slots = live[chunk_of_live == index]
            row_R = self.source.rows_of(index)
            slot_R = torch.full_like(row_R, -1)
            slot_R[torch.searchsorted(row_R, self.row_N[slots])] = slots
            self.source.stream(index, writer(self.rows_NX, self.source.layout, slot_R))
            if on_harvest:
                on_harvest(done, len(needed))
