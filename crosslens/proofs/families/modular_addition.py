"""Addition modulo p by one ReLU block."""

from __future__ import annotations

import torch

from crosslens.proofs.certificate import Refused
from crosslens.proofs.families.parts import Asked, Bounds, Family, affordable, share, within
from crosslens.proofs.ledger import Cost
from crosslens.proofs.ledger import modular_addition as modular_addition_cost
from crosslens.proofs.lemmas import modular_addition
from crosslens.proofs.rounding import up


def evaluate(asked: Asked) -> Bounds:
    """Points (a, b) with their labels."""
    points, labels, coder = asked.data["points"], asked.data["labels"], asked.coder
    for values in (points, labels):
        within("The data", values, asked.size["P"])
    hinted = "left" in coder
    if hinted != (asked.tier == "factors"):
        raise Refused(
            f"Tier {asked.tier} goes {'without' if hinted else 'with'} factors in the coder."
        )
    cost = _cost(asked)
    table = modular_addition.tables(asked.weights, coder["decoder"])
    hint = (coder["left"], coder["right"]) if hinted else None
    to_judge = modular_addition.Points(points, labels, asked.spare)
    if asked.tier in ("codes", "factors"):
        factors = modular_addition.factors(table, hint)
        found = modular_addition.by_codes(table, factors, to_judge)
    elif asked.tier == "box":
        found = modular_addition.by_box(table, to_judge)
    else:
        found = modular_addition.by_features(table, to_judge, pairs=asked.tier == "pairs")
    mean = float(up(torch.tensor(found.loss, dtype=torch.float64) / len(labels)))
    accuracy = share(found.right, len(labels))
    return Bounds(accuracy=accuracy, loss=mean, base=float(table.base), cost=cost)


def _cost(asked: Asked) -> Cost:
    size = {"R": 0, **asked.size}
    tokens, chunk = size["P"], min(size["M"], modular_addition.CHUNK)
    wide = tokens + size["N"]
    arrays = (3 * tokens * wide, chunk * wide, 9 * tokens * tokens)
    return affordable(modular_addition_cost(asked.tier, size), *arrays)


MODULAR_ADDITION = Family(
    weights={"W_E": "2 P D", "W_in": "D N", "b_in": "N", "W_out": "N D", "W_U": "D P"},
    coder={"decoder": "2 P D"},
    hints={"left": "N R", "right": "R P"},
    data={"points": "M 2", "labels": "M"},
    tiers=("codes", "factors", "additive", "pairs", "box"),
    evaluate=evaluate,
)
