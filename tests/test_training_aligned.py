"""Models of other widths and with other tokenizers, through training, evaluation and the report."""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosslens.activations import Source, TokenPolicy, check_aligned, site_layout
from crosslens.cli import main
from crosslens.coder import BatchTopK, Coder, Crosscoder, TopK, load, transpose_init
from crosslens.errors import CrosslensError, Interrupted, UsageError
from crosslens.evaluation import evaluate, splice
from crosslens.explore.build import build
from crosslens.lm import ModelSpec, next_token_loss
from crosslens.text import Corpus, TextConfig, build_blocks
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
from tests.tokenizer_kinds import other_bytes

SITES = ("resid_mid.1", "resid_post.1")
TEXT = TextConfig(corpora={"main": Corpus(source="stdlib")}, tokens=1500, heldout=300, block=32)


def saved_model(folder: Path, tokenizer, width: int, seed: int) -> Path:
    """A random Llama of two layers and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "narrow": saved_model(folder / "narrow", tiny_tokenizer, 16, 0),
        "wide": saved_model(folder / "wide", tiny_tokenizer, 24, 1),
        "other": saved_model(folder / "other", other_bytes(), 24, 2),
    }


def config_of(folders: dict[str, Path], second: str, **changes) -> TrainConfig:
    paths = {"base": folders["narrow"], "chat": folders[second]}
    fit = {
        "steps": 12, "batch": 64, "dtype": "float32", "device": "cpu", "log_every": 4,
        "heldout_every": 6, "heldout_rows": 64, "checkpoint_every": 6, "dead_after": 300,
        "calibration_tokens": 256, "harvest_tokens": 128, **changes.pop("fit", {}),
    }  # fmt: skip
    return TrainConfig(
        models={
            name: ModelSpec(path=str(path), dtype="float32", device="cpu")
            for name, path in paths.items()
        },
        sites=SITES,
        text=TEXT,
        coder=CoderConfig(latents=48, activation=BatchTopK(k=4)),
        optimizer=Adam(warmup=3),
        fit=FitConfig(**fit),
        **changes,
    )


def test_widths_may_differ(folders, tmp_path):
    config = config_of(folders, "wide")
    models = open_models(config)
    run = create_run(tmp_path / "run", config)
    train(run, models)
    assert run.record()["sites"] == {
        "base/resid_mid.1": 16, "base/resid_post.1": 16,
        "chat/resid_mid.1": 24, "chat/resid_post.1": 24,
    }  # fmt: skip
    assert "alignment" not in run.record()["text"]
    source = run_source(run, models, run.blocks("heldout"))
    tokens = source.blocks.tokens_NT[source.block_range(0)]
    chunk = source.chunk(0)
    place = chunk.row_R % 32, chunk.row_R // 32
    for name, site, rows in zip(("base", "base", "chat", "chat"), SITES * 2, chunk.sites,
                                strict=True):  # fmt: skip
        seen = models[name].capture(tokens, [site])[site]
        assert torch.allclose(rows, seen[place[1], place[0]], atol=1e-5)
    found = evaluate(load(run.folder), source, splice_tokens=100)
    assert set(found.reconstruction.sites) == set(source.layout.sites)
    assert all(0 < figures.fvu < 2 for figures in found.reconstruction.sites.values())
    assert set(found.splice) == set(source.layout.sites)


@pytest.fixture(scope="module")
def aligned_run(folders, tmp_path_factory):
    config = config_of(folders, "other", align=True)
    run = create_run(tmp_path_factory.mktemp("runs") / "aligned", config)
    told: list[str] = []
    train(run, open_models(config), lambda stage, *_: told.append(stage))
    return run, told


@pytest.fixture(scope="module")
def models(aligned_run):
    return open_models(aligned_run[0].config())


def test_other_tokenizers_are_refused_unless_they_are_to_be_aligned(folders, tmp_path):
    config = config_of(folders, "other")
    models = open_models(config)
    run = create_run(tmp_path / "run", config)
    with pytest.raises(UsageError, match=r"have different tokenizers .* --align\.$"):
        train(run, models)
    blocks = build_blocks(TEXT, models["base"].tokenizer, 0).train
    with pytest.raises(CrosslensError, match="not cut for the model chat"):
        check_aligned(models, blocks)
    check_aligned({"base": models["base"]}, blocks)


def test_a_run_says_how_much_pairs(aligned_run):
    run, told = aligned_run
    kept = run.record()["text"]["alignment"]
    blocks = run.blocks("train")
    pairs = int(((blocks.others["chat"].place_NT >= 0) & (blocks.docs_NT >= 0)).sum())
    assert kept["pairs"] == pairs
    assert kept["coverage"] == {
        "base": pairs / int((blocks.docs_NT >= 0).sum()),
        "chat": pairs / int((blocks.others["chat"].docs_NS >= 0).sum()),
    }
    assert 0.5 < min(kept["coverage"].values()) < 1
    assert any(f"{pairs:,} pairs" in stage and "of chat's" in stage for stage in told)
    positions = run.summary()["positions"]
    assert positions["unpaired"] > 0
    assert positions["kept"] == run.summary()["usage"]["tokens"]
    assert load(run.folder).wiring.harvest.widths == (16, 16, 24, 24)


def test_rows_are_the_last_tokens_of_windows(aligned_run, models):
    """Each row against the models run on its own block alone; each text of a row's window ends
    alike in both."""
    run, _ = aligned_run
    source = run_source(run, models, run.blocks("heldout"))
    own = source.blocks.others["chat"]
    seen = 0
    for chunk in source:
        for number, row in zip(chunk.row_R.tolist(), chunk.rows(), strict=True):
            block, t = divmod(number, 32)
            s = int(own.place_NT[block, t])
            assert s > 0 < t
            tokens = source.blocks.tokens_NT[block : block + 1, : t + 1]
            theirs = own.tokens_NS[block : block + 1, : s + 1]
            if seen % 7 == 0:
                a, b = models["base"].capture(tokens, SITES), models["chat"].capture(theirs, SITES)
                direct = torch.cat([x[site][0, -1] for x in (a, b) for site in SITES])
                assert torch.allclose(row, direct, atol=1e-4)
                texts = [
                    model.tokenizer.decode(ids[0], skip_special_tokens=True)
                    for model, ids in ((models["base"], tokens), (models["chat"], theirs))
                ]
                assert texts[0].removeprefix("\ufffd").endswith(texts[1][-8:])
            seen += 1
    assert seen > 100
    for index in range(source.n_chunks):
        again = source.chunk(index)
        assert torch.equal(again.rows(), source.chunk(index).rows())
        assert torch.equal(again.row_R, source.rows_of(index)[source.stream(index, lambda *_: None)
                                                              .fine_R])  # fmt: skip


@pytest.mark.parametrize("buffer_gb", [2.5, 1e-4], ids=["resident", "refilled"])
def test_interrupted_and_resumed_is_uninterrupted(folders, tmp_path, buffer_gb):
    config = config_of(folders, "other", align=True, fit={"buffer_gb": buffer_gb})
    models = open_models(config)
    whole = create_run(tmp_path / "whole", config)
    train(whole, models)
    run = create_run(tmp_path / "stopped", config)

    def interrupt(stage, done, total, figures):
        if stage == "train" and done == 8 and not run.finished:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="after step"):
        train(run, models, interrupt)
    train(open_run(run.folder), models)
    one, two = load(run.folder).state_dict(), load(whole.folder).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert run.summary()["usage"] == whole.summary()["usage"]
    assert run.summary()["positions"] == whole.summary()["positions"]


def test_splice_is_each_model_run_by_hand_on_its_own_tokens(aligned_run, models):
    run, _ = aligned_run
    layout = site_layout(models, SITES, align=True)
    blocks = run.blocks("heldout").some(slice(6))
    source = Source(models, layout, blocks, TokenPolicy(outlier_norm=None), blocks_per_chunk=4)
    coder = Coder(Crosscoder()(layout, 24), TopK(k=6))
    transpose_init(coder, 1.0, torch.Generator().manual_seed(1))
    coder.eval().requires_grad_(False)
    mean = {
        site: torch.full((width,), 0.1)
        for site, width in zip(layout.sites, layout.widths, strict=True)
    }
    found = splice(coder, source, mean, tokens=10_000)
    own = blocks.others["chat"]
    tokens = {"base": blocks.tokens_NT, "chat": own.tokens_NS}
    real = {"base": blocks.docs_NT[:, 1:] >= 0, "chat": own.docs_NS[:, 1:] >= 0}
    acts = {name: model.capture(tokens[name], SITES) for name, model in models.items()}
    pairs = [
        (n, t, int(own.place_NT[n, t]))
        for n in range(6)
        for t in range(1, 32)
        if own.place_NT[n, t] >= 0 and blocks.docs_NT[n, t] >= 0
    ]
    rows = torch.stack(
        [
            torch.cat(
                [acts["base"][site][n, t] for site in SITES]
                + [acts["chat"][site][n, s] for site in SITES]
            )
            for n, t, s in pairs
        ]
    )
    recon = coder(rows)
    for site, columns in zip(layout.sites, layout.slices, strict=True):
        name, plain = site.split("/")
        new = acts[name][plain].clone()
        for row, (n, t, s) in enumerate(pairs):
            new[n, t if name == "base" else s] = recon[row, columns]
        model = models[name]
        with torch.no_grad():
            spliced = model.run(tokens[name], {plain: lambda _, new=new: new})
            clean = model.run(tokens[name], {})
        losses = [
            float(next_token_loss(logits, tokens[name])[real[name]].mean())
            for logits in (spliced, clean)
        ]
        assert found[site].ce == pytest.approx(losses[0], rel=1e-4)
        assert found[site].ce_clean == pytest.approx(losses[1], rel=1e-4)


def test_it_is_evaluated_and_reported_without_aligning_again(aligned_run, models, monkeypatch):
    run, _ = aligned_run
    monkeypatch.setattr("crosslens.text.alignment._align", None)
    source = run_source(run, models, run.blocks("heldout"))
    found = evaluate(load(run.folder), source, splice_tokens=64)
    assert found.reconstruction.tokens == sum(len(chunk.row_R) for chunk in source)
    built = build(run, models, tokens=600)
    assert built.report.is_file()
    logits = built.store.logits
    assert logits is not None
    assert logits.site == "base/resid_post.1", "of the model whose tokens the report shows"


def test_three_models_two_of_which_share_a_tokenizer(folders, models):
    specs = {
        name: ModelSpec(path=str(folders[path]), dtype="float32", device="cpu")
        for name, path in (("base", "narrow"), ("other", "other"), ("wide", "wide"))
    }
    three = open_models(replace(config_of(folders, "other", align=True), models=specs))
    layout = site_layout(three, ["resid_post.1"], align=True)
    blocks = build_blocks(
        TEXT, three["base"].tokenizer, 0, {"other": three["other"].tokenizer}
    ).heldout
    source = Source(three, layout, blocks, TokenPolicy(), blocks_per_chunk=3)
    chunk = source.chunk(1)
    block, t = (chunk.row_R // 32, chunk.row_R % 32)
    wide = three["wide"].capture(blocks.tokens_NT[3:6], ["resid_post.1"])["resid_post.1"]
    assert torch.allclose(chunk.sites[2], wide[block - 3, t], atol=1e-5)


def test_the_command_line(folders, tmp_path, capsys):
    given = [
        "train", "--models.base.path", str(folders["narrow"]), "--models.chat.path",
        str(folders["other"]), "--models.base.device", "cpu", "--models.chat.device", "cpu",
        "--models.base.dtype", "float32", "--models.chat.dtype", "float32", "--sites",
        "resid_post.1", "--text.tokens", "1500", "--text.heldout", "300", "--text.block", "32",
        "--coder.latents", "48", "--coder.activation.k", "4", "--optimizer.warmup", "2",
        "--fit.steps", "6", "--fit.batch", "64", "--fit.dtype", "float32", "--fit.device", "cpu",
        "--fit.heldout-rows", "64", "--fit.calibration-tokens", "256",
        "--out", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(given) == 2
    assert "--align" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*given, "--align", "--dry-run"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("alignment"))
    assert re.fullmatch(
        r"alignment +[\d.]+% of base's, [\d.]+% of chat's tokens pair, from a sample", line
    )
    assert main([*given, "--align"]) == 0
    assert "aligned by decoded text: " in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "run"), "--splice-tokens", "64"]) == 0
    assert "chat/resid_post.1" in capsys.readouterr().out


def test_chat_without_a_template_of_the_first_model(folders, tmp_path):
    """The text is made once, with the first model's template."""
    config = config_of(folders, "other", align=True)
    chat = replace(TEXT, corpora={"main": Corpus(source="stdlib-chat")})
    run = create_run(tmp_path / "run", replace(config, text=chat))
    with pytest.raises(UsageError, match="has no chat template"):
        train(run, open_models(config))
