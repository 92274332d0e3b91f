"""Three panels against the FVU: largest share, the largest contribution alone, and all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

COLOURS = {"none": "0.45", "exact": "#2f6db3", "paper": "#c9622b"}
LABELS = {"none": "no penalty, fewer active", "exact": "exact form", "paper": "the paper's form"}
PANELS: tuple[tuple[str, Callable[[Row], Mapping[str, float]]], ...] = (
    ("share of the largest contribution", lambda row: row["share_largest"]),
    ("Φ, the largest alone", lambda row: row["fidelity"]["keep largest 1"]),
    ("Φ, all contributions", lambda row: row["fidelity"]["full"]),
)


def draw(file: Path, rows: Sequence[Row]) -> bool:
    """Curves of each family, with bars of one standard deviation; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: the plot is left out (pip install 'crosslens[repro]')")
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    style: Any = {"svg.hashsalt": "crosslens", "svg.fonttype": "none", "font.size": 8}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 3.2), layout="constrained")
        for axis, (title, of) in zip(axes, PANELS, strict=True):
            for family in COLOURS:
                _curve(axis, [row for row in rows if row["family"] == family], of)
            axis.set(title=title, xlabel="FVU, held out")
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="0.92")
        axes[0].legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return True


def _curve(axis: Any, rows: Sequence[Row], of: Callable[[Row], Mapping[str, float]]) -> None:
    if not rows:
        return
    family = rows[0]["family"]
    ordered = sorted(rows, key=lambda row: (row["weight"], -row["k"]))
    x, y = ([each["mean"] for each in values] for values in _axes(ordered, of))
    x_bar, y_bar = ([each["sd"] for each in values] for values in _axes(ordered, of))
    axis.errorbar(
        x, y, xerr=x_bar, yerr=y_bar, marker="o", markersize=3, linewidth=1, elinewidth=0.6,
        color=COLOURS[family], label=LABELS[family],
    )  # fmt: skip


def _axes(
    rows: Sequence[Row], of: Callable[[Row], Mapping[str, float]]
) -> tuple[list[Mapping[str, float]], list[Mapping[str, float]]]:
    return [row["fvu"] for row in rows], [of(row) for row in rows]
