"""`report.html`: one self-contained file about a run and its latents."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from crosslens.explore import figures
from crosslens.explore.codes import Ints
from crosslens.explore.diff_read import Diffed
from crosslens.explore.diff_section import latent_facts, section
from crosslens.explore.interact_plots import TALL, WIDE
from crosslens.explore.interact_read import Interacted
from crosslens.explore.interact_section import partners
from crosslens.explore.interact_section import section as interact_section
from crosslens.explore.payload import choose_latents, packed, payload
from crosslens.explore.prove_read import Proved, read_prove
from crosslens.explore.prove_section import section as prove_section
from crosslens.explore.saved import Unreadable
from crosslens.explore.store import LatentStore
from crosslens.storage import void, write_atomic
from crosslens.training import Run

LATENTS = 1000
"""Latents with examples in a report, at most: about 2 MB."""
_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("data.js", "list.js", "latent.js", "diff.js", "interact.js", "main.js")
_STYLES = ("report.css", "diff.css", "interact.css", "prove.css")


_COLUMNS = (
    ("sites", "reconstruction", (("fvu", "FVU"), ("explained_variance", "expl. var."),
                                 ("cosine", "cosine"), ("norm_ratio", "norm ratio"))),
    ("splice", "cross-entropy when spliced, nats",
     (("ce_clean", "clean"), ("ce", "coder"), ("ce_mean", "mean"), ("ce_zero", "zero"))),
    ("splice", "recovered against", (("recovered_mean", "mean"), ("recovered_zero", "zero"))),
    ("splice", "", (("kl", "KL"),)),
)  # fmt: skip


@dataclass(frozen=True)
class SiteColumns:
    """Some columns of the table of sites, under one heading."""

    heading: str
    names: tuple[tuple[str, str], ...]
    """Key and title of each column that has any value."""
    rows: dict[str, dict[str, float]]
    """Site → key → value."""


def write_report(
    run: Run,
    store: LatentStore,
    evaluation: Mapping[str, Any] | None,
    latents: int = LATENTS,
    diff: Diffed | Unreadable | None = None,
    interact: Interacted | Unreadable | None = None,
) -> Path:
    """Write the run's `report.html`, atomically, and return its path.

    Args:
        evaluation: what `crosslens evaluate` saved, if it ran.
        latents: how many latents the page carries, at most.
        diff: what `crosslens diff` saved, if it ran.
        interact: what `crosslens interact` saved, if it ran.
    """
    html = render(run, store, evaluation, latents, diff, interact)
    path = run.folder / "report.html"
    write_atomic(path, lambda temporary: void(temporary.write_text(html, encoding="utf-8")))
    return path


def render(
    run: Run,
    store: LatentStore,
    evaluation: Mapping[str, Any] | None,
    latents: int = LATENTS,
    diff: Diffed | Unreadable | None = None,
    interact: Interacted | Unreadable | None = None,
) -> str:
    """The page as text; what is given gives the page, always the same."""
    metrics = run.metrics()
    evaluation = evaluation or {}
    found = section(diff) if isinstance(diff, Diffed) else None
    interacted = interact_section(interact) if isinstance(interact, Interacted) else None
    named = [*(found.latents if found else ()), *(interacted.latents if interacted else ())]
    chosen = choose_latents(store, latents, named)
    told = _key_figures(store, metrics, evaluation)
    script = _joined(_SCRIPTS)
    digest = hashlib.sha256(script.encode()).digest()
    template = _environment().get_template("report.html.j2")
    return template.render(
        run=run,
        store=store,
        evaluated=bool(evaluation),
        key_figures=told,
        measured=_measured(told),
        site_columns=_site_columns(metrics, evaluation),
        shown=len(chosen),
        facts=_facts(run, store),
        provenance=_provenance(store),
        diff=found,
        no_diff=diff.why if isinstance(diff, Unreadable) else None,
        interact=interacted,
        no_interact=interact.why if isinstance(interact, Unreadable) else None,
        on_page=frozenset(chosen.tolist()),
        payload=packed(_payload(store, chosen, diff, interact)),
        **_charts(store, metrics),
        **_proofs(run, store),
        css=Markup(_joined(_STYLES)),
        script=Markup(script),
        script_hash=Markup(base64.b64encode(digest).decode("ascii")),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": figures.number, "percent": figures.percent}
    return environment


def _charts(store: LatentStore, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page draws of the coder itself, and the sizes of plot areas."""
    return {
        "curves": figures.curves(metrics),
        "strip": figures.norm_strip(store),
        "density": figures.density_histogram(store),
        "dead": [i for i, n in enumerate(store.statistics.count_L.tolist()) if n == 0],
        "plot": (figures.WIDTH, figures.HEIGHT),
        "scatter_plot": (WIDE, TALL),
    }


