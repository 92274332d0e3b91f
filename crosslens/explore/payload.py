"""What a report carries of its latents: compact, and ready to be shown without further thought.

Each shown position of the text is stored once, as the number of its piece of text; an example is a
stretch of positions. Bytes are joined into characters here, never in the browser.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.explore.codes import Ints, Places
from crosslens.explore.logits import LogitTable
from crosslens.explore.statistics import BINS_PER_OCTAVE, LOWEST
from crosslens.explore.store import LatentStore

STRONGEST = 0.25
"""Share of the shown latents that is chosen for strength; the others lie evenly over density."""
LEVELS = 255
_LABELS = 3


def choose_latents(store: LatentStore, most: int, wanted: Collection[int] = ()) -> Ints:
    """Which living latents a report shows, ascending: all, or a fair `most` of them.

    A quarter are the strongest by max activation · Σ‖decoder‖; the others lie evenly over the
    ranking by density. Those `wanted` come first, as far as they live.
    """
    alive = store.alive_L
    if len(alive) <= most:
        return alive
    first = alive[np.isin(alive, list(wanted))][:most]
    alive, most = np.setdiff1d(alive, first), most - len(first)
    strength = store.statistics.max_L[alive] * store.norm_LP[alive].sum(1)
    strongest = alive[np.argsort(-strength, kind="stable")[: round(STRONGEST * most)]]
    others = np.setdiff1d(alive, strongest)
    ranked = others[np.argsort(store.statistics.count_L[others], kind="stable")]
    places = np.linspace(0, len(ranked) - 1, most - len(strongest)).round().astype(np.int64)
    return np.sort(np.concatenate([first, strongest, ranked[places]])).astype(np.int32)


def payload(store: LatentStore, chosen: Ints) -> dict[str, Any]:
    """JSON-able: columns by shown latent, examples, and the text that they need."""
    pool = _Pool()
    figures = store.statistics
    text = _text(store, chosen, pool)
    examples = [_examples(store, int(latent), text) for latent in chosen]
    logits = [_logits(store, int(latent), pool) for latent in chosen]
    return {
        "sites": list(store.manifest.sites),
        "tokens": store.manifest.tokens,
        "block": store.blocks.tokens_NT.shape[1],
        "intervals": store.manifest.plan.intervals,
        "bins": {"lowest": LOWEST, "perOctave": BINS_PER_OCTAVE},
        "id": chosen.tolist(),
        "count": figures.count_L[chosen].tolist(),
        "max": _short(figures.max_L[chosen]),
        "mean": _short(figures.mean_L[chosen]),
        "norms": [_short(norms) for norms in store.norm_LP[chosen]],
        "histogram": [_trimmed(counts) for counts in figures.histogram_LB[chosen]],
        "bounds": [_bounds(store, int(latent)) for latent in chosen],
        "label": [_label(found, text) for found in examples],
        "examples": examples,
        "logitSite": store.manifest.logit_site,
        "top": [top for top, _ in logits],
        "bottom": [bottom for _, bottom in logits],
        "text": text.piece.tolist(),
        "documents": text.documents,
        "pieces": [text for text, _ in pool.numbers],
        "special": [number for (_, special), number in pool.numbers.items() if special],
    }


def packed(value: dict[str, Any]) -> str:
    """JSON, compressed, in base64: the same value gives the same letters."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(plain, mtime=0)).decode("ascii")


@dataclass
class _Pool:
    """Distinct pieces of text, numbered. A special token and the same letters are two."""

    numbers: dict[tuple[str, bool], int] = field(default_factory=dict)

    def add(self, text: str, special: bool = False) -> int:
        return self.numbers.setdefault((text, special), len(self.numbers))


@dataclass(frozen=True)
class _Text:
    """The positions in use, side by side."""

    place_R: Places
    """Row → its place in `piece`."""
    begin_R: Places
    """Row → the row where its piece begins."""
    piece: Ints
    """Number of the piece that begins at each place; -1 where one goes on."""
    document_R: Ints
    documents: list[str]


