"""What attention's measures must equal: loops over queries, keys, heads and pairs of parts."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import torch

from crosslens.activations import Source, TokenPolicy
from crosslens.coder import Coder
from crosslens.interactions.attention.plan import AttentionPlan
from crosslens.interactions.attention.view import HeadsView
from crosslens.lm.model import LanguageModel
from tests.interaction_sites import source_at
from tests.test_lm_families import tokens

CASES = {
    "llama": "resid_post.0",
    "mistral": "resid_pre.1",
    "qwen2": "attn_in.1",
    "gpt2": "resid_mid.0",
    "neox-parallel": "resid_pre.1",
    "phi": "attn_in.1",
}
"""Model → the site at which it is measured: every kind of position, norm and place."""
PLAN = AttentionPlan(queries=9, candidates=1000, contenders=1000, groups=2)
"""Everything there is."""
ORIGINS = ("latents", "biases", "error")


def source_of(model: LanguageModel, *sites: str, special: bool = False) -> Source:
    """Two blocks of nine tokens, of which, if asked, the special ones do not count."""
    source = source_at(model, *sites, per_chunk=1)
    if not special:
        return source
    ids = tuple(int(i) for i in (tokens()[0, 0], tokens()[1, 3], tokens()[1, 4]))
    blocks = replace(source.blocks, special_ids=ids)
    policy = TokenPolicy(drop_padding=False, drop_special=True)
    return replace(source, blocks=blocks, policy=policy)


@dataclass(frozen=True)
class Part:
    """One summand of a row: `latent` where it is of one."""

    origin: str
    latent: int | None
    weight: float
    query: torch.Tensor
    """[H, A], not turned."""
    key: torch.Tensor
    """[J, A]"""


def turn(x: torch.Tensor, view: HeadsView, position: int) -> torch.Tensor:
    """Each pair of coordinates turned by hand."""
    out, speeds = x.clone(), view.heads.turn_F.tolist()
    n = len(speeds)
    for f, speed in enumerate(speeds):
        c, s = math.cos(position * speed), math.sin(position * speed)
        out[..., f] = c * x[..., f] - s * x[..., n + f]
        out[..., n + f] = c * x[..., n + f] + s * x[..., f]
    return out


def parts_of(
    model: LanguageModel, coder: Coder, view: HeadsView, row: int, counted: bool
) -> list[Part]:
    """The summands of one row (of both blocks' rows in turn), in float64."""
    seen = {site: x.flatten(0, 1)[row] for site, x in model.capture(tokens(), ["*"]).items()}
    z_L = coder.encode(torch.cat([seen[site] for site in coder.wiring.read.sites])[None])[
        0
    ].double()
    write = coder.wiring.write
    scale = coder.scale_write[write.index(view.site)].double()
    decoder = coder.W_dec[0][:, write.slice(view.site)].double() / scale
    bias = coder.b_dec[write.slice(view.site)].double() / scale
    given = seen[view.input_site].double()
    norm, gain, constant, scalar, mean = view.norm, 1.0, torch.zeros_like(given), 1.0, 0.0
    if norm is not None:
        mean = 1.0 if norm.kind == "layer" else 0.0
        centred = given - mean * given.mean()
        scalar = float(1 / ((centred**2).mean() + norm.eps) ** 0.5)
        gain = norm.gain_D.double()
        constant = constant if norm.bias_D is None else norm.bias_D.double()

    def part(origin: str, latent: int | None, weight: float, x: torch.Tensor) -> Part:
        fixed = origin == "biases"
        x = (x - mean * x.mean()) * scalar * gain + constant * fixed
        heads = view.heads
        query = heads.W_Q_HAD.double() @ x + heads.b_Q_HA.double() * fixed
        key = heads.W_K_JAD.double() @ x + heads.b_K_JA.double() * fixed
        return Part(origin, latent, weight, query, key)

    active = [i for i in range(len(z_L)) if z_L[i] > 0 and counted]
    rows = [float(z_L[i]) * decoder[i] for i in active]
    found = [
        part("latents", i, float(z_L[i]) * scalar, x) for i, x in zip(active, rows, strict=True)
    ]
    error = given - sum(rows, torch.zeros_like(given)) - bias
    return [*found, part("biases", None, 1.0, bias), part("error", None, 1.0, error)]


@dataclass(frozen=True)
class Met:
    """A pair at one head and query: what it brings at every key that counts, 0 where it is not."""

    row: int
    brought: dict[int, float]
    centred: dict[int, float]
    attention: dict[int, float]
    scores: dict[int, float]
    back: dict[int, int]


@dataclass
class Truth:
    """Sums over queries; keys of the dictionaries end with the head."""

    queries: int = 0
    keys: int = 0
    groups: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    head: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))
    by_group: dict[tuple[str, int, int], float] = field(default_factory=lambda: defaultdict(float))
    met: dict[tuple[int, int, int], list[Met]] = field(default_factory=lambda: defaultdict(list))
    carried: dict[tuple[int, int], float] = field(default_factory=lambda: defaultdict(float))
    entries: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    weight: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    distances: list[int] = field(default_factory=list)
    scores: dict[tuple[int, int, int], dict[int, float]] = field(default_factory=dict)
    """(block, query, head) → key → the sum of all products of parts."""

    def add(self, name: str, head: int, group: int, value: float) -> None:
        self.head[name, head] += value
        self.by_group[name, head, group] += value


