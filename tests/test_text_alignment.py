"""Blocks for models with tokenizers of their own: the same text, and pairs of tokens that end at
the same place in it, against oracles that try all prefixes."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.activations import TokenPolicy, token_mask
from crosslens.errors import CrosslensError, UsageError
from crosslens.text import Blocks, TextConfig, Vocabulary, aligned, build_blocks, coverage
from crosslens.text.tokenise import block_start, padding, special_ids
from tests.conftest import build_tiny_tokenizer
from tests.test_text_vocabulary import sentencepiece_like
from tests.tokenizer_kinds import other_bytes, unigram, wordpiece

HARD = "def f():\n\treturn 'é 日本語 مرحبا 👩‍👩‍👧 e\u0301 ﬁ'  # x\r\n"


@pytest.fixture(scope="module")
def kinds(tiny_tokenizer) -> dict:
    return {
        "bytes": tiny_tokenizer, "other bytes": other_bytes(),
        "byte tokens": sentencepiece_like(), "wordpiece": wordpiece(), "unigram": unigram(),
    }  # fmt: skip


LOSSLESS = [("bytes", "other bytes"), ("other bytes", "bytes"), ("bytes", "byte tokens"),
            ("byte tokens", "bytes")]  # fmt: skip


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def blocks_of(tokenizer, documents: list[list[int]], length: int | None = None) -> Blocks:
    """Documents end to end in blocks of `length` text positions (one block if None)."""
    ids = [token for document in documents for token in document]
    docs = [number for number, document in enumerate(documents) for _ in document]
    length = length or max(1, len(ids))
    n, bos, pad = -(-len(ids) // length) or 1, block_start(tokenizer), padding(tokenizer)
    tokens = torch.full((n * length,), pad, dtype=torch.int32)
    tokens[: len(ids)] = torch.tensor(ids, dtype=torch.int32)
    numbers = torch.full((n * length,), -1, dtype=torch.int32)
    numbers[: len(ids)] = torch.tensor(docs, dtype=torch.int32)
    tokens, numbers = tokens.view(n, length), numbers.view(n, length)
    if bos is not None:
        tokens = torch.cat([torch.full((n, 1), bos, dtype=torch.int32), tokens], 1)
        numbers = torch.cat([torch.full((n, 1), -1, dtype=torch.int32), numbers], 1)
    names = tuple(f"d{i}" for i in range(len(documents)))
    return Blocks(tokens, numbers, names, bos, pad, special_ids(tokenizer))


def found_pairs(blocks: Blocks, block: int = 0) -> list[tuple[int, int]]:
    """Pairs as places among the text's tokens, without the tokens that blocks begin with."""
    other = blocks.others["b"]
    before = int(blocks.bos_id is not None), int(other.bos_id is not None)
    place = other.place_NT[block].tolist()
    return [
        (t - before[0], s - before[1]) for t, s in enumerate(place) if s >= 0 and t >= before[0]
    ]


def prefix_pairs(a: list[bytes], b: list[bytes]) -> list[tuple[int, int]]:
    """All prefixes of either side that are the same whole characters."""
    pairs = []
    for i in range(len(a)):
        for j in range(len(b)):
            one, two = b"".join(a[: i + 1]), b"".join(b[: j + 1])
            if one == two and one.decode("utf-8", "ignore").encode() == one:
                pairs.append((i, j))
    return pairs


def checked(kinds, names, text: str) -> Blocks:
    """One document as one block, aligned; pairs are those of the oracle, windows the same text."""
    first, second = (kinds[name] for name in names)
    ids = ids_of(first, text)
    blocks = aligned(blocks_of(first, [ids]), first, {"b": second})
    own = blocks.others["b"]
    theirs = [t for t, d in zip(own.tokens_NS[0].tolist(), own.docs_NS[0].tolist(), strict=True)
              if d >= 0]  # fmt: skip
    a, b = (
        [vocabulary.bytes(token) for token in tokens]
        for vocabulary, tokens in (
            (Vocabulary.from_tokenizer(first), ids), (Vocabulary.from_tokenizer(second), theirs)
        )
    )  # fmt: skip
    assert b"".join(b) == text.encode(), "the other model reads the same text"
    pairs = found_pairs(blocks)
    assert pairs == prefix_pairs(a, b)
    edges = [(-1, -1), *pairs]
    for (i, j), (k, m) in pairwise(edges):
        window = b"".join(a[i + 1 : k + 1])
        assert window == b"".join(b[j + 1 : m + 1])
        assert window.decode() != ""
    if ids:
        assert pairs[-1] == (len(ids) - 1, len(theirs) - 1), "the windows are all of the text"
        assert own.open_N.tolist() == [0]
    return blocks


