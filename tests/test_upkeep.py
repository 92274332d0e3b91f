"""Unit decoders and resampled latents, alone and through stopped and resumed runs."""

from __future__ import annotations

import pytest
import torch

from crosslens.coder import (
    Coder,
    Crosscoder,
    CrossLayer,
    DesignatedShared,
    Gated,
    JumpReLU,
    Layout,
    ReLU,
    Rows,
    Transpose,
    train_pass,
)
from crosslens.training import (
    Adam,
    CoderConfig,
    FitConfig,
    Muon,
    NormL1,
    Objective,
    Recon,
    SignSGD,
    TrainConfig,
)
from crosslens.training.checkpoint import TrainState
from crosslens.training.fit import Hooks, fit, new_optimizer
from crosslens.training.upkeep import (
    as_saved,
    project_decoder_gradient,
    renormalise_decoder,
    resample,
)

LAYOUT = Layout(("a", "b"), (6, 4))
PAIR = Layout(("a/x.1", "b/x.1"), (5, 5))
MLP = Layout(("mlp_in.0", "mlp_out.0", "mlp_in.1", "mlp_out.1"), (6, 4, 6, 4))
WIRINGS = {
    "crosscoder": Crosscoder()(LAYOUT, 12),
    "cross-layer": CrossLayer()(MLP, 12),
    "shared": DesignatedShared(shared=0.5)(PAIR, 12),
}


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def tiny_coder(wiring=None, activation=None, **options) -> Coder:
    wiring = wiring or WIRINGS["crosscoder"]
    coder = Coder(wiring, activation or ReLU(), **options)
    Transpose(decoder_norm=0.5)(coder, torch.zeros(1, wiring.harvest.width), seeded())
    return coder.train()


def new_state(coder: Coder, config=None) -> TrainState:
    n = coder.wiring.n_latents
    return TrainState(coder, new_optimizer(coder, config or Adam()), torch.zeros(n).long())


def some_rows(coder: Coder, n: int = 40) -> Rows:
    x = torch.randn(n, coder.wiring.read.width, generator=seeded(1)) + 2
    same = coder.wiring.read == coder.wiring.write
    y = x if same else torch.randn(n, coder.wiring.write.width, generator=seeded(2)) + 2
    return Rows(x, y)


def row_norms(coder: Coder) -> torch.Tensor:
    """Of each latent over everything that it writes, tied copies counted."""
    return coder.decoder_norms().detach().norm(dim=-1)


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
def test_decoders_come_to_norm_one_over_all_sites(wiring):
    coder = tiny_coder(wiring)
    before = [w.detach().clone() for w in coder.W_dec]
    renormalise_decoder(coder)
    assert torch.allclose(row_norms(coder), torch.ones(12))
    for old, new in zip(before, coder.W_dec, strict=True):
        assert torch.allclose(torch.cosine_similarity(old, new), torch.ones(len(old)))


@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
def test_the_projected_gradient_leaves_norms_alone(wiring):
    coder = tiny_coder(wiring)
    for W in coder.W_dec:
        W.grad = torch.randn(W.shape, generator=seeded(3))
    wanted = [
        g - (g * w).sum(-1, keepdim=True) / w.norm(dim=-1, keepdim=True) ** 2 * w
        for g, w in ((W.grad.clone(), W.detach()) for W in coder.W_dec)
    ]
    project_decoder_gradient(coder)
    for W, right in zip(coder.W_dec, wanted, strict=True):
        assert torch.allclose(W.grad, right, atol=1e-6)
        assert torch.allclose((W.grad * W).sum(-1), torch.zeros(len(W)), atol=1e-6)


class Table:
    """The same batches every time."""

    def __init__(self, width: int, batch: int = 16) -> None:
        self.shape, self.given = (batch, width), 0

    def next(self, check):
        self.given += 1
        return torch.randn(self.shape, generator=seeded(self.given))

    def state(self):
        return {}


def quiet(heldout=None, log=None) -> Hooks:
    return Hooks(log or (lambda m: None), lambda s: None, heldout or (lambda c: {}))


