"""The shapes of a diff's section: coordinates and words are the numbers."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from crosslens.diffing.classes import MINDER, NAMES
from crosslens.explore.diff_charts import (
    BINS,
    COSINE_BINS,
    NORM_WIDTH,
    cosine_histogram,
    difference_of,
    log_axis,
    norm_histogram,
    relative_of,
)
from crosslens.explore.diff_plots import CLOUD, TALL, causal_curve, scaling_scatter
from crosslens.explore.diff_section import TOP, section
from crosslens.explore.figures import HEIGHT, WIDTH
from crosslens.explore.shapes import Each, Maybe, misfit
from crosslens.functional.shares import wilson
from tests.explore_diffed import DEAD, toy


def counted(high: float, height) -> int:
    return next(n for n in range(1000) if math.isclose(height(n), high, abs_tol=1e-9))


def axis_of(*counts) -> object:
    return log_axis(max(int(max(each)) for each in counts))[0]


def norm_counts(columns) -> list[int]:
    counts = [0] * (BINS + 1)
    for r, tokens in zip(columns["relative_norm"], columns["tokens"], strict=True):
        counts[BINS if tokens == 0 else min(int(r * BINS), BINS - 1)] += 1
    return counts


def test_bars_are_the_latents_of_each_bin_and_the_dead_stand_apart():
    found = toy()
    chart = norm_histogram(found)
    counts = norm_counts(found.columns)
    height = axis_of(counts, *(norm_counts(each) for each in found.nulls.values()))
    bars = {round(bar.x / NORM_WIDTH * BINS): bar for bar in chart.bars if bar.kind != "dead"}
    told = [counted(bars[i].high, height) if i in bars else 0 for i in range(BINS)]
    assert told == counts[:-1]
    (dead,) = [bar for bar in chart.bars if bar.kind == "dead"]
    assert counted(dead.high, height) == DEAD
    assert dead.x > NORM_WIDTH
    for bar in chart.bars:
        assert bar.y + bar.high == pytest.approx(HEIGHT)


def test_bars_have_the_colour_of_their_class():
    found = toy()
    columns = found.columns
    kinds = {round(b.x / NORM_WIDTH * BINS): b.kind for b in norm_histogram(found).bars[:-1]}
    for r, kind in zip(columns["relative_norm"], columns["class_minder"], strict=True):
        if kind != "dead":
            assert kinds[int(r * BINS)] == kind


def test_bands_hold_the_counts_of_either_convention():
    found = toy()
    for name, segments in norm_histogram(found).bands:
        counts = dict.fromkeys(NAMES, 0)
        for each in segments:
            counts[each.kind] += each.count
        wanted = found.facts["conventions"][name.lower()]
        assert counts | {"dead": DEAD} == {kind: wanted[kind] for kind in NAMES}
        assert sum(each.wide for each in segments) == pytest.approx(NORM_WIDTH)


def test_both_conventions_say_the_same_of_a_latent():
    for r in np.linspace(0, 1, 41).tolist():
        a, b = 1 - r, r
        assert difference_of(r) == pytest.approx((1 + (b - a) / max(a, b)) / 2)
        assert relative_of(difference_of(r)) == pytest.approx(r)
    assert relative_of(MINDER.only_b_above) == pytest.approx(1 / 1.2)


def test_outlines_are_the_nulls():
    found = toy()
    chart = norm_histogram(found)
    assert [name for name, _ in chart.outlines] == ["self", "noop"]
    height = axis_of(*(norm_counts(t) for t in (found.columns, *found.nulls.values())))
    for name, path in chart.outlines:
        levels = [float(level) for level in re.findall(r"V([\d.]+)h", path)]
        counts = norm_counts(found.nulls[name])
        assert levels == [pytest.approx(HEIGHT - height(n), abs=0.06) for n in counts[:-1]]
    for null in found.facts["null"].values():
        assert f"{null['classes']['only_a']}, {null['classes']['shared']}" in chart.summary


def test_cosines_are_those_of_shared_latents():
    found = toy()
    chart = cosine_histogram(found)
    assert chart is not None

    def binned(columns) -> list[int]:
        counts = [0] * COSINE_BINS
        both = zip(columns["decoder_cosine"], columns["class_minder"], strict=True)
        for cosine, kind in both:
            if kind == "shared":
                counts[min(int((cosine + 1) / 2 * COSINE_BINS), COSINE_BINS - 1)] += 1
        return counts

    counts = binned(found.columns)
    height = axis_of(counts, *(binned(each) for each in found.nulls.values()))
    bars = {round(bar.x / WIDTH * COSINE_BINS): counted(bar.high, height) for bar in chart.bars}
    assert [bars.get(i, 0) for i in range(COSINE_BINS)] == counts
    assert f"Shared latents: {sum(counts)}, median" in chart.brief


def test_without_cosines_there_is_no_histogram():
    found = toy()
    found.columns["decoder_cosine"][:] = math.nan
    assert cosine_histogram(found) is None
    assert section(found).cosines is None


def test_the_scatter_is_the_ratios():
    found = toy()
    columns = found.columns
    ranked_L = columns["tokens"] >= 10
    chart = scaling_scatter(found, ranked_L, [int(np.flatnonzero(ranked_L)[0])])
    inside, dots = 0, set()
    for latent in np.flatnonzero(ranked_L):
        x, y = columns["nu_reconstruction"][latent], columns["nu_error"][latent]
        if -0.5 <= x <= 1.5 and -0.5 <= y <= 1.5:
            inside += 1
            dots.add((round(WIDTH * (x + 0.5) / 2), round(TALL * (1.5 - y) / 2)))
    assert chart.ranked == ranked_L.sum()
    assert chart.outside == chart.ranked - inside > 5
    assert sum(cloud.inside for cloud in chart.clouds) == inside
    drawn = re.findall(r"M([-\d.]+),([-\d.]+)h0", "".join(cloud.path for cloud in chart.clouds))
    assert len(drawn) == inside
    assert all(min(abs(float(x) - a) + abs(float(y) - b) for a, b in dots) < 1.2 for x, y in drawn)
    # the corner of Minder et al.: ν of the reconstruction below 0.5, of the error below 0.2
    assert chart.box == (pytest.approx(WIDTH / 2), pytest.approx(TALL * 0.65))


def test_a_marked_latent_has_its_intervals():
    found = toy()
    columns = found.columns
    for name, value in (("nu_error", 0.1), ("nu_reconstruction", 0.3)):
        for end, at in (("", value), ("_low", -math.inf), ("_high", value + 0.2)):
            columns[name + end][5] = at
    chart = scaling_scatter(found, columns["tokens"] >= 0, [5])
    (point,) = chart.points
    assert (point.x, point.y) == (pytest.approx(WIDTH * 0.4), pytest.approx(TALL * 0.7))
    assert point.words == (
        "Latent 5: ν of the error 0.100 (−∞ to 0.300), of the reconstruction 0.300 (−∞ to 0.500)"
    )
    x, y, right = WIDTH * 0.4, TALL * 0.7, WIDTH * 0.5
    assert point.cross == f"M0.0,{y:.1f}H{right:.1f}M{x:.1f},{TALL:.1f}V{TALL * 0.6:.1f}"


def test_a_cloud_too_large_is_thinned_and_says_so():
    found = toy()
    many = 4 * CLOUD
    columns = {n: np.resize(each, many) for n, each in found.columns.items()}
    columns["class_minder"] = np.full(many, "shared", object)
    chart = scaling_scatter(replace(found, columns=columns), np.ones(many, bool), [])
    (cloud,) = chart.clouds
    assert cloud.drawn == CLOUD
    assert cloud.inside == many - chart.outside


def test_the_curve_is_the_causal_figures():
    figures = toy().facts["causal"]
    chart = causal_curve(figures, "chat")
    assert chart is not None
    top = 0.5  # the upper end of the interval with no latent
    for (x, y, _), row in zip(chart.points, figures["curve"], strict=True):
        assert x == pytest.approx(WIDTH * math.sqrt(row["share"]))
        assert y == pytest.approx(HEIGHT * (1 - row["kl"] / top))
    assert [y for y, _, _ in chart.levels] == [
        pytest.approx(HEIGHT * (1 - kl / top)) for kl in (0.4, 0.08)
    ]
    assert [at - y for y, at, _ in chart.levels] == [pytest.approx(-4), pytest.approx(11)]
    assert chart.bottom is not None
    assert chart.bottom[1] == pytest.approx(HEIGHT * (1 - 0.35 / top))
    assert chart.whiskers.startswith(f"M0.0,{HEIGHT * 0.3:.1f}V0.0")
    assert "0.0800 (0.0600 to 0.0900) with the whole decoded difference" in chart.brief
    assert "10 % of the latents: 0.200 (0.150 to 0.300) nats" in chart.summary


def test_a_curve_without_any_figure_is_none():
    figures = toy().facts["causal"]
    assert causal_curve({**figures, "curve": []}, "chat") is None
    same = [{"share": 0.0, "kl": 0.0, "intervals": {}}]
    zero = dict.fromkeys(("kl_baseline", "kl_full", "kl_bottom_half", "kl_top_half"), 0.0)
    flat = causal_curve({**figures, **zero, "curve": same}, "chat")
    assert flat is not None
    assert flat.points[0][:2] == (0.0, HEIGHT)


def test_every_count_stands_beside_its_nulls():
    found = toy()
    table = section(found).counts
    assert table.columns == ("base → chat", "null: self", "null: noop")
    sides = [found.facts, *found.facts["null"].values()]
    rows = {(group, name): cells for group, rows in table.groups for name, cells in rows}
    for bins, group in (("minder", "Minder et al., Δ"), ("kissane", "Kissane et al., r")):
        (name,) = [n for g, n in rows if g == group and n.startswith("only chat")]
        for (count, ends), side in zip(rows[group, name], sides, strict=True):
            known = side["conventions"][bins]
            assert count == str(known["only_b"])
            low, high = known["interval"]["only_b"]
            assert ends == f"{low:.0f}–{high:.0f}"
    for (count, ends), side in zip(
        rows["By other means", "only chat by latent scaling"], sides, strict=True
    ):
        alive = 300 - DEAD
        low, high = wilson(side["by_scaling"], alive)
        assert (count, ends) == (str(side["by_scaling"]), f"{low * alive:.0f}–{high * alive:.0f}")


def test_the_first_latents_of_each_class_are_the_furthest():
    found = toy()
    columns = found.columns
    for each in section(found).tops:
        of_class = [
            i
            for i in range(300)
            if columns["class_minder"][i] == each.kind
            and columns["tokens"][i] >= 10
            and not columns["near_start"][i]
        ]
        assert each.ranked == len(of_class)
        far = {"only_a": 0.0, "only_b": 1.0, "shared": 0.5}[each.kind]
        wanted = sorted(of_class, key=lambda i, far=far: abs(columns["norm_difference"][i] - far))
        assert [top.latent for top in each.tops] == wanted[:TOP]


def test_of_an_empty_class_the_nearest_are_shown():
    found = toy()
    columns = found.columns
    kinds = columns["class_minder"]
    columns["class_minder"] = np.where(kinds == "only_b", "other", kinds)
    shown = next(each for each in section(found).tops if each.kind == "only_b")
    may_L = (columns["tokens"] >= 10) & ~columns["near_start"]
    best = np.where(may_L, columns["norm_difference"], -1).argsort()[::-1][:TOP]
    assert shown.ranked == 0
    assert [top.latent for top in shown.tops] == best.tolist()


def test_planted_figures_stand_beside_their_controls():
    found = section(toy()).planted
    assert found is not None
    detection = dict(found.detection)
    assert detection["triggered against clean text"] == ("0.987", "0.951 to 1.00")
    assert detection["base in its place: triggered against clean text"] == ("0.654", "")
    assert detection["latents tied to the behaviour"] == ("17", "")
    assert not any("no-op" in name or "ranking" in name for name in detection)
    assert found.ablation[0] == ("nothing", ("95.0 %", "84.0 % to 99.0 %"), ("", ""))
    assert found.ablation[1] == (
        "the 3 most exclusive", ("2.5 %", "1.5 % to 3.5 %"), ("+0.42 %", "+0.32 % to ∞")
    )  # fmt: skip
    assert len(found.ablation) == 4


def test_baselines_stand_under_the_crosscoder():
    rows = section(toy()).baselines
    assert rows[0] == (
        "crosscoder, by Δ",
        ("0.987", "0.951 to 1.00"),
        ("0.876", "0.800 to 0.900"),
        "",
    )
    assert rows[1] == (
        "PCA",
        ("0.800", "0.700 to 0.900"),
        ("0.800", "0.700 to 0.900"),
        "explained 0.457",
    )
    assert rows[2] == ("token KL", ("–", ""), ("–", ""), "mean 0.0500 · tokens '<b>'")
    assert rows[3][3] == "left out: no such text"
    alone = toy()
    alone.facts["planted"] = None  # type: ignore[index]
    assert [row[0] for row in section(alone).baselines] == ["PCA", "token KL", "stage-wise SAE"]


def test_seeds_stand_beside_chance():
    found = toy()
    found.facts["stability"] = {  # type: ignore[index]
        "runs": 3,
        "recurrence": {"only_b": {"exclusive": 6, "counts": [1, 2, 3],
                                  "random_labels": [5.5, 0.4, 0.1],
                                  "random_partners": [6.0, 0.0, 0.0]}},
    }  # fmt: skip
    table = section(found).recurrence
    assert table is not None
    assert table.columns == ("in 0 of 2", "in 1 of 2", "in 2 of 2")
    ((heading, rows),) = table.groups
    assert heading == "only chat: 6"
    assert rows[0] == ("found", (("1", ""), ("2", ""), ("3", "")))
    assert rows[1][1][0] == ("5.50", "")


def test_misfits_are_told_where_they_are():
    shape = {"n": int, "x": Maybe(float), "each": Each({"ends": (float, float)}), "names": [str]}
    good = {"n": 1, "x": None, "each": {"a": {"ends": [0, 1.5]}}, "names": ["b"], "more": 3}
    assert misfit(good, shape, "it") is None
    for wrong, told in (
        ({"n": True}, "it.n is True"),
        ({"n": 1.5}, "it.n is 1.5"),
        ({"x": "no"}, "it.x is 'no'"),
        ({"each": []}, "it.each is []"),
        ({"each": {"a": {}}}, "it.each.a lacks ends"),
        ({"each": {"a": {"ends": [1.0]}}}, "it.each.a.ends is [1.0]"),
        ({"names": ["b", 2]}, "it.names is 2"),
    ):
        assert misfit({**good, **wrong}, shape, "it") == told
    assert misfit([], shape, "it") == "it is []"
