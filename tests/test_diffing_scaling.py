"""Streamed latent scaling is the regression it stands for, and its intervals hold what they say."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from crosslens.coder import Coder, Crosscoder, Layout, ReLU
from crosslens.diffing.groups import block_groups
from crosslens.diffing.intervals import Estimate, students_t
from crosslens.diffing.norms import norms_of
from crosslens.diffing.pair import Pair
from crosslens.diffing.scaling import (
    ScalingSums,
    bootstrapped_scaling,
    chat_specific,
    latent_scaling,
    surely_chat_specific,
)
from crosslens.errors import UsageError
from tests.diffing_toy import (
    BLOCK,
    MEAN,
    MEAN_SQUARE,
    Planted,
    chunk_of,
    constructed_coder,
    planted,
    toy_pair,
)

FIGURES = (
    "beta_error_a",
    "beta_error_b",
    "nu_error",
    "beta_reconstruction_a",
    "beta_reconstruction_b",
    "nu_reconstruction",
)


def shaken(truth: Planted, amount: float, seed: int) -> Coder:
    """A coder whose decoders are off the truth, with every latent writing both models."""
    random = torch.Generator().manual_seed(seed)
    a_LD, b_LD = (
        table + amount * torch.randn(table.shape, generator=random)
        for table in (truth.a_FD, truth.b_FD)
    )
    return constructed_coder(truth, a_LD, b_LD)


@dataclass(frozen=True)
class Stream:
    pair: Pair
    rows: torch.Tensor
    code: torch.Tensor
    sums: ScalingSums


@pytest.fixture(scope="module")
def stream() -> Stream:
    """24 blocks in three chunks of unequal size; one latent is never active."""
    truth = planted(8, 4, 12, rate=0.2)
    truth.rate_F[3] = 0
    random = torch.Generator().manual_seed(1)
    coder = shaken(truth, 0.1, 2)
    coder.b_dec.normal_(generator=random)
    code = truth.code(24 * BLOCK, random)
    rows = truth.rows(code, 0.5, random)
    pair = toy_pair(coder)
    sums = ScalingSums(pair, block_groups(24, 4))
    for start, stop in ((0, 9), (9, 10), (10, 24)):
        at = slice(start * BLOCK, stop * BLOCK)
        sums.add(chunk_of(coder, rows[at], code[at], start))
    return Stream(pair, rows, code, sums)


def regressions(stream: Stream, keep: np.ndarray, model: int) -> dict[str, list[float]]:
    """Least squares in float64, one per latent, with the targets written out."""
    D_a, D_b = (d.double().numpy() for d in stream.pair.decoders())
    D, width = (D_a, D_b)[model], D_b.shape[1]
    at = slice(model * width, (model + 1) * width)
    f, x = stream.code.double().numpy()[keep], stream.rows.double().numpy()[keep, at]
    recon = f @ D + stream.pair.coder.b_dec.double().numpy()[at]
    found: dict[str, list[float]] = {"error": [], "reconstruction": []}
    for j in range(f.shape[1]):
        against = np.outer(f[:, j], D_b[j]).reshape(-1, 1)
        for name, target in (
            ("error", x - recon + np.outer(f[:, j], D[j])),
            ("reconstruction", recon),
        ):
            found[name].append(np.linalg.lstsq(against, target.reshape(-1), rcond=None)[0][0])
    return found


def test_streamed_beta_is_the_regression(stream):
    found = latent_scaling(stream.sums)
    alive = (stream.code > 0).any(0)
    assert (~alive).sum() == 1
    everything = np.ones(len(stream.rows), dtype=bool)
    for model, name in enumerate("ab"):
        for target, expected in regressions(stream, everything, model).items():
            value = getattr(found, f"beta_{target}_{name}").value_L
            assert value[alive].tolist() == pytest.approx(
                np.array(expected)[alive.numpy()], abs=1e-5, rel=1e-5
            )
            assert value[~alive].isnan().all()
    for target in ("error", "reconstruction"):
        a, b = (getattr(found, f"beta_{target}_{m}").value_L for m in "ab")
        nu = getattr(found, f"nu_{target}").value_L
        assert torch.allclose(nu[alive], (a / b)[alive])
    assert torch.equal(found.count_L, (stream.code > 0).sum(0))


def test_halves_are_regressions_on_half_the_groups(stream):
    found = latent_scaling(stream.sums)
    group = block_groups(24, 4).of_block_N.repeat_interleave(BLOCK).numpy()
    alive = (stream.code > 0).any(0).numpy()
    for half, keep in enumerate((group < 2, group >= 2)):
        expected = np.array(regressions(stream, keep, 0)["error"])[alive]
        value = found.beta_error_a.halves_HL[half].numpy()[alive]
        assert value.tolist() == pytest.approx(expected, abs=1e-5)


def test_bootstrapped_intervals_surround_the_same_values(stream):
    clustered, drawn = latent_scaling(stream.sums), bootstrapped_scaling(stream.sums, draws=500)
    alive = clustered.count_L > 0
    for name in FIGURES:
        ours, theirs = getattr(clustered, name), getattr(drawn, name)
        assert torch.allclose(ours.value_L[alive], theirs.value_L[alive])
        assert (theirs.low_L <= theirs.value_L)[alive].all()
        assert (theirs.value_L <= theirs.high_L)[alive].all()
        assert torch.allclose(ours.halves_HL, theirs.halves_HL, equal_nan=True)


def test_shrinkage_and_decoupling_are_told_from_a_latent_of_b_only():
    """Four latents with no decoder in `a`: one right, one shrunk (the feature is in `a` too), one
    decoupled (another latent writes it in `a`), and one never active."""
    eye = torch.eye(5, 6)
    truth = Planted(
        torch.stack([eye[0] * 0, eye[1], eye[2], eye[2] * 0, eye[3]]),
        torch.stack([eye[0], eye[1], eye[2] * 0, eye[2], eye[3]]),
        torch.tensor([0.3, 0.3, 0.3, 0.3, 0.0]),
    )
    a_LD = truth.a_FD.clone()
    a_LD[[1, 4]] = 0
    coder = constructed_coder(truth, a_LD)
    random = torch.Generator().manual_seed(0)
    code = truth.code(64 * BLOCK, random)
    code[:, 3] = code[:, 2]  # the two halves of one feature
    rows = truth.rows(code, 0.1, random)
    sums = ScalingSums(toy_pair(coder), block_groups(64))
    sums.add(chunk_of(coder, rows, code))
    found = latent_scaling(sums)
    of_b = [0, 1, 3]
    assert found.nu_error.value_L[of_b].tolist() == pytest.approx([0, 1, 0], abs=0.03)
    assert found.nu_reconstruction.value_L[of_b].tolist() == pytest.approx([0, 0, 1], abs=0.03)
    norms = norms_of(sums.pair)
    assert chat_specific(found, norms).tolist() == [True, False, False, False, False]
    assert surely_chat_specific(found, norms).tolist() == [True, False, False, False, False]


def test_sure_is_less_than_estimated():
    """Where the tokens are few, an estimate below the rule's bounds may prove nothing."""
    truth = planted(0, 8, 12, rate=0.02)
    coder = constructed_coder(truth)
    random = torch.Generator().manual_seed(0)
    code = truth.code(16 * BLOCK, random)
    sums = ScalingSums(toy_pair(coder), block_groups(16))
    sums.add(chunk_of(coder, truth.rows(code, 1.0, random), code))
    found = latent_scaling(sums)
    norms = norms_of(sums.pair)
    estimated, sure = chat_specific(found, norms), surely_chat_specific(found, norms)
    assert (estimated | ~sure).all()
    assert estimated.sum() > sure.sum()


