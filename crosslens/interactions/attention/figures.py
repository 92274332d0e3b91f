"""The figures of a head, and the table of its pairs, from the sums of the second pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosslens.interactions.attention.plan import AttentionPlan
from crosslens.interactions.attention.scores import (
    CONTENT,
    HEAD_SUMS,
    ORIGINS,
    PAIR_SUMS,
    HeadSums,
    ratio_interval,
)
from crosslens.interactions.intervals import mean_interval
from crosslens.interactions.pairs.kinds import HEAD_KINDS, binding, shares_of


def figures(sums: HeadSums, head: int, plan: AttentionPlan) -> dict[str, Any]:
    """What is told of a head, as JSON takes it."""
    of = {name: sums.total_MHG[m, head : head + 1] for m, name in enumerate(HEAD_SUMS)}
    queries_1G, variance_1G = sums.queries_G[None].double(), of["variance"]
    share, share_ci = _told(of["between"], variance_1G)
    bound, bound_ci = _told(of["bound"], queries_1G)
    moved, moved_ci = _told(of["variation"], queries_1G)
    with_error = [f"{q} × {k}" for q in ORIGINS for k in ORIGINS if "error" in (q, k)]
    known = [f"{q} × {k}" for q in ORIGINS[:2] for k in ORIGINS[:2]]
    error_1G = torch.stack([of[name] for name in with_error]).sum(0)
    table = pair_columns(sums, head)
    return {
        "site": sums.usage.view.site,
        "queries": int(sums.queries_G.sum()),
        "variance": _told(variance_1G, queries_1G)[0],
        "interaction_share": share,
        "interaction_ci": share_ci,
        "content": {name: _told(of[name], variance_1G)[0] for name in CONTENT},
        "origin": {name: _told(of[name], variance_1G)[0] for name in known},
        "error_share": _told(error_1G, variance_1G)[0],
        "elsewhere": _told(of["elsewhere"], queries_1G)[0],
        "dominance": {
            "bound": bound,
            "bound_ci": bound_ci,
            "variation": moved,
            "variation_ci": moved_ci,
            "bound_of_none": _told(of["bound of none"], queries_1G)[0],
            "variation_of_none": _told(of["variation of none"], queries_1G)[0],
        },
        "coverage": _coverage(sums, head),
        "by_kind": shares_of(table["product"], table["kind"], HEAD_KINDS),
        "pairs": _pairs(table, plan.top),
    }


def _told(part_1G: Tensor, whole_1G: Tensor) -> tuple[float | None, list[float] | None]:
    """A ratio and its interval; None for what is not known."""
    ratio, low, high = (float(x) for x in ratio_interval(part_1G, whole_1G))
    known = [each if np.isfinite(each) else None for each in (ratio, low, high)]
    return known[0], None if known[1] is None else [low, high]


def _coverage(sums: HeadSums, head: int) -> float | None:
    """Share of all pairs' |flow| that the head's own candidates have."""
    whole = float(sums.usage.whole_H[head])
    flow_P = sums.pair_PGHM[:, :, head, PAIR_SUMS.index("flow")].sum(1)
    return float(flow_P[sums.wanted_PH[:, head]].sum()) / whole if whole > 0 else None


def _pairs(table: Mapping[str, Any], n: int) -> list[dict[str, Any]]:
    found = []
    for c in range(min(n, len(table["query"]))):
        low, high = (float(table[f"strength_{end}"][c]) for end in ("low", "high"))
        found.append(
            {
                "query": int(table["query"][c]),
                "key": int(table["key"][c]),
                "kind": str(table["kind"][c]),
                "strength": float(table["strength"][c]),
                "ci": [low, high] if np.isfinite(low) else None,
                "frequency": float(table["frequency"][c]),
                "sign": int(table["sign"][c]),
                "meetings": int(table["meetings"][c]),
                "share": float(table["share"][c]),
                "attention": float(table["attention"][c]),
                "distance": float(table["distance"][c]),
            }
        )
    return found


def pair_columns(sums: HeadSums, head: int | None = None) -> dict[str, Any]:
    """The candidates of a head, or of all heads, the highest product first: columns by name.

    `strength`: mean over meetings of |c̃|, with its interval; `signed`: of c̃; `product`: strength ×
    frequency; `share`: of the head's variance of scores; `attention`, `distance`: means over
    meetings; `kind`: one of `HEAD_KINDS`.
    """
    view, wanted_PH = sums.usage.view, sums.wanted_PH
    if head is not None:
        only_H = torch.arange(wanted_PH.shape[1], device=wanted_PH.device) == head
        wanted_PH = wanted_PH & only_H
    p_C, h_C = wanted_PH.nonzero(as_tuple=True)
    met_CG, total_CGM = sums.met_PG[p_C], sums.pair_PGHM[p_C, :, h_C]
    met_C, of = met_CG.sum(1), {name: total_CGM[..., m] for m, name in enumerate(PAIR_SUMS)}
    strength = mean_interval(of["size"], met_CG)
    signed = mean_interval(of["signed"], met_CG)
    frequency_C = met_C / sums.keys_G.sum()
    variance_H = sums.total("variance").sum(1)
    columns = {
        "layer": torch.full_like(h_C, view.layer),
        "head": h_C,
        "query": sums.key_P[p_C] // view.n_latents,
        "key": sums.key_P[p_C] % view.n_latents,
        "meetings": met_C,
        "frequency": frequency_C.double(),
        "strength": strength[0],
        "strength_low": strength[1],
        "strength_high": strength[2],
        "product": strength[0] * frequency_C,
        "sign": (signed[1] > 0).long() - (signed[2] < 0).long(),
        "signed": signed[0],
        "signed_low": signed[1],
        "signed_high": signed[2],
        "share": of["shared"].sum(1) / variance_H[h_C],
        "attention": of["attention"].sum(1) / met_C,
        "distance": sums.distance_P[p_C] / met_C,
    }
    order = columns["product"].argsort(descending=True, stable=True)
    found = {name: each[order].cpu().numpy() for name, each in columns.items()}
    return {"site": np.full(len(order), view.site), **found, "kind": binding(found)}
