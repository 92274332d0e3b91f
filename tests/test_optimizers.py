"""Each optimiser against torch or a loop of its equation, and going on from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch

from crosslens.cli.arguments import parse
from crosslens.coder import (
    Coder,
    Crosscoder,
    JumpReLU,
    LayerConditioned,
    Layout,
    ReLU,
    Rows,
    Transcoder,
    Transpose,
    train_pass,
)
from crosslens.config import from_plain, to_plain
from crosslens.errors import CrosslensError, UsageError
from crosslens.training import Adam, CoderConfig, Muon, SignSGD, TrainConfig
from crosslens.training.checkpoint import TrainState, restore_checkpoint, save_checkpoint
from crosslens.training.descent import AdamWithoutMoment, ScheduleFreeSign
from crosslens.training.optimizers import Optimizer, new_optimizer

LAYOUT = Layout(("a", "b"), (6, 4))
KINDS = [
    Adam(lr=1e-2, warmup=0),
    Adam(lr=1e-2, beta1=0.0, warmup=0),
    SignSGD(lr=1e-2, warmup=0),
    Muon(lr=1e-2, warmup=0),
    Muon(lr=1e-2, beta1=0.0, warmup=0),
    Adam(lr=1e-2, moments="bfloat16", warmup=0),
    Adam(lr=1e-2, beta1=0.0, moments="bfloat16", warmup=0),
]
IDS = [
    *("adam", "adam without moment", "sign", "muon", "muon without moment"),
    *("adam in half", "adam without moment in half"),
]


def tiny_coder(wiring=None, activation=None) -> Coder:
    wiring = wiring or Crosscoder()(LAYOUT, 12)
    coder = Coder(wiring, activation or ReLU())
    Transpose(decoder_norm=0.5)(coder, torch.zeros(1, wiring.harvest.width), seeded())
    return coder.train()


def seeded(n: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def push(coder: Coder, optimizer: Optimizer, step: int, factor: float = 1.0) -> None:
    """One step towards the reconstruction of rows that depend on the number of the step."""
    x = torch.randn(8, coder.wiring.read.width, generator=seeded(step))
    site = torch.zeros(8).long() if coder.wiring.n_codes else None
    y = torch.randn(8, coder.wiring.write.width, generator=seeded(step + 10**6))
    shown = train_pass(coder, Rows(x, y, site))
    (shown.target_BY - shown.recon_BY).square().sum(-1).mean().backward()
    optimizer.step(factor)


def test_adam_without_a_first_moment_is_torchs_with_beta1_0_to_the_bit():
    coder = tiny_coder(activation=JumpReLU(initial_threshold=0.1, bandwidth=0.5))
    twin = copy.deepcopy(coder)
    mine = new_optimizer(coder, Adam(lr=1e-2, beta1=0.0, beta2=0.9, eps=1e-6))
    theirs = torch.optim.Adam(twin.parameters(), betas=(0.0, 0.9), eps=1e-6, fused=True)
    for step in range(30):
        x = torch.randn(8, 10, generator=seeded(step))
        for each in (coder, twin):
            shown = train_pass(each, Rows(x, x))
            (shown.target_BY - shown.recon_BY).square().sum(-1).mean().backward()
        mine.step(0.5 if step < 10 else 1.0)
        theirs.param_groups[0]["lr"] = 1e-2 * (0.5 if step < 10 else 1.0)
        theirs.step()
        theirs.zero_grad()
    for found, wanted in zip(coder.parameters(), twin.parameters(), strict=True):
        assert torch.equal(found, wanted)
    names = {key.partition(".")[2] for key in mine.tensors()}
    assert names == {"step", "exp_avg_sq"}, "no first moment is kept"
    assert all(p.grad is None for p in coder.parameters())


def test_adam_itself_is_torchs():
    coder = tiny_coder()
    twin = copy.deepcopy(coder)
    mine = new_optimizer(coder, Adam(lr=1e-2))
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-2, eps=6.25e-10)
    for step in range(5):
        push(coder, mine, step)
        x = torch.randn(8, 10, generator=seeded(step))
        y = torch.randn(8, 10, generator=seeded(step + 10**6))
        shown = train_pass(twin, Rows(x, y))
        (shown.target_BY - shown.recon_BY).square().sum(-1).mean().backward()
        theirs.step()
        theirs.zero_grad()
    for found, wanted in zip(coder.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_moments_in_half_are_torchs_but_for_rounding(beta1):
    coder = tiny_coder()
    twin = copy.deepcopy(coder)
    mine = new_optimizer(coder, Adam(lr=1e-3, beta1=beta1, moments="bfloat16"))
    theirs = torch.optim.Adam(twin.parameters(), lr=1e-3, betas=(beta1, 0.999), eps=6.25e-10)
    started = [p.detach().clone() for p in coder.parameters()]
    for step in range(40):
        push(coder, mine, step)
        x = torch.randn(8, 10, generator=seeded(step))
        y = torch.randn(8, 10, generator=seeded(step + 10**6))
        shown = train_pass(twin, Rows(x, y))
        (shown.target_BY - shown.recon_BY).square().sum(-1).mean().backward()
        theirs.step()
        theirs.zero_grad()
    for found, wanted, start in zip(coder.parameters(), twin.parameters(), started, strict=True):
        moved = (wanted - start).norm()
        assert (found - wanted).norm() < 0.02 * moved
        assert moved > 0
    kept = mine.tensors()
    for name in ("exp_avg_sq", *(["exp_avg"] if beta1 else [])):
        formats = [value.dtype for key, value in kept.items() if key.endswith(f".{name}")]
        assert formats.count(torch.bfloat16) == 2, "of both matrices"
        assert formats.count(torch.float32) == len(formats) - 2


def test_schedule_free_sign_is_the_loop_of_its_equation():
    """Three sequences kept apart in float64, number by number: z the iterate, x the average, y
    where gradients are taken; the average weights z by the square of the largest rate so far."""
    start = [0.3, -0.2, 0.7, 0.0]
    target = [1.0, 1.0, -1.0, 0.0]
    weight = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = ScheduleFreeSign([weight], lr=0.1, momentum=0.9)
    z, x, y = list(start), list(start), list(start)
    largest = total = 0.0
    for step in range(25):
        rate = 0.1 * min(1.0, (step + 1) / 5)
        optimizer.param_groups[0]["lr"] = rate
        (weight - torch.tensor(target)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        largest = max(largest, rate)
        total += largest**2
        share = largest**2 / total
        for i in range(4):
            slope = y[i] - target[i]
            z[i] -= rate * ((slope > 0) - (slope < 0))
            x[i] = (1 - share) * x[i] + share * z[i]
            y[i] = 0.9 * x[i] + 0.1 * z[i]
        assert weight.tolist() == pytest.approx(y, abs=1e-12)
    optimizer.to_average()
    assert weight.tolist() == pytest.approx(x, abs=1e-12)
    assert weight[3] == 0, "what has no gradient does not move"


def test_the_average_is_shown_inside_and_the_weights_are_untouched_after():
    coder = tiny_coder()
    optimizer = new_optimizer(coder, SignSGD(lr=1e-2))
    with optimizer.averaged():
        pass  # nothing to average yet
    for step in range(6):
        push(coder, optimizer, step)
    before = [p.detach().clone() for p in coder.parameters()]
    with optimizer.averaged():
        shown = [p.detach().clone() for p in coder.parameters()]
    after = [p.detach().clone() for p in coder.parameters()]
    assert all(map(torch.equal, before, after))
    assert not any(map(torch.equal, before, shown))
    beta = 0.95
    for y, x, p in zip(before, shown, coder.parameters(), strict=True):
        z = optimizer.parts[0].state[p]["z"]
        assert torch.allclose(y, beta * x + (1 - beta) * z, atol=1e-6)
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        1 / 0  # noqa: B018
    assert all(map(torch.equal, before, (p.detach() for p in coder.parameters())))


@pytest.mark.parametrize("config", [Adam(), Muon()])
def test_others_have_no_average(config):
    coder = tiny_coder()
    optimizer = new_optimizer(coder, config)
    push(coder, optimizer, 0)
    before = coder.W_enc[0].detach().clone()
    with optimizer.averaged():
        assert torch.equal(coder.W_enc[0], before)


def test_muon_steps_the_matrices_and_adam_the_rest():
    layout = Layout(("mlp_in.0", "mlp_out.0"), (6, 4))
    coder = tiny_coder(
        Transcoder(skip=True)(layout, 12), JumpReLU(initial_threshold=0.1, bandwidth=0.5)
    )
    optimizer = new_optimizer(coder, Muon(lr=1e-2))
    push(coder, optimizer, 0)
    names = {id(p): name for name, p in coder.named_parameters()}
    owned = [
        {names[id(p)] for group in part.param_groups for p in group["params"]}
        for part in optimizer.parts
    ]
    assert owned == [{"W_enc.0", "W_dec.0", "W_skip.0"}, {"b_enc", "b_dec", "threshold"}]
    code = tiny_coder(LayerConditioned(code="learnt")(Layout(("a.1", "a.2"), (6, 6)), 12))
    rest = new_optimizer(code, Muon()).parts[1]
    assert any(p is code.site_code for p in rest.param_groups[0]["params"])


def test_muons_step_is_orthogonal_and_of_adams_size():
    coder = tiny_coder()
    before = coder.W_enc[0].detach().clone()
    push(coder, new_optimizer(coder, Muon(lr=1e-2)), 0)
    moved = (coder.W_enc[0].detach() - before) / 1e-2
    values = torch.linalg.svdvals(moved) / (0.2 * 12**0.5)
    assert values[:8].min() > 0.5, "a batch of eight rows: a gradient of rank eight"
    assert values.max() < 1.5


def test_the_factor_scales_the_rate():
    for config in KINDS:
        moved = []
        for factor in (1.0, 0.25):
            coder = tiny_coder()
            before = coder.W_enc[0].detach().clone()
            push(coder, new_optimizer(coder, config), 0, factor)
            moved.append(coder.W_enc[0].detach() - before)
        assert torch.allclose(moved[1], 0.25 * moved[0], atol=1e-5)
        assert moved[0].any()


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_going_on_from_a_checkpoint_is_exact(tmp_path, config):
    whole = tiny_coder()
    optimizer = new_optimizer(whole, config)
    state = TrainState(whole, optimizer, torch.zeros(12).long())
    for step in range(4):
        push(whole, optimizer, step)
    path = save_checkpoint(tmp_path, state, {})
    for step in range(4, 8):
        push(whole, optimizer, step)

    again = tiny_coder()
    other = TrainState(again, new_optimizer(again, config), torch.zeros(12).long())
    push(again, other.optimizer, 99)  # a state that must be replaced as a whole
    restore_checkpoint(path, other)
    for step in range(4, 8):
        push(again, other.optimizer, step)
    for found, wanted in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(found, wanted)
    with optimizer.averaged(), other.optimizer.averaged():
        assert torch.equal(again.W_dec[0], whole.W_dec[0])


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_another_coders_state_is_refused(config):
    coder, wider = tiny_coder(), tiny_coder(Crosscoder()(LAYOUT, 13))
    optimizer = new_optimizer(coder, config)
    push(coder, optimizer, 0)
    with pytest.raises(CrosslensError, match=r"here\.safetensors does not fit"):
        new_optimizer(wider, config).restore(optimizer.tensors(), "here.safetensors")
    for key in ("99.exp_avg", "x.exp_avg", "-1.exp_avg"):
        with pytest.raises(CrosslensError, match="does not fit"):
            optimizer.restore({key: torch.zeros(12, 10)}, "here.safetensors")


@pytest.mark.parametrize("config", KINDS, ids=IDS)
def test_rows_can_be_forgotten(config):
    coder = tiny_coder()
    optimizer = new_optimizer(coder, config)
    for step in range(3):
        push(coder, optimizer, step)
    before = {key: value.clone() for key, value in optimizer.tensors().items()}
    rows = torch.tensor([2, 5])
    with torch.no_grad():
        coder.W_enc[0][rows] = 7.0
    optimizer.forget(coder.W_enc[0], rows)
    place = next(i for i, p in enumerate(coder.parameters()) if p is coder.W_enc[0])
    touched = set()
    for key, value in optimizer.tensors().items():
        if not torch.equal(value, before[key]):
            touched.add(key)
            fresh = coder.W_enc[0][rows] if key.endswith("z") else torch.zeros(2, 10)
            assert torch.equal(value[rows], fresh)
            others = torch.ones(12, dtype=torch.bool)
            others[rows] = False
            assert torch.equal(value[others], before[key][others])
    assert touched
    assert all(key.startswith(f"{place}.") for key in touched)
    with optimizer.averaged():
        assert torch.allclose(coder.W_enc[0][rows], torch.tensor(7.0))


def test_no_moments_for_what_never_had_a_gradient(tmp_path):
    optimizer = new_optimizer(tiny_coder(), Adam(beta1=0.0))
    assert optimizer.tensors() == {}
    assert isinstance(optimizer.parts[0], AdamWithoutMoment)


@pytest.mark.parametrize("config", [*KINDS, Adam(clip=None, rise="cosine", warmup="1k tokens")])
def test_configurations_survive_json(config):
    whole = TrainConfig(optimizer=config)
    plain = to_plain(whole)
    assert plain["optimizer"]["kind"] == type(config).__name__.lower()
    assert from_plain(TrainConfig, plain, "here") == whole


def test_the_command_line_chooses_and_fills_an_optimiser():
    def read(*argv: str) -> TrainConfig:
        return parse(TrainConfig, argv, TrainConfig(), prog="x", description="y")

    assert read("--optimizer", "signsgd", "--optimizer.momentum", "0.9").optimizer == SignSGD(
        momentum=0.9
    )
    assert read("--optimizer.warmup", "100k tokens").optimizer.warmup == "100k tokens"
    assert read("--optimizer.warmup", "30").optimizer.warmup == 30
    assert read("--optimizer.decay", "40 steps").optimizer.decay == "40 steps"
    assert read("--optimizer.clip", "None").optimizer.clip is None
    assert read("--optimizer", "muon", "--optimizer.lr", "0.1").optimizer == Muon(lr=0.1)
    assert read("--coder.init", "datapoint", "--coder.init.p", "0.4").coder.init.p == 0.4
    with pytest.raises(UsageError, match=r"optimizer\.lr"):
        read("--optimizer.lr", "-1")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Adam(lr=0.0), r"optimizer\.lr"),
        (lambda: Adam(eps=0.0), r"optimizer\.eps"),
        (lambda: Adam(clip=0.0), r"optimizer\.clip"),
        (lambda: Adam(beta1=1.0), r"optimizer\.beta1"),
        (lambda: Muon(beta2=-0.1), "beta2"),
        (lambda: Muon(momentum=1.0), r"optimizer\.momentum"),
        (lambda: SignSGD(momentum=0.0), r"optimizer\.momentum"),
        (lambda: SignSGD(warmup="soon"), r"optimizer\.warmup"),
        (lambda: Adam(decay=-0.1), r"optimizer\.decay"),
        (lambda: CoderConfig(firing_rate=0.0), r"coder\.firing_rate"),
        (lambda: CoderConfig(firing_rate=0.1), r"coder\.firing_rate.*batchtopk"),
        (lambda: CoderConfig(shared_start=1.1), r"coder\.shared_start"),
        (lambda: CoderConfig(zero_decoder=True), r"coder\.zero_decoder"),
        (lambda: TrainConfig(coder=CoderConfig(shared_start=0.1)), r"coder\.shared_start"),
        (
            lambda: TrainConfig(coder=CoderConfig(unit_norm=True), optimizer=SignSGD()),
            r"coder\.unit_norm.*signsgd",
        ),
    ],
)
def test_bad_configurations_are_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()
