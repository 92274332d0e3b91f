"""One latent in a terminal: tokens on a ramp of colour, as in seed 003, or marked without it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.cells import cell_len

from crosslens.explore.figures import number, percent
from crosslens.explore.store import Example, LatentStore
from crosslens.text import visible

_DARK = ((0x2B, 0x24, 0x1C), (0x90, 0x52, 0x11), (0xE6, 0xE6, 0xE6))
_LIGHT = ((0xFF, 0xF3, 0xE6), (0xFC, 0x9E, 0x47), (0x1F, 0x23, 0x28))
"""Ground of the weakest and of the strongest activation, and the text on both."""
_RESET = "\x1b[0m"
_BAR = 24
_PEAK_AT = 0.55
"""Where the peak stands, as a share of the width of a line."""


@dataclass(frozen=True)
class Style:
    """How to write: for whom, and how wide."""

    color: bool
    light: bool = False
    """On a light background."""
    width: int = 100


@dataclass(frozen=True)
class _Letter:
    text: str
    share: float
    peak: bool


def described(store: LatentStore, latent: int, examples: int, style: Style) -> str:
    """Figures, decoder norms, examples and direct logits of a latent.

    Args:
        examples: strongest ones shown, at most; each interval shows a third as many.

    Raises:
        UsageError: there is no such latent.
    """
    store.check_latent(latent)
    if not store.statistics.count_L[latent]:
        return f"{dead_sentence(store, latent)}\n"
    parts = [
        _header(store, latent),
        _norms(store, latent),
        *_sections(store, latent, examples, style),
        *_logits(store, latent),
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def dead_sentence(store: LatentStore, latent: int) -> str:
    """Why there is nothing to show of a latent."""
    return (
        f"Latent {latent} is dead: it is active on none of the {store.manifest.tokens:,} tokens "
        "that were looked at."
    )


def plain(store: LatentStore, latent: int, examples: int) -> dict[str, Any]:
    """The same as JSON-able data."""
    store.check_latent(latent)
    found = store.statistics
    shown = _shown(list(store.examples_of(latent)), examples)
    top, bottom = _directions(store, latent)
    return {
        "latent": latent,
        "count": int(found.count_L[latent]),
        "tokens": store.manifest.tokens,
        "density": float(store.density_L[latent]),
        "max": float(found.max_L[latent]),
        "mean": float(found.mean_L[latent]),
        "norms": dict(zip(store.manifest.sites, store.norm_LP[latent].tolist(), strict=True)),
        "examples": [_plain_example(store, example) for example in shown],
        "logit_site": store.manifest.logit_site,
        "top": top,
        "bottom": bottom,
    }


def _plain_example(store: LatentStore, example: Example) -> dict[str, Any]:
    pieces = store.vocabulary.pieces(example.token_ids)
    return {
        "value": example.value,
        "section": example.section,
        "repeats": example.repeats,
        "document": example.document,
        "block": example.block,
        "position": example.position,
        "pieces": [[p.text, max(example.activations[p.start : p.end])] for p in pieces],
        "peak": next(i for i, p in enumerate(pieces) if p.start <= example.peak < p.end),
    }


def _header(store: LatentStore, latent: int) -> list[str]:
    found = store.statistics
    return [
        f"latent {latent} of {store.n_latents}",
        f"density {percent(float(store.density_L[latent]))} ({found.count_L[latent]:,} of "
        f"{store.manifest.tokens:,} tokens) · max {number(float(found.max_L[latent]))} · "
        f"mean when active {number(float(found.mean_L[latent]))}",
    ]


def _norms(store: LatentStore, latent: int) -> list[str]:
    norms = store.norm_LP[latent].tolist()
    wide = max(map(len, store.manifest.sites))
    largest = max(norms) or 1.0
    return [
        "decoder norm",
        *(
            f"  {site:{wide}}  {'█' * round(_BAR * norm / largest):{_BAR}}  {number(norm)}"
            for site, norm in zip(store.manifest.sites, norms, strict=True)
        ),
    ]


def _sections(store: LatentStore, latent: int, examples: int, style: Style) -> list[list[str]]:
    shown = _shown(list(store.examples_of(latent)), examples)
    parts = []
    for section, members in groupby(shown, key=lambda example: example.section):
        lines = [_line(store, latent, example, style) for example in members]
        parts.append([_section_title(store, latent, section), *lines])
    return parts


def _shown(found: Sequence[Example], examples: int) -> list[Example]:
    """The first `examples` of the strongest, and a third as many of each interval."""
    shown: list[Example] = []
    for section, members in groupby(found, key=lambda example: example.section):
        shown += list(members)[: examples if section == 0 else examples // 3]
    return shown


def _section_title(store: LatentStore, latent: int, section: int) -> str:
    if section == 0:
        return "strongest"
    low = float(store.examples.low_LI[latent, section - 1])
    high = float(store.examples.high_LI[latent, section - 1])
    share = round(100 / store.manifest.plan.intervals)
    return f"{number(low)} to {number(high)}, {share} % of its active tokens"


def _line(store: LatentStore, latent: int, example: Example, style: Style) -> str:
    """Value, then the text with the peak always at the same column."""
    letters = _letters(store, latent, example)
    first = next(i for i, letter in enumerate(letters) if letter.peak)
    room = style.width - 10
    before = round(room * _PEAK_AT)
    left = _fitting(reversed(letters[:first]), before)[::-1]
    right = _fitting(letters[first:], room - before)
    gap = " " * (before - sum(cell_len(letter.text) for letter in left))
    repeats = f"  ×{example.repeats}" if example.repeats > 1 else ""
    return f"{number(example.value):>7}  {gap}{_painted([*left, *right], style)}{repeats}"


def _letters(store: LatentStore, latent: int, example: Example) -> list[_Letter]:
    largest = float(store.statistics.max_L[latent])
    letters = []
    for piece in store.vocabulary.pieces(example.token_ids):
        share = max(example.activations[piece.start : piece.end]) / largest
        peak = piece.start <= example.peak < piece.end
        text = harmless(_seen(piece.text, share > 0 or peak))
        # A piece without text (an unused id) still has to show where the peak is.
        text = text or ("□" if peak else "")
        letters += [_Letter(letter, share, peak) for letter in text]
    return letters


def _seen(text: str, marked: bool) -> str:
    """White space as glyphs; the space before a word only where the token is marked."""
    lead = 0 if marked or not text.strip() else len(text) - len(text.lstrip(" "))
    return text[:lead] + visible(text[lead:])


def _fitting(letters: Iterable[_Letter], room: int) -> list[_Letter]:
    kept: list[_Letter] = []
    for letter in letters:
        room -= cell_len(letter.text)
        if room < 0:
            break
        kept.append(letter)
    return kept


def _painted(letters: Sequence[_Letter], style: Style) -> str:
    runs = groupby(letters, key=lambda letter: (letter.share, letter.peak))
    return "".join(
        _run("".join(letter.text for letter in members), share, peak, style)
        for (share, peak), members in runs
    )


def _run(text: str, share: float, peak: bool, style: Style) -> str:
    if not style.color:
        return f"«{text}»" if peak else text
    if share <= 0 and not peak:
        return text
    weak, strong, ink = _LIGHT if style.light else _DARK
    ground = [round(a + (b - a) * min(1.0, share)) for a, b in zip(weak, strong, strict=True)]
    back, fore = ";".join(map(str, ground)), ";".join(map(str, ink))
    return f"\x1b[48;2;{back}m\x1b[38;2;{fore}m{chr(27) + '[1;4m' if peak else ''}{text}{_RESET}"


def _logits(store: LatentStore, latent: int) -> list[list[str]]:
    top, bottom = _directions(store, latent)
    if not top:
        return []
    return [
        [
            f"{verb} directly, from {store.manifest.logit_site}",
            "  " + "  ".join(f"{harmless(visible(text))} {number(value)}" for text, value in found),
        ]
        for verb, found in (("promotes", top), ("suppresses", bottom))
    ]


def _directions(
    store: LatentStore, latent: int
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """(token's text, logit) of what a latent promotes and of what it suppresses."""
    table = store.logits
    if table is None or table.top_id_LK[latent, 0] < 0:
        return [], []

    def told(ids: Any, values: Any) -> list[tuple[str, float]]:
        texts = ["".join(p.text for p in store.vocabulary.pieces([int(t)])) for t in ids]
        return list(zip(texts, map(float, values), strict=True))

    return (
        told(table.top_id_LK[latent], table.top_LK[latent]),
        told(table.bottom_id_LK[latent], table.bottom_LK[latent]),
    )


def harmless(text: str) -> str:
    r"""`text` with control, bidirectional and line-separating characters written as `\x1b`: a
    token must not be able to command the terminal."""
    return "".join(_escaped(letter) if _commands(letter) else letter for letter in text)


def _commands(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(letter: str) -> str:
    code = ord(letter)
    return (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
