"""The same model and text for every library, as local folders: no hub is needed.

python -m benchmarks.inputs FOLDER --tokens 65536: writes the built-in model to FOLDER/model, and to
FOLDER/text/train.jsonl enough of the standard library, in passages, for so many tokens of training.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crosslens.lm import ModelSpec, open_model
from crosslens.text.stdlib import read_stdlib

LINES = 20
"""Of a passage. Files whole would be few documents, too few to hold some out."""
SPARE = 1.5
"""Tokens written for each one that is trained on: documents are held out, and buffers filled."""
LEAST = 60_000
"""Tokens written however few are trained on: libraries that fill a buffer first need them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    asked = parser.parse_args()
    model = open_model(ModelSpec())
    saved: Any = model.module
    saved.save_pretrained(asked.folder / "model")
    model.tokenizer.save_pretrained(asked.folder / "model")
    text = asked.folder / "text"
    text.mkdir()
    wanted = int(max(LEAST, SPARE * asked.tokens))
    with (text / "train.jsonl").open("w", encoding="utf-8") as file:
        for document in documents(model.tokenizer, wanted):
            file.write(json.dumps({"text": document}) + "\n")


def documents(tokenizer: Any, wanted: int) -> Iterator[str]:
    """Passages of the standard library's files until they hold so many tokens."""
    found = 0
    for document in read_stdlib("0"):
        lines = str(document.content).splitlines(keepends=True)
        for start in range(0, len(lines), LINES):
            passage = "".join(lines[start : start + LINES])
            found += len(tokenizer(passage).input_ids)
            yield passage
        if found >= wanted:
            return


if __name__ == "__main__":
    main()
