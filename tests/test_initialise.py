"""Where weights start: each published equation against its own loop, and the data it looks at."""

from __future__ import annotations

import pytest
import torch

from crosslens.coder import (
    BatchTopK,
    Causal,
    Coder,
    Crosscoder,
    CrossLayer,
    DataPoint,
    Dedicated,
    DesignatedShared,
    Difference,
    Gated,
    Group,
    JumpReLU,
    LayerConditioned,
    Layout,
    ReLU,
    TopK,
    Transcoder,
    Transpose,
    Uniform,
    Wiring,
    all_rows,
    biases,
    center_at_median,
    center_biases,
    geometric_median,
    set_firing_rate,
    share_start,
    zero_decoders,
)
from crosslens.errors import UsageError

PAIR = Layout(
    ("a/resid_post.1", "a/resid_post.2", "b/resid_post.1", "b/resid_post.2"), (6, 4, 6, 4)
)
MLP = Layout(("mlp_in.0", "mlp_out.0", "mlp_in.1", "mlp_out.1"), (6, 8, 6, 8))
EVEN = Layout(("resid_post.1", "resid_post.2", "resid_post.3"), (6, 6, 6))

WIRINGS = {
    "crosscoder": Crosscoder()(PAIR, 30),
    "transcoder": Transcoder(skip=True)(Layout(MLP.sites[:2], MLP.widths[:2]), 30),
    "cross-layer": CrossLayer()(MLP, 30),
    "causal": Causal()(EVEN, 30),
    "dedicated": Dedicated(exclusive=0.2)(PAIR, 30),
    "dedicated, tied": Dedicated(exclusive=0.2, tied_decoders=True)(PAIR, 30),
    "shared": DesignatedShared(shared=0.3)(PAIR, 30),
    "difference": Difference()(PAIR, 30),
    "per site": LayerConditioned()(EVEN, 30),
}


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def sample(wiring: Wiring, rows: int = 200) -> torch.Tensor:
    """Rows around a mean that is not 0, with columns of unequal size."""
    drawn = torch.randn(rows, wiring.harvest.width, generator=seeded(7))
    spread = torch.linspace(0.5, 2, wiring.harvest.width)
    return drawn * spread + torch.linspace(-3, 3, wiring.harvest.width)


def new_coder(wiring: Wiring, activation=None, **options) -> Coder:
    coder = Coder(wiring, activation or ReLU(), **options).requires_grad_(False)
    coder.scale_read.copy_(torch.linspace(0.5, 1.5, len(coder.scale_read)))
    coder.scale_write.copy_(torch.linspace(0.5, 1.5, len(coder.scale_write)))
    return coder


