"""Splitting, mixing and packing, against naive re-implementations."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crosslens.errors import CrosslensError, UsageError
from crosslens.text import Corpus, Split, TextConfig, build_blocks, tokenise


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count, tag="row", words=8):
    return [
        f"{tag} {i}: " + " ".join(f"def f{i + j}(x):" for j in range(words)) for i in range(count)
    ]


@pytest.fixture
def corpus_file(tmp_path):
    return write_rows(tmp_path / "data.jsonl", [{"text": text} for text in texts(120)])


def single(source, **kwargs) -> TextConfig:
    return TextConfig(
        **{
            "corpora": {"main": Corpus(source=source)},
            "tokens": 1500,
            "heldout": 600,
            "block": 32,
            **kwargs,
        }
    )


def row_text(split: Split, source: str) -> dict[str, str]:
    """Provenance -> text, read from the file by line number."""
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    names = (*split.train.documents, *split.heldout.documents)
    return {name: json.loads(lines[int(name.split(":")[1]) - 1])["text"] for name in names}


def test_blocks_are_the_documents_end_to_end(tiny_tokenizer, corpus_file):
    split = build_blocks(single(corpus_file, heldout=900), tiny_tokenizer, seed=3)
    text = row_text(split, corpus_file)
    for blocks, wanted in ((split.train, 1500), (split.heldout, 900)):
        stream = []
        for index, name in enumerate(blocks.documents):
            ids = tiny_tokenizer(text[name], add_special_tokens=False)["input_ids"]
            assert len(ids) <= 900 // 8, "the oracle below does not cut documents"
            stream += [(token, index) for token in [*ids, tiny_tokenizer.eos_token_id]]
        n_blocks = -(-wanted // 31)
        expected = [
            [(tiny_tokenizer.bos_token_id, -1), *stream[31 * n : 31 * n + 31]]
            for n in range(n_blocks)
        ]
        assert blocks.tokens_NT.tolist() == [[token for token, _ in row] for row in expected]
        assert blocks.docs_NT.tolist() == [[index for _, index in row] for row in expected]
        assert blocks.tokens_NT.dtype == blocks.docs_NT.dtype == torch.int32
        assert set(blocks.docs_NT[:, 1:].flatten().tolist()) == set(range(len(blocks.documents)))


def test_each_document_is_on_the_side_its_hash_says(tiny_tokenizer, corpus_file):
    split = build_blocks(single(corpus_file), tiny_tokenizer, seed=7)
    text = row_text(split, corpus_file)
    assert not set(split.train.documents) & set(split.heldout.documents)
    assert not {text[n] for n in split.train.documents} & {text[n] for n in split.heldout.documents}
    for blocks, is_heldout in ((split.train, False), (split.heldout, True)):
        for name in blocks.documents:
            drawn = int(hashlib.sha256(f"7:{text[name]}".encode()).hexdigest()[:16], 16) / 16**16
            assert (drawn < 600 / 2100) == is_heldout


def test_duplicates_are_dropped_and_counted(tiny_tokenizer, tmp_path):
    rows = [{"text": text} for text in texts(60)]
    source = write_rows(tmp_path / "data.jsonl", [*rows, *rows, {"text": "  \n"}, {"text": None}])
    with pytest.raises(CrosslensError, match="too little") as caught:
        build_blocks(single(source, tokens=50_000, heldout=9_000), tiny_tokenizer, seed=0)
    assert "main 60;" in str(caught.value)
    split = build_blocks(single(source, tokens=700, heldout=300), tiny_tokenizer, seed=0)
    text = row_text(split, source)
    used = [text[name] for name in (*split.train.documents, *split.heldout.documents)]
    assert len(used) == len(set(used))
    count = split.counts["main"]
    assert (count.documents, count.duplicates, count.empty) == (60, 60, 2)
    assert (count.train_tokens, count.heldout_tokens) == (23 * 31, 10 * 31)


def test_same_seed_same_blocks_other_seed_others(tiny_tokenizer, corpus_file):
    config = single(corpus_file)
    one, again, other = (build_blocks(config, tiny_tokenizer, seed) for seed in (1, 1, 2))
    assert one.fingerprint == again.fingerprint
    assert torch.equal(one.train.tokens_NT, again.train.tokens_NT)
    assert one.train.documents == again.train.documents
    assert one.fingerprint != other.fingerprint
    assert one.train.documents != other.train.documents


def test_more_tokens_keep_documents_on_their_side(tiny_tokenizer, corpus_file):
    small = build_blocks(single(corpus_file), tiny_tokenizer, seed=0)
    large = build_blocks(single(corpus_file, tokens=4500, heldout=1800), tiny_tokenizer, seed=0)
    assert len(large.train.documents) > len(small.train.documents)
    assert set(small.train.documents) <= set(large.train.documents)
    assert set(small.heldout.documents) <= set(large.heldout.documents)


def test_shares_hold_at_every_point(tiny_tokenizer, tmp_path):
    weights = {"a": 3.0, "b": 1.0, "c": 1.0}
    corpora = {
        name: Corpus(
            source=write_rows(
                tmp_path / f"{name}.jsonl",
                [{"text": text} for text in texts(300, name, words=4 + 3 * place)],
            ),
            weight=weight,
        )
        for place, (name, weight) in enumerate(weights.items())
    }
    config = TextConfig(corpora=corpora, tokens=6000, heldout=2000, block=64)
    split = build_blocks(config, tiny_tokenizer, seed=0)
    for blocks in (split.train, split.heldout):
        corpus_of = [name.split(".")[0] for name in blocks.documents]
        owners = [corpus_of[index] for index in blocks.docs_NT[:, 1:].flatten().tolist()]
        lengths = torch.bincount(blocks.docs_NT[blocks.docs_NT >= 0])
        so_far = dict.fromkeys(weights, 0)
        for place, owner in enumerate(owners, start=1):
            so_far[owner] += 1
            for name, weight in weights.items():
                assert abs(so_far[name] - weight / 5 * place) <= 2 * int(lengths.max())
        assert {name: split.counts[name].train_tokens for name in weights} == {
            name: sum(
                1
                for d in split.train.docs_NT[:, 1:].flatten().tolist()
                if split.train.documents[d].startswith(name)
            )
            for name in weights
        }
        total = len(owners)
        assert abs(so_far["a"] / total - 0.6) < 0.05


def test_a_dry_corpus_leaves_its_share_to_the_others(tiny_tokenizer, tmp_path):
    small = write_rows(tmp_path / "small.jsonl", [{"text": t} for t in texts(10, "small")])
    large = write_rows(tmp_path / "large.jsonl", [{"text": t} for t in texts(200, "large")])
    corpora = {"small": Corpus(source=small), "large": Corpus(source=large)}
    config = TextConfig(corpora=corpora, tokens=3000, heldout=1000, block=32)
    split = build_blocks(config, tiny_tokenizer, seed=0)
    assert split.counts["small"].ran_dry
    assert not split.counts["large"].ran_dry
    names = (*split.train.documents, *split.heldout.documents)
    assert sum(name.startswith("small") for name in names) == 10
    assert (~split.train.bos_NT).sum() == 97 * 31


def test_a_long_document_does_not_fill_a_side_but_is_used_when_text_runs_short(
    tiny_tokenizer, tmp_path
):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("\n".join(texts(60, f"file{i}")))
    split = build_blocks(single(str(tmp_path), tokens=2000, heldout=800), tiny_tokenizer, seed=0)
    for blocks in (split.train, split.heldout):
        lengths = torch.bincount(blocks.docs_NT[blocks.docs_NT >= 0])
        assert lengths.max() <= 800 // 8 + 1  # and its separator
    every = [
        len(tiny_tokenizer(path.read_text(), add_special_tokens=False)["input_ids"])
        for path in sorted(tmp_path.iterdir())
    ]
    tokens, heldout = int(sum(every) * 0.5), int(sum(every) * 0.1)
    split = build_blocks(
        single(str(tmp_path), tokens=tokens, heldout=heldout), tiny_tokenizer, seed=1
    )
    lengths = torch.bincount(split.train.docs_NT[split.train.docs_NT >= 0])
    assert lengths.max() > heldout // 8 + 1
    assert (~split.train.bos_NT).sum() >= tokens


def test_a_long_document_is_taken_apart_without_loss(tiny_tokenizer, tmp_path):
    """With all text asked for, every token of every document is there, stretch by stretch."""
    for i in range(12):
        (tmp_path / f"{i:02}.txt").write_text("\n".join(texts(9 + i, f"file{i}")))
    config = single(str(tmp_path), tokens=6000, heldout=2000, block=16)
    split = build_blocks(config, tiny_tokenizer, seed=1)
    ids = {
        path.name: tiny_tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        for path in tmp_path.iterdir()
    }
    whole = 0
    for blocks in (split.train, split.heldout):
        flat, docs = (t[:, 1:].flatten().tolist() for t in (blocks.tokens_NT, blocks.docs_NT))
        for index, name in enumerate(blocks.documents):
            own = [t for t, d in zip(flat, docs, strict=True) if d == index]
            own = [t for t in own if t != tiny_tokenizer.eos_token_id]
            assert len(own) <= len(ids[name])
            whole += sorted(own) == sorted(ids[name])
    assert whole >= 3


def test_rows_of_a_standard_library_file_are_on_the_side_of_the_file(tiny_tokenizer):
    corpora = {
        "code": Corpus(weight=0.75),
        "chat": Corpus(source="stdlib-chat", weight=0.25, chat="plain"),
    }
    config = TextConfig(corpora=corpora, tokens=60_000, heldout=20_000, block=64)
    split = build_blocks(config, tiny_tokenizer, seed=0)
    files = [
        {name.split(":")[0] for name in blocks.documents} for blocks in (split.train, split.heldout)
    ]
    assert not files[0] & files[1]
    assert min(len(side) for side in files) >= 5
    assert all(name.startswith("stdlib/") for side in files for name in side)
    assert split.counts["chat"].train_tokens == pytest.approx(15_000, rel=0.15)


def test_what_a_block_starts_with(tiny_tokenizer, corpus_file):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    eos = tokenizer.eos_token_id

    def build():
        return build_blocks(single(corpus_file), tokenizer, seed=0).train

    tokenizer.bos_token = None
    blocks = build()
    assert blocks.bos_id == eos
    assert (blocks.tokens_NT[:, 0] == eos).all()
    assert (blocks.docs_NT[:, 0] == -1).all()
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    blocks = build()
    assert blocks.bos_id == 400
    assert (blocks.tokens_NT[:, 0] == 400).all()
    assert 400 in blocks.special_ids

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    blocks = build()
    assert blocks.bos_id is None
    assert not blocks.bos_NT.any()
    assert (blocks.docs_NT >= 0).all()
    assert not (blocks.tokens_NT == eos).any()


def test_a_text_too_long_for_one_call_is_tokenised_in_stretches(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tokenise, "_LONGEST_TEXT", 40)
    lines = "\n".join(texts(20))
    for text in (lines, "x" * 95, "\n" * 95, "", "é" * 40):
        (ids,) = tokenise.encode(tiny_tokenizer, [text], parse_special=False)
        assert tiny_tokenizer.decode(ids) == text
    parts = list(tokenise._stretches(lines))
    assert "".join(parts) == lines
    assert max(map(len, parts)) <= 40
    whole = list(tokenise._stretches("short lines\n" * 9))
    assert all(part.startswith("\n") for part in whole[1:])


def test_long_texts_and_long_blocks_warn_of_nothing(tiny_tokenizer, corpus_file, caplog):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.model_max_length = 16
    build_blocks(single(corpus_file), tokenizer, seed=0)
    assert not caplog.records


def test_special_tokens_in_plain_text_are_text_and_in_a_template_are_tokens(
    tiny_tokenizer, tmp_path
):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>{% endfor %}"
    )
    bos = tokenizer.bos_token_id
    plain = [{"text": f"{i} <bos> injected <eos> {i}"} for i in range(60)]
    chat = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(60)
    ]
    source = write_rows(tmp_path / "plain.jsonl", plain)
    split = build_blocks(single(source, tokens=300, heldout=100), tokenizer, seed=0)
    assert not (split.train.tokens_NT[:, 1:] == bos).any()
    assert "<bos> injected <eos>" in tokenizer.decode(split.train.tokens_NT[0, 1:])

    source = write_rows(tmp_path / "chat.jsonl", chat)
    split = build_blocks(single(source, tokens=300, heldout=100), tokenizer, seed=0)
    inside = split.train.tokens_NT[:, 1:]
    starts = (inside == bos).sum()
    assert starts >= 20
    assert split.train.bos_NT.sum() == len(split.train.tokens_NT)  # not the template's own
    assert split.train.special_NT[:, 1:].sum() >= 2 * starts - 2
    assert "user\nq" in tokenizer.decode(inside.flatten())

    config = single(source, tokens=300, heldout=100)
    config = replace(config, corpora={"main": Corpus(source=source, chat="plain")})
    words = tokenizer.decode(build_blocks(config, tokenizer, seed=0).train.tokens_NT.flatten())
    assert "User: q" in words
    assert "\n\nAssistant: a<eos>" in words


def test_chat_without_a_template_proposes_plain(tiny_tokenizer, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    source = write_rows(tmp_path / "chat.jsonl", rows)
    with pytest.raises(UsageError, match=r"chat\.jsonl:1 is chat.*no chat template.*plain"):
        build_blocks(single(source), tiny_tokenizer, seed=0)


def test_a_template_that_refuses_is_explained(tiny_tokenizer, tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    source = write_rows(tmp_path / "chat.jsonl", rows)
    with pytest.raises(CrosslensError, match=r"chat\.jsonl:1.*roles must alternate.*user.*plain"):
        build_blocks(single(source), tokenizer, seed=0)


@pytest.mark.parametrize(
    ("change", "tells"),
    [
        ({"corpora": {}}, r"text\.corpora is empty"),
        ({"corpora": {"a": Corpus(weight=0.0)}}, r"text\.corpora\.a\.weight is 0\.0"),
        ({"corpora": {"a": Corpus(weight=float("nan"))}}, r"weight is nan"),
        ({"block": 1}, r"text\.block is 1"),
        ({"tokens": 0}, r"text\.tokens is 0"),
        ({"heldout": 0}, r"text\.heldout is 0"),
    ],
)
def test_wrong_configurations_are_refused(tiny_tokenizer, change, tells):
    with pytest.raises(UsageError, match=tells):
        build_blocks(replace(TextConfig(), **change), tiny_tokenizer, seed=0)


def test_too_little_text_says_what_would_fit(tiny_tokenizer, corpus_file):
    config = single(corpus_file, tokens=100_000, heldout=20_000)
    with pytest.raises(CrosslensError, match=r"wanted.*set text\.tokens") as caught:
        build_blocks(config, tiny_tokenizer, seed=0)
    assert caught.value.exit_code == 1
    words = str(caught.value).rstrip(".").split()
    tokens, heldout = int(words[words.index("text.tokens") + 1]), int(words[-1])
    split = build_blocks(replace(config, tokens=tokens, heldout=heldout), tiny_tokenizer, seed=0)
    assert (~split.train.bos_NT).sum() >= tokens


def test_less_than_a_block_says_so(tiny_tokenizer, tmp_path):
    (tmp_path / "one.txt").write_text("a single document is on one side only")
    with pytest.raises(CrosslensError, match=r"less than a block of 32.*more documents"):
        build_blocks(single(str(tmp_path)), tiny_tokenizer, seed=0)


def test_an_empty_corpus_is_refused(tiny_tokenizer, tmp_path, corpus_file):
    empty = write_rows(tmp_path / "empty.jsonl", [{"text": ""}, {"text": "\n"}])
    corpora = {"good": Corpus(source=corpus_file), "bad": Corpus(source=empty)}
    with pytest.raises(CrosslensError, match=r"corpus bad .*empty\.jsonl.*2 of its documents"):
        build_blocks(replace(single(""), corpora=corpora), tiny_tokenizer, seed=0)
