"""The whole of it on two synthetic models: a coder that is trained on their rows tells what is of
one model only, and its scaling factors are known to within their intervals."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import cosine_similarity

from crosslens.coder import BatchTopK, Coder, Crosscoder
from crosslens.diffing.classes import KISSANE, MINDER, Bins, classes
from crosslens.diffing.groups import block_groups
from crosslens.diffing.norms import norms_of
from crosslens.diffing.scaling import (
    ScalingSums,
    chat_specific,
    latent_scaling,
    surely_chat_specific,
)
from crosslens.diffing.strength import ActivitySums, activity
from crosslens.training import CoderConfig
from tests.diffing_toy import BLOCK, Planted, chunk_of, planted, toy_pair
from tests.test_planted import BATCH, generator, train

SAMPLES, BLOCKS = 24, 64


@dataclass(frozen=True)
class Found:
    """A trained coder, and which planted feature each latent is nearest to, over both models."""

    truth: Planted
    coder: Coder
    feature_L: torch.Tensor
    latent_F: torch.Tensor


@pytest.fixture(scope="module")
def found() -> Found:
    """72 features, 40 of both models and 16 of each alone, in 32 columns; twice as many latents."""
    truth = planted(40, 16, 32, rate=3 / 72)
    random = generator(5)
    shape = CoderConfig(latents=144, activation=BatchTopK(k=3))

    def rows() -> torch.Tensor:
        return truth.rows(truth.code(BATCH, random) * 5, 0.1, random)

    coder = train(Crosscoder(), truth.layout, rows, shape, steps=800)
    cosine_FL = cosine_similarity(truth.table_FY[:, None], coder.W_dec[0][None], dim=-1)
    return Found(truth, coder, cosine_FL.argmax(0), cosine_FL.argmax(1))


@pytest.fixture(scope="module")
def samples(found) -> list[ScalingSums]:
    """Sums over fresh tokens, sample by sample."""
    random = generator(6)
    parts = []
    for _ in range(SAMPLES):
        code = found.truth.code(BLOCKS * BLOCK, random) * 5
        sums = ScalingSums(toy_pair(found.coder), block_groups(BLOCKS))
        sums.add(chunk_of(found.coder, found.truth.rows(code, 0.1, random)))
        parts.append(sums)
    return parts


def recovered(found: Found, said: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Precision and recall of latents [L] (bool) that are said to be of one model only, by kind."""
    kinds = found.truth.kinds
    right = [
        kinds[found.feature_L[latent]] == kind
        for kind, exclusive_L in said.items()
        for latent in exclusive_L.nonzero().flatten().tolist()
    ]
    hit = [
        bool(said[kind][latent])
        for kind, latent in zip(kinds, found.latent_F.tolist(), strict=True)
        if kind in said
    ]
    return sum(right) / len(right), sum(hit) / len(hit)


@pytest.mark.parametrize("bins", [KISSANE, MINDER], ids=["kissane", "minder"])
def test_exclusive_latents_are_found_by_their_norms(found, samples, bins: Bins):
    count_L = torch.stack([sums.count_L for sums in samples]).sum(0)
    label = classes(norms_of(toy_pair(found.coder)), count_L, bins)
    precision, recall = recovered(found, {k: label.mask(k) for k in ("only_a", "only_b")})
    print(f"{bins.measure}: precision {precision:.3f}, recall {recall:.3f}, {label.counts}")
    assert precision >= 0.95
    assert recall >= 0.95


def test_exclusive_latents_of_b_are_found_by_scaling(found, samples):
    norms, scaling = norms_of(toy_pair(found.coder)), latent_scaling(samples[0])
    for rule in (chat_specific, surely_chat_specific):
        precision, recall = recovered(found, {"only_b": rule(scaling, norms)})
        print(f"{rule.__name__}: precision {precision:.3f}, recall {recall:.3f}")
        assert precision >= 0.95
        assert recall >= 0.93


def test_a_sample_s_interval_holds_what_much_more_tokens_say(found, samples):
    """The errors of a trained coder are not random, and the intervals hold all the same: ν and β of
    24 samples of 2048 tokens against those of all 49,152."""
    whole = ScalingSums(toy_pair(found.coder), block_groups(BLOCKS))
    for sums in samples:
        whole.square_GL += sums.square_GL
        whole.error_MGL += sums.error_MGL
        whole.recon_MGL += sums.recon_MGL
    expected = latent_scaling(whole)
    each = [latent_scaling(sums) for sums in samples]
    for name in ("beta_error_a", "beta_error_b", "nu_error"):
        true_L = getattr(expected, name).value_L
        low, high = (
            torch.stack([getattr(getattr(one, name), end) for one in each])
            for end in ("low_L", "high_L")
        )
        known = ~low.isnan()
        held = ((low <= true_L) & (true_L <= high))[known].double().mean()
        print(f"{name}: {held:.3f} of {int(known.sum())} intervals hold")
        assert held >= 0.93, name


def test_one_pass_feeds_all_measures(found):
    """Accumulators of one chunk at a time, side by side, agree on what was active."""
    pair = toy_pair(found.coder)
    code = found.truth.code(4 * BLOCK, generator(9)) * 5
    rows = found.truth.rows(code, 0.1, generator(8))
    marked = torch.zeros(4, BLOCK, dtype=torch.bool)
    scaling, strength = ScalingSums(pair, block_groups(4, 2)), ActivitySums(pair, marked)
    for block, part in enumerate(rows.split(BLOCK)):
        chunk = chunk_of(found.coder, part, first_block=block)
        for sums in (scaling, strength):
            sums.add(chunk)
    assert torch.equal(latent_scaling(scaling).count_L, activity(strength).count_L)
