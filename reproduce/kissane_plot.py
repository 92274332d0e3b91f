"""Their two histograms, for the pair and for the model against itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BLUE, DARK = "#2f6db3", "0.15"


def draw(file: Path, shown: Mapping[str, Mapping[str, Any]]) -> bool:
    """A row of panels for each title -> figures; False where there is no matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: the plot is left out (pip install 'crosslens[repro]')")
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "crosslens", "svg.fonttype": "none", "font.size": 8}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            len(shown), 2, figsize=(9, 2.4 * len(shown)), squeeze=False, layout="constrained"
        )
        for (title, figures), (left, right) in zip(shown.items(), axes, strict=True):
            _norms(left, figures, title)
            _cosines(right, figures, title)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return True


def _norms(axis: Any, figures: Mapping[str, Any], title: str) -> None:
    """r of the latents, the dead ones apart; a cut at .3 and .7."""
    alive, dead = figures["relative_norm"], figures["relative_norm_dead"]
    axis.stairs(alive, _edges(alive, 0.0), fill=True, color=BLUE, label=f"alive ({sum(alive)})")
    # An outline, in front: dead latents lie where they began, behind the tallest bars.
    axis.stairs(dead, _edges(dead, 0.0), color=DARK, label=f"dead ({sum(dead)})")
    for cut in (0.3, 0.7):
        axis.axvline(cut, color="0.4", linewidth=0.6, linestyle=":")
    axis.set(xlim=(0, 1), title=title, ylabel="latents")
    axis.set_xlabel("relative decoder norm: 0 only base, 1 only changed")
    axis.legend(frameon=False)


def _cosines(axis: Any, figures: Mapping[str, Any], title: str) -> None:
    """Of shared latents, on a logarithmic axis."""
    counts = figures["decoder_cosine"]
    axis.stairs(counts, _edges(counts, -1.0), fill=True, color=BLUE)
    axis.set(xlim=(-1, 1), title=f"{title}: shared latents ({sum(counts)})", ylabel="latents")
    axis.set_yscale("log")
    axis.set_ylim(0.7, 2.0 * max(1, *counts))
    axis.set_xlabel("cosine of the two decoders")


def _edges(counts: list[int], low: float) -> list[float]:
    n = len(counts)
    return [low + (1.0 - low) * i / n for i in range(n + 1)]
