"""The benchmarks as a page, a JSON file and a plot."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.arena import GB
from benchmarks.task import SHAPES

Found = Mapping[str, Any]

STEP = """\
Tokens per second of one full training step (forward, losses, backward, clipping, optimiser), batch
2,048, all on the same random rows, taking turns in one run: the median of the counted steps, the
slowest and the fastest. Peak memory is the process's, beyond its imports. The libraries that know
SAEs only get a crosscoder's sites side by side as one SAE: the same products of the same size.
No latent is dead in any of them, so no auxiliary loss is at work.
`bfloat16`: products in bfloat16, weights in float32. `bfloat16_weights`: weights and moments too.
The roofline: `benchmarks/roofline.py`."""
HARVEST = """\
Tokens per second of a language model's activations at several sites, the same real text and weights
for all, taking turns in one run. `plain`: Transformers alone, to the same depth. `bridge`:
TransformerLens, in bfloat16 and in its default number format. Peak memory is the whole process's.
The ratio is the median over the turns."""
GROWTH = """\
crosslens in bfloat16, every point in a process of its own. Seconds of a step; beside them what the
encoder's product takes alone (measured in turns with it), one pass of Adam at the measured
bandwidth of a copy (28 bytes a parameter), and what remains. Elsewhere 5 sites of 576, 4,096
latents, k = 32, batch 2,048."""
WHOLE = """\
The whole process of each library's own command, from text to a saved SAE at one layer of the
built-in model: importing, loading, tokenising, harvesting, training. How good the coders get is not
compared."""
PREDICTION = """\
What `crosslens train --dry-run` says after `crosslens doctor --calibrate`, beside what then happens
in a process of its own. ✗: more than 25 % off."""
SECTIONS = {
    "train_step": "A training step",
    "harvest": "Harvest",
    "growth": "Growth",
    "end_to_end": "From text to a trained coder",
    "prediction": "What a dry run predicts",
}


def write_page(folder: Path, found: Found) -> None:
    """`bench.md`, `bench.json`, and `bench.svg` where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (folder / "bench.json").write_text(text, encoding="utf-8")
    drawn = False
    if importlib.util.find_spec("matplotlib") and found["benchmarks"].get("growth", {}).get(
        "sweeps"
    ):
        from benchmarks.plot import draw

        draw(folder / "bench.svg", found["benchmarks"]["growth"]["sweeps"])
        drawn = True
    (folder / "bench.md").write_text(page(found, drawn), encoding="utf-8")


