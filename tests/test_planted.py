"""Structure that is put into synthetic rows is found again: shared and exclusive latents of two
models, a two-layer map, and which layers a cross-layer latent writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from crosslens.coder import (
    BatchTopK,
    Coder,
    Crosscoder,
    CrossLayer,
    Dedicated,
    DesignatedShared,
    Layout,
    ReLU,
    Transcoder,
    WiringConfig,
    transpose_init,
)
from crosslens.training import (
    Adam,
    AuxK,
    CoderConfig,
    FitConfig,
    NormL1,
    Objective,
    TrainConfig,
)
from crosslens.training.fit import fit
from tests.test_training import Table, quiet_hooks, state_of

BATCH = 512


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def directions(n: int, width: int, random: torch.Generator) -> Tensor:
    return normalize(torch.randn(n, width, generator=random), dim=-1)


def strengths(n: int, active: int, random: torch.Generator) -> Tensor:
    """Rows [B, n] with `active` entries in [1, 2), the rest 0."""
    scores = torch.rand(BATCH, n, generator=random)
    chosen = scores >= scores.topk(active, -1).values[:, -1:]
    return chosen * (1 + torch.rand(BATCH, n, generator=random))


def train(
    wiring_config: WiringConfig,
    layout: Layout,
    rows: Callable[[], Tensor],
    shape: CoderConfig,
    objective: Objective | None = None,
    steps: int = 600,
) -> Coder:
    """A coder trained on what `rows()` gives, batch by batch."""
    config = TrainConfig(
        wiring=wiring_config,
        coder=shape,
        objective=objective or Objective(aux=AuxK(k=8)),
        fit=FitConfig(steps=steps, batch=BATCH, dtype="float32", dead_after=5000),
        optimizer=Adam(lr=3e-3),
    )
    coder = Coder(wiring_config(layout, shape.latents), shape.activation)
    transpose_init(coder, 0.3, generator(1))
    fit(config, state_of(config, coder), Table(rows), quiet_hooks())
    return coder.eval().requires_grad_(False)


N_SHARED, N_OWN, WIDTH = 24, 8, 24
THREE_OF_80 = CoderConfig(latents=80, activation=BatchTopK(k=3))


@dataclass(frozen=True)
class TwoModels:
    """40 features: 24 in both models, 8 of the first only, 8 of the second only."""

    first: Tensor
    second: Tensor
    layout = Layout(("a/resid_post.1", "b/resid_post.1"), (WIDTH, WIDTH))

    def rows(self, random: torch.Generator):
        table = torch.cat([self.first, self.second], -1)
        return lambda: strengths(len(table), 3, random) @ table * 5


def two_models(*, same_directions: bool) -> TwoModels:
    random = generator()
    n = N_SHARED + 2 * N_OWN
    first, second = directions(n, WIDTH, random), directions(n, WIDTH, random)
    if same_directions:
        second[:N_SHARED] = first[:N_SHARED]
    first[N_SHARED + N_OWN :] = 0
    second[N_SHARED : N_SHARED + N_OWN] = 0
    return TwoModels(first, second)


def decoders(coder: Coder) -> Tensor:
    """What each latent writes [L, Y], sites not written being 0."""
    return coder.decode_scaled(torch.eye(coder.wiring.n_latents))


def found_by(truth: Tensor, coder: Coder) -> tuple[Tensor, Tensor]:
    """For each true direction, the best latent's cosine and number."""
    best = cosine_similarity(truth[:, None], decoders(coder)[None], dim=-1).max(-1)
    return best.values, best.indices


def relative_norm(coder: Coder) -> Tensor:
    """‖d_b‖ / (‖d_a‖ + ‖d_b‖) of each latent."""
    norms = coder.decoder_norms()
    return norms[:, 1] / norms.sum(-1)


def check_two_models(toy: TwoModels, coder: Coder) -> Tensor:
    """All features found at cosine ≥ 0.9, each by a latent of its own, and exclusive ones classed
    right by the decoder norm; the group of each feature's latent."""
    cosine, latent = found_by(torch.cat([toy.first, toy.second], -1), coder)
    assert cosine.min() >= 0.9
    assert len(set(latent.tolist())) == len(latent)
    shared, a_only, b_only = relative_norm(coder)[latent].split([N_SHARED, N_OWN, N_OWN])
    assert ((shared > 0.3) & (shared < 0.7)).all()
    assert (a_only < 0.1).all()
    assert (b_only > 0.9).all()
    ends = torch.tensor([span.stop for span in coder.wiring.slices])
    return torch.bucketize(latent, ends, right=True)


@pytest.mark.parametrize("seed", [2, 3])
def test_batchtopk_tells_shared_from_exclusive_latents(seed):
    """As the recipe `batchtopk_diff`: selection by f·Σ‖W_dec‖ (Minder et al. 2025)."""
    toy = two_models(same_directions=False)
    coder = train(Crosscoder(), toy.layout, toy.rows(generator(seed)), THREE_OF_80)
    check_two_models(toy, coder)


