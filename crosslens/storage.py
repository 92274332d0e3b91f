"""Files that are never half-written: a temporary file, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosslens.errors import CrosslensError

if TYPE_CHECKING:
    from torch import Tensor


def cache_folder() -> Path:
    """`$CROSSLENS_CACHE`, else `$XDG_CACHE_HOME/crosslens`, else `~/.cache/crosslens`."""
    if own := os.environ.get("CROSSLENS_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "crosslens"


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    A crash or a full disk leaves what was at `path` as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        _sync(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(temporary: Path, final: Path) -> None:
    """Move a fully written folder into place, replacing the one there, if any."""
    _sync(temporary)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.replace(old)
        temporary.replace(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.replace(final)
    _sync(final.parent)


def save_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda p: void(p.write_text(text, encoding="utf-8")))


def load_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is one clear sentence."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CrosslensError(f"{path} does not exist.") from error
    except (OSError, ValueError) as error:
        raise CrosslensError(f"{path} is damaged or not JSON: {error}.") from error


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(contiguous, temporary)
        except SafetensorError as error:  # it wraps the disk's own complaint
            raise OSError(_errno_in(str(error)), str(error)) from error

    write_atomic(path, write)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a missing or damaged one is one clear sentence."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CrosslensError(f"{path} does not exist.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CrosslensError(
            f"{path} is damaged: {error}. It may have been cut short by a full disk or a copy "
            "that stopped; use another copy or an earlier checkpoint."
        ) from error


def void(_: object) -> None:
    """Drop a value, for callbacks that must return nothing."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _errno_in(message: str) -> int:
    return errno.ENOSPC if "No space left" in message or "os error 28" in message else errno.EIO


def _explained(error: OSError, path: Path) -> CrosslensError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CrosslensError(
            f"The disk is full: {path} could not be written, and what was saved before is kept. "
            "Free some space, then go on with `crosslens resume`."
        )
    return CrosslensError(f"{path} could not be written: {error.strerror or error}.")
