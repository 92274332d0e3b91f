"""Exact interactions against loops over tokens, neurons and contributions."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch

from crosslens.activations import TokenPolicy
from crosslens.coder import (
    Coder,
    ReLU,
    fold,
)
from crosslens.interactions.neurons.contributions import (
    SiteChunk,
    effective,
    mlp_sites,
    site_chunks,
)
from crosslens.interactions.neurons.exact import SiteInteraction, SiteSums, interactions
from crosslens.interactions.neurons.fused import Fused
from crosslens.kernels import bag_sum
from crosslens.kernels.build import built
from crosslens.lm import ModelSpec, open_model
from crosslens.lm.builtin import BUILT_IN
from crosslens.storage import cache_folder
from tests.interaction_sites import (
    CASES,
    coder_at,
    loops,
    model_of,
    parts_of,
    source_at,
    through,
)
from tests.test_lm_families import FAMILIES, WIDTH, every_family, tiny, tokens
from tests.test_lm_mlp import by_hand

every_case = pytest.mark.parametrize("name", CASES)
either_form = pytest.mark.usefixtures("form")


@pytest.fixture(params=["kernel", "torch"])
def form(request, monkeypatch):
    """By the compiled kernel, and by products in torch."""
    if request.param == "torch":
        without_kernel(monkeypatch)


def without_kernel(monkeypatch) -> None:
    monkeypatch.setattr("crosslens.interactions.neurons.fused.takes", lambda *_: False)


def chunks_at(model, *sites: str, **kwargs) -> list[dict[str, SiteChunk]]:
    source = source_at(model, *sites, **kwargs)
    coder = coder_at(source.layout)
    effectives = {site: effective(coder, model, site) for site in sites}
    return list(site_chunks(source, coder, model, effectives))


def summed(chunk: SiteChunk) -> list[torch.Tensor]:
    """Latents + biases + error, for each branch."""
    one = chunk.effective
    branches = [branch for branch in (one.value, one.gate) if branch is not None]
    return [
        bag_sum(chunk.lists, chunk.weight_E, branch.E_LN)
        + chunk.constant(branch)
        + chunk.error(branch)
        for branch in branches
    ]


def close(found: torch.Tensor, expected: torch.Tensor, rel: float = 1e-5) -> None:
    """Relative to the scale."""
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=0, atol=rel * float(expected.abs().max())
    )


@every_family
def test_contributions_sum_to_the_models_own_pre_activation(family):
    model = tiny(family)
    middle = ["resid_mid.1"] * (FAMILIES[family][1].mid is not None)
    sites = ["resid_post.0", "resid_pre.1", *middle, "mlp_in.1"]
    given = model.capture(tokens(), ["mlp_in.1"])["mlp_in.1"].flatten(0, 1).double()
    hand = by_hand(family)
    for site in sites:
        (chunks,) = chunks_at(model, site)
        for found, name in zip(summed(chunks[site]), ("in", "gate"), strict=False):
            own = given @ hand[f"W_{name}_ND"].double().T
            bias = hand[f"b_{name}_N"]
            close(found, own if bias is None else own + bias.double())
        assert (chunks[site].effective.gate is None) == (hand["W_gate_ND"] is None)


@every_case
def test_each_contribution_is_that_of_the_loop(name):
    """Not only their sum."""
    model, site = model_of(name), CASES[name]
    source = source_at(model, site)
    coder = coder_at(source.layout)
    one = effective(coder, model, site)
    (chunks,) = site_chunks(source, coder, model, {site: one})
    chunk = chunks[site]
    for row in (0, 7, 17):
        parts = parts_of(model, coder, one, row)
        at = slice(int(chunk.lists.starts_I[row]), int(chunk.lists.starts_I[row + 1]))
        latents, weight = chunk.lists.index_N[at].long(), chunk.weight_E[at, None]
        for i, branch in enumerate([one.value] + [one.gate] * (one.gate is not None)):
            expected = torch.tensor([part.branches[i] for part in parts], dtype=torch.float64)
            close(branch.E_LN[latents] * weight, expected[:-2])
            close(chunk.constant(branch)[row], expected[-2])
            close(chunk.error(branch)[row], expected[-1])


@cache
def truth(name: str) -> dict[str, torch.Tensor]:
    model, site = model_of(name), CASES[name]
    coder = coder_at(source_at(model, site).layout)
    return loops(model, coder, effective(coder, model, site))


def measured(name: str, per_chunk: int = 2, **kwargs) -> SiteInteraction:
    model, site = model_of(name), CASES[name]
    source = source_at(model, site, per_chunk=per_chunk)
    return interactions(source, coder_at(source.layout), model, **kwargs)[site]


@either_form
@every_case
def test_every_sum_is_the_loop(name):
    found, expected = measured(name), truth(name)
    for measure, sum_N in expected.items():
        if measure != "tokens":
            close(getattr(found, f"{measure}_N"), sum_N)
    assert (found.tokens, found.entries) == (18, 18 * 5)
    total = {key: float(value.sum()) for key, value in expected.items()}
    share = total["interaction"] / total["mass"]
    assert found.interaction_share == pytest.approx(share, rel=1e-4)
    assert found.output_share == pytest.approx(total["interaction"] / total["output"], rel=1e-4)
    both = total["of_error"] + total["without_error"]
    assert found.error_share == pytest.approx(total["of_error"] / both, rel=1e-4)
    both = total["mediated"] + total["direct"]
    assert found.norm_mediated_share == pytest.approx(total["mediated"] / both, rel=1e-4)
    assert found.slack_share < 1e-4
    close(found.share_N, expected["interaction"] / expected["mass"], rel=1e-4)


@either_form
@every_case
def test_tokens_and_documents_are_the_loop(name):
    heard = []
    found = measured(name, per_chunk=1, receive=heard.append)
    per_token = [each[CASES[name]] for each in heard]
    assert torch.cat([each.row_R for each in per_token]).tolist() == list(range(18))
    for i, measure in enumerate(("interaction", "mass")):
        expected_R = truth(name)["tokens"][:, i]
        close(torch.cat([getattr(each, f"{measure}_R") for each in per_token]), expected_R)
        documents = torch.stack([expected_R[:6].sum(), expected_R[6:17].sum()])
        close(getattr(found, f"{measure}_by_document"), documents)


@either_form
def test_cutting_the_tokens_otherwise_changes_nothing(monkeypatch):
    whole = measured("llama")
    monkeypatch.setattr("crosslens.interactions.neurons.exact.AT_ONCE", {"cpu": 100})
    monkeypatch.setattr("crosslens.interactions.neurons.exact.PRODUCTS", 200)
    monkeypatch.setattr("crosslens.interactions.neurons.entries.AT_ONCE", 150)
    for additive in ("series", "exact"):
        for found in (measured("llama", per_chunk=1), measured("llama", additive=additive)):
            close(found.interaction_N, whole.interaction_N)
            close(found.of_error_N, whole.of_error_N)


@every_case
def test_entry_by_entry_is_the_loop_and_within_the_slack_of_the_series(name, monkeypatch):
    without_kernel(monkeypatch)
    exact, series = measured(name, additive="exact"), measured(name)
    smooth = series.kind not in ("relu", "relu2")
    assert (exact.additive, series.additive) == ("exact", "series" if smooth else "exact")
    for measure, sum_N in truth(name).items():
        if measure != "tokens":
            close(getattr(exact, f"{measure}_N"), sum_N)
    off_N = (series.interaction_N - exact.interaction_N).abs()
    assert bool((off_N <= series.slack_N + 1e-6 * series.mass_N).all())
    assert bool(series.slack_N.any()) == smooth
    assert not exact.slack_N.any()


@pytest.mark.parametrize("reach", [0.05, 1.0])
def test_entries_beyond_the_series_are_computed(reach, monkeypatch):
    """With a reach that some, or nearly all, exceed."""
    without_kernel(monkeypatch)
    monkeypatch.setattr("crosslens.interactions.neurons.inputs.SERIES_REACH", reach)
    for name in ("llama", "gpt2"):
        close(measured(name).interaction_N, truth(name)["interaction"])


def test_the_kernel_needs_no_series():
    found = measured("llama")
    assert found.additive == ("exact" if built().compiled else "series")
    assert (found.slack_share == 0) == (built().compiled is not None)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_kernel_is_told_how_far_latents_reach(sign):
    """By what φ acts on, the gate, in either direction."""
    model = model_of("llama")
    one = effective(coder_at(source_at(model, CASES["llama"]).layout), model, CASES["llama"])
    gate = replace(one.gate, E_LN=sign * one.gate.E_LN.abs())
    reach_L = Fused(replace(one, gate=gate))._reach_L
    assert torch.equal(reach_L, one.gate.E_LN.abs().amax(1))
    assert not torch.allclose(reach_L, one.value.E_LN.abs().amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_is_multiplied_as_the_model_is_rounded(dtype):
    model = model_of("llama")
    coder = coder_at(source_at(model, CASES["llama"]).layout)
    module = copy.deepcopy(model.module).to(dtype)
    one = effective(coder, replace(model, module=module), CASES["llama"])
    expected = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    assert (one.value.dense, one.gate.dense) == (expected, expected)
    assert one.value.error_DN.dtype is expected


@either_form
def test_errors_in_bfloat16_are_near():
    (chunks,) = chunks_at(model_of("llama"), CASES["llama"])
    one = chunks[CASES["llama"]]
    known = one.effective
    gate = replace(known.gate, dense=torch.bfloat16)
    short = replace(known, value=replace(known.value, dense=torch.bfloat16), gate=gate)
    sums = [SiteSums(each, 2) for each in (known, short)]
    for each in sums:
        each.add(one)
    wide, short = (each.figures() for each in sums)
    assert short.interaction_share == pytest.approx(wide.interaction_share, rel=0.02)
    assert not torch.equal(short.interaction_N, wide.interaction_N)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox-parallel"])
def test_effects_through_the_norm_are_those_of_autograd(name):
    """a_i ∂y/∂a_i = y_i − ρ_i (y − fixed), and the ρ of a row sum to its mean square's share."""
    model, site = model_of(name), CASES[name]
    coder = coder_at(source_at(model, site).layout)
    one = effective(coder, model, site)
    parts = parts_of(model, coder, one, 4)
    rows = torch.stack([part.row for part in parts])

    def pre(strength: torch.Tensor) -> torch.Tensor:
        x = (strength[:, None] * rows).sum(0)
        norm = replace(one.norm, gain_D=one.norm.gain_D.double())
        return one.mlp.W_in_ND.double() @ norm(x).double()

    ones = torch.ones(len(rows), dtype=torch.float64)
    slope = torch.autograd.functional.jacobian(pre, ones)
    given = rows.sum(0)
    centred = given - given.mean() if one.norm.kind == "layer" else given
    square = (centred**2).mean() + one.norm.eps
    rho = rows @ centred / len(centred) / square
    direct = torch.tensor([through(one, given, row)[0] for row in rows], dtype=torch.float64)
    moving = direct.sum(0)
    close(slope, (direct - rho[:, None] * moving).T)
    assert float(rho.sum()) == pytest.approx(float(1 - one.norm.eps / square))


