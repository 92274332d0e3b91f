"""Small sources for the tests of effects, and single whole passes with hooks in float64."""

from __future__ import annotations

import copy
from functools import cache, partial

import numpy as np
import torch

from crosslens.activations import Source, TokenPolicy
from crosslens.coder import Coder, Layout
from crosslens.interactions.effects.measure import FIGURES, EffectPlan
from crosslens.interactions.neurons.contributions import effective, site_chunks
from crosslens.interactions.pairs.measure import PairPlan, measure_pairs
from crosslens.interactions.pairs.table import Triplets
from crosslens.lm.model import LanguageModel
from crosslens.text import Blocks
from tests.interaction_sites import coder_at, model_of

T = 14
PLAN = EffectPlan(pairs=3, tokens=9, blocks=3, least=3)


def many_blocks(n: int = 10, seed: int = 3) -> Blocks:
    """Two documents a block and some of the next block's; the last block ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 89, (n, T), generator=generator, dtype=torch.int32)
    docs = torch.arange(n, dtype=torch.int32)[:, None].expand(n, T).clone()
    docs[:, 9:] += 1
    docs[-1, 11:] = -1
    docs[:, 0] = -1
    tokens[:, 0] = 1
    documents = tuple(f"d{k}" for k in range(n + 1))
    return Blocks(tokens, docs, documents, bos_id=1, pad_id=0, special_ids=(0, 1))


def source_of(model: LanguageModel, *sites: str, blocks: Blocks | None = None) -> Source:
    layout = Layout(sites, tuple(model.width(site) for site in sites))
    text = many_blocks() if blocks is None else blocks
    return Source({model.name: model}, layout, text, TokenPolicy(), blocks_per_chunk=4)


def table_of(source: Source, coder: Coder, model: LanguageModel, **plan: int) -> Triplets:
    found = {site: effective(coder, model, site) for site in source.layout.sites}
    chunks = partial(site_chunks, source, coder, model, found)
    return measure_pairs(chunks, PairPlan(least=2, **plan)).triplets


@cache
def case(name: str, *sites: str) -> tuple[LanguageModel, Source, Coder, Triplets]:
    model = model_of(name)
    source = source_of(model, *sites)
    coder = coder_at(source.layout)
    return model, source, coder, table_of(source, coder, model, candidates=12)


def hooked(module: torch.nn.Module, site: str):
    """The module at a site, and how a hook takes something away there."""
    kind, layer = site.split(".")
    one = module.model.layers[int(layer)]
    if kind == "resid_post":
        return one.register_forward_hook
    if kind == "resid_pre":
        return one.register_forward_pre_hook
    return one.mlp.register_forward_pre_hook


def log_probabilities(double, site: str, tokens_T, removed_TD) -> torch.Tensor:
    """One whole pass of a float64 model, batch of one, with something taken away at a site."""

    def less(x):
        return x - removed_TD if isinstance(x, torch.Tensor) else (x[0] - removed_TD, *x[1:])

    before = not site.startswith("resid_post")
    hook = (lambda _m, args: less(args)) if before else (lambda _m, _args, out: less(out))
    handle = hooked(double, site)(hook)
    with torch.no_grad():
        logits = double(input_ids=tokens_T[None].long(), use_cache=False).logits[0]
    handle.remove()
    return logits.log_softmax(-1)


class Loops:
    """Everything from single whole passes in float64."""

    def __init__(self, source: Source, coder: Coder, model: LanguageModel) -> None:
        self.source, self.coder = source, coder
        self.double = copy.deepcopy(model.module).double()
        seen = model.capture(source.blocks.tokens_NT, list(source.layout.sites))
        rows = torch.cat([seen[site] for site in source.layout.sites], -1)
        with torch.no_grad():
            self.code = coder.encode(rows.flatten(0, 1)).view(*rows.shape[:2], -1).double()
        self.code[source.blocks.docs_NT < 0] = 0.0  # neither BOS nor padding has rows

    def part(self, site: str, latent: int, block: int) -> torch.Tensor:
        write = self.coder.wiring.write
        scale = self.coder.scale_write[write.index(site)].double()
        d = self.coder.W_dec[0][latent, write.slice(site)].double() / scale
        return self.code[block, :, latent, None] * d

    def active(self, latent: int, block: int) -> set[int]:
        return set((self.code[block, :, latent] > 0).nonzero().flatten().tolist())

    def told(self, block: int, t: int) -> bool:
        docs = self.source.blocks.docs_NT[block]
        return t + 1 < len(docs) and int(docs[t]) >= 0 and int(docs[t + 1]) >= 0

    def positions(self, i: int, j: int, block: int) -> tuple[list[int], list[int]]:
        """Here, and later in the same document."""
        both = self.active(i, block) & self.active(j, block)
        here = sorted(t for t in both if self.told(block, t))
        docs = self.source.blocks.docs_NT[block].tolist()
        later = [
            t
            for t in range(len(docs))
            if t not in here
            and self.told(block, t)
            and any(s < t and docs[s] == docs[t] for s in here)
        ]
        return here, later

    def figures(self, site: str, i: int, j: int, block: int) -> dict[int, dict[str, float]]:
        """Position → `FIGURES`."""
        tokens = self.source.blocks.tokens_NT[block]
        a, b = self.part(site, i, block), self.part(site, j, block)
        runs = [log_probabilities(self.double, site, tokens, x) for x in (0 * a, a, b, a + b)]
        found = {}
        for t in range(T - 1):
            losses = [-float(run[t, int(tokens[t + 1])]) for run in runs]
            d_i, d_j, d_ij = (loss - losses[0] for loss in losses[1:])
            p = runs[0][t].exp()
            kl = [sum((p * (runs[0][t] - run[t])).tolist()) for run in runs[1:]]
            added = (runs[1][t] + runs[2][t] - runs[0][t]).log_softmax(-1)
            beyond = float((runs[3][t].exp() * (runs[3][t] - added)).sum())
            of_kl = kl[2] - kl[0] - kl[1]
            values = (d_i, d_j, d_ij, d_ij - d_i - d_j, abs(d_ij - d_i - d_j))
            values += (*kl, of_kl, abs(of_kl), beyond)
            found[t] = dict(zip(FIGURES, values, strict=True))
        return found


def looked_at(loops: Loops, i: int, j: int, plan: EffectPlan) -> list[int]:
    """Blocks in the plan's order until there are enough tokens."""
    n = len(loops.source.blocks.tokens_NT)
    rank = np.random.default_rng(plan.seed).permutation(n)
    blocks, tokens = [], 0
    for block in sorted(range(n), key=lambda b: rank[b]):
        here, _ = loops.positions(i, j, block)
        if here and tokens < plan.tokens and len(blocks) < plan.blocks:
            blocks.append(block)
            tokens += len(here)
    return blocks


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
