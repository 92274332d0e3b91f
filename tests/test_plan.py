"""What `--dry-run` predicts, against real runs and against counts by hand. Never a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import recorded
from crosslens.activations import site_layout
from crosslens.cli.plan import described
from crosslens.coder import (
    BatchTopK,
    Coder,
    CrossLayer,
    JumpReLU,
    Layout,
    ReLU,
    TopK,
    transpose_init,
)
from crosslens.functional.interaction_penalty import Neurons
from crosslens.kernels import calibration
from crosslens.kernels.calibration import LENGTHS, Calibration, Measured, Rates, Size
from crosslens.lm import ModelSpec
from crosslens.text import Corpus, TextConfig
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    FitConfig,
    Interaction,
    MultiTopK,
    Muon,
    NormL1,
    Objective,
    TrainConfig,
    create_run,
    open_models,
    train,
)
from crosslens.training import plan as planning
from crosslens.training.fit import Hooks, fit
from crosslens.training.footprint import footprint
from crosslens.training.objective import interaction
from crosslens.training.plan import plan
from crosslens.training.probe import interaction_seconds
from crosslens.training.readers import Reader, readers_of
from crosslens.training.start import first_state
from crosslens.training.step_cost import entries, is_sparse, size_of, step_cost

CPU = torch.device("cpu")
RATES = Rates(
    encode=1e9, decode=2e9, weights=4e9, bag_rows=1e8, products=2e8,
    sums=tuple(1 / (2e-9 + 1e-9 * n) for n in LENGTHS), look=1e8, take=1e7, sort=2e7,
    adam_rows=1e8, adam=5e7, norms=1e9, write=1e10, fresh=1e9, block=1e9, calls=1e6,
)  # fmt: skip
NOTHING = Hooks(lambda _: None, lambda _: None, lambda _: {})


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def calibrated() -> None:
    size = Size(rows=64, read=64, written=64, latents=48)
    measured = tuple(Measured(dtype=d, size=size, rates=RATES) for d in ("float32", "bfloat16"))
    facts = calibration.machine_facts(CPU)
    calibration.save(Calibration(facts=facts, measured=measured, seconds=1.0))


def config_of(folder: Path, **fit_changes) -> TrainConfig:
    fit = {
        "steps": 30, "batch": 64, "dtype": "float32", "device": "cpu", "log_every": 5,
        "heldout_every": 10, "heldout_rows": 64, "checkpoint_every": 10, "dead_after": 10**6,
        "calibration_tokens": 256, "harvest_tokens": 256,
    }  # fmt: skip
    return TrainConfig(
        models={"base": ModelSpec(path=str(folder), dtype="float32", device="cpu")},
        sites=("resid_mid.1", "resid_mid.2"),
        text=TextConfig(
            corpora={"main": Corpus(source="stdlib")}, tokens=4000, heldout=600, block=32
        ),
        coder=CoderConfig(latents=512, activation=TopK(k=4)),
        optimizer=Adam(warmup=2),
        fit=FitConfig(**{**fit, **fit_changes}),
    )


def size_on_disk(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


# ── against real runs ──


@pytest.mark.parametrize(
    ("optimizer", "changes"),
    [
        (Adam(warmup=2), {}),
        (Adam(warmup=2), {"steps": 8}),
        (Adam(warmup=2, beta1=0.0), {"steps": 12}),
        (Adam(warmup=2, moments="bfloat16"), {"steps": 12}),
        (Muon(warmup=2), {"steps": 12}),
    ],
)
def test_the_disk_that_a_run_takes(tiny_model_folder, tmp_path, optimizer, changes):
    config = replace(config_of(tiny_model_folder, **changes), optimizer=optimizer)
    models = open_models(config)
    predicted = plan(config, models, probe_steps=1)
    run = create_run(tmp_path / "run", config)
    train(run, models)
    assert predicted.disk == pytest.approx(size_on_disk(run.folder), rel=0.25)
    assert predicted.disk_peak > predicted.disk


@pytest.mark.parametrize("buffer_gb", [1.0, 0.0002])
def test_the_positions_that_are_harvested(tiny_model_folder, tmp_path, buffer_gb):
    """The second buffer holds a third of the text, and is filled again and again."""
    config = config_of(tiny_model_folder, buffer_gb=buffer_gb, steps=90)
    models = open_models(config)
    run = create_run(tmp_path / "run", config)
    summary = train(run, models)
    wiring = config.wiring(site_layout(models, config.sites), config.coder.latents)
    beside = config.fit.heldout_rows + config.fit.calibration_tokens
    predicted = planning._harvested(config, wiring) - beside
    assert predicted == pytest.approx(summary["positions"]["seen"], rel=0.25)
    if buffer_gb < 1:
        assert predicted > 1.3 * config.text.tokens


class Rows:
    """The same rows every time."""

    def __init__(self, rows_BX: torch.Tensor) -> None:
        self.rows_BX = rows_BX

    def next(self, check: object) -> torch.Tensor:
        return self.rows_BX

    def state(self) -> dict[str, torch.Tensor]:
        return {}


def stepped(config: TrainConfig, below: float, readers: tuple[Reader, ...] = ()):
    """A training after two steps, and a function that makes two more."""
    layout = Layout(("resid_post.1", "resid_post.2"), (96, 160))
    wiring = config.wiring(layout, config.coder.latents)
    coder = Coder(wiring, config.coder.activation)
    transpose_init(coder, 0.1, torch.Generator().manual_seed(0))
    state = first_state(coder, config, below)
    rows = Rows(torch.randn(config.fit.batch, layout.width).bfloat16())

    def go(until: int) -> None:
        fit(replace(config, fit=replace(config.fit, steps=until)), state, rows, NOTHING, readers)

    go(2)
    return wiring, state, go


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("sparse", "latents"), [(True, 8192), (False, 4096)])
def test_the_memory_of_a_step(tiny_model_folder, dtype, sparse, latents):
    config = config_of(tiny_model_folder, batch=1024, dtype=dtype, heldout_rows=1, log_every=99)
    objective = replace(config.objective, aux=AuxK(weight=0.0))
    config = replace(
        config,
        coder=CoderConfig(latents=latents, activation=BatchTopK(k=8)),
        optimizer=Adam(warmup=0, decay=0.0),
        objective=objective,
    )
    wiring, state, go = stepped(config, 1.1 if sparse else 0.0)
    with recorded() as peaks:
        go(4)
    parameters = sum(p.numel() for p in state.coder.parameters())
    found = footprint(config, wiring, parameters, sparse)
    assert found.step == pytest.approx(max(p.total for p in peaks.values()), rel=0.25)
    copies = sum(
        c.nbytes for c in map(state.coder.copies.held, state.coder.parameters()) if c is not None
    )
    moments = sum(value.nbytes for value in state.optimizer.tensors().values())
    assert found.coder == pytest.approx(4 * parameters + moments + copies, rel=0.02)


INTERACTION = Interaction(weight=0.1, ramp=0.0, share=1.0, neurons=1.0)


@pytest.mark.parametrize("form", ["exact", "paper"])
@pytest.mark.parametrize(("sparse", "latents"), [(True, 8192), (False, 4096)])
def test_the_memory_of_a_step_that_looks_at_interactions(tiny_model_folder, sparse, latents, form):
    config = config_of(tiny_model_folder, batch=1024, heldout_rows=1, log_every=99)
    torch.manual_seed(0)
    term = replace(INTERACTION, form=form, sites=("resid_post.1",), share=0.25)
    config = replace(
        config,
        coder=CoderConfig(latents=latents, activation=BatchTopK(k=8)),
        optimizer=Adam(warmup=0, decay=0.0),
        objective=Objective(aux=AuxK(weight=0.0), interaction=term),
    )
    neurons = Neurons(
        kind="silu",
        through_DW=torch.randn(96, 1024),
        fixed_W=torch.zeros(1024),
        out_norm_N=torch.ones(512),
    )
    readers = (Reader(site="resid_post.1", norm=None, blocks=(neurons,)),)
    wiring, state, go = stepped(config, 1.1 if sparse else 0.0, readers)
    with recorded() as peaks:
        go(4)
    parameters = sum(p.numel() for p in state.coder.parameters())
    found = footprint(config, wiring, parameters, sparse, readers)
    assert found.step == pytest.approx(max(p.total for p in peaks.values()), rel=0.25)
    without = footprint(config, wiring, parameters, sparse)
    assert found.coder == without.coder + 4 * 96 * 1024


# ── by hand ──


@pytest.mark.parametrize("sparse_below", [0.5, 0.0])
@pytest.mark.usefixtures("calibrated")
def test_the_interaction_penalty_is_tried_and_added(tiny_model_folder, monkeypatch, sparse_below):
    asked = []

    def tried(config, wiring, readers, active, sparse) -> float:
        asked.append(([reader.site for reader in readers], active, sparse))
        return 0.5

    monkeypatch.setattr(planning, "interaction_seconds", tried)
    config = config_of(tiny_model_folder, sparse_below=sparse_below)
    models = open_models(config)
    without = plan(config, models)
    assert asked == []
    objective = replace(config.objective, interaction=replace(INTERACTION, sites=("*.2",)))
    found = plan(replace(config, objective=objective), models)
    assert asked == [(["resid_mid.2"], 4, sparse_below > 0)]
    assert found.seconds_per_step == pytest.approx(without.seconds_per_step + 0.5)
    assert found.step_parts == {**without.step_parts, "interaction": 0.5}
    assert found.step_from == "the calibration, objective.interaction from a probe"
    assert found.memory_step > without.memory_step


@pytest.mark.parametrize("form", ["exact", "paper"])
@pytest.mark.parametrize("sparse", [True, False])
def test_the_interaction_penalty_s_own_code_is_timed(tiny_model_folder, monkeypatch, sparse, form):
    seen = []
    config = config_of(tiny_model_folder)
    term = replace(INTERACTION, form=form, share=0.5)
    config = replace(config, objective=Objective(interaction=term))
    models = open_models(config)
    wiring = config.wiring(site_layout(models, config.sites), 512)
    taken = interaction.FORMS[form]

    def noted(active, neurons) -> torch.Tensor:
        seen.append((active.lists.n_items, len(active.strength_E), len(neurons.out_norm_N)))
        return taken(active, neurons)

    monkeypatch.setitem(interaction.FORMS, form, noted)
    readers = readers_of(models, wiring, (), 1)
    assert interaction_seconds(config, wiring, readers, 4, sparse) > 0
    rows, entries, neurons = seen[0]
    assert (rows, neurons) == (32, 64)
    assert 32 * 4 - 4 <= entries <= 32 * 4  # a latent may be drawn twice
    assert len(seen) % 2 == 0, "both sites, each time"


@pytest.mark.usefixtures("calibrated")
def test_a_calibrated_step_is_counted_and_not_tried(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(planning, "step_seconds", lambda *_: pytest.fail("a step was tried"))
    config = config_of(tiny_model_folder, sparse_below=0.5)
    found = plan(config, open_models(config))
    assert found.step_from == "the calibration"
    assert found.sparse
    assert found.seconds_per_step == pytest.approx(sum(found.step_parts.values()))
    pairs = 64 * 4
    assert found.step_parts["decoder"] == pytest.approx(pairs * 64 * 4 / 1e8)
    assert found.step_parts["encoder"] == pytest.approx(2 * 64 * 512 * 64 / 1e9 + 64 * 512 * 4e-10)
    assert found.seconds > 30 * found.seconds_per_step
    whole = plan(replace(config, fit=replace(config.fit, sparse_below=0.0)), open_models(config))
    assert not whole.sparse
    assert whole.step_parts["decoder"] == pytest.approx(2 * 64 * 512 * 64 / 2e9)


def test_without_a_calibration_a_step_is_tried(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(planning, "step_seconds", lambda *_: 0.25)
    config = config_of(tiny_model_folder)
    found = plan(config, open_models(config))
    assert found.seconds_per_step == 0.25
    assert found.step_parts == {}
    assert "never measured: `crosslens doctor --calibrate`" in found.step_from


@pytest.mark.usefixtures("calibrated")
def test_what_was_not_measured_is_tried(tiny_model_folder, monkeypatch):
    monkeypatch.setattr(planning, "step_seconds", lambda *_: 0.25)
    config = replace(config_of(tiny_model_folder), optimizer=Muon(warmup=2))
    assert plan(config, open_models(config)).seconds_per_step == 0.25


@pytest.mark.usefixtures("calibrated")
def test_an_activation_without_k_has_two_speeds(tiny_model_folder):
    config = config_of(tiny_model_folder, sparse_below=0.05)
    penalty = Objective(l1=NormL1(weight=1.0), aux=AuxK(weight=0.0))
    config = replace(config, coder=CoderConfig(latents=512, activation=ReLU()), objective=penalty)
    found = plan(config, open_models(config))
    assert not found.sparse
    assert found.seconds_per_sparse_step is not None
    assert found.seconds_per_sparse_step < found.seconds_per_step
    assert "once much less than 0.05 of it is active" in described(config, found)


def test_the_plan_in_words(tiny_model_folder):
    config = config_of(tiny_model_folder)
    found = replace(
        plan(config, open_models(config), probe_steps=1),
        memory_peak=3_000_000_000, memory_device=2_000_000_000, disk=1_000_000, seconds=61.0,
        seconds_per_step=0.5, step_parts={"encoder": 0.3, "decoder": 0.1, "rows": 0.1},
    )  # fmt: skip
    lines = dict(line.split(None, 1) for line in described(config, found).splitlines())
    assert lines["memory"].startswith("3GB at the peak; 2GB on the accelerator: ")
    assert lines["disk"].startswith("1MB; ")
    assert lines["time"] == "about 1m01s"
    assert lines["encoder"] == "60%, decoder 20%, rows 20%"


def test_entries_are_those_of_all_codes(tiny_model_folder):
    config = config_of(tiny_model_folder)
    assert entries(config) == 4
    more = replace(config, objective=Objective(multi_topk=MultiTopK(factor=3)))
    assert entries(more) == 4 + 12
    jump = replace(config, coder=CoderConfig(latents=512, activation=JumpReLU.anthropic()))
    assert entries(jump) is None
    assert [is_sparse(c, 0.01) for c in (config, jump)] == [True, False]
    assert not is_sparse(config, 4 / 512)


def test_costs_grow_with_what_they_count(tiny_model_folder):
    config = config_of(tiny_model_folder)
    layout = Layout(("a.1",), (64,))
    wiring, double = (config.wiring(layout, n) for n in (512, 1024))
    few, many = (step_cost(config, w, RATES, 4) for w in (wiring, double))
    assert few is not None
    assert many is not None
    assert many.parts["encoder"] == pytest.approx(2 * few.parts["encoder"])
    assert many.parts["optimizer"] == pytest.approx(2 * few.parts["optimizer"])
    for part in ("decoder", "code's gradient", "rows", "starting"):
        assert many.parts[part] == few.parts[part], "k is the same"
    lazy = replace(config, optimizer=Adam(warmup=2, beta1=0.0))
    seldom = step_cost(lazy, double, RATES, 4)
    assert seldom is not None
    assert seldom.parts["optimizer"] == pytest.approx(many.parts["optimizer"] * 64 * 4 / 1024)
    dying = replace(config.fit, dead_after=100)
    with_dead = step_cost(replace(config, fit=dying), wiring, RATES, 4)
    assert with_dead is not None
    assert "aux" in with_dead.parts
    assert "aux" not in few.parts


def test_the_mean_width_of_latents_is_told():
    layout = Layout(("mlp_in.1", "mlp_in.2", "mlp_out.1", "mlp_out.2"), (8, 8, 10, 10))
    # Half of the latents write both outputs, half only the second.
    assert size_of(CrossLayer()(layout, 20), 7) == Size(rows=7, read=8, written=15, latents=20)
