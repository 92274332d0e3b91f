"""Compile the CPU kernels on first use, and keep them for the next."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from crosslens.storage import cache_folder

FOLDER = Path(__file__).parent
OBJECTS = {
    "rows16": ("rows.c", ["-DTABLE=16"]),
    "rows32": ("rows.c", ["-DTABLE=32"]),
    "neurons": ("neurons.c", []),
    "pairs": ("pairs.c", []),
}
"""Each one's source, and flags of its own."""
SOURCES = ("rows.c", "neurons.c", "pairs.c", "phi.h")
SWITCH = "CROSSLENS_KERNELS"
"""Environment variable: `stock` does without compiled kernels."""
FLAGS = (
    "-std=c99",
    "-O3",
    "-fPIC",
    # Sums may be reordered, to be vectors. NaN and infinity stay what they are.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fassociative-math",
    "-ffp-contract=fast",  # multiply and add in one instruction; off in plain C99
)
NATIVE = ("-march=native", "-mcpu=native", "")
"""For this machine's own vectors; the first that the compiler knows."""
PATIENCE = 120
"""Seconds a compiler may take for one file; it takes one to five."""


@dataclass(frozen=True)
class Built:
    """The compiled library, or why there is none."""

    compiled: ctypes.CDLL | None
    reason: str


@functools.cache
def built() -> Built:
    """The kernels for this machine, compiled now if they are not in the cache."""
    if os.environ.get(SWITCH) == "stock":
        return Built(None, f"switched off by {SWITCH}=stock")
    compiler = _compiler()
    if compiler is None:
        return Built(None, "no C compiler found (cc, gcc or clang; or set CC)")
    library = cache_folder() / "kernels" / f"rows-{_fingerprint(compiler)}.so"
    try:
        if not library.exists():
            _compile(compiler, library)
        return Built(ctypes.CDLL(str(library)), f"compiled with {Path(compiler[0]).name}")
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        return Built(
            None, f"none could be made in {library.parent}: {told.strip().splitlines()[-1]}"
        )


def _compiler() -> list[str] | None:
    asked = shlex.split(os.environ.get("CC", ""))
    for command in (asked, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    return None


def _fingerprint(compiler: list[str]) -> str:
    """Of the source, the flags and the processor: a cache may be shared by machines."""
    texts = (f"{name}\n{(FOLDER / name).read_text()}" for name in SOURCES)
    parts = (*texts, *FLAGS, *NATIVE, *compiler, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """What tells one processor's instructions from another's."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compile(compiler: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for native in NATIVE:
            try:
                made = _compile_for(compiler, native, Path(folder))
                break
            except subprocess.CalledProcessError:
                if not native:
                    raise
        made.replace(library)  # in one piece: another process may be doing the same


def _compile_for(compiler: list[str], native: str, folder: Path) -> Path:
    def compiled(name: str) -> str:
        source, own = OBJECTS[name]
        target = str(folder / f"{name}.o")
        flags = [*FLAGS, *([native] if native else []), *own]
        _run([*compiler, *flags, "-c", str(FOLDER / source), "-o", target])
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, OBJECTS))
    made = folder / "rows.so"
    _run([*compiler, "-shared", "-o", str(made), *objects, "-lm"])
    return made


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
