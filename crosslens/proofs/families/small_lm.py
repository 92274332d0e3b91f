"""A small causal language model: the mean loss over given positions, tier by tier."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crosslens.proofs import ledger_lm
from crosslens.proofs.certificate import Refused
from crosslens.proofs.families.parts import Asked, Bounds, Family, Layer, affordable, share, within
from crosslens.proofs.ledger import Cost, total
from crosslens.proofs.ledger_lm import Counted
from crosslens.proofs.lemmas import readout as out
from crosslens.proofs.lemmas import stream
from crosslens.proofs.lemmas.contexts import Contexts, contexts
from crosslens.proofs.lemmas.normalisation import rms_moves
from crosslens.proofs.lemmas.recursion import Code, distance, recursion
from crosslens.proofs.lemmas.stream import FLOOR, Rows, exactly, normalised
from crosslens.proofs.rounding import sum_up, up

RUN = ("distinct", "regions", "stream")
"""Tiers that work out the activations; "stream" does no more, so that it bounds sites only."""
RECURSED = ("codes", "additive", "pairs")
"""Tiers that know activations by the coder, and an error got by recursion."""


@dataclass(frozen=True)
class Task:
    """Positions of one tier, and the nodes their contexts lead to."""

    tier: str
    at: Tensor
    """Positions, s T + t."""
    nodes: Tensor
    place: Tensor
    """Of each position's node among `nodes`."""


@dataclass(frozen=True)
class Plan:
    """Tasks that share one tree, and what they cost."""

    tree: Contexts
    tasks: tuple[Task, ...]
    cost: Cost


@dataclass(frozen=True)
class Part:
    """What is found of some of the positions."""

    at: Tensor
    loss: Tensor
    right: Tensor
    errors: tuple[Tensor, ...] = ()
    """At least ‖x − x̂‖ of each position, site by site."""
    layers: tuple[Layer, ...] = ()


def evaluate(asked: Asked) -> Bounds:
    """Every position by its group's tier; never more than its label's cap."""
    plans = planned(asked)
    cost = cost_of(asked, plans)
    loss_N, parts = positions(asked, plans)
    right = sum(int(part.right.sum()) for part in parts)
    whole = parts[0] if parts and len(parts[0].at) == len(loss_N) else None
    names = sites(asked.size["L"])
    means = [_mean(error_N) for error_N in whole.errors] if whole else []
    return Bounds(
        accuracy=share(right, len(loss_N)),
        loss=_mean(loss_N),
        base=float(whole.errors[0].max()) if whole else math.inf,
        cost=cost,
        sites=dict(zip(names, means, strict=False)),
        layers=next((part.layers for part in parts if part.layers), ()),
    )


def planned(asked: Asked) -> list[Plan]:
    """Which contexts the tiers need, after a look at all numbers; nothing else is worked out."""
    tier_N = _groups(asked)
    found = []
    for tiers in (RUN, *((tier,) for tier in RECURSED)):
        used = torch.cat([_at(asked, tier_N, tier) for tier in tiers])
        if not used.numel():
            continue
        tree, tasks = _tree(asked, used), []
        for tier in tiers:
            at = _at(asked, tier_N, tier)
            nodes, place = torch.unique(tree.node_ST.flatten()[at], return_inverse=True)
            tasks.append(Task(tier, at, nodes, place))
        kept = tuple(task for task in tasks if task.at.numel())
        found.append(Plan(tree, kept, _plan_cost(asked, tree, kept)))
    return found


def _plan_cost(asked: Asked, tree: Contexts, tasks: tuple[Task, ...]) -> Cost:
    found = Counted(nodes=len(tree.first_U), tokens=len(tree.tokens_X))
    costs = [ledger_lm.body(asked.size, found)] if tasks[0].tier in RUN else []
    for task in tasks:
        found = Counted(nodes=len(tree.first_U), judged=len(task.nodes), told=len(task.at))
        if task.tier in RECURSED:
            costs.append(ledger_lm.recursed(asked.size, task.tier, found))
        elif task.tier != "stream":
            count = ledger_lm.in_full if task.tier == "distinct" else ledger_lm.near
            costs.append(count(asked.size, found))
    return total(*costs)


