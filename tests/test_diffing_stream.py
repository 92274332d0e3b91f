"""One pass over a pair, against the coder called by hand; a coder's weights as whole matrices."""

from __future__ import annotations

import pytest
import torch

from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.coder import (
    Coder,
    Crosscoder,
    Dedicated,
    DesignatedShared,
    LayerConditioned,
    ReLU,
    TopK,
    dense_decoder,
    dense_encoder,
    fold,
)
from crosslens.diffing.pair import pair_of
from crosslens.diffing.stream import coded
from crosslens.errors import UsageError
from crosslens.lm import ModelSpec, open_models
from crosslens.text import Blocks

LATENTS = 20


@pytest.fixture(scope="module")
def source(tiny_pair):
    specs = {n: ModelSpec(path=str(p), dtype="float32", device="cpu") for n, p in tiny_pair.items()}
    models = open_models(specs)
    tokens_NT = torch.randint(
        3, 200, (6, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    docs_NT = torch.zeros_like(tokens_NT)
    docs_NT[:, 0] = -1
    blocks = Blocks(tokens_NT, docs_NT, ("doc",), 0, 2, (0, 1, 2))
    layout = site_layout(models, ["resid_post.1", "resid_post.2"])
    return Source(models, layout, blocks, TokenPolicy(outlier_norm=None), blocks_per_chunk=4)


def coder_over(layout, wiring, activation=None) -> Coder:
    coder = Coder(wiring(layout, LATENTS), activation or TopK(k=3))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.normal_(generator=generator)
        scales = torch.linspace(0.5, 3.0, len(layout.sites))
        coder.scale_read.copy_(scales[: len(coder.scale_read)])
        coder.scale_write.copy_(scales[: len(coder.scale_write)])
    return coder.eval()


@pytest.mark.parametrize("folded", [False, True])
def test_a_chunk_is_the_coder_called_by_hand(source, folded):
    coder = coder_over(source.layout, Crosscoder())
    scale_Y = source.layout.spread(coder.scale_write)
    given = fold(coder) if folded else coder
    seen = 0
    for part, chunk in zip(coded(source, given), source, strict=True):
        rows_RX = chunk.rows().float()
        torch.testing.assert_close(part.target_RY, rows_RX * scale_Y)
        torch.testing.assert_close(part.recon_RY, coder(rows_RX) * scale_Y, rtol=1e-3, atol=1e-3)
        z_RL = coder.encode(rows_RX)
        dense_RL = torch.zeros_like(z_RL)
        dense_RL[part.row_E, part.latent_E] = part.value_E
        torch.testing.assert_close(dense_RL, z_RL * (z_RL > 0), rtol=1e-3, atol=1e-3)
        for r, (block, position) in enumerate(
            zip(part.block_R.tolist(), part.position_R.tolist(), strict=True)
        ):
            assert int(part.tokens_R[r]) == int(source.blocks.tokens_NT[block, position])
        seen += len(part.tokens_R)
    assert seen == 6 * 15, "all positions but BOS"


def test_other_sites_and_rows_of_one_site_are_refused(source):
    wrong = site_layout(source.models, ["resid_post.0", "resid_post.2"])
    with pytest.raises(UsageError, match="are not the source's"):
        next(coded(source, coder_over(wrong, Crosscoder())))
    per_site = Coder(LayerConditioned()(source.layout, LATENTS), ReLU())
    with pytest.raises(UsageError, match="one site each"):
        next(coded(source, per_site))
    with pytest.raises(UsageError, match="one site a row"):
        pair_of(per_site)


@pytest.mark.parametrize(
    "wiring",
    [
        Crosscoder(),
        Dedicated(exclusive=0.25),
        Dedicated(exclusive=0.25, tied_decoders=True),
        DesignatedShared(shared=0.4),
    ],
)
@pytest.mark.parametrize("folded", [False, True])
def test_dense_matrices_do_what_the_coder_does(source, wiring, folded):
    coder = coder_over(source.layout, wiring, ReLU())
    given = fold(coder) if folded else coder
    x_BX = torch.randn(5, source.layout.width, generator=torch.Generator().manual_seed(2))
    scale_X = source.layout.spread(coder.scale_read)
    expected_BL = coder.preactivations(x_BX)  # of scaled rows
    torch.testing.assert_close(
        x_BX @ dense_encoder(given).T + coder.b_enc, expected_BL, rtol=1e-4, atol=1e-4
    )
    z_BL = torch.rand(5, LATENTS)
    torch.testing.assert_close(
        z_BL @ dense_decoder(given), coder.decode_scaled(z_BL), rtol=1e-4, atol=1e-4
    )
    raw_BY = z_BL @ dense_decoder(given) / scale_X
    if not folded:
        torch.testing.assert_close(
            raw_BY + coder.b_dec / scale_X, given.decode(z_BL), rtol=1e-4, atol=1e-4
        )


def test_a_pair_names_its_sites_and_columns(source):
    pair = pair_of(coder_over(source.layout, Crosscoder()))
    assert (pair.a, pair.b) == ("base", "chat")
    assert pair.sites_b == ("chat/resid_post.1", "chat/resid_post.2")
    whole = torch.cat([pair.columns_a, pair.columns_b])
    assert whole.tolist() == list(range(source.layout.width))
    W_LY = dense_decoder(pair.coder)
    for part_LX, columns in zip(pair.decoders(), (pair.columns_a, pair.columns_b), strict=True):
        torch.testing.assert_close(part_LX, W_LY[:, columns])
    turned = pair_of(pair.coder, "chat", "base")
    torch.testing.assert_close(turned.decoders()[0], pair.decoders()[1])
