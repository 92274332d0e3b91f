"""Which latents of a site interact mostly among themselves: Leiden clusters of the sparse graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosslens.errors import CrosslensError, UsageError
from crosslens.interactions.clusters.agreement import adjusted_rand
from crosslens.interactions.pairs.table import Floats, Ints, Order, Triplets

ITERATIONS = 10
"""Of Leiden's whole cycle, each from the partition of the one before."""


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """How clusters are found."""

    by: Order = "product"
    """What an edge weighs."""
    resolution: float = 1.0
    """γ of modularity; above 1 clusters are smaller."""
    seeds: int = 10
    """Partitions from different seeds; that with the highest modularity counts."""
    rewired: int = 5
    """Graphs with the same weights and numbers of edges per latent, but other ends: the null."""

    def __post_init__(self) -> None:
        if self.seeds < 2 or self.rewired < 1 or not self.resolution > 0:
            raise UsageError(
                "Clusters need at least 2 seeds, 1 rewired graph and a resolution above 0; found "
                f"{self.seeds}, {self.rewired} and {self.resolution}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Edges:
    """An undirected weighted graph over nodes 0, 1, …; no edge from a node to itself."""

    first_E: Ints
    second_E: Ints
    weight_E: Floats
    """Above 0."""
    n_nodes: int

    @property
    def degree_V(self) -> Floats:
        """Σ of the weights at each node."""
        ends = np.concatenate([self.first_E, self.second_E])
        return np.bincount(ends, np.tile(self.weight_E, 2), self.n_nodes).astype(np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteClusters:
    """The clusters of one site."""

    latent_V: Ints
    """The latents that have an edge, ascending."""
    label_V: Ints
    """Cluster of each: 0 the one with the highest degrees together, then 1, …"""
    degree_V: Floats
    modularity: float
    null_modularity: float
    """Mean over rewired graphs, clustered as often: what chance gives."""
    seed_agreement: float
    """Mean adjusted Rand index over all two seeds."""
    half_agreement: float | None
    """The same of the clusters of two halves of the documents, over latents in both."""
    half_latents: int
    """In how many latents the halves were compared."""

    @property
    def sizes(self) -> Ints:
        """Latents in each cluster."""
        return np.bincount(self.label_V)

    def plain(self) -> dict[str, object]:
        """Figures as JSON has them."""
        return {
            "latents": len(self.latent_V),
            "clusters": len(self.sizes),
            "sizes": self.sizes[:20].tolist(),
            "modularity": self.modularity,
            "null_modularity": self.null_modularity,
            "seed_agreement": self.seed_agreement,
            "half_agreement": self.half_agreement,
            "half_latents": self.half_latents,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """The clusters of every site; a cluster is of one site."""

    plan: ClusterPlan
    sites: Mapping[str, SiteClusters]

    def of(self, triplets: Triplets) -> Ints:
        """The cluster of each triplet: its latents' where they are in one, else −1."""
        found_C = np.full(len(triplets), -1)
        for number, site in enumerate(triplets.sites):
            mine_C = triplets.site_C == number
            one = self.sites.get(site)
            if one is not None:
                ends = [_label(one, x_C[mine_C]) for x_C in (triplets.i_C, triplets.j_C)]
                found_C[mine_C] = np.where(ends[0] == ends[1], ends[0], -1)
        return found_C

    def columns(self) -> dict[str, NDArray[Any]]:
        """One row for each latent at each site."""
        sizes = [len(one.latent_V) for one in self.sites.values()]
        empty = np.zeros(0, np.int64)
        return {
            "site": np.repeat(np.array(list(self.sites), dtype=np.str_), sizes),
            **{
                name: np.concatenate(
                    [empty, *(getattr(s, f"{key}_V") for s in self.sites.values())]
                )
                for name, key in (("latent", "latent"), ("cluster", "label"), ("degree", "degree"))
            },
        }

    def plain(self) -> dict[str, object]:
        """Figures by site as JSON has them."""
        return {site: one.plain() for site, one in self.sites.items()}


def clusters(
    triplets: Triplets,
    plan: ClusterPlan = ClusterPlan(),
    halves: tuple[Triplets, Triplets] | None = None,
) -> Clusters:
    """Leiden clusters (Traag, Waltman & van Eck 2019) of each site's graph, whose nodes are latents
    and whose edges are triplets. A site of which no triplet weighs anything is left out.

    Args:
        halves: the same measured on two halves of the documents, to see what comes again.

    Raises:
        CrosslensError: the library that finds them is not installed.
    """
    found = {}
    for site in triplets.sites:
        parts = [_graph(table, site, plan.by) for table in (triplets, *(halves or ()))]
        if len(parts[0][1].weight_E):
            found[site] = _of_site(parts[0], parts[1:], plan)
    return Clusters(plan=plan, sites=found)


def _of_site(
    graph: tuple[Ints, Edges], halves: Sequence[tuple[Ints, Edges]], plan: ClusterPlan
) -> SiteClusters:
    latent_V, edges = graph
    runs = _runs(edges, plan)
    label_V = _best(edges, runs, plan.resolution)
    nulls = [rewired(edges, seed) for seed in range(plan.rewired)]
    agreement, n_common = _halves_agree(halves, plan)
    return SiteClusters(
        latent_V=latent_V,
        label_V=label_V,
        degree_V=edges.degree_V,
        modularity=modularity(edges, label_V, plan.resolution),
        null_modularity=float(np.mean([_highest(null, plan) for null in nulls])),
        seed_agreement=float(np.mean([adjusted_rand(a, b) for a, b in combinations(runs, 2)])),
        half_agreement=agreement,
        half_latents=n_common,
    )


def _halves_agree(
    halves: Sequence[tuple[Ints, Edges]], plan: ClusterPlan
) -> tuple[float | None, int]:
    if not all(len(edges.weight_E) for _, edges in halves) or not halves:
        return None, 0
    labels = [_best(edges, _runs(edges, plan), plan.resolution) for _, edges in halves]
    (first_V, _), (second_V, _) = halves
    _, at, other = np.intersect1d(first_V, second_V, assume_unique=True, return_indices=True)
    return (adjusted_rand(labels[0][at], labels[1][other]) if len(at) else None), len(at)


def _graph(triplets: Triplets, site: str, by: Order) -> tuple[Ints, Edges]:
    """The latents of a site's triplets, ascending, and the graph over their places."""
    weight_C = triplets.product_C if by == "product" else getattr(triplets, f"{by}_C")
    there_C = (weight_C > 0) & (triplets.site_C == _number(triplets, site))
    ends = np.stack([triplets.i_C[there_C], triplets.j_C[there_C]])
    latent_V, place = np.unique(ends, return_inverse=True)
    first_E, second_E = place.reshape(ends.shape)
    weight_E = weight_C[there_C].astype(np.float64)
    return latent_V, Edges(
        first_E=first_E, second_E=second_E, weight_E=weight_E, n_nodes=len(latent_V)
    )


def _number(triplets: Triplets, site: str) -> int:
    return triplets.sites.index(site) if site in triplets.sites else -1


def _label(one: SiteClusters, latent_C: Ints) -> NDArray[np.float64]:
    """Each latent's cluster, NaN where it has none."""
    place_C = np.searchsorted(one.latent_V, latent_C).clip(max=len(one.latent_V) - 1)
    return np.where(one.latent_V[place_C] == latent_C, one.label_V[place_C], np.nan)


def modularity(edges: Edges, label_V: Ints, resolution: float = 1.0) -> float:
    """Q = Σ over clusters of w_in/m − γ (d/2m)²: m the weight of all edges, w_in that of those
    within the cluster, d the sum of its degrees (Newman & Girvan 2004; Reichardt & Bornholdt
    2006)."""
    whole = edges.weight_E.sum()
    inside = edges.weight_E[label_V[edges.first_E] == label_V[edges.second_E]].sum()
    degree = np.bincount(label_V, edges.degree_V)
    return float(inside / whole - resolution * np.square(degree / (2 * whole)).sum())


def rewired(edges: Edges, seed: int) -> Edges:
    """A graph with as many edges at each node and the same weights, but random ends (the
    configuration model, from which edges of a node to itself are left out)."""
    generator = np.random.default_rng(seed)
    ends = np.concatenate([edges.first_E, edges.second_E])
    first_E, second_E = generator.permutation(ends).reshape(2, -1)
    kept = first_E != second_E
    return Edges(
        first_E=first_E[kept],
        second_E=second_E[kept],
        weight_E=edges.weight_E[kept],
        n_nodes=edges.n_nodes,
    )


def _highest(edges: Edges, plan: ClusterPlan) -> float:
    if not len(edges.weight_E):
        return 0.0
    return modularity(edges, _best(edges, _runs(edges, plan), plan.resolution), plan.resolution)


def _best(edges: Edges, runs: Sequence[Ints], resolution: float) -> Ints:
    """The partition with the highest modularity, its clusters numbered by falling degree."""
    label_V = max(runs, key=lambda label_V: modularity(edges, label_V, resolution))
    order = np.argsort(-np.bincount(label_V, edges.degree_V), kind="stable")
    return np.argsort(order)[label_V]


def _runs(edges: Edges, plan: ClusterPlan) -> list[Ints]:
    """A partition from each seed, labels 0, 1, … without a gap."""
    try:
        from graspologic_native import leiden
    except ImportError as error:
        raise CrosslensError(
            "Clusters are found with graspologic-native, which is not installed: "
            "pip install graspologic-native."
        ) from error
    ends = zip(edges.first_E, edges.second_E, edges.weight_E, strict=True)
    named = [(str(i), str(j), float(w)) for i, j, w in ends]
    found = []
    for seed in range(plan.seeds):
        _, community = leiden(
            edges=named, resolution=plan.resolution, iterations=ITERATIONS, seed=seed
        )
        alone = range(len(community), len(community) + edges.n_nodes)
        label_V = [community.get(str(v), alone[v]) for v in range(edges.n_nodes)]
        found.append(np.unique(label_V, return_inverse=True)[1])
    return found
