"""The largest of K tokens by one attention head."""

from __future__ import annotations

import math

from crosslens.proofs.certificate import Refused
from crosslens.proofs.families.parts import Asked, Bounds, Family, affordable, share
from crosslens.proofs.ledger import max_of_k as max_of_k_cost
from crosslens.proofs.lemmas import max_of_k

COUNTED = {
    "codes": max_of_k.certified_by_codes,
    "pairs": max_of_k.certified_by_pairs,
    "pessimum": max_of_k.certified_by_pessimum,
    "box": max_of_k.certified_by_box,
}


def evaluate(asked: Asked) -> Bounds:
    """All sequences, of `domain` = (vocabulary, length)."""
    size, domain = asked.size, asked.data["domain"].tolist()
    if domain != [size["V"], size["K"]] or size["V"] < 2 or size["K"] > 8:
        raise Refused(
            f"The data are all sequences of {domain} (tokens, length); this model "
            f"takes {size['V']} tokens and {size['K']} places (tokens ≥ 2, places ≤ 8)."
        )
    cost = affordable(max_of_k_cost(asked.tier, size), size["K"] * size["V"] ** 3)
    table = max_of_k.tables(asked.weights, asked.coder["decoder"])
    right, among = COUNTED[asked.tier](table, asked.spare), size["V"] ** size["K"]
    return Bounds(accuracy=share(right, among), loss=math.inf, base=float(table.base), cost=cost)


MAX_OF_K = Family(
    weights={
        "W_E": "V D",
        "W_P": "K D",
        "W_Q": "D H",
        "W_K": "D H",
        "W_V": "D H",
        "W_O": "H D",
        "W_U": "D V",
    },
    coder={"decoder": "K V D"},
    data={"domain": "2"},
    tiers=tuple(COUNTED),
    evaluate=evaluate,
)
