"""The recursion from the embedding: never below the truth, and made of what it says."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import pytest
import torch

from crosslens.errors import UsageError
from crosslens.lm.attention import attention_of
from crosslens.lm.mlp import mlp_of
from crosslens.proofs.local import local
from crosslens.proofs.local_gather import gather
from crosslens.proofs.recursion import (
    Step,
    attention_cap,
    loss_cap,
    mlp_cap,
    plain,
    recursion,
)
from tests.interaction_sites import blocks, coder_at, model_of, source_at
from tests.test_lm_families import LAYERS, VOCABULARY, tokens

NAMES = ("llama", "gpt2", "relu")


@cache
def steps(name: str, *sites: str) -> tuple[Step, ...]:
    model = model_of(name)
    source = source_at(model, *sites)
    found = gather(source, coder_at(source.layout), model, 9)
    made = {site: local(each, lambda _: None) for site, each in found.items()}
    return tuple(recursion(model, made, blocks().tokens_NT))


@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_at_least_the_truth(name: str) -> None:
    found = steps(name, "resid_mid.0", "resid_mid.2")
    wanted = ["embedding"]
    for layer in range(LAYERS):
        wanted.append(f"attention {layer}")
        wanted += [f"resid_mid.{layer}"] * (layer in (0, 2))
        wanted.append(f"mlp {layer}")
    assert [step.name for step in found] == wanted
    for step in found:
        assert step.after >= step.true * (1 - 1e-6), step.name
        terms = step.before + step.propagation + step.interaction + step.transition
        assert step.after == pytest.approx(terms, rel=1e-9)
    assert found[0].after == 0.0
    for before, after in pairwise(found):
        assert after.before == before.after


def test_terms_stand_where_they_belong() -> None:
    for step in steps("llama", "resid_mid.0", "resid_mid.2"):
        at_site = step.name.startswith("resid_mid")
        assert (step.transition > 0) == at_site
        assert (step.propagation > 0) == (step.name != "embedding" and not at_site)
        assert step.by_features == 0.0 or step.name in ("mlp 0", "mlp 2")
        assert (step.interaction > 0) == (step.by_features > 0)


def test_features_are_used_where_they_are_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the weights promise little of an MLP, the way over the surrogate is taken."""
    cap = mlp_cap(model_of("llama"), 0)
    steps.cache_clear()
    monkeypatch.setattr("crosslens.proofs.recursion.mlp_cap", lambda *_: cap * 1e6)
    found = {step.name: step for step in steps("llama", "resid_mid.0")}
    steps.cache_clear()
    own = found["mlp 0"]
    assert own.by_features == 1.0
    assert own.interaction > 0
    assert own.after >= own.true


@pytest.mark.parametrize("name", NAMES)
def test_no_search_makes_a_part_write_more_than_its_cap(name: str) -> None:
    model = model_of(name)
    for layer in range(LAYERS):
        attention, mlp = attention_of(model, layer), mlp_of(model, layer)
        caps = attention_cap(model, attention), mlp_cap(model, layer)
        generator = torch.Generator().manual_seed(layer)
        for part, cap in zip((attention, mlp), caps, strict=True):
            assert part.norm is not None
            x = torch.randn(6, model.d_model, generator=generator)
            for _ in range(25):
                x = x.detach().requires_grad_(True)
                wrote = part(part.norm(x)).norm(dim=-1)
                assert float(wrote.detach().max()) <= float(cap) * (1 + 1e-5)
                (slope,) = torch.autograd.grad(wrote.sum(), x)
                x = x + slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def test_the_cap_of_the_loss_holds() -> None:
    for name in NAMES:
        model = model_of(name)
        cap = loss_cap(model)
        logits = model.capture(tokens(), ["logits"])["logits"].double()
        losses = -logits.log_softmax(-1)
        assert float(losses.max()) <= cap
        assert cap >= math.log(VOCABULARY) * (1 - 1e-12)


def test_it_says_that_it_is_vacuous_and_in_powers_of_ten() -> None:
    found = steps("llama", "resid_mid.0")
    told = plain(found, 17.0, VOCABULARY)
    assert told["loss"] == 17.0
    assert told["loss_uniform"] == math.log(VOCABULARY)
    assert told["vacuous"] == (found[-1].after >= found[-1].norm)
    for step, each in zip(found, told["steps"], strict=True):
        assert each["name"] == step.name
        if step.after:
            assert 10 ** each["log10_after"] == pytest.approx(step.after)


def test_models_and_sites_without_a_recursion_say_why() -> None:
    model = model_of("llama")
    source = source_at(model, "mlp_in.1")
    found = gather(source, coder_at(source.layout), model, 9)
    made = {site: local(each, lambda _: None) for site, each in found.items()}
    with pytest.raises(UsageError, match="resid_mid"):
        recursion(model, made, blocks().tokens_NT)
