"""Norms and classes of latents in every published convention, against loops and printed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crosslens.coder import Coder, Crosscoder, Dedicated, Layout, ReLU, fold, transpose_init
from crosslens.diffing.classes import (
    ANTHROPIC,
    KISSANE,
    MINDER,
    Bins,
    classes,
    near_start,
)
from crosslens.diffing.measures import Measures
from crosslens.diffing.norms import (
    from_published_difference,
    norm_difference,
    norm_shares,
    norms_of,
    relative_norm,
)
from crosslens.diffing.pair import Pair, pair_of
from crosslens.diffing.strength import Activity
from crosslens.errors import UsageError
from crosslens.functional.shares import wilson
from tests.diffing_toy import toy_pair


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def coder_of_norms(a: list[float], b: list[float], widths: tuple[int, int] = (3, 3)) -> Coder:
    """One latent per pair of norms, decoders along (1, 1, 1)."""
    coder = Coder(Crosscoder()(Layout(("a/x.1", "b/x.1"), widths), len(a)), ReLU())
    parts = [
        torch.tensor(n)[:, None].expand(-1, w) / math.sqrt(w)
        for n, w in zip((a, b), widths, strict=True)
    ]
    with torch.no_grad():
        coder.W_dec[0].copy_(torch.cat(parts, -1))
    return coder


def test_one_is_only_b_in_both_conventions():
    a, b = numbers(1, 0, 2), numbers(0, 1, 2)
    assert relative_norm(a, b).tolist() == [0, 1, 0.5]
    assert norm_difference(a, b).tolist() == [0, 1, 0.5]


def test_published_tables_have_it_the_other_way_round():
    """A row as in Minder et al.'s tables: chat-only at 0, where the paper's Δ is 1."""
    base, chat = numbers(0.1, 1.0, 1.0), numbers(1.0, 0.1, 1.0)
    table = (1 + (base - chat) / torch.maximum(base, chat)) / 2
    assert table[0] < 0.1
    assert torch.allclose(from_published_difference(table), norm_difference(base, chat))


@pytest.mark.parametrize(("relative", "difference"), [(0.7, 0.786), (0.833, 0.9), (0.3, 0.214)])
def test_the_conventions_are_not_interchangeable(relative, difference):
    a, b = numbers(1 - relative), numbers(relative)
    assert relative_norm(a, b).item() == pytest.approx(relative)
    assert norm_difference(a, b).item() == pytest.approx(difference, abs=5e-4)


def test_nothing_in_either_model_has_no_share():
    assert relative_norm(numbers(0), numbers(0)).isnan().all()
    assert norm_difference(numbers(0), numbers(0)).isnan().all()


def test_bins_of_the_same_decoders_side_by_side():
    """r = .72, .8, .84 are all of b for Kissane; only the last is for Minder, and none for
    Anthropic."""
    r = [0.02, 0.1, 0.2, 0.5, 0.65, 0.72, 0.8, 0.84, 0.97]
    norms = norms_of(toy_pair(coder_of_norms([1 - x for x in r], r)))
    alive = torch.ones(len(r), dtype=torch.int64)
    # Δ = .010 .056 .125 .5 .731 .806 .875 .905 .985
    expected = {
        KISSANE: "only_a only_a only_a shared shared only_b only_b only_b only_b",
        MINDER: "only_a only_a other shared other other other only_b only_b",
        ANTHROPIC: "only_a shared shared shared shared shared shared shared only_b",
    }
    for bins, names in expected.items():
        found = classes(norms, alive, bins)
        assert names.split() == [
            next(c for c in found.counts if found.mask(c)[i]) for i in range(len(r))
        ]
        assert sum(found.counts.values()) == len(r)


def test_the_dead_are_apart_whatever_their_norms():
    norms = norms_of(toy_pair(coder_of_norms([0.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0])))
    found = classes(norms, torch.tensor([0, 5, 5, 5]), MINDER)
    assert found.counts == {"only_a": 0, "only_b": 1, "shared": 1, "other": 0, "dead": 2}
    assert found.mask("dead").tolist() == [True, False, False, True]
    assert found.mask("only_b", "shared").tolist() == [False, True, True, False]


def test_intervals_of_counts_are_wilson_s():
    """Wilson 1927: 0 of 100 is [0, 3.70 %], 10 of 100 [5.52 %, 17.44 %] (published values)."""
    n = 100
    r = [0.99] * 10 + [0.5] * 90 + [0.01]
    norms = norms_of(toy_pair(coder_of_norms([1 - x for x in r], r)))
    found = classes(norms, torch.tensor([1] * n + [0]), MINDER).intervals()
    assert found["only_b"] == pytest.approx((5.52, 17.44), abs=0.01)
    assert found["only_a"] == pytest.approx((0.0, 3.70), abs=0.01)
    assert found["dead"][0] > 0


def test_bounds_of_bins_must_ascend():
    with pytest.raises(UsageError, match="ascend"):
        Bins(
            measure="relative_norm",
            only_a_below=0.5,
            shared_above=0.4,
            shared_below=0.6,
            only_b_above=0.9,
        )


def test_latents_near_their_start_are_told():
    norms = norms_of(toy_pair(coder_of_norms([0.1, 0.1, 0.5], [0.101, 0.3, 0.1])))
    assert near_start(norms, 0.1).tolist() == [True, False, False]


def measures_of(pair: Pair, count_L: torch.Tensor) -> Measures:
    """Of a hundred tokens, on so many of which each latent was active."""
    one_L = torch.ones(len(count_L), dtype=torch.float64)
    used = Activity(
        tokens=100,
        marked_tokens=0,
        count_L=count_L,
        mean_L=one_L,
        largest_L=one_L,
        strength_a_L=one_L,
        strength_b_L=one_L,
        marked_count_L=torch.zeros_like(count_L),
        marked_sum_share_L=0 * one_L,
    )
    return Measures(
        norms=norms_of(pair),
        activity=used,
        agreement=None,
        scaling=None,
        fidelity={},
        start_norm=0.4,
    )


def test_a_latent_that_fired_once_is_no_exclusive_one():
    """Latents 0 and 1 are of b alone, 2 of a; 1 fired on three tokens, 3 is where it began."""
    pair = toy_pair(coder_of_norms([0.0, 0.0, 1.0, 0.4, 1.0], [1.0, 1.0, 0.0, 0.4, 1.1]))
    count_L = torch.tensor([50, 3, 10, 70, 90])
    found = measures_of(pair, count_L)
    assert found.classes().counts["only_b"] == 2
    exclusive = found.exclusive()
    assert (exclusive["only_a"], exclusive["only_b"]) == (1, 1)
    low, high = wilson(1, 3)
    assert exclusive["interval"]["only_b"] == [round(3 * low, 1), round(3 * high, 1)]


def test_what_both_write_alike_is_not_more_of_b():
    """Tied decoders are equal by construction; their norms at most but for rounding."""
    layout = Layout(("a/resid_post.1", "b/resid_post.1"), (37, 37))
    coder = Coder(Dedicated(exclusive=0.1, tied_decoders=True)(layout, 50), ReLU())
    transpose_init(coder, 1.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        coder.W_dec[2].mul_(torch.rand(40, 1, generator=torch.Generator().manual_seed(1)))
    found = measures_of(toy_pair(coder), torch.full((50,), 90))
    assert found.more_of_b_L.nonzero().squeeze(-1).tolist() == [5, 6, 7, 8, 9]
    norms = toy_pair(coder_of_norms([1.0, 1.0, 1.0, 0.0], [1.0001, 0.9999, 1.0, 0.0]))
    assert measures_of(norms, torch.full((4,), 90)).more_of_b_L.tolist() == [
        True, False, False, False,
    ]  # fmt: skip


def two_sites(widths: tuple[int, int, int, int]) -> Coder:
    sites = ("a/resid_post.1", "a/resid_post.2", "b/resid_post.1", "b/resid_post.2")
    coder = Coder(Crosscoder()(Layout(sites, widths), 5), ReLU()).requires_grad_(False)
    transpose_init(coder, 1.0, torch.Generator().manual_seed(0))
    coder.W_dec[0].mul_(torch.rand(5, sum(widths), generator=torch.Generator().manual_seed(1)))
    coder.scale_write.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    return coder


def test_norms_and_cosines_site_by_site_are_the_loop():
    coder = two_sites((3, 4, 3, 4))
    norms = norms_of(pair_of(coder))
    W = coder.W_dec[0].double().numpy()
    assert norms.places == ("resid_post.1", "resid_post.2")
    for j in range(5):
        a, b = W[j, :7], W[j, 7:]
        assert norms.a_L[j].item() == pytest.approx(np.linalg.norm(a))
        assert norms.cosine_L[j].item() == pytest.approx(
            a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        )
        for p, at in enumerate((slice(0, 3), slice(3, 7))):
            na, nb = np.linalg.norm(a[at]), np.linalg.norm(b[at])
            assert norms.relative_norm_LP[j, p].item() == pytest.approx(nb / (na + nb))
            assert norms.cosine_LP[j, p].item() == pytest.approx(a[at] @ b[at] / na / nb)


def test_folding_changes_no_norm():
    coder = two_sites((3, 4, 3, 4))
    before = norms_of(pair_of(coder))
    after = norms_of(pair_of(fold(coder)))
    assert torch.allclose(before.relative_norm_LP, after.relative_norm_LP)
    assert torch.allclose(before.cosine_L, after.cosine_L)


def test_widths_that_differ_have_norms_but_no_cosine():
    norms = norms_of(pair_of(two_sites((3, 4, 3, 6))))
    assert norms.relative_norm_L.isfinite().all()
    assert norms.cosine_L.isnan().all()
    assert norms.cosine_LP[:, 0].isfinite().all()
    assert norms.cosine_LP[:, 1].isnan().all()


def test_sites_that_do_not_pair_have_no_cosine_though_they_add_up():
    norms = norms_of(pair_of(two_sites((3, 4, 4, 3))))
    assert norms.cosine_L.isnan().all()
    assert norms.cosine_LP.isnan().all()


def test_shares_of_three_models():
    sites = ("a/x.1", "b/x.1", "c/x.1")
    coder = Coder(Crosscoder()(Layout(sites, (1, 2, 1)), 1), ReLU()).requires_grad_(False)
    coder.W_dec[0].copy_(torch.tensor([[1.0, 3.0, 4.0, -2.0]]))
    found = norm_shares(coder)
    assert found.models == ("a", "b", "c")
    assert found.share_LM.tolist() == [pytest.approx([1 / 8, 5 / 8, 2 / 8])]
    assert norm_shares(coder, ("c", "a")).share_LM[0, 0].item() == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match="no decoders of d"):
        norm_shares(coder, ("a", "d"))