@pytest.mark.parametrize("names", LOSSLESS)
@pytest.mark.parametrize(
    "text", [HARD, " ", "a", "👋👋", "日本", "hi hi 日 hi", "\u00e9e\u0301\u0302"]
)
def test_pairs_are_all_equal_prefixes(kinds, names, text):
    checked(kinds, names, text)


@pytest.mark.parametrize("names", LOSSLESS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="▁"), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_is_cut_into_windows(kinds, names, text):
    checked(kinds, names, text)


@given(text=st.text(alphabet="abXY fz.,(\n", min_size=1, max_size=50))
@settings(max_examples=150, deadline=None)
def test_white_space_and_case_that_one_side_drops(kinds, text):
    first, second = kinds["bytes"], kinds["wordpiece"]
    ids = ids_of(first, text)
    blocks = aligned(blocks_of(first, [ids]), first, {"b": second})
    theirs = blocks.others["b"].tokens_NS[0].tolist()[1:]
    vocabulary = Vocabulary.from_tokenizer(first)

    def folded(data: bytes) -> str:
        return "".join(data.decode().split()).lower()

    wanted: list[tuple[int, int]] = []
    done = 0
    for j in range(len(theirs)):
        read = "".join(second.convert_ids_to_tokens(t).removeprefix("##") for t in theirs[: j + 1])
        same = [
            i
            for i in range(done, len(ids))
            if folded(b"".join(vocabulary.bytes(t) for t in ids[: i + 1])) == read
        ]
        if same:
            wanted.append((same[0], j))
            done = same[0] + 1
    assert found_pairs(blocks) == wanted


def test_an_unknown_word_pairs_with_nothing(kinds):
    first, second = kinds["bytes"], kinds["wordpiece"]
    ids = ids_of(first, "abc 👋 xyz")
    blocks = aligned(blocks_of(first, [ids]), first, {"b": second})
    theirs = blocks.others["b"].tokens_NS[0].tolist()
    assert second.unk_token_id in theirs
    paired = [theirs[s + 1] for _, s in found_pairs(blocks)]
    assert second.unk_token_id not in paired
    assert found_pairs(blocks)[-1][0] == len(ids) - 1, "what follows is aligned again"


@pytest.mark.parametrize("names", [("bytes", "unigram"), ("unigram", "bytes"),
                                   ("wordpiece", "unigram"), ("unigram", "wordpiece")])  # fmt: skip
@given(text=st.text(max_size=40) | st.text(alphabet="ab é ﬁ½ \n▁", max_size=20))
@settings(max_examples=60, deadline=None)
def test_normalised_text_still_gives_pairs_in_order(kinds, names, text):
    first, second = (kinds[name] for name in names)
    ids = ids_of(first, text)
    blocks = aligned(blocks_of(first, [ids]), first, {"b": second})
    own, pairs = blocks.others["b"], found_pairs(blocks)
    for one, two in pairwise(pairs):
        assert one[0] < two[0]
        assert one[1] < two[1]
    assert all(0 <= i < len(ids) for i, _ in pairs)
    length = int((own.docs_NS[0] >= 0).sum())
    assert all(0 <= j < length for _, j in pairs)


def test_a_space_that_the_first_puts_in_front_is_not_text(kinds):
    first, second = kinds["unigram"], kinds["bytes"]
    ids = ids_of(first, "return self")
    blocks = aligned(blocks_of(first, [ids]), first, {"b": second})
    own = blocks.others["b"].tokens_NS[0].tolist()[1:]
    assert second.decode(own) == "return self"
    assert found_pairs(blocks)[-1] == (len(ids) - 1, len(own) - 1)


