"""Packing by hand, masks, and blocks on disk."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from crosslens.errors import CrosslensError
from crosslens.text import Blocks
from crosslens.text.mixture import Reader
from crosslens.text.packing import Frame, pack
from crosslens.text.passages import Passage, Tally

FRAME = Frame(block=4, bos_id=1, pad_id=2, special_ids=(1, 2))


def passage(name: str, *ids: int) -> Passage:
    return Passage(name, name.encode(), "train", np.asarray(ids, np.int32))


A, B = passage("a", 5, 6, 7, 8, 2), passage("b", 9, 1, 2)


def test_passages_go_on_in_the_next_block():
    blocks = pack([A, B], 6, FRAME)
    assert blocks.tokens_NT.tolist() == [[1, 5, 6, 7], [1, 8, 2, 9]]
    assert blocks.docs_NT.tolist() == [[-1, 0, 0, 0], [-1, 0, 0, 1]]
    assert blocks.documents == ("a", "b")


def test_the_last_block_is_padded_only_if_it_is_needed():
    padded = pack([A, B], 7, FRAME)
    assert padded.tokens_NT[2].tolist() == [1, 1, 2, 2]
    assert padded.docs_NT[2].tolist() == [-1, 1, 1, -1]
    dropped = pack([A, B], 5, FRAME)
    assert dropped.tokens_NT.shape == (2, 4)


def test_a_document_that_does_not_appear_is_not_listed():
    assert pack([A, B], 3, FRAME).documents == ("a",)


def test_stretches_of_a_document_are_one_document():
    again = Passage("a", A.digest, "train", np.asarray([4, 4], np.int32))
    blocks = pack([A, B, again], 10, FRAME)
    assert blocks.docs_NT[:, 1:].flatten().tolist() == [0] * 5 + [1] * 3 + [0] * 2 + [-1] * 2
    assert blocks.documents == ("a", "b")


def test_masks_tell_bos_padding_and_special_apart():
    blocks = pack([A, B], 7, FRAME)  # pad is the same id as the separator, BOS occurs inside b
    yes, no = True, False
    assert blocks.bos_NT.tolist() == [[yes, no, no, no]] * 3
    assert blocks.padding_NT.tolist() == [[no] * 4, [no] * 4, [no, no, no, yes]]
    assert blocks.special_NT.tolist() == [[yes, no, no, no], [yes, no, yes, no], [yes] * 4]


def test_without_a_bos_every_position_is_text():
    blocks = pack([A, B], 8, replace(FRAME, bos_id=None))
    assert blocks.tokens_NT.tolist() == [[5, 6, 7, 8], [2, 9, 1, 2]]
    assert not blocks.bos_NT.any()
    assert not blocks.padding_NT.any()


def test_pieces_for_the_other_side_wait_only_while_it_needs_them():
    sides = ("heldout", "train", "heldout", "train", "heldout", "train")
    passages = [replace(passage(str(i), i), side=side) for i, side in enumerate(sides)]
    reader = Reader(passages=iter(passages), tally=Tally())
    assert reader.take("train", keep_other=True) is passages[1]
    assert reader.take("train", keep_other=False) is passages[3]
    assert list(reader.waiting["heldout"]) == [passages[0]]
    assert reader.take("heldout", keep_other=False) is passages[0]
    assert reader.take("heldout", keep_other=False) is passages[4]
    assert not reader.ran_dry
    assert reader.take("heldout", keep_other=False) is None
    assert reader.ran_dry


def test_blocks_come_back_as_they_were_saved(tmp_path):
    blocks = pack([A, B], 7, FRAME)
    blocks.save(tmp_path / "new", "train")
    back = Blocks.load(tmp_path / "new", "train")
    assert torch.equal(back.tokens_NT, blocks.tokens_NT)
    assert torch.equal(back.docs_NT, blocks.docs_NT)
    assert back.documents == blocks.documents
    assert (back.bos_id, back.pad_id, back.special_ids) == (1, 2, (1, 2))
    assert back.fingerprint() == blocks.fingerprint()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "train.json",
        "train.safetensors",
    ]


def test_fingerprint_sees_every_part():
    blocks = pack([A, B], 7, FRAME)
    changed = [
        replace(blocks, tokens_NT=blocks.tokens_NT + 1),
        replace(blocks, docs_NT=blocks.docs_NT - 1),
        replace(blocks, documents=("a", "c")),
        replace(blocks, bos_id=None),
        replace(blocks, tokens_NT=blocks.tokens_NT.view(4, 3), docs_NT=blocks.docs_NT.view(4, 3)),
    ]
    assert len({blocks.fingerprint(), *(each.fingerprint() for each in changed)}) == 6


def cut_tensors(folder):
    file = folder / "train.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def cut_json(folder):
    file = folder / "train.json"
    file.write_text(file.read_text()[:40])


def change_json(folder, **changes):
    file = folder / "train.json"
    facts = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in facts.items() if value != "drop"}))


@pytest.mark.parametrize(
    ("damage", "tells"),
    [
        (cut_tensors, "safetensors is damaged"),
        (cut_json, "damaged or not JSON"),
        (lambda folder: change_json(folder, documents=["a", "x"]), "do not belong together"),
        (lambda folder: change_json(folder, bos_id="drop"), "not a description of blocks"),
        (lambda folder: change_json(folder, documents=7), "not a description of blocks"),
        (lambda folder: (folder / "train.json").write_text("[]"), "not a description of blocks"),
        (lambda folder: (folder / "train.json").unlink(), "does not exist"),
        (lambda folder: pack([B], 3, FRAME).save(folder / "x", "train"), None),
    ],
)
def test_damaged_blocks_are_refused(tmp_path, damage, tells):
    pack([A, B], 7, FRAME).save(tmp_path, "train")
    damage(tmp_path)
    if tells is None:
        (tmp_path / "x" / "train.safetensors").replace(tmp_path / "train.safetensors")
        tells = "do not belong together"
    with pytest.raises(CrosslensError, match=tells):
        Blocks.load(tmp_path, "train")