def _proofs(run: Run, store: LatentStore) -> dict[str, Any]:
    """What `crosslens prove local` left of the run, or why it cannot be shown."""
    found = read_prove(run.folder, store.manifest.coder)
    shown = prove_section(found) if isinstance(found, Proved) else None
    return {"prove": shown, "no_prove": found.why if isinstance(found, Unreadable) else None}


def _payload(
    store: LatentStore,
    chosen: Ints,
    diff: Diffed | Unreadable | None,
    interact: Interacted | Unreadable | None,
) -> dict[str, Any]:
    found = payload(store, chosen)
    if isinstance(interact, Interacted):
        found["interact"] = partners(interact, chosen.tolist())
    if isinstance(diff, Diffed):
        found["diff"] = latent_facts(diff, chosen.tolist())
    return found


def _joined(names: Sequence[str]) -> str:
    return "\n".join((_PAGE / name).read_text(encoding="utf-8") for name in names)


def _key_figures(
    store: LatentStore, metrics: list[dict[str, Any]], evaluation: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    """(name, value, what it was measured on) of what one asks first."""
    during = _last_heldout(metrics)
    found = evaluation or during
    where = "on held-out tokens" if evaluation else "on held-out rows, when training ended"
    dead = 1 - len(store.alive_L) / store.n_latents
    told = [
        ("FVU", _told(found.get("fvu")), where),
        ("L0", _told(found.get("l0")), where),
        ("dead latents", figures.percent(dead), "never active on the tokens of this page"),
    ]
    splice = [s["recovered_mean"] for s in evaluation.get("splice", {}).values()]
    shares = [share for share in splice if share is not None and math.isfinite(share)]
    if shares:
        mean = sum(shares) / len(shares)
        told.append(("CE recovered", figures.percent(mean), "against mean ablation, over sites"))
    return told


def _measured(told: list[tuple[str, str, str]]) -> list[tuple[str, list[str]]]:
    """On what each of the key figures was measured, and which were on it."""
    grounds = dict.fromkeys(ground for _, _, ground in told)
    return [(ground, [n for n, _, at in told if at == ground]) for ground in grounds]


def _last_heldout(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The last measurement of the training on held-out rows."""
    return next((dict(m["heldout"]) for m in reversed(metrics) if "heldout" in m), {})


def _told(value: float | None) -> str:
    return "–" if value is None else figures.number(float(value))


def _site_columns(
    metrics: list[dict[str, Any]], evaluation: Mapping[str, Any]
) -> list[SiteColumns]:
    """What was measured at each site; what nobody measured has no column."""
    during = _last_heldout(metrics)
    found = []
    for source, heading, names in _COLUMNS:
        rows = evaluation.get(source) or during.get(source) or {}
        rows = {s: {k: v for k, v in row.items() if v is not None} for s, row in rows.items()}
        known = tuple((k, n) for k, n in names if any(k in row for row in rows.values()))
        if known:
            found.append(SiteColumns(heading, known, rows))
    return found


def _facts(run: Run, store: LatentStore) -> list[tuple[str, str]]:
    """What was trained on what."""
    config = run.config()
    models = ", ".join(
        f"{name}: {spec.path}" + (f" + {spec.adapter}" if spec.adapter else "")
        for name, spec in config.models.items()
    )
    activation = config.coder.activation
    told = type(activation).__name__ + (f", k = {activation.k}" if hasattr(activation, "k") else "")
    return [
        ("Models" if len(config.models) > 1 else "Model", models),
        ("Sites", ", ".join(store.manifest.sites)),
        ("Coder", f"{store.n_latents} latents, {told}"),
        ("Trained on", f"{config.fit.steps * config.fit.batch:,} rows in {config.fit.steps} steps"),
        ("Text", ", ".join(corpus.source for corpus in config.text.corpora.values())),
    ]


def _provenance(store: LatentStore) -> list[tuple[str, str]]:
    """What these numbers rest on, for the foot of the page."""
    known = store.manifest.provenance
    told = [("tokens", f"{store.manifest.tokens:,}")]
    if "blocks" in known:
        told.append(("blocks", f"{known['blocks']}, {known.get('heldout_blocks', 0)} held out"))
    told += [
        (name, str(known[key])[:16])
        for name, key in (("text", "fingerprint"), ("seed", "seed"), ("step", "step"))
        if known.get(key) is not None
    ]
    told.append(("coder", store.manifest.coder[:16]))
    told += [(name, str(version)) for name, version in known.get("versions", {}).items()]
    return told