def page(found: Found, drawn: bool = False) -> str:
    """The whole page as Markdown."""
    facts = found["machine"]
    lines = [
        "# Benchmarks",
        "",
        f"{facts['cpu']}, {facts['usable_cores']} cores ({', '.join(facts['flags']) or 'no flags'}"
        f" among the flags looked for), {facts['memory_gb']} GB, {facts['system']}, Python "
        f"{facts['python']}. Written by `make bench`; all figures are in `bench.json`.",
        "",
    ]
    for name, one in found["benchmarks"].items():
        lines += [f"## {SECTIONS[name]}", ""]
        if "reason" in one:
            lines += [f"Not measured: {one['reason']}.", ""]
            continue
        lines += [*WRITERS[name](one), f"`{' '.join(one['command'])}`, {one['minutes']} min.", ""]
        if name == "growth" and drawn:
            lines += ["![Seconds of a step](bench.svg)", ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _steps(found: Found) -> Iterator[str]:
    yield from (STEP, "")
    yield from (f"Versions: {', '.join(_versions(found))}.", "")
    for name, one in found["shapes"].items():
        yield from (f"### {SHAPES[name]}", "")
        head = ("library", "setting", "tokens/s", "slowest – fastest", "peak")
        rows = [*_contestants(one)]
        if one["roofline"]:
            rows.append(["roofline", "", f"{one['roofline']:,.0f}", "", ""])
        yield from _table(head, rows)
        if one["fraction_of_roofline"]:
            rates = one["roofline_from"]
            product, copied = rates["flop_per_s"] / 1e12, rates["copy_bytes_per_s"] / GB
            yield f"crosslens reaches {one['fraction_of_roofline']:.2f} of the roofline (product"
            yield f"{product:.2f} TFLOP/s, copy {copied:.1f} GB/s)."
        if one["times_fastest_peer"]:
            yield f"It is {one['times_fastest_peer']:.1f} times as fast as the fastest peer."
        yield ""


def _contestants(one: Found) -> Iterator[list[str]]:
    for name, settings in {"crosslens": one["crosslens"], **one["peers"]}.items():
        if "reason" in settings:
            yield [name, "", settings["reason"], "", ""]
            continue
        for setting, rate in settings.items():
            if "reason" in rate:
                yield [name, setting, rate["reason"], "", ""]
                continue
            peak = f"{one['peak_bytes'][name][setting] / GB:.1f} GB"
            yield [name, setting, *_rate(rate), peak]


def _rate(rate: Found) -> tuple[str, str]:
    return f"{rate['median']:,.0f}", f"{rate['least']:,.0f} – {rate['most']:,.0f}"


def _versions(found: Found) -> list[str]:
    """Each library once, torch and its threads with them."""
    told: dict[str, None] = {}
    for one in found["shapes"].values():
        for contestant, facts in one["facts"].items():
            name = contestant.split()[0]
            if name not in ("product", "copy"):
                told[f"{name} {facts['version'] or '(from its folder)'}"] = None
            told[f"torch {facts['torch']} on {facts['threads']} threads"] = None
    return list(told)


def _growth(found: Found) -> Iterator[str]:
    yield from (GROWTH, "")
    for name, points in found["sweeps"].items():
        grows = name.partition("_")[0]
        yield from (f"### With {grows}{_sites(name)}", "")
        head = (grows, "tokens/s", "step", "encoder", "optimiser", "rest", "peak")
        yield from _table(head, [_point(point, grows) for point in points])


def _sites(name: str) -> str:
    count = name.partition("_")[2]
    return f", {count} site{'s' if count != '1' else ''}" if count else ""


def _point(point: Found, grows: str) -> list[str]:
    size = f"{point[grows]:,}"
    if "reason" in point:
        return [size, point["reason"], "", "", "", "", ""]
    seconds = [f"{point[f'{p}_seconds']:.3f}" for p in ("step", "encoder", "optimizer", "rest")]
    rate, peak = point["tokens_per_s"]["median"], f"{point['peak_bytes'] / GB:.1f} GB"
    return [size, f"{rate:,.0f}", *seconds, peak]


def _whole(found: Found) -> Iterator[str]:
    yield from (f"{WHOLE} {found['tokens']:,} tokens each.", "")
    rows: list[list[str]] = []
    for name, one in found["contestants"].items():
        if "reason" in one:
            rows.append([name, one["how"], one["reason"], "", "", ""])
            continue
        peak = f"{one['peak_bytes'] / GB:.1f} GB"
        rows.append([name, one["how"], *_rate(one["tokens_per_s"]), f"{one['seconds']:.0f}", peak])
    yield from _table(
        ("library", "run as", "tokens/s", "slowest – fastest", "seconds", "peak"), rows
    )


def _harvest(found: Found) -> Iterator[str]:
    yield from (f"{HARVEST} {found['model']}, {', '.join(found['sites'])}.", "")
    rows: list[list[str]] = []
    for name in ("crosslens", "plain", "bridge", "bridge_float32"):
        one = found[name]
        if "reason" in one:
            rows.append([name, one["reason"], "", "", "", ""])
            continue
        peak, times = f"{one['peak_bytes'] / GB:.1f} GB", found["times"].get(name)
        ratio = (f"{times['median']:.2f}", f"{times['goal']}") if times else ("", "")
        rows.append([name, *_rate(one), peak, *ratio])
    head = ("who", "tokens/s", "slowest – fastest", "peak", "crosslens is × it", "goal")
    yield from _table(head, rows)


def _prediction(found: Found) -> Iterator[str]:
    yield from (PREDICTION, "")
    units = {"seconds_per_step": 1.0, "harvest_tokens_per_s": 1.0, "memory_peak": GB, "disk": GB}
    head = ("predicted / happened", "step, s", "harvest, tokens/s", "memory, GB", "disk, GB")
    rows = [
        [name, *(_pair(one, *unit) for unit in units.items())]
        for name, one in found["configurations"].items()
    ]
    yield from _table(head, rows)


def _pair(one: Found, key: str, unit: float) -> str:
    told = [one[side][key] / unit for side in ("predicted", "happened")]
    shown = " / ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in told)
    return shown if one["within"][key] else f"{shown} ✗"


WRITERS = {
    "train_step": _steps,
    "harvest": _harvest,
    "growth": _growth,
    "end_to_end": _whole,
    "prediction": _prediction,
}
