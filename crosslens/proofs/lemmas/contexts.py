"""Equal contexts once: the positions of many sequences as the nodes of one tree.

A causal model's activations at a position depend on the tokens up to it alone, so positions with
equal contexts share a node. Nodes are numbered level by level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Contexts:
    """The nodes U that some positions lead to, each with its path from the root, itself last."""

    node_ST: Tensor
    """Each position's node; −1 where nothing later in its sequence is asked for."""
    first_U: Tensor
    """A position that leads to each node: s T + t."""
    path_UT: Tensor
    """Nodes from the root on; beyond the node's own depth, any."""
    age_UT: Tensor
    """How far back the path's nodes are; negative beyond the node itself."""
    tokens_X: Tensor
    """The tokens that occur."""
    token_U: Tensor
    """Each node's token, as a place in `tokens_X`."""

    @property
    def inside_UT(self) -> Tensor:
        """Where `path_UT` counts."""
        return self.age_UT >= 0


def contexts(tokens_ST: Int[Tensor, "S T"], used_ST: Bool[Tensor, "S T"]) -> Contexts:
    """The tree that the used positions need: what comes before a used position is in it."""
    S, T = tokens_ST.shape
    needed = used_ST.flip(1).cumsum(1).flip(1) > 0
    node_ST = torch.full((S, T), -1)
    parent_S, vocabulary, made = torch.zeros(S, dtype=torch.int64), int(tokens_ST.max()) + 1, 0
    paths, firsts = torch.empty(0, 0, dtype=torch.int64), []
    for t in range(T):
        rows = needed[:, t].nonzero()[:, 0]
        key = parent_S[rows] * vocabulary + tokens_ST[rows, t]
        distinct, which = torch.unique(key, return_inverse=True)
        own = made + torch.arange(len(distinct))
        first = torch.full((len(distinct),), S).scatter_reduce(0, which, rows, "amin")
        above = paths[parent_S[first]] if t else torch.empty(len(own), 0, dtype=torch.int64)
        level = torch.cat([above[:, :t], own[:, None]], 1)
        wide = torch.nn.functional.pad(level, (0, T - t - 1))
        paths = torch.cat([paths, wide]) if t else wide
        node_ST[rows, t] = made + which
        parent_S[rows] = made + which
        firsts.append(first * T + t)
        made += len(distinct)
    first_U = torch.cat(firsts)
    tokens_X, token_U = torch.unique(tokens_ST.flatten()[first_U], return_inverse=True)
    age_UT = (first_U % T)[:, None] - torch.arange(T)
    return Contexts(node_ST, first_U, paths, age_UT, tokens_X, token_U)
