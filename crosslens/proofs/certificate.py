"""A certificate: a claim, what it is about, what proves it, and what that costs.

A folder with `certificate.json` and `coder.safetensors` (features, and hints that the proof uses).
Files are read as a stranger's: sizes first, JSON and safetensors only, every field checked.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from crosslens.errors import CrosslensError, UsageError
from crosslens.proofs.ledger import Cost
from crosslens.storage import load_tensors, replace_folder, save_json, save_tensors

VERSION = 2
"""What is written. Version 1 had the one group of inputs "all" and no errors at sites."""
FORMAT = "crosslens certificate"
ClaimKind = Literal["accuracy", "loss", "site_error"]
MOST_GROUPS = 16
LARGEST_JSON = 2**20
LARGEST_TENSORS = 2**31
"""Bytes."""
HASHED = ("coder", "data", "weights")
FIELDS = ("bound", "family", "format", "hashes", "kind", "ledger", "site", "tiers", "version")


class Refused(CrosslensError):
    """A claim that does not hold, or is not shown to."""

    exit_code = 4


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The proof's cost, which the checker recounts, and the search's, which it takes on trust."""

    matmul: int
    elementwise: int
    bits: int
    search_flops: int
    attempts: int

    @property
    def cost(self) -> Cost:
        return Cost(matmul=self.matmul, elementwise=self.elementwise, bits=self.bits)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """`kind` accuracy: at least `bound` of the data is answered right. `kind` loss: the mean
    cross-entropy is at most `bound` nats. `kind` site_error: the mean ‖x − x̂‖ at `site` is at most
    `bound`."""

    family: str
    kind: ClaimKind
    bound: float
    hashes: Mapping[str, str]
    """SHA-256 of the coder, the data and the weights."""
    tiers: Mapping[str, str]
    """Group of inputs → how it is bounded. The group "all" stands alone; of several, the coder's
    tensor `group` numbers each input's among the sorted names."""
    ledger: Ledger
    coder: Mapping[str, Tensor]
    site: str = ""
    """Where the error is claimed; empty for other claims."""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save(
    certificate: Certificate, folder: Path, beside: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Write the certificate, and the tensors of `beside` (weights, data) by their names, at once.

    A folder that holds something else than a certificate is refused.
    """
    if folder.exists() and not (folder / "certificate.json").is_file():
        raise UsageError(f"{folder} exists and is no certificate; name a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
        temporary = Path(name) / "written"
        temporary.mkdir()
        plain = {key: value for key, value in asdict(certificate).items() if key != "coder"}
        plain = {"format": FORMAT, "version": VERSION} | plain
        save_json(temporary / "certificate.json", plain)
        for kind, tensors in {**beside, "coder": certificate.coder}.items():
            save_tensors(temporary / f"{kind}.safetensors", tensors)
        replace_folder(temporary, folder)


def load(folder: Path) -> Certificate:
    """Read a certificate; Refused says what is wrong with it."""
    found = _object(_json(folder / "certificate.json"), "certificate")
    if found.get("format") != FORMAT:
        raise Refused(f"{folder / 'certificate.json'} is no certificate of crosslens.")
    version = _version(found)
    fields = FIELDS if version > 1 else tuple(name for name in FIELDS if name != "site")
    _names(found, fields)
    kind = found["kind"]
    if kind not in get_args(ClaimKind):
        known = ", ".join(get_args(ClaimKind))
        raise Refused(f"The certificate claims {kind!r}; known are {known}.")
    return Certificate(
        family=_text(found["family"], "family"),
        kind=kind,
        bound=_number(found["bound"]),
        hashes=_hashes(found["hashes"]),
        tiers=_tiers(found["tiers"], version),
        ledger=_ledger(found["ledger"]),
        coder=read_tensors(folder / "coder.safetensors"),
        site=_site(kind, found.get("site", "")),
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file of a bearable size; Refused where it is missing, too large or damaged."""
    _bearable(path, LARGEST_TENSORS)
    try:
        return load_tensors(path)
    except CrosslensError as error:
        raise Refused(str(error)) from error


def _json(path: Path) -> Any:
    _bearable(path, LARGEST_JSON)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is damaged or not JSON: {type(error).__name__}.") from error


def _bearable(path: Path, most: int) -> None:
    if not path.is_file():
        raise Refused(f"{path} does not exist: the certificate is not whole.")
    size = path.stat().st_size
    if size > most:
        raise Refused(f"{path} has {size} bytes, more than the {most} that are read.")


def _version(found: Mapping[str, Any]) -> int:
    version = found.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        newer = type(version) is int and version > VERSION
        advice = " It was written by a newer version: update crosslens." if newer else ""
        raise Refused(f"The certificate has version {version!r}, known is 1 to {VERSION}.{advice}")
    return version


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Refused(f"The certificate's {what} is no JSON object.")
    return value


def _names(found: Mapping[str, Any], wanted: tuple[str, ...]) -> None:
    if sorted(found) != sorted(wanted):
        odd = sorted(set(found) ^ set(wanted))
        raise Refused(f"The certificate lacks, or should not have: {', '.join(map(repr, odd))}.")


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 100:
        raise Refused(f"The certificate's {what} is no short text.")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not -1e300 < value < 1e300 or math.isnan(value):
        raise Refused("The certificate's bound is no finite number.")
    return float(value)


def _hashes(value: Any) -> dict[str, str]:
    found = _object(value, "hashes")
    _names(found, HASHED)
    for name, digest in found.items():
        text = _text(digest, f"hash of the {name}")
        if len(text) != 64 or set(text) - set("0123456789abcdef"):
            raise Refused(f"The certificate's hash of the {name} is no SHA-256.")
    return found


def _tiers(value: Any, version: int) -> dict[str, str]:
    found = _object(value, "tiers")
    if version == 1 or "all" in found:
        _names(found, ("all",))
    if not 0 < len(found) <= MOST_GROUPS:
        raise Refused(f"The certificate has {len(found)} groups; 1 to {MOST_GROUPS} are taken.")
    for group in found:
        _text(group, "group")
    return {group: _text(tier, "tier") for group, tier in found.items()}


def _site(kind: str, value: Any) -> str:
    if kind != "site_error":
        if value != "":
            raise Refused(f"The certificate names a site, which a claim of {kind} has not.")
        return ""
    return _text(value, "site")


def _ledger(value: Any) -> Ledger:
    found = _object(value, "ledger")
    _names(found, tuple(Ledger.__dataclass_fields__))
    for name, count in found.items():
        if type(count) is not int or not 0 <= count < 2**63:
            raise Refused(f"The certificate's ledger has {name} = {count!r}, no count.")
    return Ledger(**found)
