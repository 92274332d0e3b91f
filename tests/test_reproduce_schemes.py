"""The comparison of schemes, with everything small: all of it runs, and what is done stays done."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from crosslens.activations import calibrate
from crosslens.coder import load
from crosslens.recipes import RECIPES
from reproduce import schemes
from reproduce.scheme_judging import baseline
from reproduce.scheme_page import NOTES
from reproduce.scheme_rows import Batches, scheme_source
from reproduce.scheme_table import SCHEMES, Sizes, config_of, with_weight
from reproduce.scheme_training import Rows, start, train

SMALL = {
    "tokens": 3000, "heldout": 600, "splice-tokens": 128, "latents": 96, "l0": 4, "steps": 12,
    "batch": 128, "dtype": "float32", "model-dtype": "float32", "finetune-steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("schemes")
    words = ["--model", str(tiny_model_folder)]
    words += ["--work", str(folder / "work"), "--out", str(folder / "out")]
    return words + [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def bench(arguments):
    return schemes.prepare(schemes._parser().parse_args(arguments))


@pytest.fixture(scope="module")
def page(arguments, bench):
    schemes.main(arguments)
    asked = schemes._parser().parse_args(arguments)
    return asked.out / "schemes.md", json.loads((asked.out / "schemes.json").read_text())


def test_every_recipe_is_a_scheme():
    """But those with an interaction penalty, whose comparison is `reproduce.interactions_paper`."""
    penalised = {name for name, made in RECIPES.items() if made().objective.interaction.weight}
    assert penalised == {"interaction_exact", "interaction_paper"}
    assert set(SCHEMES) == set(RECIPES) - penalised


def test_every_scheme_has_its_figures(page):
    file, saved = page
    text = file.read_text()
    assert [r["name"] for r in saved["schemes"]] == list(SCHEMES)
    for result in saved["schemes"]:
        assert "diverged" not in result, result["name"]
        assert f"`{result['name']}`" in text
        assert 0 < result["fvu"] < 3
        assert 0 <= result["dead"] <= 1
        assert result["l0"] > 0
        assert result["heldout_rows"] > 500
        assert 0 <= result["baseline"]["fvu"] < 1.2
        assert set(result["splice"]) <= set(result["fvu_by_site"]) | set(result["sites"])
    assert "python -m reproduce.schemes --model" in text
    assert "/schemes.md" not in saved["facts"]["command"], "where it was written is nobody's matter"


def test_no_two_schemes_had_other_tokens(bench):
    seen = set()
    for name in SCHEMES:
        rows = Rows(bench.harvest, schemes._sites(name, bench.sizes), SCHEMES[name].two_models)
        batches = rows.batches(config_of(name, bench.sizes))
        batches.next(lambda: None)
        seen.add(tuple(batches.order.tolist()))
    assert len(seen) == 1


def test_batches_use_each_row_once_before_any_twice(bench):
    sites = ("base/resid_mid.2",)
    batches = Batches(bench.harvest, sites, 100, seed=0)
    (span,) = bench.harvest.columns(sites)
    rows = bench.harvest.rows("train")[:, span]
    n = len(rows) // 100
    got = torch.cat([batches.next(lambda: None) for _ in range(n)])
    assert len(got.unique(dim=0)) == pytest.approx(len(rows[: 100 * n].unique(dim=0)), rel=0.02)


def test_harvested_rows_are_the_models_activations(bench):
    blocks, layout = bench.harvest.blocks("heldout"), bench.harvest.layout
    tokens = blocks.tokens_NT[:2]
    rows = bench.harvest.rows("heldout").float()
    for name, model in bench.models.items():
        for site in (s for s in layout.sites if s.startswith(name)):
            x = model.capture(tokens, [site.partition("/")[2]])[site.partition("/")[2]]
            want = x[:, 1:].flatten(0, 1)[:50]
            torch.testing.assert_close(rows[:50, layout.slice(site)], want, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("name", ["topk_sae", "clt_topk", "diff_sae", "layer_conditioned_sae"])
def test_scales_are_those_of_calibrate(name, bench):
    scheme, config = SCHEMES[name], config_of(name, bench.sizes)
    rows = Rows(bench.harvest, schemes._sites(name, bench.sizes), scheme.two_models)
    coder = start(config, rows).coder
    source = scheme_source(bench.models, bench.harvest, rows.sites, scheme.two_models)
    source = replace(source, blocks=bench.harvest.blocks("train"))
    found, _ = calibrate(source, coder.wiring, 10**6, config.coder.scale)
    assert coder.scale_read.tolist() == pytest.approx(found.read_scale, rel=0.01)
    assert coder.scale_write.tolist() == pytest.approx(found.write_scale, rel=0.01)


def test_done_stays_done_and_notes_are_kept(page, arguments, capsys):
    file, _ = page
    file.write_text(file.read_text().partition(NOTES)[0] + f"{NOTES}\n\nNothing did.\n")
    schemes.main([*arguments, "--only", "topk_sae", "gated_sae"])
    assert capsys.readouterr().out.count("done before") == 2
    assert file.read_text().endswith("Nothing did.\n")
    assert file.read_text().count("`topk_sae`") == 1


def test_the_next_weight_goes_outwards_then_between():
    from reproduce.scheme_training import next_weight

    assert next_weight([(1.0, 500.0)], 32) > 1
    assert next_weight([(1.0, 3.0)], 32) < 1
    # L0 = 3200 / weight: two points on either side, and the line through them is exact.
    assert next_weight([(10.0, 320.0), (1000.0, 3.2), (1.0, 3200.0)], 32) == pytest.approx(100)
    assert 1 < next_weight([(1.0, 100.0), (2.0, 0.0)], 32) < 2


def test_the_search_comes_near_the_l0_that_is_asked_for(bench):
    """Longer than the others, so that a penalty can act."""
    from reproduce.scheme_training import TRIALS, heldout_l0, matched

    sizes = replace(bench.sizes, steps=60, l0=8)
    rows = Rows(bench.harvest, schemes._sites("l1_crosscoder", sizes), False)
    config = config_of("l1_crosscoder", sizes)
    tried = matched(config, rows, "l1", 8)
    assert len(tried) <= TRIALS
    best = tried[-1]
    assert 4 < best.l0 < 16
    assert all(abs(math.log(best.l0 / 8)) <= abs(math.log(each.l0 / 8)) for each in tried)
    again = train(with_weight(config, "l1", best.weight), rows)
    assert heldout_l0(again.coder, rows) == pytest.approx(best.l0)


def test_the_baseline_is_principal_components(bench, page, arguments):
    rows = Rows(bench.harvest, schemes._sites("topk_sae", bench.sizes), False)
    coder = load(bench.work / "schemes" / "topk_sae" / "coder")
    x, y = rows.sample().double(), rows.heldout().double()
    _, _, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    left = y - x.mean(0)
    left = left - left @ V[:4].T @ V[:4]
    want = left.square().sum() / (y - y.mean(0)).square().sum()
    assert baseline(coder, rows, 4)["fvu"] == pytest.approx(float(want), rel=1e-3)


def test_recipes_keep_what_they_are():
    sizes = Sizes(latents=96, l0=4, steps=12, batch=64, layers=(0, 1, 2))
    for name in SCHEMES:
        recipe, config = RECIPES[name](), config_of(name, sizes)
        assert config.wiring == recipe.wiring
        assert type(config.coder.activation) is type(recipe.coder.activation)
        assert type(config.optimizer) is type(recipe.optimizer)
        on = [dict(each.objective.active()).keys() for each in (recipe, config)]
        assert on[0] == on[1]
