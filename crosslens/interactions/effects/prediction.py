"""How well what was measured inside a pair's MLP predicts what ablating the pair does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crosslens.errors import UsageError, suggestion
from crosslens.interactions.effects.choice import CHOICES
from crosslens.interactions.effects.measure import Effects
from crosslens.interactions.effects.statistics import correlated
from crosslens.interactions.pairs.table import Floats, Triplets

BASELINES = ("cooccurrence", "decoder_cosine", "size_product")
"""What an interaction is compared with; see `Effects`."""
BOTH_WAYS = {
    "dominance": ("first_dominant", "second_dominant"),
    "gating": ("first_gated", "second_gated"),
}
"""Which latent of a pair is the first says nothing about it, so the two directions are added."""
_NO_MEASURES = {"site", "i", "j", "count", "measured", "sign", "shapley_error"}
_SIGNED = {"interaction", "kl_interaction"}


def prediction(
    effects: Effects,
    triplets: Triplets,
    target: str = "interaction_abs",
    among: Sequence[str] = CHOICES,
    beyond: str | None = None,
) -> dict[str, dict[str, object]]:
    """{metric: {"spearman": ρ, "ci": [low, high]}}: the rank correlation within sites of a metric
    and a measured effect, over the chosen pairs (`effects_statistics.correlated`).

    Metrics are the table's measures, `dominance` and `gating` of both directions together, and
    `BASELINES`. Where the target is a size, so are metrics: |x|. A metric known for fewer than five
    pairs, or the same for all, is left out.

    Args:
        triplets: the table that the effects were chosen from.
        target: a column of the effects.
        among: which kinds of choice to look at. The top pairs were chosen by a metric: that metric
            varies more among all than among pairs drawn at random.
        beyond: a metric, such as `size_product`; then the partial correlations, what goes with its
            ranks taken off both: what a metric knows that this one does not.

    Raises:
        UsageError: `beyond` is no metric.
    """
    effect_C = effects.columns()[target]
    inside_C = np.isin(effects.chosen.kind_C, list(among))
    size = target.removeprefix("later_") not in _SIGNED
    known = {name: np.abs(x_C) if size else x_C for name, x_C in metrics(effects, triplets).items()}
    if beyond is not None and beyond not in known:
        raise UsageError(f"There is no metric {beyond!r}.{suggestion(beyond, known)}")
    taken_off = None if beyond is None else known.pop(beyond)[inside_C]
    found: dict[str, dict[str, object]] = {}
    for name, x_C in known.items():
        site_C = effects.chosen.site_C[inside_C]
        rho = correlated(x_C[inside_C], effect_C[inside_C], site_C, taken_off)
        if rho is not None:
            found[name] = {"spearman": rho.value, "ci": [rho.low, rho.high]}
    return found


def metrics(effects: Effects, triplets: Triplets) -> dict[str, Floats]:
    """Every metric by name, one number for each chosen pair; NaN where it is not known."""
    columns = effects.columns()
    asked = list(zip(*(columns[name].tolist() for name in ("site", "i", "j")), strict=True))
    found: dict[str, Floats] = {}
    for table in filter(None, (effects.others, triplets)):
        _fill(found, table, asked)
    for name, parts in BOTH_WAYS.items():
        ways = [found.pop(part) for part in parts if part in found]
        if ways:
            found[name] = np.sum(ways, axis=0)
    return found | {name: columns[name] for name in BASELINES}


def _fill(found: dict[str, Floats], table: Triplets, asked: list[tuple[str, int, int]]) -> None:
    """Take a table's measures of the pairs that it holds."""
    columns = table.columns()
    pairs = zip(*(columns[name].tolist() for name in ("site", "i", "j")), strict=True)
    row_of = {pair: row for row, pair in enumerate(pairs)}
    at = [(c, row_of[pair]) for c, pair in enumerate(asked) if pair in row_of]
    for name, column in columns.items():
        if name in _NO_MEASURES or name.endswith(("_low", "_high")):
            continue
        whole_C = found.setdefault(name, np.full(len(asked), np.nan))
        for c, row in at:
            whole_C[c] = column[row]