def blocks(weight, widths):
    return torch.split(weight, list(widths), -1)


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
@pytest.mark.parametrize("init", [Transpose(decoder_norm=0.3), DataPoint(decoder_norm=0.3)])
def test_every_stored_block_has_the_set_norm(wiring, init):
    coder = new_coder(wiring)
    init(coder, sample(wiring), seeded())
    for group, W_enc, W_dec in zip(wiring.groups, coder.W_enc, coder.W_dec, strict=True):
        write = wiring.write.pick(group.writes).widths
        for block in blocks(W_dec, write[: len(write) // group.copies]):
            assert torch.allclose(block.norm(dim=-1), torch.tensor(0.3))
        for block in blocks(W_enc, wiring.read.pick(group.reads).widths):
            assert torch.allclose(block.norm(dim=-1), torch.tensor(0.3))


@pytest.mark.parametrize("init", [Transpose(), DataPoint(), Uniform()])
def test_an_autoencoder_starts_tied_and_a_seed_decides(init):
    wiring = WIRINGS["crosscoder"]
    first, again, other = (new_coder(wiring) for _ in range(3))
    for coder, seed in ((first, 0), (again, 0), (other, 1)):
        init(coder, sample(wiring), seeded(seed))
    gain = wiring.read.width / 30 if init == Uniform() else 1.0
    assert torch.allclose(first.W_enc[0], gain * first.W_dec[0])
    assert torch.equal(first.W_dec[0], again.W_dec[0])
    assert not torch.equal(first.W_dec[0], other.W_dec[0])
    assert not first.b_enc.any()
    assert not first.b_dec.any()


def test_a_data_point_row_is_the_blend_of_a_row_and_noise():
    """At p = 1 each encoder row is one row of the sample minus the mean, each used once; at p the
    two parts have lengths p and 1 − p at every site."""
    wiring = Crosscoder()(PAIR, 30)
    rows = sample(wiring, 30)
    coder = new_coder(wiring)
    DataPoint(p=1.0, decoder_norm=1.0)(coder, rows, seeded())
    scaled = coder.scaled_read(rows)
    centred = scaled - scaled.mean(0)
    directions = [b / b.norm(dim=-1, keepdim=True) for b in blocks(centred, PAIR.widths)]
    used = set()
    for latent in coder.W_enc[0]:
        parts = blocks(latent, PAIR.widths)
        fits = torch.stack([d @ part for d, part in zip(directions, parts, strict=True)]).min(0)
        assert fits.values.max() == pytest.approx(1.0, abs=1e-5)
        used.add(int(fits.values.argmax()))
    assert len(used) == 30
    noise, blend = new_coder(wiring), new_coder(wiring)
    DataPoint(p=0.0, decoder_norm=1.0)(noise, rows, seeded())
    DataPoint(p=0.4, decoder_norm=1.0)(blend, rows, seeded())
    mixed = 0.4 * coder.W_enc[0] + 0.6 * noise.W_enc[0]
    wanted = [b / b.norm(dim=-1, keepdim=True) for b in blocks(mixed, PAIR.widths)]
    assert torch.allclose(blend.W_enc[0], torch.cat(wanted, -1), atol=1e-6)
    apart = (noise.W_enc[0] * coder.W_enc[0]).sum(-1) / 4
    assert apart.abs().mean() < 0.4, "the noise has nothing to do with the row"


def test_a_data_point_of_a_transcoder_writes_what_its_own_row_writes():
    wiring = WIRINGS["cross-layer"]
    rows = sample(wiring, 30)
    coder = new_coder(wiring)
    DataPoint(p=1.0, decoder_norm=1.0)(coder, rows, seeded())
    x = rows[:, wiring.harvest.columns(("mlp_in.0",))]
    x = (x - x.mean(0)) / (x - x.mean(0)).norm(dim=-1, keepdim=True)
    y = rows[:, wiring.harvest.columns(("mlp_out.0",))]
    y = (y - y.mean(0)) / (y - y.mean(0)).norm(dim=-1, keepdim=True)
    read, written = (coder.W_enc[0] @ x.T).max(-1), (coder.W_dec[0][:, :8] @ y.T).max(-1)
    assert torch.allclose(read.values, torch.ones(15), atol=1e-5)
    assert torch.equal(read.indices, written.indices)


def test_more_latents_than_rows_take_rows_again():
    wiring = Crosscoder()(PAIR, 30)
    coder = new_coder(wiring)
    DataPoint(p=1.0)(coder, sample(wiring, 10), seeded())
    assert len(coder.W_enc[0].round(decimals=5).unique(dim=0)) == 10


def test_uniform_bounds_are_the_published_ones():
    """±1/√n with W_enc = (n/m)·W_decᵀ; ±1/√m and ±1/√(L·d) across layers."""
    wiring = Crosscoder()(PAIR, 3000)
    coder = new_coder(wiring)
    Uniform()(coder, sample(wiring), seeded())
    bound = 20**-0.5
    assert coder.W_dec[0].abs().max() == pytest.approx(bound, rel=1e-2)
    assert coder.W_dec[0].std() == pytest.approx(bound / 3**0.5, rel=1e-2)
    assert torch.allclose(coder.W_enc[0], 20 / 3000 * coder.W_dec[0])
    across = new_coder(CrossLayer()(MLP, 6000))
    Uniform()(across, sample(across.wiring), seeded())
    for W_enc, W_dec in zip(across.W_enc, across.W_dec, strict=True):
        assert W_enc.abs().max() == pytest.approx(3000**-0.5, rel=1e-2)
        assert W_dec.abs().max() == pytest.approx(16**-0.5, rel=1e-2)


@pytest.mark.parametrize("activation", [TopK(k=4), BatchTopK(k=4), ReLU()])
def test_unit_gain_brings_random_unit_rows_to_norm_one(activation):
    wiring = Crosscoder()(Layout(("a",), (24,)), 200)
    coder = new_coder(wiring, activation, center=True)
    coder.b_dec.data.fill_(3.0)
    Transpose(decoder_norm=1.0, unit_gain=True)(coder, sample(wiring), seeded())
    x = torch.randn(512, 24, generator=seeded(5))
    x /= x.norm(dim=-1, keepdim=True)
    recon = coder.train().decode_scaled(coder.activate(coder.preactivations(x)))
    assert recon.norm(dim=-1).mean() == pytest.approx(1.0, rel=0.05)
    if isinstance(activation, BatchTopK):
        fresh = new_coder(wiring, activation)
        Transpose(unit_gain=True)(fresh, sample(wiring), seeded())
        assert fresh.threshold.isnan(), "the running threshold must not learn from noise"


def test_unit_gain_of_a_transcoder_is_refused():
    with pytest.raises(UsageError, match=r"init\.unit_gain"):
        Transpose(unit_gain=True)(new_coder(WIRINGS["transcoder"]), torch.zeros(2, 14), seeded())


def distances(rows, point):
    return (rows - point).norm(dim=-1).sum().item()


def test_the_geometric_median_is_least_in_distance_and_shrugs_at_outliers():
    rows = torch.randn(60, 5, generator=seeded()).double() + 4
    rows[:5] += 1000
    median = geometric_median(rows)
    for axis in range(5):
        for step in (-1e-2, 1e-2):
            moved = median.clone()
            moved[axis] += step
            assert distances(rows, moved) > distances(rows, median)
    assert (median - 4).abs().max() < 1
    assert torch.allclose(geometric_median(torch.ones(7, 3)), torch.ones(3))


@pytest.mark.parametrize("center", [center_biases, center_at_median])
@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
def test_the_middle_of_the_data_is_written_by_biases_alone(wiring, center):
    """With all rows at one point, a coder whose latents are silent reproduces it."""
    coder = new_coder(wiring)
    Transpose()(coder, sample(wiring), seeded())
    point = sample(wiring)[:1]
    if wiring.n_codes:  # each site has a scale of its own: one point at all of them
        point = torch.ones(1, wiring.harvest.width)
        coder.scale_read.fill_(0.7)
        coder.scale_write.fill_(0.7)
        coder.site_code.zero_()
    center(coder, point[0] if center is center_biases else point.repeat(9, 1))
    rows = all_rows(wiring, point)
    pre = coder.preactivations(coder.scaled_read(rows.x_BX, rows.site_B))
    assert torch.allclose(pre, torch.zeros_like(pre), atol=1e-5)
    target = coder.scaled_write(rows.y_BY, rows.site_B)
    assert torch.allclose(coder.b_dec.expand_as(target), target, atol=1e-5)


def test_a_gate_and_its_magnitudes_start_from_the_same_middle():
    coder = new_coder(WIRINGS["crosscoder"], Gated())
    Transpose()(coder, sample(coder.wiring), seeded())
    center_biases(coder, sample(coder.wiring).mean(0))
    assert coder.b_enc.any()
    assert torch.equal(coder.b_mag, coder.b_enc)


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
@pytest.mark.parametrize(
    "activation", [JumpReLU.anthropic(), JumpReLU.deepmind(), ReLU()], ids=["e^t", "θ", "relu"]
)
def test_each_latent_fires_on_exactly_the_set_share_of_the_sample(wiring, activation):
    coder = new_coder(wiring, activation)
    rows = sample(wiring)
    Transpose()(coder, rows, seeded())
    center_biases(coder, rows.mean(0))
    set_firing_rate(coder, rows, 0.15)
    made = all_rows(wiring, rows)
    fired = coder.eval().encode(made.x_BX, made.site_B) > 0
    share = fired.double().mean(0)
    assert torch.allclose(share, torch.full((30,), 0.15).double(), atol=1e-9)


def test_the_rate_needs_no_matrix_of_rows_by_latents(monkeypatch):
    """Blocks of one latent at a time give the same biases as one block for all."""
    wiring = WIRINGS["cross-layer"]
    rows = sample(wiring)
    whole, blocked = new_coder(wiring), new_coder(wiring)
    seen = []
    cut = biases._cut

    def watched(pre_LB, fires):
        seen.append(tuple(pre_LB.shape))
        return cut(pre_LB, fires)

    monkeypatch.setattr(biases, "_cut", watched)
    for coder, size in ((whole, biases.BLOCK_BYTES), (blocked, 3 * 4 * len(rows))):
        monkeypatch.setattr(biases, "BLOCK_BYTES", size)
        Transpose()(coder, rows, seeded())
        set_firing_rate(coder, rows, 0.1)
    assert torch.allclose(whole.b_enc, blocked.b_enc)
    assert seen == [(15, 200)] * 2 + [(3, 200)] * 10


def test_a_rate_below_one_row_is_refused_by_name():
    coder = new_coder(WIRINGS["crosscoder"], JumpReLU())
    with pytest.raises(UsageError, match=r"coder\.firing_rate.*calibration-tokens"):
        set_firing_rate(coder, sample(coder.wiring), 0.001)


def test_a_centred_coder_is_calibrated_as_it_encodes():
    coder = new_coder(WIRINGS["crosscoder"], JumpReLU.deepmind(), center=True)
    rows = sample(coder.wiring)
    coder.scale_write.copy_(coder.scale_read)
    Transpose()(coder, rows, seeded())
    center_biases(coder, rows.mean(0))
    assert not coder.b_enc.any()
    set_firing_rate(coder, rows, 0.2)
    assert ((coder.eval().encode(rows) > 0).double().mean(0) - 0.2).abs().max() < 1e-9


@pytest.mark.parametrize("init", [Transpose(), DataPoint(), Uniform()])
def test_shared_latents_start_the_same_for_both_models(init):
    coder = new_coder(Crosscoder()(PAIR, 30))
    init(coder, sample(coder.wiring), seeded())
    before = coder.W_dec[0].detach().clone()
    share_start(coder, 0.4)
    for weight in (coder.W_dec[0], coder.W_enc[0]):
        same = (weight[:, :10] == weight[:, 10:]).all(-1)
        assert same.tolist() == [True] * 12 + [False] * 18
    assert torch.equal(coder.W_dec[0][:, :10], before[:, :10])
    assert torch.equal(coder.W_dec[0][12:], before[12:])
    gain = 20 / 30 if init == Uniform() else 1.0
    assert torch.allclose(coder.W_enc[0], gain * coder.W_dec[0]), "still tied"


def test_only_latents_of_both_models_are_shared():
    coder = new_coder(WIRINGS["dedicated"])
    Transpose()(coder, sample(coder.wiring), seeded())
    before = [w.detach().clone() for w in coder.W_dec]
    share_start(coder, 1.0)
    assert torch.equal(coder.W_dec[0], before[0])
    assert torch.equal(coder.W_dec[1], before[1])
    assert torch.equal(coder.W_dec[2][:, :10], coder.W_dec[2][:, 10:])


@pytest.mark.parametrize(
    "wiring",
    [
        WIRINGS["difference"],
        WIRINGS["causal"],
        Crosscoder()(Layout(("a/x.1", "b/x.1"), (6, 4)), 8),
        Crosscoder()(Layout(("a/x.1", "b/x.1", "c/x.1"), (4, 4, 4)), 8),
    ],
)
def test_a_shared_start_without_two_equal_models_is_refused(wiring):
    with pytest.raises(UsageError, match=r"coder\.shared_start"):
        share_start(new_coder(wiring), 0.5)


def test_a_zero_decoder_writes_the_bias_alone():
    coder = new_coder(WIRINGS["transcoder"], TopK(k=3))
    rows = sample(coder.wiring)
    Transpose()(coder, rows, seeded())
    coder.W_skip["0"].data.fill_(1.0)
    zero_decoders(coder)
    center_biases(coder, rows.mean(0))
    wrote = coder(rows[:, :6])
    assert torch.allclose(wrote, rows[:, 6:].mean(0).expand_as(wrote), atol=1e-5)
    assert coder.W_enc[0].any()


def test_tied_copies_take_the_mean_of_what_the_models_write():
    wiring = Wiring(PAIR, PAIR, PAIR, (Group(8, PAIR.sites, PAIR.sites, copies=2),))
    coder = Coder(wiring, ReLU())
    rows = sample(wiring)
    DataPoint(p=1.0, decoder_norm=1.0)(coder, rows, seeded())
    assert coder.W_dec[0].shape == (8, 10)
    whole = coder.W_enc[0].detach()
    mean = (whole[:, :10] + whole[:, 10:]) / 2
    for found, wanted in zip(blocks(coder.W_dec[0], (6, 4)), blocks(mean, (6, 4)), strict=True):
        assert torch.allclose(found, wanted / wanted.norm(dim=-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Transpose(decoder_norm=0.0), r"init\.decoder_norm"),
        (lambda: DataPoint(p=1.5), r"init\.p"),
        (lambda: DataPoint(decoder_norm=-1.0), r"init\.decoder_norm"),
    ],
)
def test_bad_starts_are_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()