def test_unequal_widths_are_refused():
    coder = Coder(Crosscoder()(Layout(("a/x.1", "b/x.1"), (3, 4)), 2), ReLU())
    with pytest.raises(UsageError, match="equal widths; they are"):
        ScalingSums(toy_pair(coder), block_groups(4))


REPEATS, BLOCKS = 60, 128


def true_scaling(truth: Planted, coder: Coder) -> dict[str, torch.Tensor]:
    """What endless tokens would give, from E f_j² = p_j·7/3 and E f_i f_j = p_i p_j·(3/2)²."""
    p = truth.rate_F.double()
    moment = (p[:, None] * p * MEAN**2).fill_diagonal_(0)
    d_a, d_b = (d.double() for d in toy_pair(coder).decoders())
    square = (p * MEAN_SQUARE) * d_b.square().sum(-1)
    found = {}
    for name, t, d in (("a", truth.a_FD.double(), d_a), ("b", truth.b_FD.double(), d_b)):
        own = (d_b * t).sum(-1) / d_b.square().sum(-1)
        found[f"beta_error_{name}"] = own + (moment * (d_b @ (t - d).T)).sum(-1) / square
        own = (d_b * d).sum(-1) / d_b.square().sum(-1)
        found[f"beta_reconstruction_{name}"] = own + (moment * (d_b @ d.T)).sum(-1) / square
    for target in ("error", "reconstruction"):
        found[f"nu_{target}"] = found[f"beta_{target}_a"] / found[f"beta_{target}_b"]
    return found


