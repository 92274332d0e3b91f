"""What baselines are made of, against numpy and loops, on the tiny pair."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.coder import Coder, Crosscoder, Layout, ReLU
from crosslens.diffing.baselines import moments, places, read_kl, token_kl
from crosslens.diffing.baselines.lens import promoted
from crosslens.diffing.baselines.pca import principal_components
from crosslens.diffing.pair import pair_of
from crosslens.diffing.planted import Condition
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import ModelSpec, open_model
from tests.test_activations import blocks_of

EVERY = TokenPolicy(outlier_norm=None)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def models(tiny_pair):
    return {
        name: open_model(ModelSpec(path=str(path), dtype="float32", device="cpu"), name)
        for name, path in tiny_pair.items()
    }


@pytest.fixture(scope="module")
def source(models) -> Source:
    layout = site_layout(models, ["resid_mid.1", "resid_post.2"])
    return Source(models, layout, blocks_of(5), EVERY, blocks_per_chunk=2)


def pair_over(layout: Layout):
    return pair_of(Coder(Crosscoder()(layout, 3), ReLU()))


def rows_of(source: Source, site: str):
    """Differences of all positions but BOS [blocks, positions, D], by numpy."""
    seen = [m.capture(source.blocks.tokens_NT, [site])[site] for m in source.models.values()]
    return (seen[1] - seen[0])[:, 1:].double().numpy(), seen[1][:, 1:].double().numpy()


def test_moments_are_numpys(source):
    found = moments(source, places(pair_over(source.layout)))
    assert list(found) == ["resid_mid.1", "resid_post.2"]
    for site, each in found.items():
        difference, changed = rows_of(source, site)
        rows = difference.reshape(-1, 32)
        assert each.count == len(rows) == 5 * 15
        assert np.allclose(each.mean_D, rows.mean(0), atol=1e-7)
        assert np.allclose(each.covariance_DD, np.cov(rows.T, bias=True), atol=1e-9)
        assert each.spread == pytest.approx(rows.var(0).sum() ** 0.5, rel=1e-5)
        assert each.norm_b == pytest.approx(np.linalg.norm(changed, axis=-1).mean(), rel=1e-5)
        assert each.first_F.tolist() == [0, 5, 5, 5, 5]  # the policy drops BOS
        assert np.allclose(each.first_FD[1:], difference[:, :4].mean(0), atol=1e-7)
        assert not each.first_FD[0].any()


def test_moments_of_no_token_are_refused(source):
    nothing = replace(source, blocks=replace(source.blocks, docs_NT=source.blocks.docs_NT * 0 - 1))
    with pytest.raises(CrosslensError, match="keeps 0 tokens"):
        moments(nothing, places(pair_over(source.layout)))


def test_models_of_different_widths_have_no_difference():
    with pytest.raises(UsageError, match="different widths"):
        places(pair_over(Layout(("a/s.1", "b/s.1"), (4, 6))))


def test_principal_components_are_those_of_the_svd():
    rows = np.random.default_rng(0).normal(size=(200, 12)) @ np.diag(np.arange(1.0, 13.0))
    about = rows - rows.mean(0)
    _, size, vectors = np.linalg.svd(about)
    share, component = principal_components(torch.tensor(about.T @ about / 200), 5)
    assert share.tolist() == pytest.approx((size**2 / (size**2).sum())[:5].tolist())
    assert component.shape == (5, 12)
    cosine = np.abs((component.numpy() * vectors[:5]).sum(-1))
    assert cosine.tolist() == pytest.approx([1.0] * 5)
    assert (component.gather(1, component.abs().argmax(1, keepdim=True)) > 0).all()


def test_models_that_do_not_differ_have_no_components():
    share, component = principal_components(torch.zeros(4, 4).double(), 9)
    assert share.tolist() == [0.0] * 4
    assert component.isfinite().all()


def test_the_lens_is_norm_then_head(models):
    model = models["chat"]
    direction = torch.randn(2, 32, generator=random(0))
    direction[1] = 0
    read, none = promoted(direction, model, "resid_mid.2", shown=4)
    x = direction[0] / direction[0].norm() * math.sqrt(32)
    norm = model.module.model.norm
    x = norm.weight * x / (x.square().mean() + norm.variance_epsilon).sqrt()
    order = (model.module.lm_head.weight @ x).argsort().tolist()
    assert read.top == tuple(model.tokenizer.decode([v]) for v in order[::-1][:4])
    assert read.bottom == tuple(model.tokenizer.decode([v]) for v in order[:4])
    assert none.top == none.bottom == ()
    assert promoted(direction, model, "mlp_act.2")[0].top == ()


def kl_by_loop(p: list[float], q: list[float]) -> float:
    """KL(p ‖ q) of two lists of logits."""
    sum_p, sum_q = (sum(math.exp(v) for v in logits) for logits in (p, q))
    total = 0.0
    for u, v in zip(p, q, strict=True):
        share = math.exp(u) / sum_p
        total += share * (math.log(share) - (v - math.log(sum_q)))
    return total


@pytest.fixture(scope="module")
def looped_kl(source):
    """KL(chat ‖ base) at every position, by loops."""
    logits = {
        name: model.capture(source.blocks.tokens_NT, ["logits"])["logits"].double().tolist()
        for name, model in source.models.items()
    }
    return [
        [kl_by_loop(p, q) for p, q in zip(chat, base, strict=True)]
        for chat, base in zip(logits["chat"], logits["base"], strict=True)
    ]


def test_the_kl_of_predictions_is_the_loops(source, looped_kl):
    found = read_kl(source, "base", "chat")
    by_token: dict[int, list[float]] = {}
    for tokens, values in zip(source.blocks.tokens_NT.tolist(), looped_kl, strict=True):
        for token, value in list(zip(tokens, values, strict=True))[1:]:
            by_token.setdefault(token, []).append(value)
    assert found.count == 75
    assert found.mean == pytest.approx(sum(map(sum, by_token.values())) / 75, rel=1e-3)
    for token, values in by_token.items():
        assert float(found.sum_V[token]) == pytest.approx(sum(values), rel=1e-3)
        assert int(found.count_V[token]) == len(values)
    best = sorted((max(values[1:]) for values in looped_kl), reverse=True)
    assert [each.kl for each in found.peaks] == pytest.approx(best, rel=1e-3)
    for each in found.peaks:
        assert looped_kl[each.block][each.position] == pytest.approx(each.kl, rel=1e-3)


def test_the_kl_is_told_with_tokens_and_places(source, looped_kl):
    made = token_kl(read_kl(source, "base", "chat"), source, "base", "chat")
    assert made.figures["tokens"] == 75
    first = made.figures["places"][0]
    block, position = max(
        ((b, t) for b in range(5) for t in range(1, 16)), key=lambda at: looped_kl[at[0]][at[1]]
    )
    context = source.blocks.tokens_NT[block, : position + 1].tolist()
    decode = source.models["chat"].tokenizer.decode
    assert first["text"] == decode(context)
    run = source.models["chat"].capture(source.blocks.tokens_NT, ["logits"])["logits"]
    assert first["next_b"] == decode([int(run[block, position].argmax())])
    assert all(each["times"] >= 3 for each in made.figures["top_tokens"])


def test_the_kl_on_prompts_is_that_of_their_models(source, looped_kl):
    made = token_kl(read_kl(source, "base", "chat"), source, "base", "chat")
    prompt, position = torch.tensor([0, 0, 3]), torch.tensor([4, 9, 2])
    rows = torch.zeros(3, source.layout.width)
    here = Condition(source, rows, prompt, position, torch.zeros_like(prompt))
    want = [looped_kl[n][t] for n, t in ((0, 4), (0, 9), (3, 2))]
    assert made.strengths(here).flatten().tolist() == pytest.approx(want, rel=1e-3)
    both = dict.fromkeys(source.models, source.models["base"])
    same = replace(here, source=replace(source, models=both))
    assert made.strengths(same).abs().max() < 1e-6


def test_models_with_different_tokenizers_have_no_kl(source, other_tokenizer):
    chat = replace(source.models["chat"], tokenizer=other_tokenizer)
    other = replace(source, models={**source.models, "chat": chat})
    with pytest.raises(UsageError, match="have different tokenizers"):
        read_kl(other, "base", "chat")