def cost_of(asked: Asked, plans: list[Plan]) -> Cost:
    """All that a proof takes, if it can be borne."""
    bits = ledger_lm.bits(asked.size, frozenset(asked.tiers.values()), len(asked.tiers))
    found = total(ledger_lm.caps(asked.size), Cost(bits=bits), *(plan.cost for plan in plans))
    return affordable(found, 1)


def positions(asked: Asked, plans: list[Plan]) -> tuple[Tensor, list[Part]]:
    """At least each position's loss, and the parts that say so."""
    read = out.readout(asked.weights["W_U"])
    cap_N = out.caps(read)[asked.data["labels"].flatten()]
    parts = [
        _run(asked, read, plan) if plan.tasks[0].tier in RUN else _recursed(asked, read, plan)
        for plan in plans
    ]
    loss_N = cap_N.clone()
    for part in parts:
        loss_N[part.at] = torch.minimum(part.loss, cap_N[part.at])
    return loss_N, parts


def sites(layers: int) -> tuple[str, ...]:
    """Where the coder has vectors, in order."""
    each = ((f"resid_mid.{layer}", f"resid_post.{layer}") for layer in range(layers))
    return ("embed", *(site for pair in each for site in pair))


def _groups(asked: Asked) -> Tensor:
    """Each position's group, as a place among the sorted names, after a look at all numbers."""
    size, coder, data = asked.size, asked.coder, asked.data
    if size["D"] % size["H"] or size["P"] != 2 * size["L"] + 1 or size["V"] < 2:
        raise Refused(
            f"{size['H']} heads must share out {size['D']} coordinates evenly, the coder needs "
            f"{2 * size['L'] + 1} sites (found {size['P']}), and the vocabulary two tokens or more."
        )
    for name, values, most in (
        ("The tokens", data["tokens"], size["V"]),
        ("The labels", data["labels"], size["V"]),
        ("The answers", coder["answers"], size["V"]),
        ("The codes", coder["index"], size["F"]),
        ("The regions", coder["region"], size["C"]),
    ):
        within(name, values, most)
    if bool((coder["strength"] < 0).any()):
        raise Refused("Strengths of features must not be negative.")
    if ("group" in coder) != (len(asked.tiers) > 1):
        raise Refused("A certificate with several groups needs the coder's `group`, and only one.")
    group = coder.get("group", torch.zeros_like(data["tokens"]))
    within("The groups", group, len(asked.tiers))
    widest = max(size["C"] * size["V"], size["C"] * (size["K"] + 1) * size["N"])
    affordable(Cost(), widest, (size["F"] + 1) ** 2, size["S"] * size["T"] ** 2 * size["D"])
    return group.flatten()


def _at(asked: Asked, tier_N: Tensor, *tiers: str) -> Tensor:
    """Positions with one of these tiers."""
    names = sorted(asked.tiers)
    known = torch.tensor([asked.tiers[name] in tiers for name in names])
    return known[tier_N].nonzero()[:, 0]


def _regions(asked: Asked, tree: Contexts) -> Tensor:
    """Each node's region: that of the first position that leads there."""
    return asked.coder["region"].flatten()[tree.first_U]


def _code(asked: Asked) -> Code:
    coder = asked.coder
    return Code(coder["decoder"], coder["decoder_bias"], coder["index"], coder["strength"])


def _tree(asked: Asked, at: Tensor) -> Contexts:
    tokens = asked.data["tokens"]
    used = torch.zeros(tokens.numel(), dtype=torch.bool)
    used[at] = True
    return contexts(tokens, used.reshape(tokens.shape))


