"""What a coder's latents do at the MLP that reads them, each alone and some left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crosslens.activations import Source
from crosslens.coder import Coder
from crosslens.functional.blocks import split_rows
from crosslens.functional.gathers import Lists, lists_of_mask
from crosslens.functional.interaction_penalty import Active, Neurons, dominance, interaction_share
from crosslens.functional.interactions import activation
from crosslens.interactions.neurons.contributions import Effective, effective
from crosslens.lm import LanguageModel, next_token_loss
from crosslens.training.readers import Reader

KEPT = (1, 4)
"""How many contributions to a neuron are kept, or dropped."""
AT_ONCE = 16
"""Tokens whose contributions are held at once."""
ROWS = 1024
"""Held-out rows on which shares are measured."""


@torch.no_grad()
def shares(coder: Coder, reader: Reader, rows_RD: Tensor) -> dict[str, float]:
    """Share of the largest contribution, interaction, and sizes, on rows of the site, raw.

    `share_largest` is the mean over tokens and pre-activations of max|y| / Σ|y|; `size` that of
    Σ|y|; `interaction_share` what the penalty's exact form is, over all neurons.
    """
    (neurons,) = reader.blocks
    active = _active(coder, reader.site, rows_RD.float(), neurons)
    size_TW, largest_TW = dominance(active, neurons)
    found = size_TW > 0
    return {
        "share_largest": float((largest_TW[found] / size_TW[found]).mean()),
        "size": float(size_TW.mean()),
        "interaction_share": float(interaction_share(active, neurons)),
        "decoder_norm": float(coder.decoder_norms().mean()),
    }


def _active(coder: Coder, site: str, rows_RD: Tensor, neurons: Neurons) -> Active:
    """Of a coder of this one site, an MLP's input, so that no norm comes between."""
    z_RL = coder.encode(rows_RD).float()
    (W_LD,), scale = coder.W_dec, coder.scale_write[coder.wiring.write.index(site)]
    bias_D = coder.unscaled_write(coder.b_dec[None])[0]
    always_W = bias_D @ neurons.through_DW + neurons.fixed_W
    lists = lists_of_mask(z_RL > 0)
    return Active(
        decoder_UD=W_LD.detach() / scale,
        lists=lists,
        strength_E=z_RL[lists.items_N, lists.index_N.long()],
        always_TW=always_W.expand(len(z_RL), -1),
    )


@dataclass(frozen=True)
class Bed:
    """Held-out text in a model, one MLP of which is replaced."""

    source: Source
    """Over the MLP's input."""
    model: LanguageModel
    tokens: int

    @property
    def site(self) -> str:
        return self.source.layout.sites[0]

    @property
    def layer(self) -> int:
        return int(self.site.partition(".")[2])

    @cached_property
    def chunks(self) -> list[_Known]:
        """What the model does when it is left alone."""
        wanted = max(1, round(self.tokens / self.source.rows_per_chunk))
        return [self._known(index) for index in range(min(wanted, self.source.n_chunks))]

    @torch.no_grad()
    def _known(self, index: int) -> _Known:
        own = self.source.blocks.some(self.source.block_range(index))
        start = f"resid_pre.{self.layer}"
        seen = self.model.capture(own.tokens_NT, [self.site, start, "logits"])
        keep_BT, _ = self.source.keep(index, [seen[self.site]])
        loss_BT = next_token_loss(seen["logits"], own.tokens_NT)
        return _Known(
            tokens_BT=own.tokens_NT,
            real_BT=~own.padding_NT[:, 1:],
            keep_BT=keep_BT,
            rows_RD=seen[self.site][keep_BT].float(),
            entering={start: seen[start]},
            loss_BT=loss_BT,
        )

    def loss(self, outputs: Mapping[int, Tensor] | None) -> float:
        """Nats per token with the MLP's output [R, D] at the tokens that count replaced, chunk by
        chunk; the model's own where there is none."""
        total = count = 0.0
        for index, known in enumerate(self.chunks):
            loss_BT = known.loss_BT if outputs is None else self._spliced(known, outputs[index])
            total += float(loss_BT[known.real_BT].double().sum())
            count += float(known.real_BT.sum())
        return total / count

    @torch.no_grad()
    def _spliced(self, known: _Known, out_RD: Tensor) -> Tensor:
        def put(old_BTD: Tensor) -> Tensor:
            old_BTD[known.keep_BT] = out_RD.to(old_BTD.dtype)
            return old_BTD

        edits: dict[str, Callable[[Tensor], Tensor]] = {f"mlp_out.{self.layer}": put}
        logits_BTV = self.model.run(known.tokens_BT, edits, known.entering)
        return next_token_loss(logits_BTV, known.tokens_BT)

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The model's own loss, and that with zeros in the place of the MLP's output."""
        zeros = {i: torch.zeros_like(known.rows_RD) for i, known in enumerate(self.chunks)}
        return self.loss(None), self.loss(zeros)


@dataclass(frozen=True, eq=False)
class _Known:
    tokens_BT: Tensor
    real_BT: Tensor
    """Predictions of a token, not of padding."""
    keep_BT: Tensor
    """Tokens that count."""
    rows_RD: Tensor
    """What goes into the MLP there."""
    entering: dict[str, Tensor]
    loss_BT: Tensor


@torch.no_grad()
def fidelity(coder: Coder, bed: Bed) -> dict[str, float]:
    """Φ = 1 − (L − L_model)/(L_zero − L_model) for each way of making the MLP's pre-activations of
    the latents' contributions to each."""
    one = effective(coder, bed.model, bed.site)
    made: dict[str, dict[int, Tensor]] = {}
    for index, known in enumerate(bed.chunks):
        generator = torch.Generator().manual_seed(index)
        z_RL = coder.eval().encode(known.rows_RD).float()
        parts = [_outputs(part, one, generator) for part in split_rows(z_RL, AT_ONCE)]
        for name in parts[0]:
            made.setdefault(name, {})[index] = torch.cat([part[name] for part in parts])
    own, zero = bed.ends
    return {name: 1 - (bed.loss(out) - own) / (zero - own) for name, out in made.items()}