def test_an_mlp_input_has_no_norm_to_go_through():
    assert measured("gemma2").norm_mediated_share == 0
    assert 0 < measured("llama").norm_mediated_share < 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folded_coder_gives_the_same(name):
    model, site = model_of(name), CASES[name]
    source = source_at(model, site)
    coder = coder_at(source.layout)
    plain, folded = (interactions(source, each, model)[site] for each in (coder, fold(coder)))
    close(folded.interaction_N, plain.interaction_N)
    close(folded.of_error_N, plain.of_error_N)


def test_several_sites_at_once_are_each_alone_given_the_same_codes():
    model = tiny("llama")
    sites = ("resid_post.0", "mlp_in.1", "resid_mid.2")
    source = replace(source_at(model, *sites), median_P=torch.full((3,), 1e3))
    coder = coder_at(source.layout)
    together = interactions(source, coder, model)
    assert tuple(together) == sites == mlp_sites(coder, model)
    for site in sites:
        alone = interactions(source, coder, model, sites=(site,))[site]
        close(alone.interaction_N, together[site].interaction_N)
    assert [each.layer for each in together.values()] == [1, 1, 2]


def test_outliers_are_left_out():
    model = tiny("llama")
    source = source_at(model, "resid_pre.1")
    norms = source.chunk(0).rows().norm(dim=-1)
    policy = TokenPolicy(drop_padding=False, outlier_norm=1.5)
    median_P = norms.sort().values[-4:-3] / 1.5 + 1e-4
    source = replace(source, policy=policy, median_P=median_P)
    found = interactions(source, coder_at(source.layout), model)["resid_pre.1"]
    assert found.tokens == 15


