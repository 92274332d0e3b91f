"""Shuffled labels: two models exchange their activations on half of the tokens, always the same."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch

from crosslens.activations import Ring, Source, TokenPolicy, calibrate, row_norms, site_layout
from crosslens.activations.swapped import Exchange, exchange_of
from crosslens.coder import BatchTopK, Coder, Crosscoder, Layout, ReLU, load
from crosslens.errors import CrosslensError, Interrupted, UsageError
from crosslens.evaluation import evaluate, reconstruction, splice
from crosslens.lm import ModelSpec, open_model
from crosslens.text import Corpus, TextConfig
from crosslens.training import (
    Adam,
    CoderConfig,
    FitConfig,
    TrainConfig,
    create_run,
    open_models,
    open_run,
    run_source,
    train,
)
from tests.test_activations import blocks_of

SITES = ("resid_mid.1", "resid_post.2")


def opened(path, dtype: str = "float32"):
    return open_model(ModelSpec(path=str(path), dtype=dtype, device="cpu"))


@pytest.fixture(scope="module")
def plain(tiny_pair) -> Source:
    models = {name: opened(path) for name, path in tiny_pair.items()}
    layout = site_layout(models, SITES)
    return Source(models, layout, blocks_of(9), TokenPolicy(), blocks_per_chunk=2)


@pytest.fixture(scope="module")
def shuffled(plain) -> Source:
    return replace(plain, exchange=exchange_of(plain.layout, seed=3))


def all_rows(source: Source) -> torch.Tensor:
    return torch.cat([chunk.rows() for chunk in source])


def by_hand(source: Source, seed: int) -> torch.Tensor:
    """The rows of a source that exchanges nothing, exchanged."""
    old, half = all_rows(source).float(), source.layout.width // 2
    rows = torch.cat([chunk.row_R for chunk in source]).tolist()
    swap_R1 = torch.tensor([[coin(seed, row)] for row in rows])
    return torch.where(swap_R1, torch.cat([old[:, half:], old[:, :half]], -1), old)


def mixed(state: int) -> int:
    """SplitMix64, with whole numbers of any size."""
    z = (state + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def coin(seed: int, row: int) -> bool:
    """Whether a token is exchanged."""
    return mixed((mixed(seed % 2**64) + row) % 2**64) >= 2**63


@pytest.mark.parametrize("seed", [0, 7, -1])
def test_the_coin_is_the_published_hash(seed):
    rows = torch.tensor([0, 1, 2, 77, 123_456_789, 2**40, 5])
    assert mixed(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from 0, as often printed
    found = Exchange((1, 0), seed).swaps(rows)
    assert found.tolist() == [coin(seed, row) for row in rows.tolist()]


def test_half_of_the_tokens_are_exchanged_and_neighbours_say_nothing():
    """Shares within five standard deviations, in ranges, strides and between seeds."""
    rows = torch.arange(100_000)
    swaps = {seed: Exchange((1, 0), seed).swaps(rows) for seed in (0, 1, 2)}
    again = swaps[0]

    def near_half(sample: torch.Tensor) -> bool:
        return abs(float(sample.double().mean()) - 0.5) < 2.5 / len(sample) ** 0.5

    assert all(near_half(each) for each in swaps.values())
    assert all(near_half(again[start::256]) for start in range(0, 256, 51))
    assert near_half(again[1:] ^ again[:-1])
    assert near_half(again[256:] ^ again[:-256])
    assert near_half(swaps[0] ^ swaps[1])
    assert near_half(swaps[1][1:] ^ swaps[2][:-1])


def test_each_token_keeps_its_pair_and_half_are_exchanged(plain, shuffled):
    """By hand, token by token: both models' rows in their places, or each in the other's."""
    before, after = all_rows(plain), all_rows(shuffled)
    row_R = torch.cat([chunk.row_R for chunk in plain])
    half = plain.layout.width // 2
    exchanged = 0
    for row, old, new in zip(row_R.tolist(), before, after, strict=True):
        swap = coin(3, row)
        expected = torch.cat([old[half:], old[:half]]) if swap else old
        assert torch.equal(new, expected)
        assert not torch.equal(old[half:], old[:half])
        exchanged += swap
    assert 0.3 < exchanged / len(row_R) < 0.7
    assert torch.equal(row_R, torch.cat([chunk.row_R for chunk in shuffled]))


def test_a_second_harvest_and_other_chunks_are_the_same_to_the_bit(shuffled):
    first = all_rows(shuffled)
    assert torch.equal(first, all_rows(shuffled))
    swaps = [
        shuffled.exchange.swaps(replace(shuffled, blocks_per_chunk=n).chunk(0).row_R[:15])
        for n in (1, 2, 5)
    ]
    assert torch.equal(swaps[0], swaps[1])
    assert torch.equal(swaps[0], swaps[2])


def test_the_ring_reads_the_exchanged_rows_again_after_a_stop(shuffled):
    expected = all_rows(shuffled).bfloat16()
    ring = Ring(shuffled, 90, 20, seed=0)
    for _ in range(3):
        ring.next()
    state = ring.state()
    after = [ring.next() for _ in range(6)]
    other = Ring(shuffled, 90, 20, seed=0)
    other.restore(state)
    for batch in after:
        assert torch.equal(other.next(), batch)
    known = {tuple(row) for row in expected.tolist()}
    assert all(tuple(row) in known for batch in after for row in batch.tolist())


def test_outliers_are_judged_at_the_sites_where_rows_end_up(shuffled):
    """The median of one site is made so that rows fall by what was exchanged into it."""
    norms = torch.cat([row_norms(chunk.sites) for chunk in shuffled])
    told = [shuffled.stream(i, lambda *_: None).norm_RP for i in range(shuffled.n_chunks)]
    assert torch.equal(torch.cat(told), norms)
    median = torch.full((4,), 1e9)
    median[0] = norms[:, 0].median() / 2
    strict = replace(shuffled, median_P=median, policy=TokenPolicy(outlier_norm=2.0))
    kept = torch.cat([chunk.row_R for chunk in strict])
    every = torch.cat([chunk.row_R for chunk in shuffled])
    assert torch.equal(kept, every[norms[:, 0] <= norms[:, 0].median()])
    assert 0 < len(kept) < len(every)


def test_scales_and_medians_are_those_of_the_exchanged_rows(plain, shuffled):
    source = replace(shuffled, policy=TokenPolicy(outlier_norm=None))
    found, rows = calibrate(source, Crosscoder()(source.layout, 4), 10**6)
    exchanged = by_hand(plain, seed=3)
    assert torch.equal(rows, exchanged)
    norms = torch.stack([exchanged[:, c].norm(dim=-1) for c in source.layout.slices], -1)
    assert found.median == pytest.approx(norms.median(0).values.tolist())
    scales = torch.tensor(source.layout.widths).sqrt() / norms.mean(0)
    assert found.read_scale == pytest.approx(scales.tolist())


def test_models_of_unlike_number_formats(tiny_pair):
    models = {"base": opened(tiny_pair["base"]), "chat": opened(tiny_pair["chat"], "bfloat16")}
    layout = site_layout(models, SITES)
    source = Source(models, layout, blocks_of(4), TokenPolicy(), blocks_per_chunk=2)
    mixed = replace(source, exchange=exchange_of(layout, 0))
    assert torch.equal(all_rows(mixed), all_rows(mixed))
    assert torch.allclose(all_rows(mixed).float(), by_hand(source, 0), rtol=0.01, atol=0.01)


def test_what_is_not_finite_is_told_of_the_model_that_computed_it(tiny_pair, plain):
    broken = opened(tiny_pair["chat"])
    with torch.no_grad():
        broken.module.get_input_embeddings().weight[5] = torch.nan
    models = {"base": plain.models["base"], "chat": broken}
    blocks = blocks_of(4)
    blocks.tokens_NT[blocks.tokens_NT == 5] = 6
    blocks.tokens_NT[0, 3] = 5
    source = replace(plain, models=models, blocks=blocks, exchange=exchange_of(plain.layout, 0))
    with pytest.raises(CrosslensError, match=r"Activations at chat/resid_mid\.1 hold NaN"):
        list(source)


@pytest.mark.parametrize(
    ("sites", "widths", "match"),
    [
        (("a/s.1", "b/s.1"), (4, 5), "a/s.1 is 4 wide, b/s.1 is 5 wide"),
        (("a/s.1", "a/s.2", "b/s.1"), (4, 4, 4), "b/s.2 is not among the sites"),
        (("a/s.1", "b/s.1", "c/s.1"), (4, 4, 4), "are for two models"),
        (("s.1", "s.2"), (4, 4), "are for two models"),
    ],
)
def test_sites_that_cannot_be_exchanged(sites, widths, match):
    with pytest.raises(UsageError, match=match):
        exchange_of(Layout(sites, widths), 0)


def test_partners_are_the_same_places_in_any_order():
    layout = Layout(("a/s.1", "a/s.2", "b/s.2", "b/s.1"), (4, 6, 6, 4))
    assert exchange_of(layout, 0).partner_P == (3, 2, 1, 0)


def test_there_is_no_splicing_and_it_is_said_once(shuffled):
    coder = Coder(Crosscoder()(shuffled.layout, 8), ReLU())
    heard = []
    found = evaluate(coder, shuffled, 100, lambda stage, done, total: heard.append(stage))
    assert found.splice == {}
    assert found.reconstruction.tokens == len(all_rows(shuffled))
    assert [stage for stage in heard if stage != "evaluate"] == [
        "no splicing: the models exchange their activations (shuffle_models)"
    ]
    with pytest.raises(UsageError, match="cannot be spliced"):
        splice(coder, shuffled, {}, 100)


def run_config(pair, **fit_changes) -> TrainConfig:
    plan = {
        "steps": 18, "batch": 48, "dtype": "float32", "device": "cpu", "log_every": 6,
        "heldout_every": 6, "heldout_rows": 64, "checkpoint_every": 6, "dead_after": 300,
        "calibration_tokens": 256, "harvest_tokens": 128, "buffer_gb": 1e-4,
    }  # fmt: skip
    return TrainConfig(
        models={
            name: ModelSpec(path=str(path), dtype="float32", device="cpu")
            for name, path in pair.items()
        },
        sites=SITES,
        text=TextConfig(
            corpora={"main": Corpus(source="stdlib")}, tokens=1500, heldout=300, block=32
        ),
        coder=CoderConfig(latents=32, activation=BatchTopK(k=4)),
        optimizer=Adam(warmup=3),
        fit=FitConfig(**{**plan, **fit_changes}),
        shuffle_models=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_pair):
    config = run_config(tiny_pair)
    run = create_run(tmp_path_factory.mktemp("null") / "whole", config)
    train(run, open_models(config))
    return run


def test_a_run_says_that_it_is_a_null_and_its_scales_are_alike(finished):
    """Both labels hold the same mixture, so their scales agree far closer than the models do."""
    assert finished.record()["config"]["shuffle_models"] is True
    assert finished.config().shuffle_models
    models = open_models(finished.config())
    source = run_source(finished, models, finished.blocks("train"))
    assert source.exchange == exchange_of(source.layout, finished.config().seed)
    wiring = Crosscoder()(source.layout, 4)
    own, _ = calibrate(replace(source, exchange=None), wiring, 256)
    shown = finished.record()["calibration"]
    assert shown["median"] != list(own.median)
    again, _ = calibrate(source, wiring, 256)
    assert shown["read_scale"] == list(again.read_scale)


def test_interrupted_and_resumed_is_uninterrupted(finished, tmp_path):
    run = create_run(tmp_path / "stopped", finished.config())
    models = open_models(run.config())
    pressed = []

    def interrupt(stage, done, total, figures):
        if stage == "train" and done == 12 and not pressed:
            pressed.append(done)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(run, models, interrupt)
    train(open_run(run.folder), models)
    whole = load(finished.folder).state_dict()
    assert all(torch.equal(v, whole[name]) for name, v in load(run.folder).state_dict().items())
    assert run.metrics()[-1] == finished.metrics()[-1]


def test_the_held_out_rows_of_a_training_are_exchanged_too(finished):
    """What training logs of held-out rows is what evaluation finds on the same exchanged rows, and
    not what it finds on rows as the models have them."""
    models = open_models(finished.config())
    source = run_source(finished, models, finished.blocks("heldout"))
    coder = load(finished.folder)
    logged = finished.summary()["heldout"]["fvu"]

    def fvu(of: Source) -> float:
        return reconstruction(coder, all_rows(of)[:64].bfloat16().split(48)).fvu

    assert fvu(source) == pytest.approx(logged, rel=1e-5)
    assert fvu(replace(source, exchange=None)) != pytest.approx(logged, rel=1e-5)


def test_other_numbers_of_models_are_refused(tiny_pair):
    config = run_config(tiny_pair)
    spec = config.models["base"]
    with pytest.raises(UsageError, match="there are 1: base"):
        replace(config, models={"base": spec})
    with pytest.raises(UsageError, match="there are 3: base, chat, more"):
        replace(config, models={**config.models, "more": spec})
