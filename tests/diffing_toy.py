"""Two models with a known difference: features of both, of `a` only and of `b` only, in one space.

A row is Σ_j f_j·t_j^m + noise, where each feature j is active on a share `rate` of the tokens,
independently of the others, with f_j uniform in [1, 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from crosslens.coder import Coder, Crosscoder, JumpReLU, Layout
from crosslens.diffing.pair import Pair, pair_of
from crosslens.diffing.stream import Coded
from crosslens.functional.gathers import lists_of_mask

MEAN, MEAN_SQUARE = 1.5, 7 / 3
"""Of f where it is active."""
BLOCK = 32


@dataclass(frozen=True)
class Planted:
    """Features [F, D] in each model, 0 where a model does not have one."""

    a_FD: Tensor
    b_FD: Tensor
    rate_F: Tensor

    @property
    def layout(self) -> Layout:
        width = self.a_FD.shape[1]
        return Layout(("a/resid_post.1", "b/resid_post.1"), (width, width))

    @property
    def table_FY(self) -> Tensor:
        """Both models side by side."""
        return torch.cat([self.a_FD, self.b_FD], -1)

    @property
    def kinds(self) -> list[str]:
        """`only_a`, `only_b` or `shared`, per feature."""
        in_a, in_b = (t.norm(dim=-1) > 0 for t in (self.a_FD, self.b_FD))
        return [
            "shared" if a and b else "only_a" if a else "only_b"
            for a, b in zip(in_a.tolist(), in_b.tolist(), strict=True)
        ]

    def code(self, n: int, random: torch.Generator) -> Tensor:
        """The features of n tokens [n, F]."""
        active = torch.rand(n, len(self.rate_F), generator=random) < self.rate_F
        return active * (1 + torch.rand(active.shape, generator=random))

    def rows(self, code_RF: Tensor, noise: float, random: torch.Generator) -> Tensor:
        """Both models' activations [R, Y]; `noise` per column."""
        clean = code_RF @ self.table_FY
        return clean + noise * torch.randn(clean.shape, generator=random)


def planted(
    n_shared: int,
    n_own: int,
    width: int,
    *,
    rate: float = 0.1,
    same_directions: bool = True,
    seed: int = 0,
) -> Planted:
    """Unit features: shared ones (in the same direction in both models, or not), then those of `a`,
    then those of `b`."""
    random = torch.Generator().manual_seed(seed)
    n = n_shared + 2 * n_own
    a_FD = normalize(torch.randn(n, width, generator=random), dim=-1)
    b_FD = normalize(torch.randn(n, width, generator=random), dim=-1)
    if same_directions:
        b_FD[:n_shared] = a_FD[:n_shared]
    a_FD[n_shared + n_own :] = 0
    b_FD[n_shared : n_shared + n_own] = 0
    return Planted(a_FD, b_FD, torch.full((n,), rate))


def constructed_coder(
    truth: Planted, a_LD: Tensor | None = None, b_LD: Tensor | None = None
) -> Coder:
    """One latent per feature, which reads exactly that feature off rows without noise, and writes
    it, or the decoders given instead. Needs as many columns of both models as there are features.
    """
    decoders = [truth.a_FD if a_LD is None else a_LD, truth.b_FD if b_LD is None else b_LD]
    wiring = Crosscoder()(truth.layout, len(truth.rate_F))
    coder = Coder(wiring, JumpReLU(initial_threshold=0.5)).requires_grad_(False)
    coder.W_enc[0].copy_(torch.linalg.pinv(truth.table_FY).T)
    coder.W_dec[0].copy_(torch.cat(decoders, -1))
    return coder.eval()


def chunk_of(
    coder: Coder, rows_RY: Tensor, code_RL: Tensor | None = None, first_block: int = 0
) -> Coded:
    """Tokens in blocks of `BLOCK`, of a coder that reads what it writes, as `coded` gives them;
    with the code given, or the coder's own."""
    z_RL = coder.encode(rows_RY) if code_RL is None else code_RL
    active_RL = z_RL > 0
    number_R = torch.arange(len(rows_RY))
    return Coded(
        block_R=first_block + number_R // BLOCK,
        position_R=number_R % BLOCK,
        tokens_R=number_R % 7,
        lists=lists_of_mask(active_RL),
        value_E=z_RL[active_RL],
        target_RY=coder.scaled_write(rows_RY),
        recon_RY=coder.scaled_write(coder.decode(z_RL)),
    )


def toy_pair(coder: Coder) -> Pair:
    """`a` and `b` of a coder over them."""
    return pair_of(coder, "a", "b")