def repeated(truth: Planted, coder: Coder, block_noise: float) -> dict[str, list[Estimate]]:
    """The whole measurement on fresh tokens, many times; the noise may be shared by a block."""
    random = torch.Generator().manual_seed(7)
    found: dict[str, list[Estimate]] = {name: [] for name in FIGURES}
    for _ in range(REPEATS):
        code = truth.code(BLOCKS * BLOCK, random)
        rows = truth.rows(code, 0.5, random)
        common = torch.randn(BLOCKS, rows.shape[1], generator=random)
        rows = rows + block_noise * common.repeat_interleave(BLOCK, 0)
        sums = ScalingSums(toy_pair(coder), block_groups(BLOCKS))
        sums.add(chunk_of(coder, rows, code))
        once = latent_scaling(sums)
        for name, estimates in found.items():
            estimates.append(getattr(once, name))
    return found


@pytest.mark.parametrize("block_noise", [0.0, 0.5])
def test_intervals_hold_the_truth_as_often_as_they_say(block_noise):
    """Of 48 latents, active on 0.4 to 30 % of 4096 tokens, 60 times over: 95 % intervals hold the
    truth in at least 93 % and at most 98 %, and are as wide as the estimates' true spread asks."""
    truth = planted(24, 12, 24)
    mixed = torch.randperm(48, generator=torch.Generator().manual_seed(4))
    truth.rate_F.copy_(torch.logspace(-2.4, -0.5, 48)[mixed])
    coder = shaken(truth, 0.05, 3)
    expected, found = true_scaling(truth, coder), repeated(truth, coder, block_noise)
    t = students_t(torch.tensor([15.0]).double(), 0.95)
    for name in FIGURES:
        low, high, value = (
            torch.stack([getattr(e, f"{end}_L") for e in found[name]])
            for end in ("low", "high", "value")
        )
        known = value.isfinite()
        held = ((low <= expected[name]) & (expected[name] <= high))[known].double().mean()
        often = truth.rate_F > 0.03
        reach = ((high - low) / 2)[:, often].median(0).values
        ratio = (reach / (t * value[:, often].std(0))).median()
        print(f"{name} block noise {block_noise}: {held:.3f} held, {ratio:.2f} of true width")
        assert 0.93 <= held <= 0.98, name
        assert 0.85 <= ratio <= 1.15, name