def test_a_character_cut_by_the_edge_of_a_block(kinds):
    """Its bytes are in neither block for the other model, and the window they are in is no pair."""
    first, second = kinds["bytes"], kinds["other bytes"]
    ids = ids_of(first, "a日c")
    assert len(ids) == 5
    for length, texts, ends, left_open in (
        (3, ["a", "c"], [[0], []], [1, 0]),
        (4, ["a日", "c"], [[0, 3], [0]], [0, 0]),
    ):
        blocks = aligned(blocks_of(first, [ids], length), first, {"b": second})
        own = blocks.others["b"]
        read = [second.decode(row[1:], skip_special_tokens=True) for row in own.tokens_NS.tolist()]
        assert read == texts
        assert [[i for i, _ in found_pairs(blocks, n)] for n in (0, 1)] == ends
        assert own.open_N.tolist() == left_open


def test_special_tokens_become_their_counterparts(kinds):
    first, second = kinds["bytes"], kinds["wordpiece"]
    eos, a, b = first.eos_token_id, ids_of(first, "abc"), ids_of(first, "xyz")
    blocks = aligned(blocks_of(first, [[*a, eos], [*b, eos]]), first, {"b": second})
    own = blocks.others["b"]
    tokens, docs = own.tokens_NS[0].tolist(), own.docs_NS[0].tolist()
    assert tokens[0] == second.bos_token_id == own.bos_id
    assert docs[0] == -1
    place = own.place_NT[0].tolist()
    assert place[0] == 0
    ends = [t for t, token in enumerate(blocks.tokens_NT[0].tolist()) if token == eos]
    assert [tokens[place[t]] for t in ends] == [second.eos_token_id] * 2
    assert docs[1 : place[ends[0]] + 1] == [0] * place[ends[0]]
    assert set(docs[place[ends[0]] + 1 :]) == {1}
    plain = second.convert_ids_to_tokens(tokens)
    assert "".join(t.removeprefix("##") for t in plain) == "[CLS]abc[SEP]xyz[SEP]"


def test_a_marker_that_the_other_does_not_have_is_spelled_out(kinds):
    first = build_tiny_tokenizer()
    first.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    second = kinds["other bytes"]
    marker = first.convert_tokens_to_ids("<|turn|>")
    ids = [marker, *ids_of(first, "abc")]
    blocks = aligned(blocks_of(first, [ids]), first, {"b": second})
    own = blocks.others["b"].tokens_NS[0].tolist()[1:]
    assert own == [*ids_of(second, "<|turn|>"), *ids_of(second, "abc")]
    assert found_pairs(blocks)[0] == (0, len(ids_of(second, "<|turn|>")) - 1)


def test_the_policy_holds_for_every_models_token(kinds):
    first, second = kinds["bytes"], kinds["other bytes"]
    eos = first.eos_token_id
    ids = [*ids_of(first, inspect.getsource(json)[:300]), eos]
    blocks = aligned(blocks_of(first, [ids, ids], 30), first, {"b": second})
    keep, counts = token_mask(TokenPolicy(), blocks)
    place = blocks.others["b"].place_NT
    wanted = (place >= 0) & ~blocks.bos_NT & ~blocks.padding_NT
    assert torch.equal(keep, wanted)
    assert counts.kept == int(wanted.sum())
    assert counts.unpaired == int((~blocks.bos_NT & ~blocks.padding_NT).sum()) - counts.kept > 0
    # A place that is special to the other model only.
    t = int((place[0] > 0).nonzero()[0])
    tokens = blocks.others["b"].tokens_NS.clone()
    tokens[0, place[0, t]] = second.eos_token_id
    changed = replace(blocks, others={"b": replace(blocks.others["b"], tokens_NS=tokens)})
    strict = token_mask(TokenPolicy(drop_special=True), changed)[0]
    assert token_mask(TokenPolicy(), changed)[0][0, t]
    assert not strict[0, t]
    assert not (strict & blocks.special_NT).any()


