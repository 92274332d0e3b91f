"""From a configuration to a trained coder in a run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from crosslens.activations import (
    Calibration,
    Counts,
    Ring,
    Source,
    calibrate,
    check_aligned,
    other_tokenizers,
    site_layout,
)
from crosslens.activations.swapped import exchange_of
from crosslens.coder import Coder, save
from crosslens.config import from_plain
from crosslens.device import resolve_device
from crosslens.errors import CrosslensError, UsageError
from crosslens.evaluation import reconstruction
from crosslens.lm import LanguageModel, tokenizer_hash
from crosslens.lm import open_models as open_models_of
from crosslens.storage import save_json
from crosslens.text import Blocks, build_blocks, coverage
from crosslens.training.chat import template_told, text_tokenizer
from crosslens.training.checkpoint import TrainState, checkpoints, restore_newest, save_checkpoint
from crosslens.training.config import TrainConfig
from crosslens.training.fit import Hooks, Metrics, fit
from crosslens.training.readers import Reader
from crosslens.training.run import Run, append_metrics, extend_record, trim_metrics
from crosslens.training.start import begin, first_readers, first_state, starting_coder
from crosslens.training.upkeep import as_saved

Models = Mapping[str, LanguageModel]
Report = Callable[[str, int, int, Mapping[str, float]], None]
"""Hears (stage, done, total, figures) as work goes on."""


def silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """The report that tells nobody."""


def open_models(config: TrainConfig) -> dict[str, LanguageModel]:
    """All models of a configuration, by name."""
    return open_models_of(config.models)


def train(run: Run, models: Models, report: Report = silent) -> dict[str, Any]:
    """Train the run that `create_run` made, from wherever it stands; returns its summary.

    A run without checkpoints starts at the beginning; otherwise it goes on bit by bit as if it
    had never stopped.
    """
    started = time.monotonic()
    config = run.config()
    training = _prepare(run, config, models, report)
    first_step = training.state.step
    hooks = _hooks(run, config, training, report)
    fit(config, training.state, _Batches(training, report), hooks, training.readers)
    summary = _summary(run, config, training, time.monotonic() - started, first_step)
    with as_saved(training.state, config.coder.unit_norm) as coder:
        save(coder.eval(), run.coder_path, _provenance(run, config, models, summary))
    save_json(run.folder / "summary.json", summary)
    return summary


def run_source(run: Run, models: Models, blocks: Blocks) -> Source:
    """Activations of any blocks at the run's sites, under its token policy and norms."""
    config = run.config()
    source = _source(config, models, blocks)
    record = run.record()
    if "calibration" not in record:
        raise CrosslensError(f"{run.folder} has not begun training: `crosslens resume` starts it.")
    return replace(source, median_P=torch.tensor(record["calibration"]["median"]))