def test_gaos_order_step_by_step():
    """Renormalise, project, clip, step; gradients are those before the renormalisation."""
    config = TrainConfig(
        coder=CoderConfig(latents=12, activation=ReLU(), unit_norm=True),
        optimizer=Adam(lr=1e-2, warmup=0, decay=0.0, clip=0.7),
        fit=FitConfig(steps=4, batch=16, dtype="float32"),
    )
    coder, twin = tiny_coder(), tiny_coder()
    fit(config, new_state(coder, config.optimizer), Table(10), quiet())
    adam = torch.optim.Adam(twin.parameters(), lr=1e-2, eps=6.25e-10, fused=True)
    table = Table(10)
    for step in range(4):
        x = table.next(None)
        loss, _ = config.objective(train_pass(twin, Rows(x, x), progress=step / 4))
        loss.backward()
        with torch.no_grad():
            W = twin.W_dec[0]
            W /= W.norm(dim=-1, keepdim=True)
            W.grad -= (W.grad * W).sum(-1, keepdim=True) * W
            norm = sum(p.grad.square().sum() for p in twin.parameters()) ** 0.5
            for p in twin.parameters():
                p.grad *= min(1.0, 0.7 / (float(norm) + 1e-6))
        adam.step()
        adam.zero_grad()
    for found, wanted in zip(coder.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
    assert not torch.allclose(row_norms(coder), torch.ones(12), atol=1e-6), "off it until the next"


def test_without_a_clip_gradients_are_left():
    moved = []
    for clip in (None, 1e6, 1e-3):
        coder = tiny_coder()
        config = TrainConfig(
            coder=CoderConfig(latents=12, activation=ReLU()),
            optimizer=Adam(lr=1e-2, warmup=0, clip=clip, eps=1.0),
            fit=FitConfig(steps=3, batch=16, dtype="float32"),
        )
        fit(config, new_state(coder, config.optimizer), Table(10), quiet())
        moved.append(coder.W_enc[0].detach().clone())
    assert torch.equal(moved[0], moved[1])
    assert not torch.allclose(moved[0], moved[2], atol=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "unit_norm"), [(SignSGD(lr=1e-2, warmup=0), False), (Adam(warmup=0), True)]
)
def test_what_is_judged_is_what_will_be_saved(optimizer, unit_norm):
    config = TrainConfig(
        coder=CoderConfig(latents=12, activation=ReLU(), unit_norm=unit_norm),
        optimizer=optimizer,
        fit=FitConfig(steps=6, batch=16, dtype="float32", heldout_every=2),
    )
    coder = tiny_coder()
    state = new_state(coder, optimizer)
    seen = []
    hooks = quiet(heldout=lambda c: seen.append(c.W_dec[0].detach().clone()) or {})
    fit(config, state, Table(10), hooks)
    kept = coder.W_dec[0].detach().clone()
    with as_saved(state, unit_norm) as shown:
        assert torch.equal(shown.W_dec[0], seen[-1])
        if unit_norm:
            assert torch.allclose(row_norms(shown), torch.ones(12))
    assert torch.equal(coder.W_dec[0], kept)
    assert not torch.equal(seen[-1], kept)
    assert len(seen) == 3


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS.values(), ids=WIRINGS)
def test_a_resampled_latent_stands_for_a_bad_row(wiring, center):
    if center and wiring.read != wiring.write:
        pytest.skip("a coder that writes other sites cannot center")
    coder = tiny_coder(wiring, center=center)
    rows = some_rows(coder)
    bad = 7
    rows.y_BY[bad] += 100 * torch.randn(wiring.write.width, generator=seeded(4))
    state = new_state(coder)
    dead_L = torch.zeros(12, dtype=torch.bool)
    dead_L[10] = True
    before = [p.detach().clone() for p in coder.parameters()]
    with torch.no_grad():
        shown = train_pass(coder, rows)
    assert resample(state, rows, shown, dead_L, seeded()) == 1

    place, local = (1, 4) if len(wiring.groups) == 2 else (0, 10)
    group = wiring.groups[place]
    reads, writes = wiring.read.columns(group.reads), wiring.write.columns(group.writes)
    x, y = rows.x_BX - rows.x_BX.mean(0), rows.y_BY - rows.y_BY.mean(0)
    W_enc, W_dec = coder.W_enc[place].detach(), coder.W_dec[place].detach()
    assert torch.cosine_similarity(W_enc[local], x[bad, reads], dim=0) == pytest.approx(1, abs=1e-5)
    written = W_dec[local].repeat(group.copies)
    assert torch.cosine_similarity(written, y[bad, writes], dim=0) == pytest.approx(1, abs=1e-5)
    live = [i for i in range(len(W_enc)) if i != local]
    assert W_enc[local].norm() == pytest.approx(0.2 * float(W_enc[live].norm(dim=-1).mean()))
    assert W_dec[local].norm() == pytest.approx(float(W_dec[live].norm(dim=-1).mean()))
    pre = coder.preactivations(rows.x_BX)[:, 10]
    assert pre.mean().item() == pytest.approx(0, abs=1e-5), "the mean is taken out"
    assert pre[bad] == pre.max()
    for old, new in zip(before, coder.parameters(), strict=True):
        if new.shape[0] in (12, len(W_enc)) and new is not coder.b_dec:
            others = torch.ones(len(new), dtype=torch.bool)
            others[10 if len(new) == 12 else local] = False
            assert torch.equal(old[others], new[others])


