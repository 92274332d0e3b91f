"""Turn a model's path into a local folder that holds safetensors weights."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosslens.errors import CrosslensError, UsageError
from crosslens.lm.builtin import BUILT_IN, fetch_built_in
from crosslens.lm.gguf import converted, file_hash
from crosslens.lm.loading import short
from crosslens.lm.spec import ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_NOT_NEEDED = ["*/*", "consolidated*", "*.fp16.safetensors", "*.bf16.safetensors"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


@dataclass(frozen=True)
class Source:
    """A folder to load from, and which version of the model it holds, if known."""

    folder: Path
    revision: str | None


def locate(spec: ModelSpec) -> Source:
    """Find, fetch or convert the model named by `spec.path`.

    Raises:
        UsageError: nothing is there, or it is not a model.
        CrosslensError: it cannot be fetched, or is damaged.
    """
    here = spec.path == BUILT_IN.name or Path(spec.path).expanduser().exists()
    if here and spec.revision is not None:
        raise UsageError(
            f"The revision {spec.revision!r} was asked for, but {spec.path!r} is not a hub model: "
            "only those have revisions. Leave it out."
        )
    if spec.path == BUILT_IN.name:
        cached = converted(BUILT_IN.sha256, BUILT_IN.name, spec.dtype, fetch_built_in)
        return Source(cached, f"sha256:{BUILT_IN.sha256}")
    path = Path(spec.path).expanduser()
    if path.is_file():
        return _from_file(path, spec.dtype)
    if path.is_dir():
        return Source(_checked(path), None)
    if _looks_local(spec.path):
        raise UsageError(
            f"The model {spec.path!r} does not exist: no such file or folder. Give a folder with "
            "config.json and safetensors weights, a .gguf file, a hub id such as "
            f"Qwen/Qwen2.5-0.5B, or the built-in `{BUILT_IN.name}`."
        )
    folder = from_hub(spec.path, spec.revision, _MODEL_FILES)
    return Source(_checked(folder), folder.name)


def from_hub(repo: str, revision: str | None, files: list[str]) -> Path:
    """The local snapshot of a hub repository's matching files; its name is the commit.

    Raises:
        UsageError: no such repository or revision, or it is not open to this user.
        CrosslensError: the hub cannot be reached.
    """
    from huggingface_hub import errors, snapshot_download

    where = repo if revision is None else f"{repo} at {revision}"
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=files, ignore_patterns=_NOT_NEEDED
            )
        )
    except errors.GatedRepoError as error:
        raise UsageError(
            f"The hub lets only accepted users read {repo!r}. Accept its terms at "
            f"https://huggingface.co/{repo}, then log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"The hub has {repo!r} but no revision {revision!r} of it.") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UsageError(
            f"There is no {repo!r}: no such file or folder here, and no such repository on the "
            "hub (a private one needs `hf auth login`). The built-in model is "
            f"`{BUILT_IN.name}`."
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # not in __all__
        raise CrosslensError(
            f"{where} is neither a file or folder here nor in the local hub cache, and it could "
            f"not be fetched from the hub: {short(error)} Check the name and the network, or use "
            f"the built-in model `{BUILT_IN.name}`, which needs no hub."
        ) from error


def _looks_local(path: str) -> bool:
    return path.endswith((".gguf", ".safetensors")) or _HUB_ID.fullmatch(path) is None


def _from_file(path: Path, dtype: str) -> Source:
    if path.suffix.lower() != ".gguf":
        raise UsageError(
            f"{path} is a file, but not a .gguf file. Give the folder that holds config.json and "
            "the safetensors weights."
        )
    sha256 = file_hash(path)
    folder = converted(sha256, path.stem, dtype, lambda _: path.resolve())
    return Source(folder, f"sha256:{sha256}")


def _checked(folder: Path) -> Path:
    """The folder, if it holds a model that can be loaded without running code from it."""
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"{folder} holds no model: it has no config.json.{_gguf_hint(folder)}")
    if "auto_map" in _read(config) and _read(config).get("model_type") not in _known_types():
        raise UsageError(
            f"The model in {folder} comes with Python code of its own, which crosslens does not "
            "run. Only architectures that transformers knows can be opened."
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        reason = (
            f"only pickled ones ({pickles[0]}), which can run code when opened. Convert them with "
            "transformers' save_pretrained, which writes safetensors."
            if pickles
            else "nor any other weights: the folder may have been copied incompletely."
        )
        raise UsageError(f"{folder} has no safetensors weights, {reason}")
    return folder


def _read(config: Path) -> dict[str, Any]:
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CrosslensError(f"{config} is damaged or not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise CrosslensError(f"{config} is damaged: it should hold a JSON object.")
    return found


def _known_types() -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING


def _gguf_hint(folder: Path) -> str:
    files = sorted(folder.glob("*.gguf"))
    return f" To open the GGUF file in it, give the path {files[0]}." if files else ""
