"""Passes that hold a code's entries only give what passes over the whole code give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosslens.coder import (
    AbsTopK,
    BatchTopK,
    Coder,
    Crosscoder,
    GroupMax,
    Layout,
    Rows,
    TopK,
    train_pass,
)
from crosslens.training import Adam, Muon, SignSGD
from crosslens.training.fit import fit
from crosslens.training.objective import AuxK, MultiTopK, Objective, PreAct, Tanh
from crosslens.training.row_steps import Gathered, clipped
from reproduce.scheme_table import SCHEMES, Sizes, config_of
from tests.sparse_runs import SILENT, first_steps, fresh_run

SIZES = Sizes(latents=240, l0=6, steps=100, batch=96, layers=(5, 15, 25))


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_trains_alike(name):
    config = config_of(name, SIZES)
    dense, sparse = (first_steps(config, SCHEMES[name], below, n=3) for below in (0.0, 1.1))
    for whole, held in zip(dense.steps, sparse.steps, strict=True):
        assert held["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert held["grad"] == pytest.approx(whole["grad"], rel=1e-4)
    assert dense.was_sparse == [False] * 3
    assert sparse.was_sparse == [config.objective.pre_act.weight == 0] * 3
    for key, value in dense.weights.items():
        torch.testing.assert_close(sparse.weights[key], value, rtol=1e-4, atol=2e-5, msg=key)
    assert torch.equal(dense.idle_L, sparse.idle_L)


@pytest.mark.parametrize(
    "optimizer",
    [
        *(Adam(), Adam(beta1=0.0), Adam(clip=None), Adam(clip=1e-3), SignSGD(), Muon()),
        *(Adam(moments="bfloat16"), Adam(beta1=0.0, moments="bfloat16")),
    ],
    ids=[
        *("adam", "no first moment", "unclipped", "clipped", "sign", "muon"),
        *("in half", "no first moment, in half"),
    ],
)
@pytest.mark.parametrize("unit_norm", [False, True])
def test_every_optimiser_steps_alike(optimizer, unit_norm):
    if unit_norm and isinstance(optimizer, SignSGD):
        return  # refused: it averages weights
    config = config_of("topk_sae", SIZES)
    coder = replace(config.coder, unit_norm=unit_norm)
    config = replace(config, coder=coder, optimizer=replace(optimizer, lr=1e-3))
    dense, sparse = (first_steps(config, SCHEMES["topk_sae"], below, n=4) for below in (0.0, 1.1))
    assert sparse.was_sparse == [True] * 4
    for key, value in dense.weights.items():
        torch.testing.assert_close(sparse.weights[key], value, rtol=1e-3, atol=1e-4, msg=key)


def a_coder(activation, **changes) -> Coder:
    layout = Layout(("resid_post.1", "resid_post.2"), (7, 5))
    coder = Coder(Crosscoder()(layout, 24), activation, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in coder.parameters():
            value.normal_(generator=generator).mul_(0.4)
    return coder.double().train()


def gradients(coder: Coder, objective: Objective, below: float) -> dict[str, torch.Tensor]:
    """Of every parameter, wherever they were left."""
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coder.zero_grad()
    coder.sparse_below = below
    dead_L = torch.arange(24) % 3 == 0
    shown = train_pass(coder, Rows(x.float(), x.float()), dead_L)
    assert (shown.known is not None) == (below > 0)
    objective(shown)[0].backward()
    found = {name: p.grad for name, p in coder.named_parameters() if p.grad is not None}
    if shown.gradients is not None:
        gathered = Gathered(shown.gradients.by_latent())
        for name, p in coder.named_parameters():
            if p in gathered.gradients:
                found[name] = found.get(name, 0) + gathered.summed(p)
    return found


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    "activation",
    [TopK(k=5), TopK(k=5, signed=True), AbsTopK(k=5), GroupMax(k=4), BatchTopK(k=5)],
    ids=["topk", "signed", "absolute", "groupmax", "batchtopk"],
)
def test_gradients_are_those_of_the_whole_code(activation, center):
    terms = {"aux": AuxK(weight=0.3, k=3)}
    if isinstance(activation, TopK):
        terms["multi_topk"] = MultiTopK(weight=0.2, factor=2)
    objective = Objective(**terms)
    want = gradients(a_coder(activation, center=center), objective, 0.0)
    got = gradients(a_coder(activation, center=center), objective, 1.1)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_norm_and_clip_are_torchs():
    coder = a_coder(TopK(k=5)).float()
    coder.sparse_below = 1.1
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    shown = train_pass(coder, Rows(x, x))
    (100 * Objective()(shown)[0]).backward()
    gathered = Gathered(shown.gradients.by_latent())
    plain = {p: gathered.summed(p) for p in gathered.gradients}
    kept = {p: p.grad.clone() for p in coder.parameters() if p.grad is not None}
    norm, scaled = clipped(coder.parameters(), gathered, 0.5)
    for p, grad in plain.items():
        assert p.grad is None
        p.grad = grad.clone()
    for p, grad in kept.items():
        p.grad = grad.clone()
    want = torch.nn.utils.clip_grad_norm_(coder.parameters(), 0.5)
    assert norm == pytest.approx(float(want), rel=1e-5)
    for p in plain:
        torch.testing.assert_close(scaled.summed(p), p.grad, rtol=1e-4, atol=1e-7)


def test_a_term_on_all_latents_keeps_the_code_whole():
    config = config_of("jumprelu_tanh", SIZES)
    objective = replace(config.objective, pre_act=PreAct(weight=1e-3), tanh=Tanh(weight=0.1))
    assert objective.needs_all_latents
    found = first_steps(replace(config, objective=objective), SCHEMES["jumprelu_tanh"], 1.1, n=1)
    assert found.was_sparse == [False]


@pytest.mark.parametrize("name", ["gated_sae", "l1_crosscoder", "jumprelu_l0"])
def test_a_code_turns_sparse_once_few_entries_are_left(name):
    """Many entries at first: the whole code. With biases so low that few are left: entries."""
    state, _, _ = fresh_run(config_of(name, SIZES), SCHEMES[name])
    state.coder.sparse_below = 0.2
    x = torch.randn(64, state.coder.wiring.read.width)
    with torch.no_grad():
        for bias in (1.0, -30.0):
            state.coder.b_enc.fill_(bias)
            shown = train_pass(state.coder.train(), Rows(x, x))
            assert (shown.known is None) == (bias > 0)


@pytest.mark.parametrize("below", [0.0, 1.1])
@pytest.mark.parametrize(
    "name", ["topk_sae", "batchtopk_diff", "clt_topk", "gated_sae", "jumprelu_l0", "l1_crosscoder"]
)
@pytest.mark.parametrize(
    "optimizer",
    [Adam(), Adam(beta1=0.0), Muon(), Adam(moments="bfloat16")],
    ids=["", "one", "muon", "half"],
)
def test_the_copies_are_the_weights(name, below, optimizer):
    """After steps of torch's optimisers, which do not all tell that they changed the weights;
    after steps that wrote weights and copies together; and after the weights alone were changed."""
    made = replace(config_of(name, SIZES), optimizer=optimizer)
    state, stream, config = fresh_run(made, SCHEMES[name], dtype="bfloat16")
    state.coder.sparse_below = below
    fit(replace(config, fit=replace(config.fit, steps=3)), state, stream, SILENT)
    for weights in (*state.coder.W_enc, *state.coder.W_dec):
        assert torch.equal(state.coder.copies.held(weights), weights.bfloat16())
        with torch.no_grad():
            weights.mul_(1.5)
        assert torch.equal(state.coder.copies.of(weights, torch.bfloat16), weights.bfloat16())


@pytest.mark.parametrize(
    "optimizer",
    [Adam(), Adam(beta1=0.0), Adam(moments="bfloat16"), Adam(beta1=0.0, moments="bfloat16")],
    ids=["adam", "no first moment", "in half", "no first moment, in half"],
)
@pytest.mark.parametrize("name", ["topk_sae", "gated_sae", "jumprelu_l0"])
def test_whole_and_sparse_steps_can_take_turns(name, optimizer):
    """Rows that sparse steps left alone have their decay made up for."""
    made = replace(config_of(name, SIZES), optimizer=optimizer)
    found = []
    for turns in ((0.0,) * 6, (0.0, 1.1, 1.1, 0.0, 0.0, 1.1)):
        state, stream, config = fresh_run(made, SCHEMES[name])
        for step, below in enumerate(turns, 1):
            state.coder.sparse_below = below
            stream.rows_BX = torch.randn(96, 12, generator=torch.Generator().manual_seed(step))
            fit(replace(config, fit=replace(config.fit, steps=step)), state, stream, SILENT)
        found.append(state.coder.state_dict())
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=5e-5, msg=key)
