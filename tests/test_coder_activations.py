"""Activations inside a coder: what they keep, annealing, files, folding, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crosslens.coder import (
    AbsTopK,
    BatchTopK,
    Coder,
    Crosscoder,
    Gated,
    Group,
    GroupMax,
    JumpReLU,
    Layout,
    ReLU,
    Rows,
    TopK,
    Wiring,
    fold,
    load,
    save,
    train_pass,
    unfold,
)
from crosslens.coder.activations import KEPT, k_at
from crosslens.config import from_plain, to_plain
from crosslens.errors import UsageError

LAYOUT = Layout(("a", "b", "c"), (4, 3, 5))
ACTIVATIONS = [
    ReLU(),
    TopK(k=3),
    TopK(k=3, signed=True),
    TopK(k=2, k_start=6, anneal=0.5),
    AbsTopK(k=3),
    BatchTopK(k=3),
    BatchTopK(k=2, k_start=4, anneal=0.2),
    GroupMax(k=4),
    JumpReLU(initial_threshold=0.3, bandwidth=0.5),
    JumpReLU.deepmind(),
    JumpReLU.anthropic(),
    JumpReLU.anthropic_clt(),
    JumpReLU(initial_threshold=0.3, bandwidth=0.5, input_gradient=True),
    Gated(),
]
LEARNT = {"JumpReLUdeepmind": {"threshold"}, "JumpReLUanthropic": {"log_threshold"},
          "Gated": {"r_mag", "b_mag"}}  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crossed() -> Wiring:
    groups = (Group(7, ("a",), ("b", "c")), Group(5, ("b", "c"), ("c",)))
    return Wiring(LAYOUT, LAYOUT, Layout(("b", "c"), (3, 5)), groups)


def filled(wiring: Wiring, activation, seed: int = 0) -> Coder:
    """A coder with every tensor random, positive where it must be."""
    coder = Coder(wiring, activation)
    with torch.no_grad():
        for i, (name, value) in enumerate(coder.named_parameters()):
            if name not in KEPT:
                value.normal_(generator=generator(seed + i)).mul_(0.5)
        for name in ("scale_read", "scale_write"):
            getattr(coder, name).uniform_(0.3, 3, generator=generator(seed + len(name)))
        for name in KEPT:
            value = getattr(coder, name)
            if value is not None:
                value.copy_(0.1 + 0.4 * torch.rand(value.shape, generator=generator(seed + 20)))
    return coder.eval()


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("wiring", [Crosscoder()(LAYOUT, 12), crossed()], ids=["all", "crossed"])
def test_files_and_folding_keep_every_activation(tmp_path, activation, wiring):
    coder = filled(wiring, activation)
    x = torch.randn(9, wiring.read.width, generator=generator(5)) * 2
    save(coder, tmp_path / "coder")
    again = load(tmp_path / "coder")
    assert again.activation == activation
    assert torch.equal(again(x), coder(x))
    for name in KEPT:
        mine, theirs = getattr(coder, name), getattr(again, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
        assert isinstance(mine, nn.Parameter) == isinstance(theirs, nn.Parameter)
    save(fold(coder), tmp_path / "folded")
    folded = load(tmp_path / "folded")
    assert torch.equal(folded.encode(x) != 0, coder.encode(x) != 0)
    assert (coder.encode(x) != 0).any()
    assert torch.allclose(folded(x), coder(x), atol=1e-4)
    assert torch.allclose(unfold(folded)(x), coder(x), atol=1e-4)
    assert from_plain(type(activation), {k: v for k, v in to_plain(activation).items()
                                         if k != "kind"}, "test") == activation  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ACTIVATIONS), st.integers(0, 1000))
def test_folding_changes_neither_output_nor_active_set(activation, seed):
    coder = filled(crossed(), activation, seed)
    x = torch.randn(6, 12, generator=generator(seed + 7)) * 2
    assert torch.equal(fold(coder).encode(x) != 0, coder.encode(x) != 0)
    assert torch.allclose(fold(coder)(x), coder(x), atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_rows_do_not_see_each_other_at_inference(activation):
    coder = filled(Crosscoder()(LAYOUT, 12), activation)
    x = torch.randn(6, 12, generator=generator(1))
    alone = torch.cat([coder.encode(x[i : i + 1]) for i in range(6)])
    assert torch.allclose(alone, coder.encode(x), atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_relabelling_latents_changes_nothing_but_order(activation):
    """Latents of GroupMax may change places within a run, and whole runs may."""
    coder = filled(Crosscoder()(LAYOUT, 12), activation)
    order = torch.randperm(12, generator=generator(3))
    if isinstance(activation, GroupMax):
        runs = torch.randperm(4, generator=generator(3))
        order = (runs[:, None] * 3 + torch.tensor([2, 0, 1])).flatten()
    other = Coder(Crosscoder()(LAYOUT, 12), activation).eval()
    other.load_state_dict({
        name: value[order] if value.dim() and value.shape[0] == 12 and name != "b_dec" else value
        for name, value in coder.state_dict().items()
    })  # fmt: skip
    x = torch.randn(5, 12, generator=generator(4))
    assert torch.allclose(other.encode(x), coder.encode(x)[:, order], atol=1e-6)
    assert torch.allclose(other(x), coder(x), atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_what_an_activation_keeps_is_learnt_or_not(activation):
    coder = Coder(Crosscoder()(LAYOUT, 12), activation)
    kind = type(activation).__name__ + getattr(activation, "form", "")
    learnt = {name for name, _ in coder.named_parameters()} & set(KEPT)
    assert learnt == LEARNT.get(kind, set())
    buffers = {"threshold"} if isinstance(activation, BatchTopK) else set()
    assert {name for name, _ in coder.named_buffers()} & set(KEPT) == buffers
    for name in learnt:
        assert getattr(coder, name).dtype == torch.float32


def test_the_presets_are_the_published_numbers():
    assert JumpReLU.deepmind() == JumpReLU()
    assert (JumpReLU().initial_threshold, JumpReLU().bandwidth) == (0.001, 0.001)
    assert JumpReLU(form="anthropic") == JumpReLU.anthropic(), "defaults do not mix the presets"
    anthropic = Coder(Crosscoder()(LAYOUT, 12), JumpReLU.anthropic())
    assert torch.allclose(anthropic.log_threshold, torch.full((12,), 0.1))
    assert JumpReLU.anthropic().bandwidth == 2.0
    clt = Coder(Crosscoder()(LAYOUT, 12), JumpReLU.anthropic_clt())
    assert torch.allclose(JumpReLU.anthropic_clt().thresholds(clt), torch.full((12,), 0.03))
    assert torch.allclose(clt.log_threshold, torch.full((12,), math.log(0.03)))
    assert JumpReLU.anthropic_clt().bandwidth == 1.0


def test_both_forms_encode_alike_and_learn_each_in_its_way():
    wide = {"initial_threshold": 0.5, "bandwidth": 4.0}
    x = torch.randn(20, 12, generator=generator(1))
    grads = {}
    for form in ("deepmind", "anthropic"):
        coder = Coder(Crosscoder()(LAYOUT, 12), JumpReLU(form=form, **wide)).train()
        with torch.no_grad():
            coder.W_enc[0].normal_(generator=generator(2))
        z = coder.encode(x)
        z.sum().backward()
        learnt = coder.threshold if form == "deepmind" else coder.log_threshold
        grads[form] = (z.detach(), learnt.grad)
    assert torch.equal(grads["deepmind"][0], grads["anthropic"][0])
    # −θ/ε and −e^t/ε are the same number for θ and for t.
    assert torch.allclose(grads["deepmind"][1], grads["anthropic"][1])
    assert grads["deepmind"][1].any()


@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_k_comes_down_linearly(kind):
    activation = kind(k=2, k_start=10, anneal=0.5)
    assert [k_at(activation, t) for t in (0.0, 0.125, 0.25, 0.5, 0.9, 1.0)] == [10, 8, 6, 2, 2, 2]
    assert k_at(kind(k=2), 0.0) == 2
    coder = Coder(Crosscoder()(LAYOUT, 12), activation).train()
    with torch.no_grad():
        coder.W_enc[0].normal_(generator=generator(2)).abs_()
        coder.W_dec[0].normal_(generator=generator(3))
    x = torch.rand(8, 12, generator=generator(1))
    for progress, k in ((0.0, 10), (0.25, 6), (0.5, 2), (1.0, 2)):
        assert (train_pass(coder, Rows(x, x), progress=progress).code != 0).sum() == 8 * k


def test_thresholds_stay_in_float32_when_products_are_short():
    for activation in (JumpReLU.anthropic(), JumpReLU(initial_threshold=0.5, bandwidth=1.0)):
        coder = Coder(Crosscoder()(LAYOUT, 12), activation).train()
        coder.compute_dtype = torch.bfloat16
        with torch.no_grad():
            coder.W_enc[0].normal_(generator=generator(2))
            coder.W_dec[0].normal_(generator=generator(3))
        x = torch.randn(30, 12, generator=generator(1))
        shown = train_pass(coder, Rows(x, x))
        assert shown.code.dtype == torch.bfloat16
        shown.recon_BY.square().sum().backward()
        learnt = coder.log_threshold if coder.threshold is None else coder.threshold
        assert learnt.dtype == learnt.grad.dtype == torch.float32
        assert learnt.grad.any()


def coder_of(n: int, activation):
    return lambda: Coder(Crosscoder()(LAYOUT, n), activation)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AbsTopK(k=0), r"activation\.k"),
        (lambda: GroupMax(k=0), r"activation\.k"),
        (lambda: TopK(k=4, k_start=8), "go together"),
        (lambda: TopK(k=4, anneal=0.5), "go together"),
        (lambda: BatchTopK(k=4, k_start=2, anneal=0.5), "k comes down"),
        (lambda: BatchTopK(k=4, k_start=8, anneal=1.5), r"activation\.anneal"),
        (lambda: JumpReLU(initial_threshold=-1.0), "initial_threshold"),
        (lambda: JumpReLU(form="anthropic", bandwidth=0.0), "bandwidth"),
        (coder_of(12, GroupMax(k=5)), "does not divide"),
        (coder_of(12, GroupMax(k=24)), "does not divide"),
        (coder_of(12, AbsTopK(k=13)), "only 12 latents"),
        (coder_of(12, TopK(k=4, k_start=13, anneal=0.1)), "k_start is 13"),
    ],
)
def test_nonsense_is_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()
