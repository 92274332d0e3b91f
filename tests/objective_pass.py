"""A coder of any wiring with a pass through it in float64, and the same in plain numbers."""

from __future__ import annotations

import math

import torch

from crosslens.coder import (
    Causal,
    Coder,
    Crosscoder,
    Dedicated,
    DesignatedShared,
    JumpReLU,
    Layout,
    Pass,
    Transcoder,
)

PLAIN = Layout(("resid_post.1", "resid_post.2"), (6, 4))
TWO = Layout(("a/resid_post.1", "b/resid_post.1"), (5, 5))
SKIP = Layout(("mlp_in.1", "mlp_out.1"), (6, 4))
WIDE = JumpReLU(initial_threshold=0.4, bandwidth=1.0)
LOG = JumpReLU(form="anthropic", initial_threshold=0.4, bandwidth=1.0)
CASES = {
    "crosscoder": (Crosscoder(), PLAIN),
    "two models": (Crosscoder(), TWO),
    "causal": (Causal(), PLAIN),
    "dedicated": (Dedicated(exclusive=0.25), TWO),
    "tied": (Dedicated(exclusive=0.25, tied_decoders=True), TWO),
    "shared": (DesignatedShared(shared=0.25), TWO),
    "skip": (Transcoder(skip=True), SKIP),
}
N = 12


def a_coder(activation, case: str = "crosscoder", *, center: bool = False) -> Coder:
    """A float64 coder with every parameter random; thresholds as the activation starts them."""
    wiring, layout = CASES[case]
    coder = Coder(wiring(layout, N), activation, center=center)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in coder.named_parameters():
            if name not in ("threshold", "log_threshold"):
                value.normal_(generator=generator).mul_(0.5)
    return coder.double().train()


def a_pass(coder: Coder, *, dead=(), progress=1.0, recon=None, seed=2) -> Pass:
    """As `Coder.train_pass`, in float64, with the reconstruction given if need be."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, coder.wiring.harvest.width, generator=generator).double()
    read, write = coder.wiring.read, coder.wiring.write
    pick = [torch.cat([x[:, coder.wiring.harvest.slice(s)] for s in part.sites], -1)
            for part in (read, write)]  # fmt: skip
    coder.progress = progress
    pre = coder.preactivations(pick[0])
    z = coder.activate(pre)
    skipped = coder.skip(pick[0])
    if recon is None:
        recon = coder.decode_scaled(z) + coder.b_dec + (0 if skipped is None else skipped)
    dead_L = torch.zeros(N, dtype=torch.bool)
    dead_L[list(dead)] = True
    return Pass(pick[1], recon, pre, z, coder, skipped, dead_L, progress)


class Plain:
    """A pass in plain numbers, and the decoder as a dense table [L][Y] with zeros."""

    def __init__(self, shown: Pass) -> None:
        coder, write = shown.coder, shown.coder.wiring.write
        self.target, self.recon = shown.target_BY.tolist(), shown.recon_BY.tolist()
        self.pre, self.z = shown.pre_BL.tolist(), shown.code.tolist()
        self.bias, self.slices = coder.b_dec.tolist(), write.slices
        self.skip = [[0.0] * write.width] * 7
        if shown.skipped_BY is not None:
            self.skip = shown.skipped_BY.tolist()
        self.decoder = []
        for group, weight in zip(coder.wiring.groups, coder.W_dec, strict=True):
            columns = write.columns(group.writes).tolist()
            for stored in weight.tolist():
                row = [0.0] * write.width
                for place, value in zip(columns, stored * group.copies, strict=True):
                    row[place] = value
                self.decoder.append(row)

    def norms(self, kind: str) -> list[float]:
        sites = [[math.sqrt(sum(v * v for v in row[s])) for s in self.slices]
                 for row in self.decoder]  # fmt: skip
        if kind == "sum":
            return [sum(each) for each in sites]
        return [math.sqrt(sum(n * n for n in each)) for each in sites]

    def decoded(self, code: list[list[float]], *, fixed: bool = True) -> list[list[float]]:
        out = []
        for b, row in enumerate(code):
            base = [v + s for v, s in zip(self.bias, self.skip[b], strict=True)]
            out.append([
                (base[y] if fixed else 0.0) + sum(row[i] * self.decoder[i][y] for i in range(N))
                for y in range(len(self.bias))
            ])  # fmt: skip
        return out

    def error(self, recon: list[list[float]]) -> float:
        return sum((t - r) ** 2 for a, b in zip(self.target, recon, strict=True)
                   for t, r in zip(a, b, strict=True)) / 7  # fmt: skip

    @property
    def variance(self) -> float:
        width = len(self.bias)
        mean = [sum(row[y] for row in self.target) / 7 for y in range(width)]
        return self.error([mean] * 7)

    def total(self, function) -> float:
        return sum(function(b, i) for b in range(7) for i in range(N)) / 7


def read_off(activation, case, **settings):
    coder = a_coder(activation, case).requires_grad_(False)
    shown = a_pass(coder, **settings)
    return shown, Plain(shown)
