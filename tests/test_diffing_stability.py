"""Latents of several runs are matched: against brute force, planted copies, and random coders."""

from __future__ import annotations

from itertools import permutations, product

import pytest
import torch
from torch.nn.functional import normalize

from crosslens.coder import Coder, Crosscoder, Dedicated, Layout, ReLU, dense_decoder
from crosslens.diffing.stability import MatchPlan, Recurrence, Seed, Stability, stability
from crosslens.errors import UsageError

LAYOUT = Layout(("base/s.1", "base/s.2", "chat/s.1", "chat/s.2"), (24, 24, 24, 24))
WIDTH = LAYOUT.width


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coder_of(W_dec: torch.Tensor, W_enc: torch.Tensor | None = None, layout=LAYOUT) -> Coder:
    coder = Coder(Crosscoder()(layout, len(W_dec)), ReLU())
    with torch.no_grad():
        coder.W_dec[0].copy_(W_dec)
        coder.W_enc[0].copy_(W_dec if W_enc is None else W_enc)
    return coder


def seed_of(W_dec, alive=None, W_enc=None, layout=LAYOUT, **exclusive) -> Seed:
    n = len(W_dec)
    masks = {
        kind: torch.isin(torch.arange(n), torch.tensor(latents, dtype=torch.int64))
        for kind, latents in exclusive.items()
    }
    alive_L = torch.ones(n, dtype=torch.bool) if alive is None else alive
    return Seed(coder=coder_of(W_dec, W_enc, layout), alive_L=alive_L, exclusive=masks)


