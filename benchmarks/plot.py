"""How a step's time grows with the latents, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PARTS = {"encoder": "#4477aa", "optimizer": "#ee6677", "rest": "#bbbbbb"}


def draw(file: Path, sweeps: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """A panel for each sweep: seconds of a step, split into the parts that are accounted for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, panels = plt.subplots(
        1, len(sweeps), figsize=(4 * len(sweeps), 3.2), squeeze=False, layout="constrained"
    )
    for panel, (name, points) in zip(panels[0], sweeps.items(), strict=True):
        grows = name.partition("_")[0]
        ran = [point for point in points if "reason" not in point]
        sizes = [point[grows] for point in ran]
        parts = [[max(point[f"{part}_seconds"], 0.0) for point in ran] for part in PARTS]
        panel.stackplot(sizes, *parts, labels=list(PARTS), colors=list(PARTS.values()))
        panel.plot(sizes, [point["step_seconds"] for point in ran], "k.-", label="step")
        panel.set(title=name.replace("_", ", sites: "), xlabel=grows, ylim=(0, None))
        panel.locator_params(axis="x", nbins=5)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0][0].set_ylabel("seconds of a step")
    panels[0][0].legend(frameon=False)
    figure.savefig(file)
    plt.close(figure)
