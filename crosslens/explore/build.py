"""From a run to its store and its report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslens.coder import Coder, coder_hash, load
from crosslens.device import resolve_device, resolve_dtype
from crosslens.errors import CrosslensError, UsageError
from crosslens.explore.codes import Progress
from crosslens.explore.diff_read import read_diff
from crosslens.explore.gather import gather, quiet
from crosslens.explore.interact_read import read_interact
from crosslens.explore.prove_read import read_prove
from crosslens.explore.report import write_report
from crosslens.explore.saved import Unreadable
from crosslens.explore.store import LatentStore, load_manifest
from crosslens.lm import LanguageModel
from crosslens.storage import load_json
from crosslens.text import Vocabulary
from crosslens.training import Run, open_models, run_source
from crosslens.training.run import first_blocks

TOKENS = 60_000


@dataclass(frozen=True)
class Built:
    """What `build` left on disk."""

    report: Path
    store: LatentStore
    gathered: bool
    """Whether the models ran; False when the stored latents still matched the coder."""
    left_out: tuple[str, ...] = ()
    """Why analyses that the run has are not in the report, a sentence each."""


def store_folder(run: Run) -> Path:
    """Where a run keeps what was gathered of its latents."""
    return run.folder / "store"


def build(
    run: Run,
    models: Mapping[str, LanguageModel] | None = None,
    tokens: int = TOKENS,
    progress: Progress = quiet,
    refresh: bool = False,
) -> Built:
    """Gather the run's latents, unless that was done, and write `report.html`.

    Args:
        models: the run's models, if they are open already.
        tokens: positions to look at: held-out blocks first, then training blocks.
        refresh: gather again even if what is stored matches the coder and `tokens`.

    Raises:
        UsageError: `tokens` is not positive.
        CrosslensError: training has not finished, or there is nothing to look at.
    """
    if tokens < 1:
        raise UsageError(f"--tokens must be at least 1, found {tokens}.")
    coder = _coder(run)
    store = None if refresh else _stored(run, coder, tokens)
    gathered = store is None
    if store is None:
        store = _gathered(run, models or open_models(run.config()), coder, tokens, progress)
        store.save(store_folder(run))
    return Built(_written(run, store), store, gathered, left_out(run, store.manifest.coder))


def rewrite(run: Run) -> Path | None:
    """Write `report.html` anew from what is stored, running no model; None where nothing is stored
    of the coder that the run has now."""
    store = _stored(run, _coder(run), None)
    return None if store is None else _written(run, store)


def left_out(run: Run, coder: str) -> tuple[str, ...]:
    """Why a diff, interactions or proofs that lie in the run's folder cannot be shown, a sentence
    each; the page says the same."""
    found = (read(run.folder, coder) for read in (read_diff, read_interact, read_prove))
    return tuple(each.why for each in found if isinstance(each, Unreadable))


def _written(run: Run, store: LatentStore) -> Path:
    """The report, with whatever else is known of the run."""
    evaluation = run.folder / "evaluation.json"
    found = load_json(evaluation) if evaluation.is_file() else None
    coder = store.manifest.coder
    diff, interact = read_diff(run.folder, coder), read_interact(run.folder, coder)
    return write_report(run, store, found, diff=diff, interact=interact)


def _coder(run: Run) -> Coder:
    """The run's coder, computing in the format it was trained in."""
    if not run.finished:
        raise CrosslensError(
            f"{run.folder} has no coder yet: training has not finished. "
            f"`crosslens resume {run.folder}` goes on."
        )
    plan = run.config().fit
    coder = load(run.coder_path, resolve_device(plan.device))
    coder.compute_dtype = resolve_dtype(plan.dtype)
    return coder


def _stored(run: Run, coder: Coder, tokens: int | None) -> LatentStore | None:
    """What was gathered of this coder, over `tokens` if that is given."""
    folder = store_folder(run)
    if not (folder / "manifest.json").is_file():
        return None
    manifest = load_manifest(folder)
    if manifest.coder != coder_hash(coder):
        return None
    if tokens is not None and manifest.provenance.get("asked") != tokens:
        return None
    return LatentStore.load(folder)


def _gathered(
    run: Run,
    models: Mapping[str, LanguageModel],
    coder: Coder,
    tokens: int,
    progress: Progress,
) -> LatentStore:
    blocks, n_heldout = first_blocks(run.blocks("heldout"), run.blocks("train"), tokens)
    source = run_source(run, models, blocks)
    vocabulary = Vocabulary.from_tokenizer(next(iter(models.values())).tokenizer)
    provenance = _provenance(run) | {
        "asked": tokens,
        "blocks": len(blocks.tokens_NT),
        "heldout_blocks": n_heldout,
    }
    return gather(source, coder, vocabulary, provenance=provenance, progress=progress)


def _provenance(run: Run) -> dict[str, Any]:
    record = run.record()
    return {
        "run": run.name,
        "step": run.summary().get("steps"),
        "seed": run.config().seed,
        "fingerprint": record.get("text", {}).get("fingerprint"),
        "versions": record.get("versions", {}),
    }
