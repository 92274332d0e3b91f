"""Losses computed a few positions at a time are those of all at once."""

from __future__ import annotations

import pytest
import torch

from crosslens.evaluation import kl_divergence
from crosslens.lm import losses, next_token_loss


@pytest.mark.parametrize("positions", [1, 2, 5, 100])
def test_pieces_make_no_difference(monkeypatch, positions):
    generator = torch.Generator().manual_seed(0)
    p, q = 3 * torch.randn(2, 3, 11, 50, generator=generator)
    tokens = torch.randint(50, (3, 11), generator=generator)
    monkeypatch.setattr(losses, "_CACHED", positions * 4 * 50)
    nll = -p.log_softmax(-1).gather(-1, tokens.roll(-1, 1)[..., None])[:, :-1, 0]
    torch.testing.assert_close(next_token_loss(p, tokens), nll)
    kl = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(kl_divergence(p, q), kl)
    sizes = [len(piece) for piece, _ in losses.pieces(p[0], tokens[0])]
    assert sum(sizes) == 11
    assert max(sizes) == min(positions, 11)


def test_a_single_token_has_no_next():
    assert next_token_loss(torch.zeros(2, 1, 7), torch.zeros(2, 1, dtype=torch.int64)).shape == (
        2,
        0,
    )