def _run(asked: Asked, read: out.Readout, plan: Plan) -> Part:
    """Positions whose activations are worked out."""
    tree = plan.tree
    found = stream.run(asked.weights, tree)
    rows = normalised(found.post[-1])
    judged = [_judged(asked, read, tree, rows, task) for task in plan.tasks]
    at = torch.cat([task.at for task in plan.tasks])
    node_N = tree.node_ST.flatten()[at]
    code, region_U = _code(asked), _regions(asked, tree)
    errors = tuple(
        up(distance(site, code.decoded(i), region_U) + code.decode_off(i))[node_N]
        for i, site in enumerate(found.sites)
    )
    loss, right = (torch.cat(parts) for parts in zip(*judged, strict=True))
    return Part(at, loss, right, errors)


def _judged(
    asked: Asked, read: out.Readout, tree: Contexts, rows: Rows, task: Task
) -> tuple[Tensor, Tensor]:
    """Losses of a task's positions, and whether they are right."""
    if task.tier == "stream":
        return torch.full((len(task.at),), math.inf).double(), torch.zeros(len(task.at)) > 0
    label = asked.data["labels"].flatten()[task.at]
    if task.tier == "distinct":
        leading = out.in_full(read, rows.at(task.nodes))
    else:
        centre = normalised(exactly(_code(asked).decoded(asked.size["P"] - 1))).value
        apart = out.regions(read, centre, asked.coder["answers"])
        along = out.directions(read, asked.coder["basis"])
        region = _regions(asked, tree)[task.nodes]
        leading = out.near(read, rows.at(task.nodes), region, apart, along)
    own = out.labels_down(read, rows.at(task.nodes[task.place]), label)
    loss = out.losses_up(leading, task.place, own)
    return loss, out.right(leading, task.place, own, label, asked.spare)


def _recursed(asked: Asked, read: out.Readout, plan: Plan) -> Part:
    """Positions that are known by their regions' codes only."""
    (task,), tree, code = plan.tasks, plan.tree, _code(asked)
    label = asked.data["labels"].flatten()[task.at]
    node_N, region_U = task.nodes[task.place], _regions(asked, tree)
    reached = recursion(asked.weights, code, region_U, tree, task.tier)
    last = code.decoded(asked.size["P"] - 1)
    centre = normalised(exactly(last))
    moved_U = rms_moves(last[region_U], reached.eps[-1], floor=FLOOR)
    reach_U = up(moved_U + centre.eps)
    apart = out.regions(read, centre.value, asked.coder["answers"])
    leading = out.far(read, apart, region_U[task.nodes], reach_U[task.nodes])
    own = out.labels_far_down(read, apart, region_U[node_N], reach_U[node_N], label)
    loss = out.losses_up(leading, task.place, own)
    right = out.right(leading, task.place, own, label, asked.spare)
    errors = tuple(up(eps + code.decode_off(i))[node_N] for i, eps in enumerate(reached.eps))
    terms = ("before", "propagation", "interaction", "transition", "after")
    layers = tuple(
        Layer(site=site, **{term: _mean(getattr(step, term)[node_N]) for term in terms})
        for site, step in zip(sites(asked.size["L"])[1:], reached.steps, strict=True)
    )
    return Part(task.at, loss, right, errors, layers)


def _mean(values_N: Tensor) -> float:
    """At least the mean of non-negative numbers; 0 where all are."""
    if not bool(values_N.any()):
        return 0.0
    return float(up(sum_up(values_N, 0) / len(values_N)))


SMALL_LM = Family(
    weights={
        "W_E": "V D",
        "W_Q": "L D D",
        "W_K": "L D D",
        "W_V": "L D D",
        "W_O": "L D D",
        "bias": "L H T",
        "W_in": "L D N",
        "W_out": "L N D",
        "W_U": "D V",
    },
    coder={
        "decoder": "P F D",
        "decoder_bias": "P D",
        "index": "C K",
        "strength": "C K",
        "region": "S T",
        "answers": "C A",
        "basis": "D R",
    },
    hints={"group": "S T"},
    whole=frozenset({"index", "region", "answers", "group"}),
    data={"tokens": "S T", "labels": "S T"},
    tiers=(*RUN, *RECURSED, "box"),
    evaluate=evaluate,
    mixes=True,
)
