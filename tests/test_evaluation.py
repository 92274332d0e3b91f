"""Figures of a coder against loops over rows, and splicing against the model itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.coder import Coder, Crosscoder, Layout, ReLU, TopK, transpose_init
from crosslens.errors import CrosslensError, UsageError
from crosslens.evaluation import evaluate, kl_divergence, reconstruction, splice
from crosslens.lm import ModelSpec, next_token_loss, open_model
from tests.test_activations import blocks_of


@pytest.fixture(scope="module")
def source(tiny_model_folder) -> Source:
    spec = ModelSpec(path=str(tiny_model_folder), dtype="float32", device="cpu")
    models = {"base": open_model(spec)}
    layout = site_layout(models, ["resid_mid.1", "resid_post.2"])
    return Source(models, layout, blocks_of(6), TokenPolicy(), blocks_per_chunk=2)


def random_coder(layout: Layout, latents: int = 24) -> Coder:
    coder = Coder(Crosscoder()(layout, latents), TopK(k=6))
    transpose_init(coder, 1.0, torch.Generator().manual_seed(1))
    with torch.no_grad():
        coder.b_dec.normal_(generator=torch.Generator().manual_seed(2))
        coder.scale_read.copy_(torch.tensor([0.5, 2.0]))
        coder.scale_write.copy_(torch.tensor([0.5, 2.0]))
    return coder.eval()


def perfect_coder(layout: Layout) -> Coder:
    """Writes back exactly what it reads: latents ±e_i for every column."""
    width = layout.width
    coder = Coder(Crosscoder()(layout, 2 * width), ReLU())
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        coder.W_enc[0].copy_(both)
        coder.W_dec[0].copy_(both)
    return coder.eval()


def test_reconstruction_is_the_loop():
    layout = Layout(("a", "b"), (3, 4))
    coder = random_coder(layout).requires_grad_(False)
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(3)) * 2 + 1
    found = reconstruction(coder, x.split(16))
    code, recon = coder.encode(x), coder(x)
    rows = x.tolist()
    n = len(rows)
    l0 = [sum(v != 0 for v in row) for row in code.tolist()]
    assert found.tokens == n
    assert found.l0 == pytest.approx(sum(l0) / n)
    assert found.l0_quantiles["0.5"] == sorted(l0)[n // 2 - 1]
    assert found.dead == sum(not any(r[i] for r in code.tolist()) for i in range(24)) / 24
    weighted_error = weighted_spread = 0.0
    for p, (site, columns) in enumerate(zip(layout.sites, layout.slices, strict=True)):
        xs, ys = x[:, columns].tolist(), recon[:, columns].tolist()
        d = len(xs[0])
        mean = [sum(row[i] for row in xs) / n for i in range(d)]
        error = [
            sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
            for u, v in zip(xs, ys, strict=True)
        ]
        spread = [sum((a - m) ** 2 for a, m in zip(u, mean, strict=True)) for u in xs]
        ratio = cosine = norms = 0.0
        for start in range(0, n, 16):
            batch = xs[start : start + 16]
            centre = [sum(row[i] for row in batch) / len(batch) for i in range(d)]
            for j, row in enumerate(batch, start):
                about = sum((a - c) ** 2 for a, c in zip(row, centre, strict=True))
                ratio += 1 - error[j] / about
        for u, v in zip(xs, ys, strict=True):
            nu, nv = sum(a * a for a in u) ** 0.5, sum(b * b for b in v) ** 0.5
            cosine += sum(a * b for a, b in zip(u, v, strict=True)) / (nu * nv)
            norms += nv / nu
        figures = found.sites[site]
        assert figures.fvu == pytest.approx(sum(error) / sum(spread), rel=1e-4)
        assert figures.explained_variance == pytest.approx(ratio / n, rel=1e-4)
        assert figures.cosine == pytest.approx(cosine / n, rel=1e-4)
        assert figures.norm_ratio == pytest.approx(norms / n, rel=1e-4)
        assert found.mean[site].tolist() == pytest.approx(mean, rel=1e-4)
        weight = float(coder.scale_write[p]) ** 2
        weighted_error += weight * sum(error)
        weighted_spread += weight * sum(spread)
    assert found.fvu == pytest.approx(weighted_error / weighted_spread, rel=1e-4)


def test_the_mean_alone_has_fvu_one():
    layout = Layout(("a",), (5,))
    coder = Coder(Crosscoder()(layout, 3), ReLU()).eval()
    x = torch.randn(64, 5)
    with torch.no_grad():
        coder.b_dec.copy_(x.mean(0))
    found = reconstruction(coder, [x])
    assert found.fvu == pytest.approx(1.0, abs=1e-5)
    assert found.dead == 1.0


def test_no_rows_is_an_error():
    with pytest.raises(CrosslensError, match="no rows"):
        reconstruction(perfect_coder(Layout(("a",), (2,))), [])


def test_a_perfect_coder_loses_nothing(source):
    found = evaluate(perfect_coder(source.layout), source, splice_tokens=1000)
    assert found.reconstruction.fvu == pytest.approx(0, abs=1e-9)
    for figures in found.splice.values():
        assert figures.ce == pytest.approx(figures.ce_clean, abs=1e-5)
        assert figures.kl == pytest.approx(0, abs=1e-6)
        assert figures.recovered_zero == pytest.approx(1, abs=1e-2)
        assert figures.ce_zero != pytest.approx(figures.ce_clean, abs=1e-4)


def test_splice_is_the_model_run_by_hand(source):
    coder = random_coder(source.layout)
    mean = {site: torch.full((32,), 0.1) for site in source.layout.sites}
    found = splice(coder, source, mean, tokens=10_000)
    model = source.models["base"]
    tokens = source.blocks.tokens_NT
    acts = model.capture(tokens, list(source.layout.sites))
    recon = coder(torch.cat([acts[s] for s in source.layout.sites], -1).flatten(0, 1)).detach()
    recon = recon.view(*tokens.shape, 64)
    with torch.no_grad():
        clean = model.run(tokens, {})
        for site, columns in zip(source.layout.sites, source.layout.slices, strict=True):
            new = acts[site].clone()
            new[:, 1:] = recon[:, 1:, columns]  # BOS keeps its activation
            spliced = model.run(tokens, {site: lambda _, new=new: new})
            zero = acts[site].clone()
            zero[:, 1:] = 0
            zeroed = model.run(tokens, {site: lambda _, zero=zero: zero})
            figures = found[site]
            assert figures.ce == pytest.approx(
                float(next_token_loss(spliced, tokens).mean()), rel=1e-5
            )
            assert figures.ce_zero == pytest.approx(
                float(next_token_loss(zeroed, tokens).mean()), rel=1e-5
            )
            assert figures.ce_clean == pytest.approx(
                float(next_token_loss(clean, tokens).mean()), rel=1e-5
            )
            p, q = clean.softmax(-1), spliced.softmax(-1)
            kl = (p * (p / q).log()).sum(-1)[:, :-1].mean()
            assert figures.kl == pytest.approx(float(kl), rel=1e-3)
            gain = figures.ce_mean - figures.ce
            assert figures.recovered_mean == pytest.approx(
                gain / (figures.ce_mean - figures.ce_clean)
            )


def test_kl_is_zero_only_for_equal_distributions():
    p = torch.randn(2, 3, 7)
    assert torch.allclose(kl_divergence(p, p + 2.0), torch.zeros(2, 3), atol=1e-6)
    assert (kl_divergence(p, torch.randn(2, 3, 7)) > 0).all()


def test_a_coder_of_other_sites_is_refused(source):
    other = replace(source, layout=source.layout.pick(["resid_mid.1"]))
    with pytest.raises(UsageError, match="are not the source's"):
        evaluate(perfect_coder(source.layout), other, splice_tokens=0)


def test_the_plain_form_has_the_documented_keys(source):
    plain = evaluate(random_coder(source.layout), source, splice_tokens=32).plain()
    assert set(plain) == {"tokens", "l0", "l0_quantiles", "dead", "fvu", "sites", "splice"}
    assert set(plain["sites"]) == set(plain["splice"]) == set(source.layout.sites)
    assert set(plain["sites"]["resid_mid.1"]) == {
        "fvu", "explained_variance", "cosine", "norm_ratio"
    }  # fmt: skip
    assert set(plain["splice"]["resid_mid.1"]) == {
        "ce_clean", "ce", "ce_zero", "ce_mean", "recovered_zero", "recovered_mean", "kl"
    }  # fmt: skip