def test_bad_rows_are_likelier_and_none_is_drawn_twice():
    coder = tiny_coder()
    rows = some_rows(coder, 6)
    rows.y_BY[:3] += 50
    dead_L = torch.ones(12, dtype=torch.bool)
    with torch.no_grad():
        shown = train_pass(coder, rows)
    state = new_state(coder)
    state.idle_L.fill_(9)
    assert resample(state, rows, shown, dead_L, seeded()) == 6, "one row each, and six rows"
    assert state.idle_L.tolist() == [0] * 6 + [9] * 6
    directions = coder.W_dec[0][:6].detach()
    assert (directions @ directions.T / directions.norm(dim=-1) ** 2 > 0.9999).sum() == 6
    y = rows.y_BY - rows.y_BY.mean(0)
    taken = (directions @ y.T / y.norm(dim=-1)).argmax(-1).tolist()
    assert set(taken[:3]) == {0, 1, 2}


@pytest.mark.parametrize(
    "activation", [JumpReLU.deepmind(), JumpReLU.anthropic(), Gated()], ids=["θ", "log θ", "gate"]
)
@pytest.mark.parametrize("config", [Adam(warmup=0), SignSGD(warmup=0), Muon(warmup=0)])
def test_a_resampled_latent_starts_over_in_all_that_is_its_own(activation, config):
    coder = tiny_coder(activation=activation)
    fresh = {n: p.detach().clone() for n, p in coder.named_parameters()}
    state = new_state(coder, config)
    rows = some_rows(coder)
    for _ in range(3):
        shown = train_pass(coder, rows)
        sum(p.square().sum() for p in coder.parameters()).backward()
        state.optimizer.step(1.0)
    dead_L = torch.zeros(12, dtype=torch.bool)
    dead_L[[3, 8]] = True
    resample(state, rows, shown, dead_L, seeded())
    for name, parameter in coder.named_parameters():
        if name in ("threshold", "log_threshold", "r_mag"):
            assert torch.equal(parameter[dead_L], fresh[name][dead_L])
        if name == "b_mag":
            assert torch.equal(parameter[dead_L], coder.b_enc[dead_L])
        for part in state.optimizer.parts:
            for key, value in part.state.get(parameter, {}).items():
                if value.shape == parameter.shape and name != "b_dec":
                    wanted = parameter[dead_L] if key == "z" else torch.zeros_like(value[dead_L])
                    assert torch.equal(value[dead_L], wanted), (name, key)


def test_nothing_dead_changes_nothing():
    coder = tiny_coder()
    before = [p.detach().clone() for p in coder.parameters()]
    rows = some_rows(coder)
    with torch.no_grad():
        shown = train_pass(coder, rows)
    none = torch.zeros(12, dtype=torch.bool)
    assert resample(new_state(coder), rows, shown, none, seeded()) == 0
    assert all(map(torch.equal, before, coder.parameters()))


def test_resampling_revives_latents():
    """Half of the latents start where no row is: without resampling, they stay there."""

    def left(every: int) -> tuple[int, list[int]]:
        coder = tiny_coder()
        with torch.no_grad():
            coder.b_enc[:6] = -1000
        told = []
        config = TrainConfig(
            coder=CoderConfig(latents=12, activation=ReLU()),
            objective=Objective(recon=Recon(), l1=NormL1(weight=1e-3)),
            optimizer=Adam(lr=1e-3, warmup=0),
            fit=FitConfig(
                steps=30, batch=16, dtype="float32", dead_after=100, resample_every=every
            ),
        )
        state = new_state(coder, config.optimizer)
        fit(config, state, Table(10), quiet(log=told.append))
        resampled = [m["resampled"] for m in told if "resampled" in m]
        return int((state.idle_L >= 100).sum()), resampled

    assert left(0) == (6, [])
    assert left(10) == (0, [6])