@pytest.mark.parametrize("seed", [2, 3])
def test_dedicated_latents_hold_only_what_is_exclusive(seed):
    """As the recipe `dedicated` (2602.11729), with just as many dedicated latents as there are
    exclusive features.

    An exclusive feature may also be found by a common latent with no decoder norm at the other
    model, since nothing in that objective makes those dearer; a shared one never by two dedicated
    latents, one for each half.
    """
    toy = two_models(same_directions=False)
    coder = train(
        Dedicated(exclusive=N_OWN / 80), toy.layout, toy.rows(generator(seed)), THREE_OF_80
    )
    shared, a_only, b_only = check_two_models(toy, coder).split([N_SHARED, N_OWN, N_OWN])
    assert (shared == 2).all()
    assert (a_only != 1).all()
    assert (b_only != 0).all()
    assert (a_only == 0).any()
    assert (b_only == 1).any()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 3])
def test_designated_shared_latents_take_what_is_shared(seed):
    """As Anthropic, February 2025: ReLU with L1 of summed norms, shared latents at 0.15 of it."""
    toy = two_models(same_directions=True)
    penalty = NormL1(weight=0.012, group_factors=(0.15, 1.0))
    coder = train(
        DesignatedShared(shared=N_SHARED / 80),
        toy.layout,
        toy.rows(generator(seed)),
        CoderConfig(latents=80, activation=ReLU()),
        Objective(l1=penalty, aux=AuxK(k=8)),
        steps=1200,
    )
    shared, exclusive = check_two_models(toy, coder).split([N_SHARED, 2 * N_OWN])
    assert (shared == 0).all()
    assert (exclusive == 1).all()


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_recovers_a_two_layer_map(skip):
    """y = Σ_j max(e_j·x − 1, 0)·d_j (+ S·x) of Gaussian x: every e_j, d_j, and S."""
    n, width, random = 24, 24, generator()
    encoder, decoder = directions(n, width, random), directions(n, width, random)
    linear = directions(width, width, random) * (0.5 if skip else 0.0)

    def rows():
        x = torch.randn(BATCH, width, generator=random)
        return torch.cat([x, torch.relu(x @ encoder.T - 1) @ decoder + x @ linear.T], -1)

    layout = Layout(("mlp_in.1", "mlp_out.1"), (width, width))
    shape = CoderConfig(latents=48, activation=BatchTopK(k=4))
    coder = train(Transcoder(skip=skip), layout, rows, shape, steps=800)
    read = cosine_similarity(encoder[:, None], coder.W_enc[0][None], dim=-1)
    written = cosine_similarity(decoder[:, None], coder.W_dec[0][None], dim=-1)
    best = torch.minimum(read, written).max(-1)
    assert best.values.min() >= 0.9
    assert len(set(best.indices.tolist())) == n
    if skip:
        assert (coder.W_skip["0"] - linear).norm() < 0.05 * linear.norm()


@dataclass(frozen=True)
class Layers:
    """Three layers' features; each reads its own layer and writes some layers from there on."""

    reads: Tensor
    """Direction at the feature's own input [3, n, D]."""
    writes: Tensor
    """Direction at each layer's output [3, n, 3, D], zero where it does not write."""

    @property
    def layout(self) -> Layout:
        names = [f"{kind}.{layer}" for layer in range(3) for kind in ("mlp_in", "mlp_out")]
        return Layout(tuple(names), (self.reads.shape[-1],) * 6)

    def rows(self, random: torch.Generator) -> Tensor:
        code = [strengths(self.reads.shape[1], 2, random) * 3 for _ in range(3)]
        parts = []
        for layer in range(3):
            parts.append(code[layer] @ self.reads[layer])
            parts.append(sum(code[m] @ self.writes[m, :, layer] for m in range(layer + 1)))
        return torch.cat(parts, -1)


def layers(random: torch.Generator, n: int = 16, width: int = 16) -> Layers:
    reads = torch.stack([directions(n, width, random) for _ in range(3)])
    writes = directions(3 * n * 3, width, random).view(3, n, 3, width)
    written = torch.rand(3, n, 3, generator=random) < 0.5
    for layer in range(3):
        always = torch.randint(layer, 3, (n,), generator=random)
        written[layer, range(n), always] = True
        written[layer, :, :layer] = False
    return Layers(reads, writes * written[..., None])


@pytest.mark.slow
def test_a_clt_writes_the_layers_that_are_written():
    """The latent that finds a feature reads its layer, and has a decoder norm where the feature
    writes and next to none where it might but does not."""
    random = generator()
    toy = layers(random)
    shape = CoderConfig(latents=96, activation=BatchTopK(k=6))
    coder = train(CrossLayer(), toy.layout, lambda: toy.rows(random), shape, steps=1000)
    cosine, latent = found_by(toy.writes.flatten(2).flatten(0, 1), coder)
    assert cosine.min() >= 0.9
    assert torch.equal(latent // 32, torch.arange(3).repeat_interleave(16))
    found = coder.decoder_norms()[latent]
    found = found / found.max(-1, keepdim=True).values
    written = toy.writes.norm(dim=-1).flatten(0, 1) > 0
    assert (~written).any(0)[1:].all(), "silence where a latent may write is part of the test"
    assert found[written].min() > 0.6
    assert found[~written].max() < 0.3
