"""What layer-local bounds are beside: the same quantities in plain float64, straight from their
definition and through the MLP's own matrices, latent by latent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from crosslens.functional.interactions import activation
from crosslens.proofs.local_certificate import block_of

SURROGATES = ("additive", "given bias", "linear", "dominance", "nothing")
_AT_ONCE = 8


class Truth:
    """One MLP in plain float64."""

    def __init__(self, weights: Mapping[str, Tensor], coder: Mapping[str, Tensor]) -> None:
        self.block = block_of(weights)
        self.coder = {k: v if v.dtype == torch.int64 else v.double() for k, v in coder.items()}
        self.phi = activation(self.block.kind)

    def decoded(self) -> Tensor:
        """x̂ [R, D]."""
        return torch.cat([self._rows(at).sum(1) for at in self._pieces()])

    def output(self, x_RD: Tensor) -> Tensor:
        """f(x) [R, D]."""
        return self.hidden(*self.arguments(x_RD)) @ self.block.out_ND + self.block.b_out_D

    def arguments(self, x_RD: Tensor) -> tuple[Tensor, Tensor | None]:
        """What φ takes, and what multiplies it, at each neuron [R, N]."""
        return self._neurons(x_RD, self._scalar(x_RD), constant=True)

    def hidden(self, gate: Tensor, value: Tensor | None) -> Tensor:
        """φ(g), or u φ(g)."""
        found: Tensor = self.phi(gate)
        return found if value is None else found * value

    def surrogates(self) -> dict[str, Tensor]:
        """Name → surrogate of f(x̂) [R, D]."""
        found: dict[str, list[Tensor]] = {name: [] for name in SURROGATES}
        for at in self._pieces():
            rows_RKD = self._rows(at)
            scalar = self._scalar(rows_RKD.sum(1))[:, None]
            gate, value = self._neurons(rows_RKD[:, :-1], scalar, constant=False)
            own = self._neurons(rows_RKD[:, -1:], scalar, constant=True)
            gate = torch.cat([gate, own[0]], 1)
            value = None if value is None or own[1] is None else torch.cat([value, own[1]], 1)
            for name in SURROGATES:
                hidden = self._surrogate(name, gate, value)
                found[name].append(hidden @ self.block.out_ND + self.block.b_out_D)
        return {name: torch.cat(each) for name, each in found.items()}

    def _pieces(self) -> list[slice]:
        rows = len(self.coder["index"])
        return [slice(start, start + _AT_ONCE) for start in range(0, rows, _AT_ONCE)]

    def _rows(self, at: slice) -> Tensor:
        """a_i d_i of each latent, and last the bias [R, K + 1, D]."""
        index, strength = self.coder["index"][at], self.coder["strength"][at]
        rows = strength[..., None] * self.coder["decoder"][index]
        return torch.cat([rows, self.coder["bias"].expand(len(rows), 1, -1)], 1)

    def _centred(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.block.norm == "layer" else x

    def _scalar(self, x_RD: Tensor) -> Tensor:
        if self.block.norm == "none":
            return torch.ones_like(x_RD[..., :1])
        return (self._centred(x_RD).square().mean(-1, keepdim=True) + self.block.floor).rsqrt()

    def _neurons(self, x: Tensor, scalar: Tensor, constant: bool) -> tuple[Tensor, Tensor | None]:
        """What rows bring to the neurons, with all that does not depend on them if `constant`."""
        block = self.block
        rows = x if block.norm == "none" else self._centred(x) * scalar * block.gain_D
        rows = rows + block.shift_D if constant else rows
        gate = rows @ block.gate_DN
        value = None if block.value_DN is None else rows @ block.value_DN
        if not constant:
            return gate, value
        if value is None or block.b_value_N is None:
            return gate + block.b_gate_N, None
        return gate + block.b_gate_N, value + block.b_value_N

    def _surrogate(self, name: str, gate: Tensor, value: Tensor | None) -> Tensor:
        match name:
            case "additive":
                return self.hidden(gate, value).sum(1)
            case "given bias":
                last = None if value is None else value[:, -1:]
                alone = self.hidden(gate[:, -1:], last)
                both = self.hidden(
                    gate[:, :-1] + gate[:, -1:],
                    None if value is None or last is None else value[:, :-1] + last,
                )
                return alone[:, 0] + (both - alone).sum(1)
            case "linear":
                constant, of_value, of_gate = self.coder["affine"]
                found: Tensor = constant + of_gate * gate.sum(1)
                return found if value is None else found + of_value * value.sum(1)
            case "dominance":
                size = gate.abs() if value is None else (gate * value).abs()
                at = size.argmax(1, keepdim=True)
                picked = None if value is None else value.gather(1, at)
                return self.hidden(gate.gather(1, at), picked)[:, 0]
        return torch.zeros_like(gate[:, 0])
