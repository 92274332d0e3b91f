"""Four panels against the FVU: interaction, what is proved of it, and the certified loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

COLOURS = {"none": "0.45", "exact": "#2f6db3", "paper": "#c9622b", "learnt": "#5a9e4b"}
LABELS = {
    "none": "no penalty, other numbers active",
    "exact": "exact form",
    "paper": "the paper's form",
    "learnt": "exact form, bias learnt",
}
ACROSS = {"fvu_mid": "FVU at the MLP", "fvu_last": "FVU at the last site"}
PANELS = (
    ("interaction at the MLP", "fvu_mid", "interaction"),
    ("‖f(x̂) − Σ g‖ / ‖f(x̂)‖ ≤, additive/neurons", "fvu_mid", "local additive/neurons"),
    ("decoded model's loss ≤, additive/exact", "fvu_mid", "decoded additive/exact"),
    ("model's loss ≤, 35 % of the flops", "fvu_last", "loss 0.35"),
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
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.2), layout="constrained")
        for axis, (title, x, y) in zip(axes, PANELS, strict=True):
            for family in COLOURS:
                _curve(axis, [row for row in rows if row["family"] == family], x, y)
            axis.set(title=title, xlabel=ACROSS[x])
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(color="0.92")
        axes[0].legend(frameon=False)
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)
    return True


def _curve(axis: Any, rows: Sequence[Row], x: str, y: str) -> None:
    if not rows:
        return
    family = rows[0]["family"]
    ordered = sorted(rows, key=lambda row: (row["weight"], -row["active"]))
    across, up = ([row["figures"][name] for row in ordered] for name in (x, y))
    axis.errorbar(
        [each["mean"] for each in across],
        [each["mean"] for each in up],
        xerr=[each["sd"] for each in across],
        yerr=[each["sd"] for each in up],
        marker="o", markersize=3, linewidth=1, elinewidth=0.6,
        color=COLOURS[family], label=LABELS[family],
    )  # fmt: skip