def loops(model: LanguageModel, coder: Coder, view: HeadsView, counted: torch.Tensor) -> Truth:
    """Everything, over all queries that have two keys that count."""
    truth, length = Truth(), counted.shape[1]
    rows = [
        [parts_of(model, coder, view, b * length + t, bool(counted[b, t])) for t in range(length)]
        for b in range(len(counted))
    ]
    kept = [parts for b, each in enumerate(rows) for parts in _kept(each, counted[b])]
    means = tuple(
        sum(sum(getattr(part, side) for part in parts) for parts in kept) / len(kept)
        for side in ("query", "key")
    )
    for parts in kept:
        for part in parts[:-2]:
            truth.entries[part.latent] += 1
            truth.weight[part.latent] += part.weight
    documents = source_at(model, view.site).blocks.docs_NT
    for b, block in enumerate(rows):
        for t in range(length):
            reach = [u for u in range(t + 1) if t - u < (view.heads.window or length)]
            keys = [u for u in reach if counted[b, u]]
            if counted[b, t] and len(keys) > 1:
                group = int(documents[b, t]) % PLAN.groups
                truth.queries += 1
                truth.keys += len(keys)
                truth.groups[group] += 1
                truth.distances += [t - u for u in keys]
                turned = {
                    (p, u): turn(one.query, view, t - u)
                    for p, one in enumerate(block[t])
                    for u in reach
                }
                for head in range(view.heads.n_heads):
                    _of_query(truth, view, block, means, (b, t, head, group), (turned, keys))
    return truth


def _kept(block: list[list[Part]], counted: torch.Tensor) -> list[list[Part]]:
    return [parts for t, parts in enumerate(block) if counted[t]]


def centred(values: dict[int, float]) -> dict[int, float]:
    mean = sum(values.values()) / len(values)
    return {u: value - mean for u, value in values.items()}


def softmax(values: dict[int, float]) -> dict[int, float]:
    top = max(values.values())
    whole = sum(math.exp(v - top) for v in values.values())
    return {u: math.exp(v - top) / whole for u, v in values.items()}


def _of_query(truth, view, block, means, at, known) -> None:
    b, t, h, group = at
    turned, keys = known
    reach = sorted({u for _, u in turned})
    j = h // (view.heads.n_heads // view.heads.n_groups)

    def product(q: torch.Tensor, k: torch.Tensor, u: int) -> float:
        return view.heads.scale * float(turn(q[h], view, t - u) @ k[j])

    brought = {
        (p, u): [view.heads.scale * float(query[h] @ other.key[j]) for other in block[u]]
        for (p, u), query in turned.items()
    }
    scores = {u: sum(sum(brought[p, u]) for p in range(len(block[t]))) for u in reach}
    truth.scores[b, t, h] = scores
    weights = softmax(scores)
    s = centred({u: scores[u] for u in keys})
    n = len(keys)
    truth.add("variance", h, group, sum(v * v for v in s.values()) / n)
    truth.add("elsewhere", h, group, sum(w for u, w in weights.items() if u not in keys))
    for p, one in enumerate(block[t]):
        for u in keys:
            for r, other in enumerate(block[u]):
                name = f"{one.origin} × {other.origin}"
                truth.add(name, h, group, brought[p, u][r] * s[u] / n)
    _content(truth, block, means, at, (s, product))
    _dominated(truth, block[t], at, {u: scores[u] for u in keys}, brought)
    for u in keys:
        for other in block[u][:-2]:
            truth.carried[h, other.latent] += weights[u] * other.weight
    _pairs(truth, block, at, keys, (brought, s, weights))


def _content(truth, block, means, at, known) -> None:
    """Mean and rest of the query with mean and rest of the keys."""
    _, t, h, group = at
    s, product = known
    query = sum(part.query for part in block[t])
    between = {}
    for u in s:
        key = sum(part.key for part in block[u])
        split = {
            "position": (means[0], means[1]),
            "key": (means[0], key - means[1]),
            "query": (query - means[0], means[1]),
            "interaction": (query - means[0], key - means[1]),
        }
        for name, (q, k) in split.items():
            value = product(q, k, u)
            truth.add(name, h, group, value * s[u] / len(s))
            if name == "interaction":
                between[u] = value
    truth.add("between", h, group, sum(v * v for v in centred(between).values()) / len(s))


def _dominated(truth, own, at, scores, brought) -> None:
    """Keep each latent of the query in turn; the one that leaves the least oscillation counts."""
    _, _, h, group = at
    left = []
    for p in range(len(own) - 2):
        alone = {u: sum(brought[p, u]) for u in scores}
        rest = [scores[u] - alone[u] for u in scores]
        left.append((max(rest) - min(rest), alone))
    if not left:
        left = [(max(scores.values()) - min(scores.values()), dict.fromkeys(scores, 0.0))]
    oscillation, alone = min(left, key=lambda each: each[0])
    truth.add("bound", h, group, math.tanh(oscillation / 4))
    truth.add("variation", h, group, distance(scores, alone))
    whole = max(scores.values()) - min(scores.values())
    truth.add("bound of none", h, group, math.tanh(whole / 4))
    truth.add("variation of none", h, group, distance(scores, dict.fromkeys(scores, 0.0)))


def distance(first: dict[int, float], second: dict[int, float]) -> float:
    a, b = softmax(first), softmax(second)
    return sum(abs(a[u] - b[u]) for u in a) / 2


def _pairs(truth, block, at, keys, known) -> None:
    _, t, h, group = at
    brought, s, weights = known
    found: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for p, one in enumerate(block[t][:-2]):
        for u in keys:
            for r, other in enumerate(block[u][:-2]):
                found[one.latent, other.latent][u] = brought[p, u][r]
    for (i, other), at_keys in found.items():
        lifted = centred({u: at_keys.get(u, 0.0) for u in keys})
        truth.met[i, other, h].append(
            Met(
                row=group,
                brought=at_keys,
                centred={u: lifted[u] for u in at_keys},
                attention={u: weights[u] for u in at_keys},
                scores={u: s[u] / len(keys) for u in at_keys},
                back={u: t - u for u in at_keys},
            )
        )
