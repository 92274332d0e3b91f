"""GGUF files: unpacked once to plain safetensors in the cache folder, quick to open after that."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crosslens.device import resolve_dtype
from crosslens.errors import CrosslensError
from crosslens.lm.loading import load_causal_lm, load_tokenizer, quiet_transformers, short
from crosslens.storage import cache_folder, replace_folder

_MAGIC = b"GGUF"
_DAMAGE = (OSError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, struct.error)
"""What transformers and gguf raise on files that are cut short or not what they claim."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def converted(sha256: str, stem: str, dtype: str, fetch: Callable[[Path], Path]) -> Path:
    """The folder with a GGUF file's model as safetensors, made now unless it is cached.

    Args:
        sha256: of the GGUF file, the key in the cache together with `dtype`.
        stem: name shown in the cache folder.
        dtype: number format the weights are unpacked to.
        fetch: called with an empty temporary folder if the file is needed; returns its path.

    Raises:
        CrosslensError: the file is damaged or of an architecture that transformers cannot read.
    """
    final = cache_folder() / "models" / f"{stem}-{sha256[:16]}-{dtype}"
    if final.is_dir():
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    except OSError as error:
        raise CrosslensError(
            f"The cache folder {final.parent} cannot be written: {error.strerror}. Point "
            "CROSSLENS_CACHE at a folder that can."
        ) from error
    try:
        _unpack(fetch(temporary), temporary / "model", dtype)
        if not final.is_dir():  # another process may have been quicker
            replace_folder(temporary / "model", final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _unpack(file: Path, folder: Path, dtype: str) -> None:
    from transformers import GgufConfig

    with file.open("rb") as stream:
        if stream.read(len(_MAGIC)) != _MAGIC:
            raise CrosslensError(f"{file} is not a GGUF file: it does not begin with 'GGUF'.")
    options = {
        "gguf_file": file.name,
        "dtype": resolve_dtype(dtype),
        "quantization_config": GgufConfig(dequantize=True),
    }
    try:
        # Its progress bar over tensors heeds no setting.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = load_tokenizer(file.parent, gguf_file=file.name)
            model = load_causal_lm(file.parent, **options)
    except _DAMAGE as error:
        raise CrosslensError(
            f"{file} could not be read as a GGUF model: {short(error)} The file may have been cut "
            "short while it was copied, or hold an architecture that transformers does not know."
        ) from error
    _save(model, tokenizer, folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            for part in (model, tokenizer):
                part.save_pretrained(folder)
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    except (OSError, SafetensorError) as error:
        raise CrosslensError(
            f"The unpacked model could not be written to {folder.parent.parent}: {error}. Free "
            "some space, or point CROSSLENS_CACHE at a disk that has it."
        ) from error