def test_coverage_is_counted(kinds):
    first = kinds["bytes"]
    documents = [[*ids_of(first, HARD), first.eos_token_id], ids_of(first, inspect.getsource(json))]
    others = {"b": kinds["other bytes"], "c": kinds["byte tokens"]}
    blocks = aligned(blocks_of(first, documents, 40), first, others)
    found = coverage(blocks, "a")
    paired = sum(
        all(int(other.place_NT[n, t]) >= 0 for other in blocks.others.values())
        for n in range(len(blocks.tokens_NT))
        for t in range(1, 41)
    )
    n_tokens = {"a": sum(map(len, documents)), "b": int((blocks.others["b"].docs_NS >= 0).sum()),
                "c": int((blocks.others["c"].docs_NS >= 0).sum())}  # fmt: skip
    assert found.pairs == paired > 0
    assert found.shares == {name: paired / count for name, count in n_tokens.items()}
    alone = [coverage(aligned(replace(blocks, others={}), first, {k: v}), "a") for k, v in
             others.items()]  # fmt: skip
    assert found.pairs <= min(each.pairs for each in alone)
    open_in = sum((other.open_N > 0).int() for other in blocks.others.values())
    assert found.whole == float((open_in == 0).double().mean())
    assert f"{found.shares['c']:.1%} of c's" in found.told()
    assert set(found.plain()) == {"coverage", "pairs", "blocks_whole", "windows_open"}


def test_they_come_back_from_disk_and_damage_is_found(kinds, tmp_path):
    split = build_blocks(
        TextConfig(tokens=600, heldout=200, block=24), kinds["bytes"], 0,
        {"chat": kinds["other bytes"]},
    )  # fmt: skip
    plain = build_blocks(TextConfig(tokens=600, heldout=200, block=24), kinds["bytes"], 0)
    assert torch.equal(plain.train.tokens_NT, split.train.tokens_NT)
    assert plain.fingerprint != split.fingerprint
    split.train.save(tmp_path, "train")
    again = Blocks.load(tmp_path, "train")
    assert again.fingerprint() == split.train.fingerprint()
    for part in ("tokens_NS", "docs_NS", "place_NT", "open_N"):
        one, two = (getattr(each.others["chat"], part) for each in (again, split.train))
        assert torch.equal(one, two)
    place = split.train.others["chat"].place_NT.clone()
    place[0, -1] += 1
    moved = {"chat": replace(split.train.others["chat"], place_NT=place)}
    described = (tmp_path / "train.json").read_text()
    replace(split.train, others=moved).save(tmp_path, "train")
    (tmp_path / "train.json").write_text(described)
    with pytest.raises(CrosslensError, match="do not belong together"):
        Blocks.load(tmp_path, "train")


def test_blocks_after_blocks_keep_their_pairs(kinds):
    first, others = kinds["bytes"], {"b": kinds["other bytes"]}
    one = aligned(blocks_of(first, [ids_of(first, "def f(x): return 1")], 6), first, others)
    two = aligned(blocks_of(first, [ids_of(first, "👋 日本語 " * 3)], 6), first, others)
    assert one.others["b"].tokens_NS.shape[1] != two.others["b"].tokens_NS.shape[1]
    both = one.followed_by(two)
    n = len(one.tokens_NT)
    assert both.documents == ("d0", "d0")
    for part, start in ((one, 0), (two, n)):
        some = both.some(slice(start, start + len(part.tokens_NT)))
        width = part.others["b"].tokens_NS.shape[1]
        assert torch.equal(some.tokens_NT, part.tokens_NT)
        assert torch.equal(some.others["b"].place_NT, part.others["b"].place_NT)
        assert torch.equal(some.others["b"].tokens_NS[:, :width], part.others["b"].tokens_NS)
        assert torch.equal(some.of("b").padding_NT[:, :width], part.of("b").padding_NT)
        assert some.of("b").padding_NT[:, width:].all()
    assert set(both.docs_NT[n:].unique().tolist()) <= {-1, 1}
    assert set(both.others["b"].docs_NS[n:].unique().tolist()) <= {-1, 1}


def test_a_tokenizer_that_gives_no_places_is_refused(kinds):
    class Slow:
        """Written in Python."""

    first = kinds["bytes"]
    blocks = blocks_of(first, [ids_of(first, "abc")])
    with pytest.raises(UsageError, match=r"Slow.* does not say which characters"):
        aligned(blocks, first, {"chat": Slow()})
