"""Harvested rows to a coder's rows and back into the models, for every wiring."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosslens.activations import Source, TokenPolicy, calibrate, site_layout
from crosslens.coder import (
    Causal,
    Crosscoder,
    CrossLayer,
    Dedicated,
    DesignatedShared,
    Difference,
    LayerConditioned,
    Layout,
    all_rows,
    replacements,
    training_rows,
)
from crosslens.coder.rows import site_names, spliced_sites
from crosslens.evaluation import evaluate, splice
from crosslens.lm import ModelSpec, next_token_loss, open_model
from tests.test_activations import blocks_of
from tests.test_wirings import SECOND, every_case, filled, generator, parts_of, rows_of


@every_case
def test_a_perfect_reconstruction_puts_back_what_was_there(case):
    """Given what should be written, `replacements` is each spliced site's own activation."""
    rows = rows_of(case)
    given = all_rows(case.wiring, rows)
    put_back = replacements(case.wiring, rows, given.y_BY)
    assert tuple(put_back) == spliced_sites(case.wiring)
    expected = set(case.sites) & {s for _, _, writes in case.table for s in writes.split()}
    if isinstance(case.config, Difference):
        expected = set(SECOND.split())
    if isinstance(case.config, LayerConditioned):
        expected = set(case.sites)
    assert set(put_back) == expected
    for b, row in enumerate(rows):
        parts = parts_of(row, case.sites)
        for site, values in put_back.items():
            assert values[b].tolist() == pytest.approx(parts[site], abs=1e-6)


@every_case
def test_training_rows_pair_what_belongs_to_one_token(case):
    """Columns of one row come from one harvested row; per site, from one of its sites."""
    rows = rows_of(case, 200)
    given = training_rows(case.wiring, rows, generator(4))
    assert len(given.x_BX) == len(rows)
    if not isinstance(case.config, LayerConditioned):
        whole = all_rows(case.wiring, rows)
        assert torch.equal(given.x_BX, whole.x_BX)
        assert torch.equal(given.y_BY, whole.y_BY)
        assert given.site_B is None
        return
    for b, row in enumerate(rows):
        parts = list(parts_of(row, case.sites).values())
        assert given.x_BX[b].tolist() == pytest.approx(parts[given.site_B[b]])
    assert torch.equal(given.x_BX, given.y_BY)
    counts = torch.bincount(given.site_B, minlength=len(case.sites))
    assert counts.min() > 200 / len(case.sites) / 2, "every site takes its turn"
    again = training_rows(case.wiring, rows, generator(4))
    assert torch.equal(again.site_B, given.site_B)
    other = training_rows(case.wiring, rows, generator(5))
    assert not torch.equal(other.site_B, given.site_B)


@pytest.fixture(scope="module")
def two_models(tmp_path_factory, tiny_model_folder, tiny_tokenizer):
    """The tiny model, and a second one: the same with noise on its weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("second")
    module = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator(1)) * 0.02)
    module.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    spec = ModelSpec(dtype="float32", device="cpu")
    return {
        "a": open_model(replace(spec, path=str(tiny_model_folder)), "a"),
        "b": open_model(replace(spec, path=str(folder)), "b"),
    }


TINY = {
    "over models": (Crosscoder(), ("resid_mid.1", "resid_post.2")),
    "dedicated": (Dedicated(exclusive=0.2), ("resid_mid.1", "resid_post.2")),
    "dedicated, tied": (
        Dedicated(exclusive=0.2, tied_decoders=True),
        ("resid_mid.1", "resid_post.2"),
    ),
    "designated shared": (DesignatedShared(shared=0.3), ("resid_mid.1", "resid_post.2")),
    "difference": (Difference(), ("resid_mid.1", "resid_post.2")),
    "sinusoidal": (LayerConditioned(), ("resid_mid.1", "resid_post.2")),
    "weakly causal": (Causal(), ("resid_mid.1", "resid_post.2")),
    "clt": (CrossLayer(skip=True), ("mlp_in.1", "mlp_out.1", "mlp_in.2", "mlp_out.2")),
}


@pytest.mark.parametrize(("config", "sites"), TINY.values(), ids=list(TINY))
def test_splicing_is_the_model_with_the_reconstruction_in_it(config, sites, two_models):
    """Cross-entropy by evaluation against the model run by hand, block by block."""
    layout = site_layout(two_models, list(sites))
    blocks = blocks_of(4)
    source = Source(two_models, layout, blocks, TokenPolicy(), blocks_per_chunk=2)
    wiring = config(layout, 20)
    coder = filled(wiring)
    norms, _ = calibrate(source, wiring, 64)
    with torch.no_grad():
        coder.scale_read.copy_(torch.tensor(norms.read_scale))
        coder.scale_write.copy_(torch.tensor(norms.write_scale))
    found = evaluate(coder, source, splice_tokens=1000)
    assert set(found.reconstruction.sites) == set(site_names(wiring))
    assert set(found.splice) == set(spliced_sites(wiring))
    tokens = blocks.tokens_NT
    acts = {
        f"{name}/{site}": x
        for name, model in two_models.items()
        for site, x in model.capture(tokens, list(sites)).items()
    }
    flat = torch.cat([acts[s][:, 1:] for s in layout.sites], -1).flatten(0, 1)
    given = all_rows(wiring, flat)
    recon = coder(given.x_BX, given.site_B).detach()
    for site, figures in found.splice.items():
        name, _, plain = site.partition("/")
        new = acts[site].clone()
        new[:, 1:] = by_hand(config, layout, flat, recon, site).view(new[:, 1:].shape)
        logits = two_models[name].run(tokens, {plain: lambda _, new=new: new})
        assert figures.ce == pytest.approx(float(next_token_loss(logits, tokens).mean()), rel=1e-4)
    if wiring.read != wiring.write:
        return
    coder.forward = lambda x_BX, site_B=None: x_BX  # writes exactly what it should
    everything = splice(coder, source, found.reconstruction.mean, 1000)
    assert all(f.ce == pytest.approx(f.ce_clean, rel=1e-4) for f in everything.values())


def by_hand(config, layout: Layout, flat, recon, site: str) -> torch.Tensor:
    """The part of a reconstruction that stands for `site`."""
    p = layout.index(site)
    if isinstance(config, LayerConditioned):
        return recon[p :: len(layout.sites)]
    if isinstance(config, Difference):
        first = "a" + site[1:]
        made = layout.slice(first)  # the differences lie as the first model's sites do
        return flat[:, made] + recon[:, made]
    written = [s for s in layout.sites if not (isinstance(config, CrossLayer) and "mlp_in" in s)]
    start = sum(layout.widths[layout.index(s)] for s in written[: written.index(site)])
    return recon[:, start : start + layout.widths[p]]
