"""What is gathered of the latents, against naive loops over dense codes."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.coder import Coder, Crosscoder, ReLU, TopK, coder_hash, transpose_init
from crosslens.errors import CrosslensError, UsageError
from crosslens.explore import ExamplePlan, LatentStore, gather
from crosslens.explore import codes as codes_module
from crosslens.explore.codes import Codes
from crosslens.explore.examples import ExampleTable, choose_examples
from crosslens.explore.statistics import N_BINS, statistics
from crosslens.lm import ModelSpec, open_model
from crosslens.text import Blocks, Vocabulary
from crosslens.training.run import first_blocks

PLAN = ExamplePlan(top=3, intervals=4, per_interval=2, before=5, after=3, seed=1)
LATENTS = 24


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    return open_model(ModelSpec(path=str(tiny_model_folder), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def source(model):
    generator = torch.Generator().manual_seed(3)
    tokens_NT = torch.randint(3, 40, (9, 32), generator=generator, dtype=torch.int32)
    tokens_NT[4] = tokens_NT[2]  # the same text twice: the same activations, and repeats
    tokens_NT[:, 0] = model.tokenizer.bos_token_id
    docs_NT = torch.arange(9, dtype=torch.int32)[:, None].expand(9, 32).clone()
    docs_NT[:, 0] = -1
    blocks = Blocks(
        tokens_NT=tokens_NT,
        docs_NT=docs_NT,
        documents=tuple(f"text {i}" for i in range(9)),
        bos_id=model.tokenizer.bos_token_id,
        pad_id=model.tokenizer.pad_token_id,
        special_ids=tuple(model.tokenizer.all_special_ids),
    )
    models = {"base": model}
    layout = site_layout(models, ["resid_post.0", "resid_mid.2"])
    return Source(models, layout, blocks, TokenPolicy(), blocks_per_chunk=4)


@pytest.fixture(scope="module")
def coder(source):
    coder = Coder(Crosscoder()(source.layout, LATENTS), TopK(k=3))
    transpose_init(coder, 0.7, torch.Generator().manual_seed(5))
    with torch.no_grad():
        coder.b_enc[0] = -1e6  # a latent that never fires
        coder.W_dec[0].mul_(torch.linspace(0.5, 2, LATENTS)[:, None])
        coder.W_dec[0][:, :32].mul_(3)
    return coder.eval()


@pytest.fixture(scope="module")
def vocabulary(model):
    return Vocabulary.from_tokenizer(model.tokenizer)


@pytest.fixture(scope="module")
def store(source, coder, vocabulary) -> LatentStore:
    return gather(source, coder, vocabulary, plan=PLAN, provenance={"seed": 7})


@pytest.fixture(scope="module")
def dense(source, coder):
    """value_NTL of every latent on every token, 0 where the policy counts no token."""
    n, length = source.blocks.tokens_NT.shape
    dense_RL = np.zeros((n * length, LATENTS), np.float32)
    with torch.no_grad():
        for chunk in source:
            dense_RL[chunk.row_R.numpy()] = coder.encode(chunk.rows()).numpy()
    return dense_RL.reshape(n, length, LATENTS)


def test_figures_equal_loops_over_dense_codes(store, dense):
    assert store.manifest.tokens == 9 * 31
    for latent in range(LATENTS):
        active = [float(v) for v in dense[:, :, latent].flatten() if v > 0]
        bins = Counter(min(max(math.floor(4 * (math.log2(v) + 8)), 0), N_BINS - 1) for v in active)
        assert store.statistics.count_L[latent] == len(active)
        assert store.density_L[latent] == pytest.approx(len(active) / (9 * 31))
        assert store.statistics.max_L[latent] == max(active, default=0)
        mean = sum(active) / len(active) if active else 0
        assert store.statistics.mean_L[latent] == pytest.approx(mean, rel=1e-5)
        found = store.statistics.histogram_LB[latent]
        assert {i: n for i, n in enumerate(found.tolist()) if n} == dict(bins)
    assert store.statistics.count_L[0] == 0
    assert 0 not in store.alive_L


def naive_peaks(value_NT: np.ndarray, reach: int) -> list[tuple[int, int]]:
    """Positions that nothing within reach exceeds; of equal ones the first."""
    found = []
    for n, row in enumerate(value_NT):
        for t, value in enumerate(row):
            before, after = row[max(0, t - reach) : t], row[t + 1 : t + 1 + reach]
            if value > 0 and all(value > b for b in before) and all(value >= a for a in after):
                found.append((n, t))
    return found


def naive_top(value_NT: np.ndarray, tokens_NT: np.ndarray, plan: ExamplePlan):
    """(block, position, repeats) of the strongest peaks with different contexts."""
    peaks = naive_peaks(value_NT, plan.before)
    peaks.sort(key=lambda p: (-value_NT[p], p))
    padded = [[None] * 6 + row + [None] for row in tokens_NT.tolist()]
    contexts = [tuple(padded[n][t : t + 8]) for n, t in peaks]
    times = Counter(contexts)
    firsts = [i for i, c in enumerate(contexts) if contexts.index(c) == i]
    return [(*peaks[i], times[contexts[i]]) for i in firsts[: plan.top]]


def test_strongest_examples_equal_loops(store, dense):
    tokens_NT = store.blocks.tokens_NT.numpy()
    repeated = 0
    for latent in range(LATENTS):
        wanted = naive_top(dense[:, :, latent], tokens_NT, PLAN)
        found = [e for e in store.examples_of(latent) if e.section == 0]
        assert [(e.block, e.position, e.repeats) for e in found] == wanted
        repeated += sum(e.repeats > 1 for e in found)
    assert repeated > 0


def test_every_example_shows_its_own_tokens_and_activations(store, dense):
    tokens = store.blocks.tokens_NT
    seen = 0
    for latent in range(LATENTS):
        for example in store.examples_of(latent):
            n, t = example.block, example.position
            window = range(max(0, t - PLAN.before), min(32, t + PLAN.after + 1))
            assert example.token_ids == tuple(int(tokens[n, i]) for i in window)
            assert window[example.peak] == t
            wanted = [float(dense[n, i, latent]) for i in window]
            assert example.activations == pytest.approx(wanted, rel=2e-3)
            assert example.value == dense[n, t, latent]
            assert example.document == f"text {n}"
            seen += 1
    assert seen > 100


def test_draws_come_from_their_interval_and_fill_it(store, dense):
    for latent in store.alive_L:
        value_NT = dense[:, :, latent]
        places = sorted(np.argwhere(value_NT > 0).tolist(), key=lambda p: (-value_NT[*p], p))
        parts = [[] for _ in range(PLAN.intervals)]
        for rank, place in enumerate(places):
            parts[rank * PLAN.intervals // len(places)].append(tuple(place))
        found = list(store.examples_of(int(latent)))
        top = {(e.block, e.position) for e in found if e.section == 0}
        for i, part in enumerate(parts):
            drawn = [e for e in found if e.section == i + 1]
            values = [value_NT[p] for p in part]
            assert store.examples.high_LI[latent, i] == max(values, default=0)
            assert store.examples.low_LI[latent, i] == min(values, default=0)
            assert {(e.block, e.position) for e in drawn} <= set(part) - top
            blocks = {n for n, t in part if (n, t) not in top}
            assert len({e.block for e in drawn}) == len(drawn)
            assert len(drawn) == min(PLAN.per_interval, len(blocks))
            assert drawn == sorted(drawn, key=lambda e: -e.value)


@st.composite
def some_codes(draw) -> tuple[Codes, np.ndarray]:
    """Codes of up to 3 latents with many equal values, and their tokens."""
    n, length = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    flat = draw(st.lists(st.sampled_from([0, 0, 1, 2, 5]), min_size=3 * n * length,
                         max_size=3 * n * length))  # fmt: skip
    dense_LR = np.array(flat, np.float32).reshape(3, n * length)
    tokens = draw(st.lists(st.integers(0, 2), min_size=n * length, max_size=n * length))
    latent_E, row_E = (a.astype(np.int32) for a in dense_LR.nonzero())
    value_E = dense_LR[dense_LR > 0]
    return (
        Codes(3, length, n * length, n * length, latent_E, row_E, value_E),
        np.array(tokens, np.int32).reshape(n, length),
    )


@settings(max_examples=150, deadline=None)
@given(some_codes(), st.integers(0, 6), st.integers(0, 4))
def test_any_codes_give_the_examples_that_loops_give(drawn, before, after):
    codes, tokens_NT = drawn
    plan = ExamplePlan(top=2, intervals=3, per_interval=1, before=before, after=after)
    table = choose_examples(codes, statistics(codes).max_L, tokens_NT, plan)
    dense_LR = np.zeros((3, codes.n_rows), np.float32)
    dense_LR[codes.latent_E, codes.row_E] = codes.value_E
    for latent in range(3):
        mine = range(table.start_L[latent], table.start_L[latent + 1])
        top = [divmod(int(table.row_C[i]), codes.block_length) for i in mine
               if table.section_C[i] == 0]  # fmt: skip
        wanted = naive_top(dense_LR[latent].reshape(tokens_NT.shape), tokens_NT, plan)
        assert top == [(n, t) for n, t, _ in wanted]
        for i in mine:
            row = int(table.row_C[i])
            for offset in range(-before, after + 1):
                same_block = row // codes.block_length == (row + offset) // codes.block_length
                inside = same_block and 0 <= row + offset < codes.n_rows
                value = dense_LR[latent, row + offset] if inside else 0
                share = value / dense_LR[latent].max()
                assert table.window_CW[i, offset + before] == pytest.approx(share, rel=1e-3)


def test_the_same_inputs_give_the_same_store(store, source, coder, vocabulary, tmp_path):
    again = gather(source, coder, vocabulary, plan=PLAN, provenance={"seed": 7})
    store.save(tmp_path / "one")
    again.save(tmp_path / "two")
    names = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert len(names) == 5
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_store_comes_back_from_disk(store, tmp_path):
    store.save(tmp_path / "store")
    store.save(tmp_path / "store")  # and replaces one that is there
    back = LatentStore.load(tmp_path / "store")
    assert back.manifest == store.manifest
    assert back.vocabulary == store.vocabulary
    for table in ("statistics", "examples", "logits"):
        old, new = getattr(store, table), getattr(back, table)
        for field in fields(old):
            assert np.array_equal(getattr(old, field.name), getattr(new, field.name))
    assert list(back.examples_of(3)) == list(store.examples_of(3))
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_a_store_of_another_schema_or_damaged_is_refused(store, tmp_path):
    store.save(tmp_path / "store")
    path = tmp_path / "store" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(CrosslensError, match="schema 99"):
        LatentStore.load(tmp_path / "store")
    store.save(tmp_path / "store")
    (tmp_path / "store" / "latents.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(CrosslensError, match="damaged"):
        LatentStore.load(tmp_path / "store")


def test_the_hash_follows_the_weights(coder):
    other = Coder(coder.wiring, coder.activation)
    other.load_state_dict(coder.state_dict())
    assert coder_hash(other) == coder_hash(coder)
    with torch.no_grad():
        other.b_dec[-1] += 1
    assert coder_hash(other) != coder_hash(coder)


def test_norms_are_the_coder_s(store, coder, source):
    width = source.layout.widths[0]
    row_Y = coder.W_dec[0][5].detach()
    wanted = row_Y[:width].norm(), row_Y[width:].norm()
    assert store.norm_LP[5].tolist() == pytest.approx([float(w) for w in wanted])


def test_a_store_without_logits_comes_back_without(store, tmp_path):
    manifest = replace(store.manifest, logit_site=None)
    replace(store, manifest=manifest, logits=None).save(tmp_path / "store")
    assert LatentStore.load(tmp_path / "store").logits is None


def test_a_code_too_dense_to_keep_is_refused(source, coder, vocabulary, monkeypatch):
    monkeypatch.setattr(codes_module, "MOST_ENTRIES", 300)
    with pytest.raises(CrosslensError, match=r"3 of 24 latents .* --tokens"):
        gather(source, coder, vocabulary)


def test_a_policy_that_keeps_nothing_is_refused(source, coder, vocabulary):
    padding = replace(source.blocks, docs_NT=torch.full_like(source.blocks.docs_NT, -1))
    with pytest.raises(CrosslensError, match="no token"):
        gather(replace(source, blocks=padding), coder, vocabulary)


def test_a_coder_whose_latents_are_all_dead_has_an_empty_store(source, vocabulary):
    coder = Coder(Crosscoder()(source.layout, 4), ReLU())
    with torch.no_grad():
        coder.b_enc.fill_(-1)
    store = gather(source, coder, vocabulary)
    assert not len(store.alive_L)
    assert list(store.examples_of(2)) == []
    assert (store.logits.top_id_LK == -1).all()


def test_held_out_blocks_come_first(source):
    heldout = replace(source.blocks, tokens_NT=source.blocks.tokens_NT[:2],
                      docs_NT=source.blocks.docs_NT[:2], documents=("a", "b"))  # fmt: skip
    blocks, n_heldout = first_blocks(heldout, source.blocks, 32 * 4 - 5)
    assert (n_heldout, len(blocks.tokens_NT)) == (2, 4)
    assert torch.equal(blocks.tokens_NT[2:], source.blocks.tokens_NT[:2])
    assert blocks.docs_NT[:, :2].tolist() == [[-1, 0], [-1, 1], [-1, 2], [-1, 3]]
    assert blocks.documents[2:4] == ("text 0", "text 1")
    fewer, n_heldout = first_blocks(heldout, source.blocks, 1)
    assert (n_heldout, len(fewer.tokens_NT)) == (1, 1)


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="at least one"):
        ExamplePlan(top=0)
    with pytest.raises(UsageError, match="negative"):
        ExamplePlan(before=-1)


def test_no_entries_at_all():
    empty = Codes(2, 4, 8, 8, *(np.zeros(0, t) for t in (np.int32, np.int32, np.float32)))
    table = choose_examples(empty, statistics(empty).max_L, np.zeros((2, 4), np.int32), PLAN)
    assert isinstance(table, ExampleTable)
    assert table.start_L.tolist() == [0, 0, 0]