def _outputs(z_RL: Tensor, one: Effective, generator: torch.Generator) -> dict[str, Tensor]:
    """What the MLP gives [R, D], by what is left of the contributions to each pre-activation."""
    branches = [branch for branch in (one.value, one.gate) if branch is not None]
    E_LW = torch.cat([branch.E_LN for branch in branches], -1)
    always_W = torch.cat([branch.moving_N + branch.fixed_N for branch in branches])
    y_RWK, some_RK = _contributions(z_RL, E_LW)
    total_RW = y_RWK.sum(-1)
    left = {"full": total_RW}
    for how, sums in (
        ("largest", _largest(y_RWK, y_RWK.abs())),
        ("random", _largest(y_RWK, _drawn(y_RWK, some_RK, generator))),
    ):
        for k in KEPT:
            kept_RW = sums[..., min(k, sums.shape[-1]) - 1]
            left[f"keep {how} {k}"] = kept_RW
            left[f"drop {how} {k}"] = total_RW - kept_RW
    return {name: _through(one, kept_RW + always_W) for name, kept_RW in left.items()}


def _contributions(z_RL: Tensor, E_LW: Tensor) -> tuple[Tensor, Tensor]:
    """y [R, W, K], zeros behind those of tokens with fewer active latents; and which are any."""
    lists: Lists = lists_of_mask(z_RL > 0)
    width = max(1, int(lists.counts_I.max()))
    place_E = torch.arange(len(lists.index_N)) - lists.starts_I[:-1][lists.items_N]
    index_RK = torch.zeros(len(z_RL), width, dtype=torch.int64)
    some_RK = torch.zeros(len(z_RL), width, dtype=torch.bool)
    index_RK[lists.items_N, place_E] = lists.index_N.long()
    some_RK[lists.items_N, place_E] = True
    strength_RK = z_RL.gather(1, index_RK) * some_RK
    return (strength_RK[..., None] * E_LW[index_RK]).mT.contiguous(), some_RK


def _drawn(y_RWK: Tensor, some_RK: Tensor, generator: torch.Generator) -> Tensor:
    """Keys whose largest are a random choice among the contributions, for each neuron anew."""
    return torch.rand(y_RWK.shape, generator=generator).masked_fill(~some_RK[:, None], -1.0)


def _largest(y_RWK: Tensor, key_RWK: Tensor) -> Tensor:
    """Sums of the 1, 2, … contributions with the largest keys [R, W, most]."""
    most = min(max(KEPT), y_RWK.shape[-1])
    return y_RWK.gather(-1, key_RWK.topk(most).indices).cumsum(-1)


def _through(one: Effective, pre_RW: Tensor) -> Tensor:
    """From pre-activations to the MLP's output."""
    mlp, n = one.mlp, len(one.out_norm_N)
    phi, value_RN, gate_RN = activation(mlp.kind), pre_RW[:, :n], pre_RW[:, n:]
    hidden_RN = phi(value_RN) if mlp.W_gate_ND is None else value_RN * phi(gate_RN)
    return torch.nn.functional.linear(hidden_RN, mlp.W_out_DN, mlp.b_out_D)