def gaussian(n: int, seed: int, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(n, width, generator=random(seed))


def near(W: torch.Tensor, cosine: float, seed: int) -> torch.Tensor:
    """Rows at exactly that cosine from those of `W`, with other norms."""
    unit = normalize(W, dim=-1)
    noise = torch.randn(W.shape, generator=random(seed))
    noise = normalize(noise - (noise * unit).sum(-1, keepdim=True) * unit, dim=-1)
    return 3 * (cosine * unit + (1 - cosine**2) ** 0.5 * noise)


def only(found: Stability):
    assert len(found.matches) == len(found.nulls) == 1
    return found.matches[0], found.nulls[0]


@pytest.mark.parametrize(("n", "m"), [(5, 5), (4, 6), (6, 4)])
@pytest.mark.parametrize("weights", ["decoder", "both"])
def test_the_assignment_is_that_of_brute_force(n, m, weights):
    """All ways to pair the smaller side with the larger are tried, cosines by loops."""
    first = [gaussian(n, 0), gaussian(n, 1)]
    other = [gaussian(m, 2), gaussian(m, 3)]
    used = 2 if weights == "both" else 1

    def cosine(i: int, j: int) -> float:
        total = 0.0
        for one, two in zip(first[:used], other[:used], strict=True):
            u, v = one[i].tolist(), two[j].tolist()
            dot = sum(a * b for a, b in zip(u, v, strict=True))
            total += dot / (sum(a * a for a in u) * sum(b * b for b in v)) ** 0.5
        return total / used

    table = [[cosine(i, j) for j in range(m)] for i in range(n)]
    small = min(n, m)
    ways = [
        list(zip(range(n), way, strict=True)) if n <= m else list(zip(way, range(m), strict=True))
        for way in permutations(range(max(n, m)), small)
    ]
    best = max(ways, key=lambda pairs: sum(table[i][j] for i, j in pairs))
    found, _ = only(
        stability(
            [seed_of(first[0], W_enc=first[1]), seed_of(other[0], W_enc=other[1])],
            MatchPlan(weights=weights),
        )
    )
    partners = [dict(best).get(i, -1) for i in range(n)]
    assert found.partner_L.tolist() == partners
    for i, j in best:
        assert float(found.cosine_L[i]) == pytest.approx(table[i][j], abs=1e-5)
    assert found.cosine_L.isnan().tolist() == [partner < 0 for partner in partners]
    assert found.best_L.tolist() == pytest.approx([max(row) for row in table], abs=1e-5)


def test_a_permuted_copy_is_matched_one_to_one_and_its_null_is_not():
    W = gaussian(60, 0)
    order = torch.randperm(60, generator=random(1))
    kinds = {"only_a": [3, 4, 5], "only_b": [40, 41]}
    moved = {kind: [order.tolist().index(i) for i in latents] for kind, latents in kinds.items()}
    copies = [seed_of(W, **kinds), seed_of(2 * W[order], **moved), seed_of(W, **kinds)]
    found = stability(copies)
    told = found.plain()
    assert order[found.matches[0].partner_L].tolist() == list(range(60))
    assert found.matches[1].partner_L.tolist() == list(range(60))
    for pair in told["pairs"]:
        assert pair["matched"] == 60
        assert pair["mean"] == pytest.approx(1.0, abs=1e-5)
        assert pair["mmcs"] == pytest.approx(1.0, abs=1e-5)
        assert pair["above"] == {"0.7": 1.0, "0.9": 1.0}
        assert pair["null"]["above"]["0.7"] == 0.0
        assert pair["null"]["mean"] < 0.5
        assert pair["quantiles"]["0.05"] > pair["null"]["quantiles"]["0.95"]
    assert told["runs"] == 3
    assert told["recurrence"]["only_a"]["counts"] == (0, 0, 3)
    assert told["recurrence"]["only_b"]["counts"] == (0, 0, 2)


def test_a_random_coder_is_like_its_null():
    found, null = only(stability([seed_of(gaussian(150, 0)), seed_of(gaussian(150, 1))]))
    mine, beside = found.figures(), null.figures()
    assert mine["mean"] == pytest.approx(beside["mean"], abs=0.02)
    assert mine["mmcs"] == pytest.approx(beside["mmcs"], abs=0.02)
    for level, cosine in mine["quantiles"].items():
        assert cosine == pytest.approx(beside["quantiles"][level], abs=0.06)
    assert mine["above"] == beside["above"] == {"0.7": 0.0, "0.9": 0.0}


def test_the_null_keeps_what_is_within_a_run():
    """Latents whose direction is the same at all sites, like those of a residual stream, agree by
    chance more than independent ones; a null that did not keep that would be too easy to beat."""
    same = [gaussian(80, seed, 24).repeat(1, 4) for seed in (0, 1)]
    free = [gaussian(80, seed) for seed in (0, 1)]
    for pair in (same, free):
        found, null = only(stability([seed_of(W) for W in pair]))
        assert found.figures()["mean"] == pytest.approx(null.figures()["mean"], abs=0.03)
    loose = only(stability([seed_of(W) for W in free]))[1].figures()["mean"]
    tight = only(stability([seed_of(W) for W in same]))[1].figures()["mean"]
    assert tight > loose + 0.2


def test_the_null_is_the_same_again_and_turns_every_run():
    seeds = [seed_of(gaussian(20, 0)) for _ in range(3)]
    one, two = stability(seeds), stability(seeds)
    for first, second in zip(one.nulls, two.nulls, strict=True):
        assert torch.equal(first.cosine_L, second.cosine_L)
    assert not torch.equal(one.nulls[0].cosine_L, one.nulls[1].cosine_L)
    other = stability(seeds, MatchPlan(seed=5))
    assert not torch.equal(one.nulls[0].cosine_L, other.nulls[0].cosine_L)


def planted() -> tuple[list[Seed], list[torch.Tensor]]:
    """Three runs. Of run 1's exclusive latents 0…7 of kind `b`: 0–3 come again in both others as
    exclusive ones; 4 in run 2 only; 5 comes again but is not exclusive there; 6 as one of kind `a`;
    7 at cosine .5 only. 8 and 9 are exclusive to a, and 8 comes again in both."""
    W = gaussian(40, 0)
    runs, kinds = [W], [{"b": list(range(8)), "a": [8, 9]}]
    for run in (1, 2):
        new = near(W, 0.95, run)
        new[7] = near(W, 0.5, 10 + run)[7]
        if run == 2:
            new[4] = gaussian(1, 99)[0]
        new[9] = gaussian(1, 50 + run)[0]
        order = torch.randperm(40, generator=random(20 + run))
        place = order.argsort().tolist()
        runs.append(new[order])
        b = [0, 1, 2, 3, 4, 7]
        kinds.append({"b": [place[i] for i in b], "a": [place[i] for i in (6, 8)]})
    return [seed_of(W, **kind) for W, kind in zip(runs, kinds, strict=True)], runs


def test_planted_recurrence_is_found():
    seeds, _ = planted()
    found = stability(seeds).recurrence
    assert found["b"].exclusive == 8
    assert found["b"].counts == (3, 1, 4)
    assert found["a"].exclusive == 2
    assert found["a"].counts == (1, 0, 1)
    strict = stability(seeds, MatchPlan(threshold=0.96)).recurrence
    assert strict["b"].counts == (8, 0, 0)
    lax = stability(seeds, MatchPlan(threshold=0.45)).recurrence
    assert lax["b"].counts == (2, 1, 5)


def enumerated(chances: list[list[float]]) -> list[float]:
    """Expected number of latents with k hits, over all outcomes of all runs, one by one."""
    n_runs = len(chances[0])
    expected = [0.0] * (n_runs + 1)
    for chance in chances:
        for outcome in product((0, 1), repeat=n_runs):
            weight = 1.0
            for hit, p in zip(outcome, chance, strict=True):
                weight *= p if hit else 1 - p
            expected[sum(outcome)] += weight
    return expected


@pytest.mark.parametrize("threshold", [0.05, 0.7])
def test_expectations_are_those_of_all_outcomes(threshold):
    """By loops: partners drawn at random among the alive, and labels dealt at random to partners as
    found."""
    seeds, runs = planted()
    found = stability(seeds, MatchPlan(threshold=threshold))
    n = len(runs[0])
    for kind, latents in (("b", range(8)), ("a", (8, 9))):
        by_partner, by_label = [], []
        for i in latents:
            partner_chances, label_chances = [], []
            for run, match in enumerate(found.matches, 1):
                labels = seeds[run].exclusive[kind].tolist()
                cosines = [float(torch.cosine_similarity(runs[0][i], w, dim=0)) for w in runs[run]]
                hits = sum(c > threshold and own for c, own in zip(cosines, labels, strict=True))
                partner_chances.append(hits / n)
                close = cosines[int(match.partner_L[i])] > threshold
                label_chances.append(close * sum(labels) / n)
            by_partner.append(partner_chances)
            by_label.append(label_chances)
        recurrence = found.recurrence[kind]
        assert recurrence.random_partners == pytest.approx(enumerated(by_partner), abs=1e-9)
        assert recurrence.random_labels == pytest.approx(enumerated(by_label), abs=1e-9)
        assert sum(recurrence.random_partners) == pytest.approx(len(latents))


def test_dead_latents_are_left_out():
    W = gaussian(12, 0)
    alive = torch.arange(12) >= 3
    found = stability([seed_of(W, alive, b=[0, 5]), seed_of(W, alive.flip(0), b=[5, 11])])
    match = found.matches[0]
    assert match.partner_L[:3].tolist() == [-1, -1, -1]
    assert match.partner_L[3:9].tolist() == [3, 4, 5, 6, 7, 8]
    assert set(match.partner_L[9:].tolist()) == {0, 1, 2}
    assert match.best_L.isnan().tolist() == (~alive).tolist()
    assert found.recurrence["b"] == Recurrence(
        exclusive=1, counts=(0, 1), random_partners=(8 / 9, 1 / 9), random_labels=(8 / 9, 1 / 9)
    )


def test_beyond_the_limit_only_exclusive_latents_are_assigned():
    """Copies find the same partners; and the largest cosines of all latents are still told."""
    seeds, _ = planted()
    whole, some = stability(seeds), stability(seeds, MatchPlan(entries=10 * 40))
    assert (whole.assigned, some.assigned) == ("alive", "exclusive")
    for full, part in zip(whole.matches, some.matches, strict=True):
        assert (part.partner_L >= 0).tolist() == [i < 10 for i in range(40)]
        copied = [0, 1, 2, 3, 5, 6]  # in both other runs
        assert torch.equal(part.partner_L[copied], full.partner_L[copied])
        assert torch.allclose(part.best_L, full.best_L)
    assert {k: r.counts for k, r in some.recurrence.items()} == {
        k: r.counts for k, r in whole.recurrence.items()
    }
    with pytest.raises(UsageError, match="Assigning 10 exclusive latents to 40"):
        stability(seeds, MatchPlan(entries=10 * 40 - 1))


def test_with_nothing_exclusive_only_the_largest_cosines_are_told():
    seeds = [seed_of(gaussian(9, 0), b=[]), seed_of(gaussian(9, 1), b=[])]
    told = stability(seeds, MatchPlan(entries=80)).plain()
    (pair,) = told["pairs"]
    assert (told["assigned"], pair["matched"], pair["mean"]) == ("exclusive", 0, None)
    assert set(pair["quantiles"].values()) == {None}
    assert 0 < pair["mmcs"] < 1
    assert told["recurrence"]["b"]["counts"] == (0, 0)


def test_folded_and_grouped_coders_match_by_what_they_write():
    """A coder in groups has zeros where it writes nothing; folding changes nothing."""
    from crosslens.coder import fold

    wiring = Dedicated(exclusive=0.25)(LAYOUT, 12)
    coders = [Coder(wiring, ReLU()) for _ in range(2)]
    with torch.no_grad():
        for coder in coders:
            for n, block in enumerate((*coder.W_dec, *coder.W_enc)):
                block.normal_(generator=random(n))
            coder.scale_read.copy_(torch.tensor([0.1, 1.0, 3.0, 9.0]))
            coder.scale_write.copy_(torch.tensor([0.1, 1.0, 3.0, 9.0]))
    coders[1] = fold(coders[1])
    assert coders[1].folded
    alive = torch.ones(12, dtype=torch.bool)
    seeds = [Seed(coder=coder, alive_L=alive, exclusive={}) for coder in coders]
    found, _ = only(stability(seeds, MatchPlan(weights="both")))
    assert found.partner_L.tolist() == list(range(12))
    assert found.cosine_L.tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    assert torch.allclose(dense_decoder(coders[0]), dense_decoder(coders[1]), atol=1e-5)


OTHER = Layout(LAYOUT.sites, (24, 24, 24, 25))


@pytest.mark.parametrize(
    ("seeds", "match"),
    [
        (lambda: [seed_of(gaussian(4, 0))], "needs two runs or more, found 1"),
        (
            lambda: [seed_of(gaussian(4, 0)), seed_of(gaussian(4, 0, 97), layout=OTHER)],
            "Run 2 has other sites or widths",
        ),
        (lambda: [seed_of(gaussian(4, 0), b=[1]), seed_of(gaussian(4, 0))], "other kinds"),
        (
            lambda: [seed_of(gaussian(4, 0)), seed_of(gaussian(4, 0), torch.zeros(4) > 0)],
            "Run 2 has no alive latent",
        ),
    ],
)
def test_runs_that_cannot_be_matched(seeds, match):
    with pytest.raises(UsageError, match=match):
        stability(seeds())


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5])
def test_a_threshold_that_is_no_cosine(threshold):
    with pytest.raises(UsageError, match=r"a cosine in \(0, 1\)"):
        MatchPlan(threshold=threshold)


def test_progress_is_told_run_by_run():
    heard = []
    stability(
        [seed_of(gaussian(4, 0)) for _ in range(4)],
        progress=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(1, 3), (2, 3), (3, 3)]
