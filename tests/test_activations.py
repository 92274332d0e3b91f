"""Token policy, scale, harvest and the shuffled ring, on a tiny model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.activations import (
    Counts,
    Ring,
    Source,
    TokenPolicy,
    calibrate,
    row_norms,
    site_layout,
    token_mask,
    within_norms,
)
from crosslens.activations.harvest import Receive, Verdict
from crosslens.coder import Crosscoder, Layout
from crosslens.errors import CrosslensError, UsageError
from crosslens.lm import ModelSpec, open_model
from crosslens.text import Blocks

SPEC = ModelSpec(dtype="float32", device="cpu")


def blocks_of(n: int, t: int = 16, vocabulary: int = 300, seed: int = 0) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, vocabulary, (n, t), dtype=torch.int32, generator=generator)
    tokens[:, 0] = 0
    docs = torch.zeros(n, t, dtype=torch.int32)
    docs[:, 0] = -1
    return Blocks(tokens, docs, ("a",), bos_id=0, pad_id=2, special_ids=(0, 1, 2))


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return open_model(replace(SPEC, path=str(tiny_model_folder)))


def source_of(model, blocks, policy=None, **kwargs) -> Source:
    models = {"base": model}
    layout = site_layout(models, ["resid_mid.1", "resid_post.2"])
    return Source(models, layout, blocks, policy or TokenPolicy(), blocks_per_chunk=2, **kwargs)


class Numbered:
    """A source whose rows say where they come from; some positions do not count, and some of the
    others turn out to be outliers."""

    def __init__(
        self,
        n_blocks: int,
        t: int,
        dropped: set[int],
        blocks_per_chunk: int = 2,
        outliers: set[int] | None = None,
    ) -> None:
        self.outliers = outliers or set()
        self.layout = Layout(("s",), (2,))
        self.n_chunks = -(-n_blocks // blocks_per_chunk)
        self.rows_per_chunk = blocks_per_chunk * t
        self.kept = [r for r in range(n_blocks * t) if r not in dropped]
        self.n_rows_at_most = self.n_positions = n_blocks * t
        self.harvests = 0

    def rows_of(self, index: int) -> torch.Tensor:
        low, high = index * self.rows_per_chunk, (index + 1) * self.rows_per_chunk
        return torch.tensor([r for r in self.kept if low <= r < high], dtype=torch.int64)

    def stream(self, index: int, receive: Receive) -> Verdict:
        self.harvests += 1
        mine = self.rows_of(index)
        # Split in two columns, since bfloat16 holds whole numbers only up to 256.
        rows = torch.stack([mine // 128, mine % 128], -1).bfloat16()
        for at in torch.arange(len(mine)).split(7):
            receive(0, at, rows[at])
        fine = torch.tensor([int(r) not in self.outliers for r in mine], dtype=torch.bool)
        counts = Counts(seen=len(mine), outlier=int((~fine).sum()))
        return Verdict(torch.ones(len(mine), 1), fine, counts)


def named(batch: torch.Tensor) -> list[int]:
    return [int(a) * 128 + int(b) for a, b in batch]


def test_each_rule_counts_once():
    blocks = blocks_of(2, 8)
    blocks.tokens_NT[0, 3] = 1
    blocks.tokens_NT[1, 6:] = 2
    blocks.docs_NT[1, 6:] = -1
    keep, counts = token_mask(TokenPolicy(drop_special=True), blocks)
    assert counts == Counts(seen=16, bos=2, padding=2, special=1)
    assert counts.kept == int(keep.sum()) == 11
    keep, counts = token_mask(TokenPolicy(drop_bos=False, drop_padding=False), blocks)
    assert keep.all()
    assert counts == Counts(seen=16)


def test_scale_brings_the_mean_squared_norm_to_one(model):
    source = source_of(model, blocks_of(6))
    wiring = Crosscoder()(source.layout, 4)
    found, rows = calibrate(source, wiring, 10**6, "unit_square")
    assert found.scale == "unit_square"
    for scale, columns in zip(found.read_scale, source.layout.slices, strict=True):
        squares = [sum(float(x) ** 2 for x in row) for row in rows[:, columns]]
        assert scale**2 * sum(squares) / len(squares) == pytest.approx(1.0, rel=1e-4)


def test_outliers_are_beyond_a_multiple_of_the_median_at_any_site():
    norms = torch.tensor([[1.0, 1.0], [10.1, 1.0], [1.0, 19.9], [1.0, 20.1]])
    median = torch.tensor([1.0, 2.0])
    policy = TokenPolicy(outlier_norm=10.0)
    assert within_norms(policy, norms, median).tolist() == [True, False, True, False]
    assert within_norms(TokenPolicy(outlier_norm=None), norms, median).all()


def test_policy_refuses_a_multiple_below_one():
    with pytest.raises(UsageError, match="outlier_norm"):
        TokenPolicy(outlier_norm=0.5)


def test_site_layout_names_models_only_when_there_are_several(model):
    one = site_layout({"base": model}, ["resid_mid.*"])
    assert one.sites == tuple(f"resid_mid.{i}" for i in range(4))
    assert one.widths == (32,) * 4
    two = site_layout({"a": model, "b": model}, ["resid_post.3", "a/resid_mid.0"])
    assert two.sites == ("a/resid_mid.0", "a/resid_post.3", "b/resid_post.3")
    with pytest.raises(UsageError, match="names the model 'c'"):
        site_layout({"a": model, "b": model}, ["c/resid_post.3"])


def test_models_with_different_tokenizers_are_refused(model, other_tokenizer):
    other = replace(model, tokenizer=other_tokenizer)
    with pytest.raises(UsageError, match="different tokenizers"):
        site_layout({"a": model, "b": other}, ["resid_post.0"])


def test_rows_come_from_the_tokens_they_name(model):
    source = source_of(model, blocks_of(5))
    seen = []
    for chunk in source:
        for row, number in zip(chunk.rows(), chunk.row_R.tolist(), strict=True):
            block, position = divmod(number, 16)
            tokens = source.blocks.tokens_NT[block : block + 1]
            alone = model.capture(tokens, list(source.layout.sites))
            direct = torch.cat([alone[s][0, position] for s in source.layout.sites])
            assert torch.allclose(row, direct, atol=1e-4)
            seen.append(number)
    assert seen == [n for n in range(80) if n % 16]


def test_paired_models_are_in_step(model):
    """Two models on the same tokens: with the same model twice, both halves of a row are equal."""
    models = {"a": model, "b": model}
    layout = site_layout(models, ["resid_post.1"])
    source = Source(models, layout, blocks_of(4), TokenPolicy(), blocks_per_chunk=2)
    for chunk in source:
        rows = chunk.rows()
        assert torch.equal(rows[:, :32], rows[:, 32:])


def test_scale_brings_the_mean_norm_to_root_d_under_the_same_policy(model):
    source = source_of(model, blocks_of(8))
    found, _ = calibrate(source, Crosscoder()(source.layout, 4), tokens=10_000)
    source = replace(source, median_P=torch.tensor(found.median))
    rows = torch.cat([chunk.rows() for chunk in source])
    for p, columns in enumerate(source.layout.slices):
        norms = rows[:, columns].norm(dim=-1)
        assert float(norms.mean()) * found.read_scale[p] == pytest.approx(32**0.5, rel=1e-4)
        assert found.tokens == 8 * 15


def test_outliers_are_left_out_of_scale_and_harvest_alike(model):
    """With a strict multiple some rows fall: the same ones in the estimate and in the harvest."""
    policy = TokenPolicy(outlier_norm=1.1)
    source = source_of(model, blocks_of(8), policy)
    found, _ = calibrate(source, Crosscoder()(source.layout, 4), tokens=10_000)
    assert 0 < found.outliers < found.tokens
    source = replace(source, median_P=torch.tensor(found.median))
    chunks = list(source)
    counts = sum((c.counts for c in chunks), Counts())
    assert counts.outlier == found.outliers
    assert counts.kept == sum(len(c.row_R) for c in chunks)
    norms = torch.cat([row_norms(c.sites) for c in chunks])
    assert (norms <= 1.1 * torch.tensor(found.median)).all()


def test_activations_that_are_not_finite_are_refused_by_site(model):
    source = source_of(model, blocks_of(2))
    sites = list(model.capture(source.blocks.tokens_NT, source.layout.sites).values())
    sites[1][0, 5, 3] = torch.nan
    with pytest.raises(CrosslensError, match=r"resid_post\.2 hold NaN"):
        source.keep(0, sites)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(3, 12),
    st.integers(4, 20),
    st.integers(1, 16),
    st.integers(0, 5),
    st.booleans(),
    st.data(),
)
def test_each_token_is_used_exactly_once_an_epoch(n_blocks, t, batch, seed, small, data):
    dropped = data.draw(st.sets(st.integers(0, n_blocks * t - 1), max_size=n_blocks))
    source = Numbered(n_blocks, t, dropped)
    total = len(source.kept)
    batch = min(batch, total)
    capacity = batch + 2 * source.rows_per_chunk if small else n_blocks * t
    ring = Ring(source, capacity, batch, seed)
    assert ring.rows_NX.shape[0] <= capacity
    epochs = 3
    seen = [name for _ in range(total * epochs // batch) for name in named(ring.next())]
    for epoch in range(epochs):
        mine = seen[epoch * total : (epoch + 1) * total]
        assert len(mine) == len(set(mine)), "no token twice in an epoch"
        if len(mine) == total:
            assert sorted(mine) == source.kept
    usage = ring.usage()
    assert usage["most"] - usage["least"] <= 1
    assert usage["most"] == -(-len(seen) // total)


def test_text_that_fits_is_harvested_once():
    source = Numbered(6, 8, set())
    ring = Ring(source, 48, 5, seed=0)
    for _ in range(40):
        ring.next()
    assert ring.resident
    assert source.harvests == source.n_chunks


def test_the_order_is_shuffled_and_seeded():
    def first(seed: int) -> list[int]:
        ring = Ring(Numbered(10, 16, set()), 160, 32, seed)
        return [n for _ in range(4) for n in named(ring.next())]

    assert first(0) == first(0)
    assert first(0) != first(1)
    gaps = [abs(a - b) for a, b in zip(first(0), first(0)[1:], strict=False)]
    assert sum(g == 1 for g in gaps) < 10, "neighbours in the text are not neighbours in a batch"


@pytest.mark.parametrize("capacity", [160, 48])
@pytest.mark.parametrize("steps_before", [0, 3, 17, 31])
def test_restoring_goes_on_exactly(capacity, steps_before):
    def new() -> Ring:
        return Ring(Numbered(10, 16, {3, 40}, blocks_per_chunk=1), capacity, 11, seed=4)

    ring = new()
    for _ in range(steps_before):
        ring.next()
    state = {name: value.clone() for name, value in ring.state().items()}
    after = [named(ring.next()) for _ in range(30)]
    again = new()
    again.restore(state)
    assert [named(again.next()) for _ in range(30)] == after
    assert again.usage() == ring.usage()
    assert again.counts == ring.counts


def test_a_buffer_too_small_is_refused_before_any_work():
    with pytest.raises(UsageError, match="activation buffer holds 20 rows"):
        Ring(Numbered(10, 16, set()), 20, 8, seed=0)


def test_text_smaller_than_a_batch_is_refused():
    ring = Ring(Numbered(2, 4, set()), 64, 20, seed=0)
    with pytest.raises(UsageError, match="fewer than one batch of 20"):
        ring.next()
