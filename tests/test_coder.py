"""The coder: its wiring against loops, folding, relabelling, and its files."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crosslens.coder import (
    BatchTopK,
    Coder,
    Crosscoder,
    Group,
    JumpReLU,
    Layout,
    ReLU,
    Rows,
    TopK,
    Wiring,
    fold,
    load,
    load_description,
    save,
    train_pass,
    transpose_init,
    unfold,
)
from crosslens.errors import CrosslensError, UsageError

LAYOUT = Layout(("a", "b", "c"), (4, 3, 5))
ACTIVATIONS = [ReLU(), TopK(k=3), BatchTopK(k=3), JumpReLU(initial_threshold=0.05)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(wiring: Wiring, activation, seed: int = 0) -> Coder:
    """A coder with every tensor random and its threshold set."""
    coder = Coder(wiring, activation)
    transpose_init(coder, 0.5, generator(seed))
    with torch.no_grad():
        coder.b_enc.normal_(generator=generator(seed + 1)).mul_(0.1)
        coder.b_dec.normal_(generator=generator(seed + 2))
        coder.scale_read.uniform_(0.3, 3, generator=generator(seed + 3))
        coder.scale_write.uniform_(0.3, 3, generator=generator(seed + 4))
        if coder.threshold is not None:
            coder.threshold.fill_(0.2)
    return coder.eval()


def cross_layer_wiring() -> Wiring:
    """Like a cross-layer transcoder: later latents write fewer sites."""
    groups = (Group(6, ("a",), ("b", "c")), Group(5, ("b", "c"), ("c",)))
    return Wiring(LAYOUT, LAYOUT, Layout(("b", "c"), (3, 5)), groups)


def test_layout_lies_side_by_side():
    assert LAYOUT.width == 12
    assert LAYOUT.slices == (slice(0, 4), slice(4, 7), slice(7, 12))
    assert LAYOUT.slice("b") == slice(4, 7)
    assert LAYOUT.columns(("c", "a")).tolist() == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert LAYOUT.spread(torch.tensor([1.0, 2.0, 3.0])).tolist() == [1] * 4 + [2] * 3 + [3] * 5


@pytest.mark.parametrize("wiring", [Crosscoder()(LAYOUT, 8), cross_layer_wiring()])
def test_forward_is_the_loop(wiring):
    coder = filled(wiring, ReLU()).requires_grad_(False)
    x = torch.randn(3, wiring.read.width, generator=generator(9))
    for b in range(3):
        code: list[float] = []
        scaled = [
            float(x[b, column]) * float(coder.scale_read[p])
            for p, columns in enumerate(wiring.read.slices)
            for column in range(columns.start, columns.stop)
        ]
        for g, group in enumerate(wiring.groups):
            read = wiring.read.columns(group.reads).tolist()
            for row in coder.W_enc[g].tolist():
                pre = sum(w * scaled[c] for w, c in zip(row, read, strict=True))
                code.append(max(0.0, pre + float(coder.b_enc[len(code)])))
        out = coder.b_dec.tolist()
        start = 0
        for g, group in enumerate(wiring.groups):
            written = wiring.write.columns(group.writes).tolist()
            for i, row in enumerate(coder.W_dec[g].tolist()):
                for w, c in zip(row, written, strict=True):
                    out[c] += code[start + i] * w
            start += group.n_latents
        for p, columns in enumerate(wiring.write.slices):
            for c in range(columns.start, columns.stop):
                out[c] /= float(coder.scale_write[p])
        assert coder.encode(x)[b].tolist() == pytest.approx(code, rel=1e-4, abs=1e-5)
        assert coder(x)[b].tolist() == pytest.approx(out, rel=1e-4, abs=1e-5)


def test_decoding_some_latents_is_decoding_a_code_that_is_zero_elsewhere():
    coder = filled(cross_layer_wiring(), ReLU())
    latents = torch.tensor([1, 4, 7, 10])
    some = torch.randn(3, 4, generator=generator(2))
    whole = torch.zeros(3, 11).index_copy(1, latents, some)
    assert torch.allclose(coder.decode_scaled(some, latents), coder.decode_scaled(whole), atol=1e-6)


def test_decoder_norms_of_sites_not_written_are_zero():
    coder = filled(cross_layer_wiring(), ReLU())
    norms = coder.decoder_norms()
    assert norms.shape == (11, 2)
    assert torch.equal(norms[6:, 0], torch.zeros(5))
    assert torch.allclose(norms[:6], torch.full((6, 2), 0.5))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(ACTIVATIONS), st.integers(0, 1000), st.booleans())
def test_folding_changes_neither_output_nor_active_set(activation, seed, crossed):
    wiring = Crosscoder()(LAYOUT, 8) if crossed else cross_layer_wiring()
    coder = filled(wiring, activation, seed)
    x = torch.randn(6, wiring.read.width, generator=generator(seed + 7)) * 3
    folded = fold(coder)
    assert folded.folded
    assert not coder.folded
    assert torch.allclose(folded(x), coder(x), atol=1e-4)
    # A score exactly at the threshold may fall either way by rounding; none is, at these seeds.
    assert torch.equal(folded.encode(x) != 0, coder.encode(x) != 0)
    assert torch.allclose(folded.decoder_norms(), coder.decoder_norms(), atol=1e-5)
    back = unfold(folded)
    assert torch.allclose(back.W_enc[0], coder.W_enc[0], atol=1e-6)
    assert torch.allclose(back(x), coder(x), atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_relabelling_latents_changes_nothing_but_order(activation):
    coder, other = (
        filled(Crosscoder()(LAYOUT, 8), activation),
        Coder(Crosscoder()(LAYOUT, 8), activation),
    )
    order = torch.randperm(8, generator=generator(3))
    state = coder.state_dict()
    moved = {
        name: tensor[order] if tensor.dim() and tensor.shape[0] == 8 else tensor
        for name, tensor in state.items()
    }
    other.load_state_dict(moved)
    x = torch.randn(5, 12, generator=generator(4))
    assert torch.allclose(other.eval().encode(x), coder.encode(x)[:, order], atol=1e-6)
    assert torch.allclose(other(x), coder(x), atol=1e-5)


def test_reordering_sites_changes_nothing_but_order():
    coder = filled(Crosscoder()(LAYOUT, 8), TopK(k=3))
    turned = Layout(("c", "a", "b"), (5, 4, 3))
    columns = torch.cat([torch.arange(12)[LAYOUT.slice(site)] for site in turned.sites])
    places = torch.tensor([LAYOUT.index(site) for site in turned.sites])
    other = Coder(Crosscoder()(turned, 8), TopK(k=3)).eval()
    with torch.no_grad():
        other.W_enc[0].copy_(coder.W_enc[0][:, columns])
        other.W_dec[0].copy_(coder.W_dec[0][:, columns])
        other.b_enc.copy_(coder.b_enc)
        other.b_dec.copy_(coder.b_dec[columns])
        other.scale_read.copy_(coder.scale_read[places])
        other.scale_write.copy_(coder.scale_write[places])
    x = torch.randn(5, 12, generator=generator(4))
    assert torch.allclose(other(x[:, columns]), coder(x)[:, columns], atol=1e-5)


def test_transpose_init_sets_each_block_norm():
    coder = Coder(Crosscoder()(LAYOUT, 8), ReLU())
    transpose_init(coder, 0.1, generator())
    assert torch.allclose(coder.decoder_norms(), torch.full((8, 3), 0.1))
    assert torch.equal(coder.W_enc[0], coder.W_dec[0])
    assert not coder.b_enc.any()
    assert not coder.b_dec.any()


def test_batch_topk_learns_the_running_threshold():
    coder = Coder(Crosscoder()(LAYOUT, 8), BatchTopK(k=2, threshold_decay=0.9)).train()
    transpose_init(coder, 0.5, generator())
    x = torch.randn(16, 12, generator=generator(1))
    expected = None
    for _ in range(3):
        shown = train_pass(coder, Rows(x, x))
        kept = (shown.code * coder.decoder_norms().sum(-1)).detach()
        smallest = float(kept[kept > 0].min())
        expected = smallest if expected is None else 0.9 * expected + 0.1 * smallest
    assert float(coder.threshold) == pytest.approx(expected, rel=1e-5)
    alone = coder.eval().encode(x[:1])
    assert torch.allclose(alone, coder.encode(x)[:1]), "at inference rows must not see each other"


def test_batch_topk_without_a_threshold_is_refused():
    coder = Coder(Crosscoder()(LAYOUT, 8), BatchTopK(k=2)).eval()
    with pytest.raises(CrosslensError, match="no inference threshold"):
        coder.encode(torch.zeros(1, 12))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wiring", [Crosscoder()(LAYOUT, 8), cross_layer_wiring()])
def test_saving_and_loading_gives_the_same_coder(tmp_path, wiring, activation):
    coder = filled(wiring, activation)
    save(coder, tmp_path / "coder", {"note": "here"})
    again = load(tmp_path / "coder")
    x = torch.randn(4, wiring.read.width, generator=generator(5))
    assert torch.equal(again(x), coder(x))
    assert (again.wiring, again.activation) == (wiring, activation)
    assert load_description(tmp_path / "coder").provenance == {"note": "here"}
    assert torch.equal(load(tmp_path)(x), coder(x)), "a run's folder works as well"
    assert isinstance(again.threshold, nn.Parameter) == isinstance(activation, JumpReLU)
    save(fold(coder), tmp_path / "coder")
    assert torch.allclose(load(tmp_path / "coder")(x), coder(x), atol=1e-4)


def test_public_names_in_the_file(tmp_path):
    from safetensors.torch import load_file

    save(filled(Crosscoder()(LAYOUT, 8), BatchTopK(k=2)), tmp_path / "one")
    save(filled(cross_layer_wiring(), ReLU()), tmp_path / "two")
    common = {"b_enc", "b_dec", "scale_read", "scale_write"}
    one = load_file(tmp_path / "one" / "coder.safetensors")
    assert set(one) == common | {"W_enc", "W_dec", "threshold"}
    assert set(load_file(tmp_path / "two" / "coder.safetensors")) == common | {
        "W_enc.0", "W_enc.1", "W_dec.0", "W_dec.1"
    }  # fmt: skip


def test_damaged_files_are_one_clear_sentence(tmp_path):
    folder = tmp_path / "coder"
    coder = filled(Crosscoder()(LAYOUT, 8), ReLU())

    def refused(match: str) -> None:
        with pytest.raises(CrosslensError, match=match):
            load(folder)

    refused("holds no coder")
    save(coder, folder)
    whole = (folder / "coder.safetensors").read_bytes()
    (folder / "coder.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("is damaged")
    (folder / "coder.safetensors").unlink()
    refused("does not exist")
    save(coder, folder)
    plain = json.loads((folder / "coder.json").read_text())
    for change, match in [
        ({"format": 99}, "format 99"),
        ({"activation": {"kind": "relo"}}, "activation"),
        ({"extra": 1}, "extra"),
        ({"activation": {"kind": "batchtopk", "k": 3}}, "lacks threshold"),
    ]:
        (folder / "coder.json").write_text(json.dumps({**plain, **change}))
        refused(match)
    (folder / "coder.json").write_text("{")
    refused("not JSON")
    save(filled(Crosscoder()(LAYOUT, 8), ReLU()), folder)
    other = json.loads((folder / "coder.json").read_text())
    other["wiring"]["groups"][0]["n_latents"] = 9
    (folder / "coder.json").write_text(json.dumps(other))
    refused(r"W_enc has shape \(8, 12\)|b_enc has shape|W_enc")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    coder = filled(Crosscoder()(LAYOUT, 8), ReLU())
    with torch.no_grad():
        coder.W_dec[0][0, 0] = torch.nan
    save(coder, tmp_path / "coder")
    with pytest.raises(CrosslensError, match="W_dec has values that are not finite"):
        load(tmp_path / "coder")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Layout((), ()), "at least one site"),
        (lambda: Layout(("a", "a"), (1, 1)), "named twice"),
        (lambda: Layout(("a",), (0,)), "positive"),
        (lambda: Group(0, ("a",), ("a",)), "at least one latent"),
        (lambda: Group(1, (), ("a",)), "read at least one"),
        (lambda: Wiring(LAYOUT, LAYOUT, LAYOUT, (Group(1, ("x",), ("a",)),)), "no site 'x'"),
        (
            lambda: Wiring(LAYOUT, LAYOUT, LAYOUT, (Group(1, ("a",), ("a",)),)),
            "No latent writes b, c",
        ),
        (lambda: Coder(Crosscoder()(LAYOUT, 4), TopK(k=5)), "only 4 latents"),
        (lambda: TopK(k=0), "at least 1"),
        (lambda: BatchTopK(k=1, threshold_decay=1.0), "threshold_decay"),
        (lambda: JumpReLU(bandwidth=0.0), "bandwidth"),
    ],
)
def test_nonsense_is_refused(make, match):
    with pytest.raises(UsageError, match=match):
        make()


def test_storage_keeps_what_was_there_when_the_disk_is_full(tmp_path, monkeypatch):
    import errno

    from crosslens import storage

    coder = filled(Crosscoder()(LAYOUT, 8), ReLU())
    save(coder, tmp_path / "coder")

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CrosslensError, match="disk is full"):
        save(filled(Crosscoder()(LAYOUT, 8), ReLU(), seed=5), tmp_path / "coder")
    x = torch.ones(1, 12)
    assert torch.equal(load(tmp_path / "coder")(x), coder(x))
    assert [p.name for p in tmp_path.iterdir()] == ["coder"], "no temporary file is left"
    assert storage.load_json(tmp_path / "coder" / "coder.json")["format"] == 1
