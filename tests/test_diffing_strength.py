"""Strength of latents, agreement of encoders and fidelity to either model, against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from crosslens.coder import Coder, Crosscoder, ReLU
from crosslens.diffing.agreement import AgreementSums, agreement
from crosslens.diffing.fidelity import FidelitySums, fidelity
from crosslens.diffing.groups import block_groups
from crosslens.diffing.strength import ActivitySums, activity
from crosslens.errors import CrosslensError
from tests.diffing_toy import BLOCK, chunk_of, constructed_coder, planted, toy_pair


@pytest.fixture(scope="module")
def streamed():
    """Ten blocks of a toy in three chunks; one latent is never active."""
    truth = planted(6, 3, 12, rate=0.25)
    truth.rate_F[4] = 0
    random = torch.Generator().manual_seed(3)
    coder = constructed_coder(truth, b_LD=truth.b_FD * 0.5)
    code = truth.code(10 * BLOCK, random)
    rows = truth.rows(code, 0.1, random)
    parts = [slice(0, 4), slice(4, 5), slice(5, 10)]
    chunks = [
        chunk_of(coder, rows[p.start * BLOCK : p.stop * BLOCK], first_block=p.start) for p in parts
    ]
    return toy_pair(coder), rows, coder.encode(rows), chunks


def test_activity_is_the_loop(streamed):
    pair, rows, code, chunks = streamed
    marked = torch.zeros(10, BLOCK, dtype=torch.bool)
    marked[:, :5] = True
    sums = ActivitySums(pair, marked)
    for chunk in chunks:
        sums.add(chunk)
    found = activity(sums)
    assert (found.tokens, found.marked_tokens) == (10 * BLOCK, 50)
    d_a, d_b = pair.decoders()
    for j in range(code.shape[1]):
        on = [(i, z) for i, z in enumerate(code[:, j].tolist()) if z > 0]
        assert found.count_L[j] == len(on)
        assert found.density_L[j].item() == pytest.approx(len(on) / len(rows))
        if not on:
            assert found.mean_L[j].isnan()
            assert found.marked_share_L[j].isnan()
            continue
        total = sum(z for _, z in on)
        here = [z for i, z in on if i % BLOCK < 5]
        assert found.largest_L[j].item() == pytest.approx(max(z for _, z in on))
        assert found.strength_a_L[j].item() == pytest.approx(total / len(on) * d_a[j].norm().item())
        assert found.strength_b_L[j].item() == pytest.approx(total / len(on) * d_b[j].norm().item())
        assert found.marked_share_L[j].item() == pytest.approx(len(here) / len(on))
        assert found.marked_sum_share_L[j].item() == pytest.approx(sum(here) / total)
    assert (found.count_L == 0).any()


def test_agreement_is_the_correlation_over_active_tokens(streamed):
    pair, rows, code, chunks = streamed
    sums = AgreementSums(pair)
    for chunk in chunks:
        sums.add(chunk)
    found = agreement(sums)
    E_a, E_b = (E.double().numpy() for E in pair.encoders())
    x = rows.double().numpy()
    for j in range(code.shape[1]):
        on = (code[:, j] > 0).numpy()
        c_a, c_b = x[on][:, :12] @ E_a[j], x[on][:, 12:] @ E_b[j]
        if not on.any():
            assert found.correlation_L[j].isnan()
            continue
        expected = np.corrcoef(c_a, c_b)[0, 1]
        assert found.correlation_L[j].item() == pytest.approx(expected, abs=1e-5)
        share = c_b.sum() / (c_a.sum() + c_b.sum())
        assert found.share_b_L[j].item() == pytest.approx(share, rel=1e-4)
        cosine = E_a[j] @ E_b[j] / np.linalg.norm(E_a[j]) / np.linalg.norm(E_b[j])
        assert found.cosine_L[j].item() == pytest.approx(cosine, abs=1e-6)


def centred_coder() -> Coder:
    """Three latents, of which the last reads `a` only; rows are centred at b_dec."""
    truth = planted(3, 0, 4)
    coder = Coder(Crosscoder()(truth.layout, 3), ReLU(), center=True).requires_grad_(False)
    random = torch.Generator().manual_seed(5)
    coder.W_enc[0].normal_(generator=random)
    coder.W_enc[0][2, 4:] = 0
    coder.W_dec[0].copy_(coder.W_enc[0])
    coder.b_dec.normal_(generator=random)
    return coder.eval()


def test_agreement_of_a_centred_coder_is_about_what_it_takes_off():
    coder = centred_coder()
    rows = torch.randn(3 * BLOCK, 8, generator=torch.Generator().manual_seed(6))
    sums = AgreementSums(toy_pair(coder))
    sums.add(chunk_of(coder, rows))
    found = agreement(sums)
    code, x = coder.encode(rows), (rows - coder.b_dec).double()
    W = coder.W_enc[0].double()
    for j in range(3):
        on = code[:, j] > 0
        a, b = (x[on, :4] @ W[j, :4]).sum(), (x[on, 4:] @ W[j, 4:]).sum()
        assert found.share_b_L[j].item() == pytest.approx((b / (a + b)).item(), rel=1e-4)
    assert found.correlation_L.isnan().tolist() == [False, False, True]
    assert found.share_b_L[2] == 0


def test_fidelity_is_the_loop_in_both_conventions(streamed):
    pair, rows, _, chunks = streamed
    sums = FidelitySums(pair, block_groups(10, 4))
    for chunk in chunks:
        sums.add(chunk)
    found = fidelity(sums)
    for name, columns in (("a", slice(0, 12)), ("b", slice(12, 24))):
        x = rows[:, columns].double().numpy()
        error = np.concatenate(
            [(c.target_RY - c.recon_RY)[:, columns].double().square().sum(-1) for c in chunks]
        )
        mean = x.mean(0)
        spread = sum(((row - mean) ** 2).sum() for row in x)
        assert found[name].fvu.value == pytest.approx(error.sum() / spread, rel=1e-5)
        ratios = []
        for chunk in chunks:
            here = chunk.target_RY[:, columns].double().numpy()
            for row in here:
                about = ((row - here.mean(0)) ** 2).sum()
                ratios.append(1 - error[len(ratios)] / about)
        assert found[name].explained_variance.value == pytest.approx(np.mean(ratios), rel=1e-5)
    assert found["a"].fvu.value < found["b"].fvu.value


def test_fidelity_s_interval_is_the_jackknife_over_groups(streamed):
    pair, rows, _, chunks = streamed
    groups = block_groups(10, 4)
    sums = FidelitySums(pair, groups)
    for chunk in chunks:
        sums.add(chunk)
    found = fidelity(sums)["a"].fvu
    group = groups.of_block_N.repeat_interleave(BLOCK).numpy()
    x = rows[:, :12].double().numpy()
    error = np.concatenate(
        [(c.target_RY - c.recon_RY)[:, :12].double().square().sum(-1) for c in chunks]
    )
    left = []
    for g in range(4):
        keep = group != g
        left.append(error[keep].sum() / ((x[keep] - x[keep].mean(0)) ** 2).sum())
    reach = 3.182446 * math.sqrt(3 / 4 * sum((v - np.mean(left)) ** 2 for v in left))
    assert found.high - found.value == pytest.approx(reach, rel=1e-3)
    assert found.value - found.low == pytest.approx(reach, rel=1e-3)


def test_fidelity_of_nothing_is_refused(streamed):
    with pytest.raises(CrosslensError, match="no tokens"):
        fidelity(FidelitySums(streamed[0], block_groups(10, 4)))
