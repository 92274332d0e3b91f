"""A pair whose joint effect is known in closed form: a neuron that is the AND of two latents."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers as hf

from crosslens.coder import Coder, Crosscoder, Layout, ReLU
from crosslens.interactions.effects.measure import EffectPlan, Effects, effects
from crosslens.interactions.pairs.table import Triplets
from crosslens.lm.model import LanguageModel
from crosslens.text import Blocks
from tests.interactions_effects_toy import T, many_blocks, mean, source_of, table_of
from tests.test_lm_families import VOCABULARY, wrapped

C0 = (1.0, 1.0, -1.0, -1.0)
WORDS = {3: C0, 4: (1.0, 0.0, -1.0, 0.0), 5: (0.0, 1.0, 0.0, -1.0), 6: (0.0, 0.0, 1.0, -1.0)}
THRESHOLD, GAIN = 5.0, 0.7


def and_model() -> LanguageModel:
    """One neuron is open where both of the first two coordinates of the normed row are on: alone
    they reach 4 at most, together 5.66, and it opens at 5. Attention writes nothing."""
    config = hf.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_act="relu",
        use_parallel_residual=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(5)
    module = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        embedding = module.gpt_neox.embed_in.weight
        for word, row in WORDS.items():
            embedding[word] = 0.0
            embedding[word, :4] = torch.tensor(row)
        for number, layer in enumerate(module.gpt_neox.layers):
            layer.attention.dense.weight.zero_()
            layer.mlp.dense_h_to_4h.weight[:, :4] = 0.0
            layer.mlp.dense_4h_to_h.weight.normal_()
            if number == 1:
                layer.mlp.dense_h_to_4h.weight[0] = 0.0
                layer.mlp.dense_h_to_4h.weight[0, :2] = 1.0
                layer.mlp.dense_h_to_4h.bias[0] = -THRESHOLD
                layer.mlp.dense_4h_to_h.weight[:, 0] *= GAIN
        module.get_output_embeddings().weight.normal_()
    return wrapped(module.requires_grad_(False))


def and_coder(layout: Layout) -> Coder:
    """Latents: how far the first two coordinates, and the next two turned round, are above ½."""
    coder = Coder(Crosscoder()(layout, 4), ReLU())
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0])
    with torch.no_grad():
        coder.W_enc[0].copy_(torch.eye(layout.width)[:4] * sign[:, None])
        coder.W_dec[0].copy_(torch.eye(layout.width)[:4] * sign[:, None])
        coder.b_enc.fill_(-0.5)  # a coordinate of 0 may be rounded to something above it
    return coder.eval().requires_grad_(False)


def words(n: int = 8) -> Blocks:
    blocks = many_blocks(n)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 7, (n, T), generator=generator, dtype=torch.int32)
    tokens[:, 0] = 1
    return replace(blocks, tokens_NT=tokens)


@cache
def planted() -> tuple[Effects, Triplets]:
    model = and_model()
    source = source_of(model, "mlp_in.1", blocks=words())
    coder = and_coder(source.layout)
    table = table_of(source, coder, model)
    plan = EffectPlan(pairs=6, tokens=500, blocks=50, least=2)
    return effects(source, coder, model, table, plan), table


def test_an_and_of_two_latents_has_the_effect_that_is_known():
    """Without either latent the neuron is closed, so Δ_i = Δ_j = Δ_ij = L(closed) − L(open), and
    the interaction is −Δ. The norm before the MLP makes the row's 1 into √8, so the neuron gives
    2√8 − 5, and L follows from the final norm and the head by hand."""
    model, blocks = and_model(), words()
    columns = planted()[0].columns()
    (c,) = ((columns["i"] == 0) & (columns["j"] == 1)).nonzero()[0]
    row = torch.zeros(32, dtype=torch.float64)
    row[:4] = torch.tensor(C0)
    variance = float(row.square().mean())
    on = 1 / (variance + 1e-5) ** 0.5
    out = model.module.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[:, 0].double()
    head = model.module.get_output_embeddings().weight.double()

    def loss(h: float, word: int) -> float:
        x = row + h * out
        x = x - x.mean()
        x = x / (x.square().mean() + 1e-5).sqrt()
        return -float((head @ x).log_softmax(-1)[word])

    deltas = []
    for n in range(len(blocks.tokens_NT)):
        for t in range(1, T - 1):
            told = int(blocks.docs_NT[n, t]) >= 0 and int(blocks.docs_NT[n, t + 1]) >= 0
            if told and int(blocks.tokens_NT[n, t]) == 3:
                word = int(blocks.tokens_NT[n, t + 1])
                deltas.append(loss(0.0, word) - loss(2 * on - THRESHOLD, word))
    assert columns["tokens"][c] == len(deltas) > 10
    for name in ("delta_loss_i", "delta_loss_j", "delta_loss_ij"):
        assert columns[name][c] == pytest.approx(mean(deltas), rel=1e-4)
    assert columns["interaction"][c] == pytest.approx(-mean(deltas), rel=1e-4)
    assert columns["interaction_abs"][c] == pytest.approx(mean([abs(d) for d in deltas]), rel=1e-4)
    assert columns["kl_interaction"][c] == pytest.approx(-columns["kl_i"][c], rel=1e-4)
    assert columns["kl_from_additive"][c] > 1e-3
    assert abs(columns["later_interaction_abs"][c]) < 1e-5, "nothing goes from token to token"


def test_latents_that_meet_in_no_neuron_do_not_interact():
    columns = planted()[0].columns()
    others = ~((columns["i"] == 0) & (columns["j"] == 1))
    assert others.sum() >= 3
    assert (np.abs(columns["interaction_abs"][others]) < 1e-5).all()
    (c,) = ((columns["i"] == 2) & (columns["j"] == 3)).nonzero()[0]
    assert abs(columns["delta_loss_ij"][c]) < 1e-5
    (c,) = ((columns["i"] == 0) & (columns["j"] == 2)).nonzero()[0]
    assert columns["delta_loss_i"][c] == pytest.approx(columns["delta_loss_ij"][c], abs=1e-5)
