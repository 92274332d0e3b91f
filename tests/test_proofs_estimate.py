"""The average-case estimate: right where features are independent, and never called a bound."""

from __future__ import annotations

import pytest
import torch

from crosslens.proofs.estimate import Binned, binned, dense, estimate, in_squares
from crosslens.proofs.local_gather import padded
from crosslens.proofs.local_truth import Truth
from tests.proofs_local_toy import Sizes, gathered, toy


def test_bins_keep_the_mean_and_the_share_of_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(5, 200, generator=generator).double().clamp_min(0)
    sample[2] = 0
    sample[3, 1:] = 0
    found = binned(sample, 8)
    torch.testing.assert_close(found.mean, sample.mean(1))
    torch.testing.assert_close(found.share.sum(1), torch.ones(5).double())
    torch.testing.assert_close(found.share[:, 0], (sample == 0).double().mean(1))
    assert (found.value >= 0).all()


def test_draws_have_the_distributions_mean() -> None:
    one = Binned(
        torch.tensor([[0.0, 2.0, 6.0]]).double(), torch.tensor([[0.5, 0.25, 0.25]]).double()
    )
    drawn = one.drawn(40_000, torch.Generator().manual_seed(1))
    assert drawn.shape == (1, 40_000)
    assert set(drawn.unique().tolist()) == {0.0, 2.0, 6.0}
    assert float(drawn.mean()) == pytest.approx(2.0, rel=0.05)


def test_independent_errors_add_in_squares() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.rand(2, 4000, generator=generator).double() + 0.5
    one, other = (binned(x[None], 32) for x in (a, b))
    found = in_squares(
        Binned(one.value[0], one.share[0]), Binned(other.value[0], other.share[0]), 32
    )
    shuffled = b[torch.randperm(len(b), generator=generator)]
    assert float(found.share.sum()) == pytest.approx(1.0)
    assert float(found.mean) == pytest.approx(float((a**2 + shuffled**2).sqrt().mean()), rel=0.02)
    exactly = in_squares(
        Binned(torch.tensor([3.0]).double(), torch.ones(1).double()),
        Binned(torch.tensor([4.0]).double(), torch.ones(1).double()),
    )
    assert float(exactly.mean) == pytest.approx(5.0)


def given(together: bool):
    """A SwiGLU whose latents fire independently of each other, or always all together."""
    generator = torch.Generator().manual_seed(3)
    weights, coder, _ = toy("silu", True, "rms", seed=3, sizes=Sizes(1, 6, 6, 8, 12))
    on = torch.rand(600, 1 if together else 6, generator=generator) < 0.5
    z = (0.5 + torch.rand(600, 6, generator=generator).double()) * on
    index, strength = padded(z)
    coder |= {"index": index, "strength": strength}
    decoded = Truth(weights, coder).decoded()
    x = decoded + 0.1 * torch.randn(decoded.shape, generator=generator).double()
    return gathered(weights, coder, x), coder["affine"], Truth(weights, coder)


def test_it_is_near_the_truth_where_features_are_independent() -> None:
    site, affine, truth = given(together=False)
    made = truth.output(truth.decoded())
    output = float(made.norm(dim=1).mean())
    found = estimate(site, affine, draws=600)
    for name, surrogate in truth.surrogates().items():
        true = float((made - surrogate).norm(dim=1).mean()) / output
        assert found.interaction[name] == pytest.approx(true, rel=0.1)
    moved = (truth.output(site.x_RD) - made).norm(dim=1)
    assert found.transition == pytest.approx(float(moved.mean()) / output, rel=0.15)
    for name in found.interaction:
        parts = found.interaction[name], found.transition
        assert max(parts) * 0.9 <= found.whole[name] <= sum(parts) * 1.1


def test_it_misses_where_they_are_not() -> None:
    site, affine, truth = given(together=True)
    made = truth.output(truth.decoded())
    missed = (made - truth.surrogates()["additive"]).norm(dim=1)
    true = float(missed.mean() / made.norm(dim=1).mean())
    found = estimate(site, affine, draws=600)
    assert abs(found.interaction["additive"] / true - 1) > 0.1


def test_it_is_called_an_estimate_and_the_same_seed_gives_the_same() -> None:
    site, affine, _ = given(together=False)
    told = estimate(site, affine, draws=50, seed=4).plain()
    assert told["is_bound"] is False
    assert told == estimate(site, affine, draws=50, seed=4).plain()
    assert told != estimate(site, affine, draws=50, seed=5).plain()
    z = dense(site.coder)
    assert z.shape == (6, 600)
    torch.testing.assert_close(z.sum(0), site.coder["strength"].sum(1))
