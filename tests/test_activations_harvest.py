"""Rows as they are handed out: those the model computes, with little computed for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from crosslens.activations import Counts, Ring, Source, TokenPolicy, row_norms, site_layout
from crosslens.activations.filling import fill
from crosslens.lm import ModelSpec, open_model
from crosslens.text import Blocks
from tests.test_activations import blocks_of

LENGTHS = [16, 11, 12, 3, 16, 9, 0, 1]
"""Positions before the padding, BOS among them; 0: a block without even that."""


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return open_model(ModelSpec(path=str(tiny_model_folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def small(tiny_model_folder):
    return open_model(ModelSpec(path=str(tiny_model_folder), dtype="bfloat16", device="cpu"))


def padded() -> Blocks:
    blocks = blocks_of(len(LENGTHS))
    for row, length in enumerate(LENGTHS):
        blocks.tokens_NT[row, length:] = blocks.pad_id
        blocks.docs_NT[row, length:] = -1
    return blocks


def source_of(model, blocks: Blocks, **kwargs) -> Source:
    models = {"base": model}
    layout = site_layout(models, ["resid_mid.1", "resid_post.2"])
    return Source(models, layout, blocks, TokenPolicy(**kwargs), blocks_per_chunk=4)


class Positions:
    """Counts the positions that go through a model."""

    def __init__(self, model) -> None:
        self.count = 0
        self.handle = model.anatomy.decoder.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs) -> None:
        self.count += kwargs["input_ids"].numel()


def test_padding_is_not_computed_and_no_row_is_lost(model):
    source, whole = source_of(model, padded()), source_of(model, blocks_of(len(LENGTHS)))
    positions = Positions(model)
    chunks = list(source)
    positions.handle.remove()
    assert positions.count == 16 + 2 * 12 + 4 + 16 + 12, (
        "in quarters of a block; two blocks not at all"
    )
    rows = torch.cat([chunk.rows() for chunk in chunks])
    row_R = torch.cat([chunk.row_R for chunk in chunks])
    expected = [b * 16 + t for b, length in enumerate(LENGTHS) for t in range(1, length)]
    assert row_R.tolist() == expected
    every = torch.cat(
        [model.capture(whole.blocks.tokens_NT, [s])[s] for s in source.layout.sites], -1
    )
    assert torch.allclose(rows, every.flatten(0, 1)[row_R], atol=1e-5)
    assert sum((c.counts for c in chunks), Counts()).kept == len(expected)


def test_a_chunk_with_padding_is_the_same_again(small):
    source = source_of(small, padded())
    for index in range(source.n_chunks):
        first, second = source.chunk(index), source.chunk(index)
        assert torch.equal(first.rows(), second.rows())
        assert torch.equal(first.row_R, source.rows_of(index))
        verdict = source.stream(index, lambda *_: None)
        assert torch.equal(verdict.norm_RP, row_norms(first.sites))


def test_padding_that_the_policy_keeps_is_computed(model):
    source = source_of(model, padded(), drop_padding=False, drop_bos=False)
    assert sum(len(chunk.row_R) for chunk in source) == 16 * len(LENGTHS)


def test_full_blocks_go_through_the_model_as_they_are(small):
    """To the bit: the rows are those of the chunk's own forward pass, in the model's own format."""
    source = source_of(small, blocks_of(6))
    for index, chunk in enumerate(source):
        tokens = source.blocks.tokens_NT[source.block_range(index)]
        direct = small.capture(tokens, source.layout.sites)
        for site, rows in zip(source.layout.sites, chunk.sites, strict=True):
            assert rows.dtype == torch.bfloat16
            assert torch.equal(rows, direct[site][:, 1:].flatten(0, 1))


def test_the_ring_holds_what_the_models_computed(small, model):
    models = {"a": small, "b": small}
    layout = site_layout(models, ["a/resid_mid.1", "b/resid_post.0", "b/resid_mid.3"])
    source = Source(models, layout, blocks_of(4), TokenPolicy(), blocks_per_chunk=2)
    rows = torch.zeros(80, layout.width, dtype=torch.bfloat16)
    slots = torch.randperm(80)[:30]
    filled = fill(source, 1, slots, rows)
    assert torch.equal(rows[slots], source.chunk(1).rows())
    assert torch.equal(filled.row_R, source.rows_of(1))


def test_outliers_are_judged_by_all_sites_before_any_row_is_used(small):
    """Rows that only the deepest site rules out are in the ring's memory, but never in a batch."""
    source = source_of(small, blocks_of(6), outlier_norm=1.2)
    norms = torch.cat([source.stream(i, lambda *_: None).norm_RP for i in range(source.n_chunks)])
    median = torch.tensor([1e9, float(norms[:, 1].median())])
    source = replace(source, median_P=median)
    fine = norms[:, 1] <= 1.2 * median[1]
    assert 0 < fine.sum() < len(fine)
    ring = Ring(source, 200, int(fine.sum()), seed=0)
    expected = torch.cat([source.rows_of(i) for i in range(source.n_chunks)])[fine]
    batch = ring.next()
    assert sorted(ring.row_N[ring.row_N >= 0].tolist()) == expected.tolist()
    rows = torch.cat([chunk.rows() for chunk in source])
    assert torch.equal(batch.sort(0).values, rows.sort(0).values)


def test_whether_a_model_is_on_an_accelerator(model):
    away = replace(model, module=torch.nn.Linear(1, 1, device="meta"))
    layout = site_layout({"a": model}, ["resid_mid.1"])
    for models, expected in (({"a": model}, False), ({"a": model, "b": away}, True)):
        assert Source(models, layout, blocks_of(2), TokenPolicy()).on_accelerator is expected
