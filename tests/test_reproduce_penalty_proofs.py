"""The sweep of penalties against proofs, with everything small; its sums against loops."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from crosslens.errors import UsageError
from crosslens.proofs.ladder import small_lm_search as search
from crosslens.proofs.ladder.small_lm import CoderPlan, SmallLM, data, forward, train
from crosslens.proofs.ladder.small_lm_coder import train_coder
from reproduce import penalty_proofs
from reproduce.penalty_proofs_judging import Bench, decoded_losses, gathered
from reproduce.penalty_proofs_page import NOTES
from reproduce.penalty_proofs_points import EXACT, points
from reproduce.penalty_proofs_summary import at_same, flat, summary
from tests.proofs_small_lm import TINY, text_of

SMALL = {
    "vocabulary": 300, "length": 6, "width": 16, "heads": 2, "neurons": 24, "sequences": 60,
    "steps": 40, "features": 24, "active": 4, "coder-steps": 20, "coder-rows": 128, "seeds": 1,
    "local-rows": 50,
}  # fmt: skip
ONLY = ["none-0-k4-seed0", "none-0-k2-seed0", "exact-0.3-k4-seed0"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("penalty_proofs")
    words = ["--work", str(folder / "work"), "--out", str(folder / "out"), "--only", *ONLY]
    return words + [part for key, value in SMALL.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def page(arguments):
    """The command's, on a text of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(penalty_proofs, "read_text", lambda config: text_of(config.vocabulary))
        penalty_proofs.main(arguments)
    out = penalty_proofs._parser().parse_args(arguments).out
    return out / "penalty_proofs.md", json.loads((out / "penalty_proofs.json").read_text())


def test_every_point_has_its_figures(page):
    file, saved = page
    assert [point["family"] for point in saved["points"]] == ["none", "none", "exact"]
    for point in saved["points"]:
        assert 0 < point["fvu"] < 3
        assert 0 < point["interaction"] < 1
        for share, found in point["budgets"].items():
            assert found["checked"]
            assert found["flops"] <= float(share)
            assert found["bound"] >= saved["facts"]["loss"]
        assert point["recursion"]["additive"]["checked"]
        assert point["recursion"]["codes"]["terms"]["interaction"] == 0
        for tier in point["local"]["tiers"].values():
            assert tier["ratio"] >= tier["true"] * (1 - 1e-6)
        decoded = point["decoded"]
        assert decoded["true"] <= decoded["additive/exact"] <= decoded["additive/neurons"]
    text = file.read_text()
    assert f"Unfinished: {len(ONLY)} of {len(points(4, (0,)))} crosscoders" in text
    assert "accepted: 18 of 18" in text
    assert NOTES in text
    drawn = (file.parent / "penalty_proofs.svg").is_file()
    assert drawn is (find_spec("matplotlib") is not None)


def test_done_stays_done_and_notes_are_kept(page, arguments, capsys):
    file, _ = page
    file.write_text(file.read_text().partition(NOTES)[0] + f"{NOTES}\n\nNothing did.\n")
    penalty_proofs.main(arguments)
    assert capsys.readouterr().out.count("done before") == len(ONLY)
    assert file.read_text().endswith("Nothing did.\n")


def test_an_unknown_point_is_refused(arguments):
    with pytest.raises(UsageError, match=r"exact-31-k4-seed0.*Did you mean exact-"):
        penalty_proofs.main([*arguments, "--only", "exact-31-k4-seed0"])


def test_the_sweep_is_as_large_as_was_asked_for():
    found = points(8, (0, 1, 2))
    assert len({point.name for point in found}) == len(found)
    assert len(EXACT) + 1 >= 6
    assert {point.seed for point in found if point.family == "exact"} == {0, 1, 2}
    one = next(p for p in found if p.family == "paper").config(SmallLM())
    assert (one.coder.form, one.coder.bias, one.coder.active) == ("paper", "mean", 8)
    learnt = next(p for p in found if p.family == "learnt").config(SmallLM())
    assert learnt.coder == CoderPlan(), "without a weight it is the coder of `prove small-lm`"


def test_the_match_lies_on_the_line_between():
    ladder = [
        {"fvu_last": 0.4, "fvu_mid": 0.9, "loss 0.2": 30.0, "interaction": 0.1},
        {"fvu_last": 0.2, "fvu_mid": 0.5, "loss 0.2": 20.0, "interaction": 0.5},
    ]
    own = {"fvu_last": 0.25, "fvu_mid": 0.8, "loss 0.2": 1.0, "interaction": 0.0}
    assert at_same(ladder, "loss 0.2", own) == pytest.approx(22.5)
    assert at_same(ladder, "interaction", own) == pytest.approx(0.2)
    assert at_same(ladder, "loss 0.2", {**own, "fvu_last": 0.1}) is None


def test_matches_are_made_seed_by_seed(page):
    point = page[1]["points"][0]
    results = []
    for seed, shift in ((0, 0.0), (1, 5.0)):
        for family, fvu, bound in (("none", 0.1, 1.0), ("none", 0.3, 3.0), ("exact", 0.2, 1.5)):
            own = {
                **point,
                "family": family,
                "seed": seed,
                "fvu_last": fvu,
                "active": int(10 * fvu),
            }
            own["budgets"] = {"0.2": {"bound": bound + shift * (1 + seed)}}
            results.append(own)
    *_, last = summary(results)
    assert last["family"] == "exact"
    assert last["figures"]["loss 0.2"]["mean"] == pytest.approx(6.5)
    want = {"mean": -0.5, "sd": 0.0, "seeds": 2}
    assert last["matched"]["loss 0.2"] == pytest.approx(want, abs=1e-12)
    assert set(flat(point)) >= {"loss 0.2", "regions 16", "true linear/exact", "whole additive"}


def test_the_decoded_models_loss_is_the_model_with_its_rows_put_in():
    """And no output within the bound does worse than what is said."""
    config = replace(TINY, seed=4)
    text = text_of(config.vocabulary)
    weights = train(config, text, lambda _: None)
    given = data(config, text)
    bench = Bench(config, text, weights, given, search.truth(weights, given), 30)
    site = gathered(train_coder(config, weights, text, lambda _: None), bench)
    found = decoded_losses(site, bench)
    rows = (site.coder["strength"][..., None] * site.coder["decoder"][site.coder["index"]]).sum(1)
    x_RD = rows + site.coder["bias"]
    hidden = (_normal(x_RD) @ weights["W_in"][0].double()).relu()
    logits = _normal(x_RD + hidden @ weights["W_out"][0].double()) @ weights["W_U"].double()
    label_R = given["labels"].flatten()[:30]
    loss = float(torch.nn.functional.cross_entropy(logits, label_R))
    assert found["true"] == pytest.approx(loss, rel=1e-9)
    assert loss < found["additive/exact"] <= found["additive/neurons"]
    assert forward(weights, given["tokens"])[1][1].flatten(0, 1)[:30] == pytest.approx(
        site.x_RD.float(), abs=1e-5
    )


def _normal(x_RD: torch.Tensor) -> torch.Tensor:
    return x_RD / (x_RD.square().mean(-1, keepdim=True) + 2.0**-17).sqrt()
