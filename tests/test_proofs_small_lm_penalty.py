"""The interaction penalty on the small language model's crosscoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import fmean

import pytest
import torch
from torch import Tensor

from crosslens.errors import UsageError
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import CoderPlan, SmallLM, Text, data, initial
from crosslens.proofs.ladder.small_lm_coder import Features, train_coder
from crosslens.proofs.ladder.small_lm_penalty import interaction, readers_of
from tests.proofs_small_lm import TINY, silent, text_of

Model = tuple[SmallLM, dict[str, Tensor], Text]


@pytest.fixture(scope="module")
def model() -> Model:
    """Untrained, but with rows of other sizes than a trained one's."""
    config = replace(TINY, layers=2, coder=replace(TINY.coder, features=32, steps=60))
    weights = initial(config)
    return config, {**weights, "W_E": 0.3 * weights["W_E"]}, text_of(config.vocabulary)


def coded(model: Model, **changed: object) -> Features:
    config, weights, text = model
    plan = CoderPlan(**{**vars(config.coder), **changed})
    return train_coder(replace(config, coder=plan), weights, text, silent)


def rows_of(model: Model) -> Tensor:
    config, weights, text = model
    return search.truth(weights, data(config, text)).rows_PND


def shared(model: Model, features: Features, rows_PRD: Tensor) -> float:
    """What `interaction` gives."""
    readers = readers_of(model[1], features.scale_P)
    return interaction(features.coder, features.scaled(rows_PRD.float()), readers)


def looped(weights: Mapping[str, Tensor], features: Features, rows_PRD: Tensor) -> float:
    """The share in the model's own units, over plain floats."""
    with torch.no_grad():
        codes = features.coder.encode(features.scaled(rows_PRD.float())).double().tolist()
    found = []
    for layer, (W_in, W_out) in enumerate(zip(weights["W_in"], weights["W_out"], strict=True)):
        site, shares = 2 * layer + 1, []
        images = (features.decoder_PFD[site].double() @ W_in.double()).tolist()
        bias = (features.bias_PD[site].double() @ W_in.double()).tolist()
        norms = W_out.double().norm(dim=1).tolist()
        for code, row in zip(codes, rows_PRD[site].tolist(), strict=True):
            r = (sum(x * x for x in row) / len(row) + 2.0**-17) ** -0.5
            apart = whole = 0.0
            for n, size in enumerate(norms):
                y = [a * r * image[n] for a, image in zip(code, images, strict=True) if a]
                c = r * bias[n]
                alone = sum(max(0.0, each) for each in y)
                together = max(0.0, c + sum(y)) - max(0.0, c)
                apart += size * abs(alone - together)
                whole += size * (abs(alone) + abs(together))
            shares.append(apart / whole if whole else 0.0)
        found.append(fmean(shares))
    return fmean(found)


def test_the_measure_is_the_loop_in_the_models_own_units(model: Model) -> None:
    features, rows_PRD = coded(model), rows_of(model)[:, :6]
    assert float((features.scale_P - 1).abs().max()) > 0.2, "the coder's rows are scaled"
    found = shared(model, features, rows_PRD)
    assert 0.05 < found < 0.95
    assert found == pytest.approx(looped(model[1], features, rows_PRD), rel=1e-4)


def test_the_penalty_lowers_the_interaction(model: Model) -> None:
    rows_PRD = rows_of(model)
    without = shared(model, coded(model, bias="mean"), rows_PRD)
    exact = shared(model, coded(model, bias="mean", penalty=1.0), rows_PRD)
    assert exact < 0.8 * without
    paper = coded(model, bias="mean", penalty=1.0, form="paper")
    assert not torch.equal(paper.decoder_PFD, coded(model, bias="mean").decoder_PFD)


def test_a_bias_that_is_not_learnt_stays_at_the_mean(model: Model) -> None:
    kept, longer = (coded(model, bias="mean", steps=steps) for steps in (1, 60))
    torch.testing.assert_close(kept.bias_PD, longer.bias_PD, rtol=0, atol=0)
    assert not torch.equal(kept.decoder_PFD, longer.decoder_PFD)
    assert not torch.equal(coded(model).bias_PD, kept.bias_PD)


def test_without_a_weight_the_form_does_not_matter(model: Model) -> None:
    one, other = coded(model), coded(model, form="paper")
    torch.testing.assert_close(one.decoder_PFD, other.decoder_PFD, rtol=0, atol=0)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(UsageError, match=r"penalty must not be negative, found -1\.0"):
        CoderPlan(penalty=-1.0)