def test_a_perfect_coder_leaves_no_error():
    model = tiny("llama")
    source = source_at(model, "resid_mid.1")
    coder = Coder(coder_at(source.layout).wiring, ReLU())
    both = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)])
    wiring = replace(coder.wiring, groups=(replace(coder.wiring.groups[0], n_latents=2 * WIDTH),))
    coder = Coder(wiring, ReLU()).requires_grad_(False)
    coder.W_enc[0].copy_(both)
    coder.W_dec[0].copy_(both)
    found = interactions(source, coder.eval(), model)["resid_mid.1"]
    assert found.error_share < 1e-5
    assert found.interaction_share > 0.01


def smollm2():
    for dtype in ("float32", "bfloat16"):
        folder = cache_folder() / "models" / f"{BUILT_IN.name}-{BUILT_IN.sha256[:16]}-{dtype}"
        if folder.is_dir():
            model = open_model(ModelSpec(path=BUILT_IN.name, dtype=dtype, device="cpu"))
            model.module.float()
            return model
    return pytest.skip("the built-in model is not in the cache")


def test_contributions_sum_to_pre_activations_of_the_built_in_model():
    model = smollm2()
    sites = ("resid_mid.5", "resid_post.14", "mlp_in.25")
    for site in sites:
        (chunks,) = chunks_at(model, site)
        chunk = chunks[site]
        module = model.anatomy.taps[f"mlp_in.{chunk.effective.layer}"].module
        name = f"mlp_in.{chunk.effective.layer}"
        given = model.capture(tokens(), [name])[name].flatten(0, 1)
        for found, own in zip(summed(chunk), (module.up_proj, module.gate_proj), strict=True):
            close(found, own(given))