def _text(store: LatentStore, chosen: Ints, pool: _Pool) -> _Text:
    index = _example_index(store, chosen)
    windows = [store.window_of(i) for i in index]
    length = store.blocks.tokens_NT.shape[1]
    begin_R, piece_R = _pieces(store, sorted({start // length for start, _ in windows}), pool)
    used_R: NDArray[np.bool_] = np.zeros(len(piece_R), bool)
    for start, end in windows:
        used_R[begin_R[start] : end] = True
    docs_R = store.blocks.docs_NT.numpy().reshape(-1)
    shown = np.unique(docs_R[store.examples.row_C[index]])
    shown = shown[shown >= 0]
    number = {int(document): place for place, document in enumerate(shown)}
    return _Text(
        place_R=np.cumsum(used_R) - 1,
        begin_R=begin_R,
        piece=piece_R[used_R],
        document_R=np.array([number.get(int(d), -1) for d in docs_R], np.int32),
        documents=[store.blocks.documents[d] for d in shown],
    )


def _pieces(store: LatentStore, blocks: list[int], pool: _Pool) -> tuple[Places, Ints]:
    """Of each row of these blocks: where its piece begins, and the piece that begins there."""
    tokens_NT = store.blocks.tokens_NT
    length = tokens_NT.shape[1]
    begin_R = np.arange(tokens_NT.numel())
    piece_R = np.full(tokens_NT.numel(), -1, np.int32)
    for block in blocks:
        for piece in store.vocabulary.pieces(tokens_NT[block].tolist()):
            first = block * length + piece.start
            begin_R[first : block * length + piece.end] = first
            piece_R[first] = pool.add(piece.text, piece.special)
    return begin_R, piece_R


def _example_index(store: LatentStore, chosen: Ints) -> list[int]:
    start_L = store.examples.start_L
    return [i for latent in chosen for i in range(start_L[latent], start_L[latent + 1])]


def _examples(store: LatentStore, latent: int, text: _Text) -> list[list[Any]]:
    """Per example: place, length, peak, section, value, repeats, row, document, activations.

    Activations are pairs of offset and level, of 255, one after another.
    """
    table, plan = store.examples, store.manifest.plan
    found = []
    for i in range(int(table.start_L[latent]), int(table.start_L[latent + 1])):
        row = int(table.row_C[i])
        start, end = store.window_of(i)
        begin = int(text.begin_R[start])
        active = np.flatnonzero(table.window_CW[i])
        level = np.ceil(table.window_CW[i, active].astype(np.float32) * LEVELS).astype(int)
        pairs = np.stack([active + row - plan.before - begin, level], -1)
        found.append(
            [
                int(text.place_R[begin]),
                end - begin,
                row - begin,
                int(table.section_C[i]),
                _digits(float(table.value_C[i])),
                int(table.repeats_C[i]),
                row,
                int(text.document_R[row]),
                pairs.reshape(-1).tolist(),
            ]
        )
    return found


def _label(examples: list[list[Any]], text: _Text) -> list[int]:
    """The commonest pieces at the peaks of the strongest examples."""
    peaks: Counter[int] = Counter()
    for place, _, peak, section, *_ in examples:
        if section == 0:
            at = place + peak
            while text.piece[at] < 0:
                at -= 1
            peaks[int(text.piece[at])] += 1
    return [piece for piece, _ in peaks.most_common(_LABELS)]


def _logits(store: LatentStore, latent: int, pool: _Pool) -> tuple[list[Any], list[Any]]:
    """[piece, value] of the tokens a latent promotes and of those it suppresses."""
    table: LogitTable | None = store.logits
    if table is None or table.top_id_LK[latent, 0] < 0:
        return [], []

    def told(ids: Ints, values: Any) -> list[Any]:
        pieces = [store.vocabulary.pieces([int(token)]) for token in ids]
        numbers = [pool.add(p[0].text, p[0].special) if p else pool.add("") for p in pieces]
        return [[n, _digits(float(v))] for n, v in zip(numbers, values, strict=True)]

    top = told(table.top_id_LK[latent], table.top_LK[latent])
    return top, told(table.bottom_id_LK[latent], table.bottom_LK[latent])


def _bounds(store: LatentStore, latent: int) -> list[list[float]]:
    high, low = store.examples.high_LI[latent], store.examples.low_LI[latent]
    return [[_digits(float(b)), _digits(float(a))] for a, b in zip(high, low, strict=True)]


def _trimmed(counts: Ints) -> list[int]:
    """The first bin that is not empty, then the counts up to the last."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return [0]
    return [int(filled[0]), *counts[filled[0] : filled[-1] + 1].tolist()]


def _short(values: Any) -> list[float]:
    return [_digits(float(value)) for value in values]


def _digits(value: float) -> float:
    """Four digits that matter."""
    return float(f"{value:.4g}")
