"""Where documents come from: local files and the hub."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest

from crosslens.errors import CrosslensError, UsageError
from crosslens.text import Corpus, TextConfig, build_blocks
from crosslens.text.documents import SHUFFLE_BUFFER, Document, shuffled
from crosslens.text.sources import open_corpus

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def read(source, seed: str = "0", **kwargs) -> dict[str, object]:
    """Provenance -> content of every document."""
    documents = list(open_corpus(Corpus(source=str(source), **kwargs), seed))
    found = {document.provenance: document.content for document in documents}
    assert len(found) == len(documents)
    return found


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, columns, rows_per_group: int = 7) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


# local files


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("\ufeffeins\r\nzwei", encoding="utf-8")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt.gz").write_bytes(gzip.compress(b"drei"))
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == {"b.txt": "eins\r\nzwei", "deep/a.txt.gz": "drei"}
    assert read(tmp_path / "b.txt") == {"b.txt": "eins\r\nzwei"}


def test_lines_of_jsonl_are_shuffled_whole_and_keep_their_numbers(tmp_path):
    rows = [{"text": f"row {i} é", "other": i} for i in range(50)]
    lines = [json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows)]
    (tmp_path / "d.jsonl").write_text("\n\n".join(lines), encoding="utf-8")  # no newline at the end
    found = read(tmp_path / "d.jsonl")
    assert found == {f"d.jsonl:{2 * i + 1}": row["text"] for i, row in enumerate(rows)}
    assert list(found) != list(read(tmp_path / "d.jsonl", seed="1"))
    assert list(found) == list(read(tmp_path / "d.jsonl"))


def test_lines_of_jsonl_are_mixed_from_end_to_end(tmp_path):
    rows = 5 * SHUFFLE_BUFFER
    path = write_lines(tmp_path / "d.jsonl", ({"text": f"row {i}"} for i in range(rows)))
    first = itertools.islice(open_corpus(Corpus(source=str(path)), "0"), 200)
    numbers = sorted(int(document.provenance.split(":")[1]) for document in first)
    assert numbers[0] < rows / 20
    assert numbers[-1] > rows * 19 / 20  # a buffer over the file's own order stops at 1,200


def test_gzipped_lines(tmp_path):
    text = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert read(tmp_path) == {f"d.jsonl.gz:{i + 1}": f"row {i}" for i in range(20)}


def test_parquet_rows_over_row_groups(tmp_path):
    rows = {"text": [f"row {i}" for i in range(40)], "n": list(range(40))}
    write_parquet(tmp_path / "d.parquet", rows)
    assert read(tmp_path) == {f"d.parquet:{i + 1}": f"row {i}" for i in range(40)}


def test_a_folder_of_everything(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    write_lines(tmp_path / "b.jsonl", [{"text": "b"}])
    write_parquet(tmp_path / "c.parquet", {"text": ["c"]})
    assert read(tmp_path) == {"a.txt": "a", "b.jsonl:1": "b", "c.parquet:1": "c"}


@pytest.mark.parametrize("field", ["text", "messages", "conversations", "dialog"])
def test_chat_fields(tmp_path, field):
    column = "messages" if field == "text" else field  # the default finds the usual names
    write_lines(tmp_path / "a.jsonl", [{column: CHAT}])
    write_parquet(tmp_path / "b.parquet", {column: [CHAT, CHAT]})
    assert read(tmp_path, field=field) == {
        "a.jsonl:1": CHAT,
        "b.parquet:1": CHAT,
        "b.parquet:2": CHAT,
    }


def test_sharegpt_chat(tmp_path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    write_lines(tmp_path / "a.jsonl", [{"conversations": turns}])
    assert read(tmp_path) == {"a.jsonl:1": CHAT}


def test_only_what_is_needed_is_read(tmp_path, tiny_tokenizer):
    """A broken line that is never reached is no error, and a large file is not decoded whole."""
    lines = [json.dumps({"text": f"{i} " * 30}) for i in range(4000)] + ["{broken"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    corpora = {"main": Corpus(source=str(tmp_path))}
    config = TextConfig(corpora=corpora, tokens=500, heldout=100, block=32)
    split = build_blocks(config, tiny_tokenizer, seed=0)
    assert split.counts["main"].documents <= 300
    with pytest.raises(CrosslensError, match=r"d\.jsonl:4001 is not valid JSON"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "error", "tells"),
    [
        ("d.jsonl", b'{"text": "a"', CrosslensError, r"d\.jsonl:1 is not valid JSON.*mend"),
        ("d.jsonl", b'"text"', CrosslensError, r"d\.jsonl:1 is JSON, but a str"),
        ("d.jsonl", b'{"text": "\xe9"}', CrosslensError, r"d\.jsonl:1 is not valid JSON"),
        ("d.jsonl", b'{"txt": "a", "id": 1}', UsageError, r"no field 'text'.*mean txt.*txt, id"),
        ("d.jsonl", b'{"text": 3}', UsageError, r"'text' holds a int.*text"),
        ("d.jsonl", b'{"text": ["a"]}', CrosslensError, r"not of messages.*'a'"),
        ("d.jsonl", b'{"text": [{"role": 1}]}', CrosslensError, r"not of messages"),
        ("d.jsonl.gz", b"not gzip", CrosslensError, r"d\.jsonl\.gz could not be read"),
        (
            "d.jsonl.gz",
            gzip.compress(b'{"text": "a"}' * 99, mtime=0)[:-9],
            CrosslensError,
            r"could not be",
        ),
        ("d.txt.gz", gzip.compress(b"a" * 999, mtime=0)[:-9], CrosslensError, r"could not be read"),
        ("d.txt", b"caf\xe9", CrosslensError, r"d\.txt is not UTF-8 text: byte 3 is 0xe9"),
        ("d.parquet", b"PAR1", CrosslensError, r"d\.parquet is damaged or not a Parquet"),
        ("d.csv", b"a,b", UsageError, r"d\.csv is not a kind.*\.jsonl"),
    ],
)
def test_bad_files(tmp_path, name, content, error, tells):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=tells):
        read(tmp_path / name)


def test_a_wrong_column_lists_the_columns(tmp_path):
    write_parquet(tmp_path / "d.parquet", {"body": ["x"], "id": [1]})
    with pytest.raises(UsageError, match=r"no field 'boddy'.*mean body.*body, id"):
        read(tmp_path, field="boddy")


def test_an_unreadable_file(tmp_path):
    (tmp_path / "d.txt").symlink_to(tmp_path / "d.txt")  # permissions do not stop root
    with pytest.raises(UsageError, match="does not exist"):
        read(tmp_path / "d.txt")
    with pytest.raises(CrosslensError, match="holds no text"):
        read(tmp_path)


@pytest.mark.parametrize(
    "source", ["./missing", "/no/such/folder", "missing.jsonl", "a/b/c", "~/missing", "", "x y"]
)
def test_a_path_that_is_not_there(source):
    with pytest.raises(UsageError, match="does not exist"):
        open_corpus(Corpus(source=source), "0")


# shuffling


def test_shuffling_loses_nothing_and_mixes():
    documents = [Document(content=str(i), provenance=str(i)) for i in range(3 * SHUFFLE_BUFFER)]
    order = [int(d.provenance) for d in shuffled(iter(documents), random.Random("0"))]
    assert sorted(order) == list(range(3 * SHUFFLE_BUFFER))
    assert order[:100] != sorted(order[:100])
    assert max(order[:200]) > SHUFFLE_BUFFER // 2


# the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """`datasets.load_dataset`, streaming a local file in a dataset's stead."""
    import datasets

    real, asked = datasets.load_dataset, []

    def load(name, subset, *, split, streaming):
        asked.append((name, subset, split))
        assert streaming
        kind = "json" if (tmp_path / "d.jsonl").exists() else "parquet"
        files = str(next(tmp_path.glob("d.*")))
        return real(kind, data_files={split: files}, split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", load)
    # it waits for its reader threads when a stream ends
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    return asked


def test_hub_rows_stream_in_shuffled(hub, tmp_path):
    write_parquet(tmp_path / "d.parquet", {"text": [f"row {i}" for i in range(60)]})
    found = read("someone/words", subset="en", split="validation")
    assert hub == [("someone/words", "en", "validation")]
    assert sorted(found) == sorted(f"someone/words:validation:{i + 1}" for i in range(60))
    assert sorted(found.values()) == sorted(f"row {i}" for i in range(60))
    assert list(found.values()) != [f"row {i}" for i in range(60)]
    assert found == read("someone/words", subset="en", split="validation")
    assert found != read("someone/words", subset="en", split="validation", seed="1")


def test_hub_chat_and_columns(hub, tmp_path):
    write_lines(tmp_path / "d.jsonl", [{"messages": CHAT, "id": 1}])
    assert list(read("someone/chat").values()) == [CHAT]
    with pytest.raises(UsageError, match=r"no field 'body'.*columns: .*messages"):
        read("someone/chat", field="body")


def test_a_hub_out_of_reach_says_what_to_use_instead():
    with pytest.raises(CrosslensError, match=r"'someone/words'.*could not.*stdlib") as caught:
        read("someone/words")
    assert caught.value.exit_code == 1
    with pytest.raises(CrosslensError, match=r"Did you mean stdlib"):
        read("stdlb")


def test_a_local_folder_wins_over_a_dataset_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("local")
    monkeypatch.chdir(tmp_path)
    assert read("words") == {"a.txt": "local"}