def _source(config: TrainConfig, models: Models, blocks: Blocks) -> Source:
    layout = site_layout(models, config.sites, config.align)
    if config.align:
        check_aligned(models, blocks)
    per_chunk = max(1, config.fit.harvest_tokens // config.text.block)
    source = Source(models, layout, blocks, config.policy, blocks_per_chunk=per_chunk)
    if not config.shuffle_models:
        return source
    return replace(source, exchange=exchange_of(layout, config.seed))


@dataclass
class _Training:
    """A run in memory."""

    state: TrainState
    ring: Ring
    heldout_BX: Tensor
    readers: tuple[Reader, ...]


class _Batches:
    """The ring's batches, with its refills reported."""

    def __init__(self, training: _Training, report: Report) -> None:
        self.ring = training.ring
        self.report = report

    def next(self, check: Callable[[], None]) -> Tensor:
        def heard(done: int, total: int) -> None:
            self.report("harvest", done, total, {})
            check()

        return self.ring.next(heard)

    def state(self) -> dict[str, Tensor]:
        return self.ring.state()


def _prepare(run: Run, config: TrainConfig, models: Models, report: Report) -> _Training:
    train_blocks, heldout_blocks = _blocks(run, config, models, report)
    source = _source(config, models, train_blocks)
    _check_buffer(config, source)
    wiring = config.wiring(source.layout, config.coder.latents)
    config.objective.check_wiring(wiring)
    readers = first_readers(config, models, wiring)
    calibration, sample_RX = _calibration(run, config, source, models, report)
    source = replace(source, median_P=torch.tensor(calibration.median))
    device = resolve_device(config.fit.device)
    state = _new_state(run, config, source, calibration, sample_RX)
    capacity = int(config.fit.buffer_gb * 1e9 / (2 * source.layout.width))
    ring = Ring(source, capacity, config.fit.batch, config.seed, ahead=source.on_accelerator)
    position, complaints = restore_newest(run.folder / "checkpoints", state)
    for complaint in complaints:
        report(f"passed over: {complaint}", 0, 0, {})
    if position is not None:
        report(f"resuming at step {state.step}", 0, 0, {})
        ring.restore(position, lambda done, total: report("harvest again", done, total, {}))
    trim_metrics(run, state.step)
    heldout = replace(source, blocks=heldout_blocks)
    heldout_BX = _heldout_rows(heldout, config.fit.heldout_rows, device)
    return _Training(state, ring, heldout_BX, readers)


def _blocks(run: Run, config: TrainConfig, models: Models, report: Report) -> tuple[Blocks, Blocks]:
    """The run's token blocks: built once, then always read from the run."""
    if "text" in run.record():
        return run.blocks("train"), run.blocks("heldout")
    report("text", 0, 0, {})
    first, others = next(iter(models)), other_tokenizers(models) if config.align else {}
    if told := template_told(models):
        report(told, 0, 0, {})
    split = build_blocks(config.text, text_tokenizer(models), config.seed, others)
    split.train.save(run.folder / "data", "train")
    split.heldout.save(run.folder / "data", "heldout")
    counts = {name: asdict(count) for name, count in split.counts.items()}
    facts = {"fingerprint": split.fingerprint, "corpora": counts}
    if others:
        paired = coverage(split.train, first)
        report(paired.told(), 0, 0, {})
        facts["alignment"] = paired.plain()
    extend_record(run, {"text": facts})
    return split.train, split.heldout


def _check_buffer(config: TrainConfig, source: Source) -> None:
    """Refuse too little text before the models have run over any of it."""
    if source.n_rows_at_most < config.fit.batch:
        raise UsageError(
            f"The text gives at most {source.n_rows_at_most} rows, fewer than one batch of "
            f"{config.fit.batch}. Raise --text.tokens or lower --fit.batch."
        )


def _calibration(
    run: Run, config: TrainConfig, source: Source, models: Models, report: Report
) -> tuple[Calibration, Tensor | None]:
    """The norms that scale the run's activations, and rows to start a coder from.

    Once there is a checkpoint, the norms are read from the run and no rows are needed.
    """
    record = run.record()
    if "calibration" in record and checkpoints(run.folder / "checkpoints"):
        known = from_plain(Calibration, record["calibration"], str(run.folder / "run.json"))
        return known, None
    report("calibrate", 0, 0, {})
    wiring = config.wiring(source.layout, config.coder.latents)
    first = None if config.start is None else starting_coder(config, wiring)
    calibration, sample_RX = calibrate(
        source, wiring, config.fit.calibration_tokens, config.coder.scale
    )
    if first is not None:  # its weights mean what they do at its own scales
        read, write = tuple(first.scale_read.tolist()), tuple(first.scale_write.tolist())
        calibration = replace(calibration, read_scale=read, write_scale=write)
    facts = {
        "sites": dict(zip(source.layout.sites, source.layout.widths, strict=True)),
        "models": {name: model.identity() for name, model in models.items()},
        "calibration": asdict(calibration),
    }
    extend_record(run, facts)
    return calibration, sample_RX


def _new_state(
    run: Run,
    config: TrainConfig,
    source: Source,
    calibration: Calibration,
    sample_RX: Tensor | None,
) -> TrainState:
    device = resolve_device(config.fit.device)
    coder = Coder(
        config.wiring(source.layout, config.coder.latents),
        config.coder.activation,
        center=config.coder.center,
    )
    coder.scale_read.copy_(torch.tensor(calibration.read_scale))
    coder.scale_write.copy_(torch.tensor(calibration.write_scale))
    if sample_RX is not None:
        begin(coder, config, sample_RX, device)
    coder.to(device)
    # Kept for the whole run: another machine may find another share, and round otherwise.
    state = first_state(coder, config, run.record().get("sparse_below"))
    extend_record(run, {"sparse_below": coder.sparse_below})
    return state


def _heldout_rows(source: Source, wanted: int, device: torch.device) -> Tensor:
    found: list[Tensor] = []
    for chunk in source:
        found.append(chunk.rows().to(torch.bfloat16))
        if sum(map(len, found)) >= wanted:
            break
    return torch.cat(found)[:wanted].to(device)


def _hooks(run: Run, config: TrainConfig, training: _Training, report: Report) -> Hooks:
    shown: dict[str, float] = {}

    def log(metrics: Metrics) -> None:
        append_metrics(run, metrics)
        if "heldout" in metrics:
            shown["held-out fvu"] = metrics["heldout"]["fvu"]
        elif "loss" in metrics:
            shown.update({key: metrics[key] for key in ("fvu", "l0", "dead")})
        report("train", metrics["step"], config.fit.steps, shown)

    def checkpoint(state: TrainState) -> None:
        save_checkpoint(run.folder / "checkpoints", state, training.ring.state())

    def heldout(coder: Coder) -> dict[str, Any]:
        found = reconstruction(coder, torch.split(training.heldout_BX, config.fit.batch))
        sites = {site: {"fvu": figures.fvu} for site, figures in found.sites.items()}
        return {"fvu": found.fvu, "l0": found.l0, "dead": found.dead, "sites": sites}

    return Hooks(log, checkpoint, heldout)


def _summary(
    run: Run, config: TrainConfig, training: _Training, seconds: float, first_step: int
) -> dict[str, Any]:
    lines = run.metrics()
    nothing: Metrics = {}
    last = next((line for line in reversed(lines) if "loss" in line), nothing)
    heldout = next((line["heldout"] for line in reversed(lines) if "heldout" in line), nothing)
    return {
        "steps": training.state.step,
        "rows": training.state.step * config.fit.batch,
        "usage": training.ring.usage(),
        "positions": _told(training.ring.counts),
        "seconds": round(seconds, 1),
        "steps_in_session": training.state.step - first_step,
        "fvu": last.get("fvu"),
        "l0": last.get("l0"),
        "dead": last.get("dead"),
        "heldout": heldout,
    }


def _told(counts: Counts) -> dict[str, int]:
    return {**asdict(counts), "kept": counts.kept}


def _provenance(
    run: Run, config: TrainConfig, models: Models, summary: Mapping[str, Any]
) -> dict[str, Any]:
    record = run.record()
    return {
        "models": {name: model.identity() for name, model in models.items()},
        "tokenizer_hash": tokenizer_hash(next(iter(models.values())).tokenizer),
        "policy": asdict(config.policy),
        "calibration": record["calibration"],
        "text": record["text"],
        "versions": record["versions"],
        "training": {k: summary[k] for k in ("steps", "rows", "fvu", "l0", "dead", "heldout")},
    }
