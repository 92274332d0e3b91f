"""The command `crosslens`, what it prints, and `crosslens doctor`."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import crosslens
from crosslens import cli
from crosslens.cli import calibrate as calibrating
from crosslens.cli import console, doctor, main
from crosslens.cli.arguments import parse
from crosslens.cli.doctor import Cpu, Gpu, Machine
from crosslens.errors import CrosslensError, Diverged, Interrupted
from crosslens.kernels import measuring
from crosslens.training.config import TrainConfig

WELL = Machine(
    versions={"python": "3.11", "torch": "2.13"},
    cpu=Cpu(
        model="Some CPU",
        cores=8,
        usable=4,
        threads=4,
        bf16="amx",
        bf16_speed=6.0,
        copy_gb_per_s=10.0,
    ),
    memory_gb=32.0,
    memory_available_gb=30.0,
    disk_free_gb={"/here": 100.0},
    gpus=(),
    unused_gpu=False,
    mps=False,
    hub="reachable",
    extras={"peft": True},
    builtin=("bfloat16",),
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A subcommand `show` that does what the test sets as `.work`."""
    module = SimpleNamespace(got=None, work=lambda: 0)

    def run(argv: list[str]) -> int:
        module.got = list(argv)
        return module.work()

    module.run = run
    monkeypatch.setitem(sys.modules, "crosslens.cli.show", module)
    monkeypatch.setattr(cli, "show", module, raising=False)
    return module


def raiser(error: BaseException):
    def work() -> int:
        raise error

    return work


# ── dispatch ──


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["--debug"]])
def test_help_lists_every_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    wanted = [
        "demo",
        "train",
        "recipes",
        "resume",
        "evaluate",
        "diff",
        "interact",
        "prove",
        "report",
        "show",
        "runs",
        "organism",
        "doctor",
    ]
    assert list(cli.COMMANDS) == wanted
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert [line[0] for line in lines[: len(wanted)]] == wanted
    assert all(len(line) > 3 for line in lines[: len(wanted)])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"crosslens {crosslens.__version__}\n"


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr() == ("", "error: Unknown command 'trian'. Did you mean train?\n")
    assert main(["--qqq"]) == 2
    assert capsys.readouterr().err.endswith("See `crosslens --help`.\n")


def test_the_rest_of_the_line_reaches_the_command(command: SimpleNamespace) -> None:
    command.work = lambda: 4
    assert main(["show", "a", "--debug", "--top", "3"]) == 4
    assert command.got == ["a", "--top", "3"]


OOM = RuntimeError("CUDA out of memory. Tried to allocate 3 GiB.\nmore lines")
CPU_OOM = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (CrosslensError("All wrong."), 1, "error: All wrong."),
        (Diverged("Step 3."), 3, "error: Step 3."),
        (Interrupted("Saved."), 75, "error: Saved."),
        (KeyboardInterrupt(), 75, "interrupted: `crosslens resume RUN`"),
        (MemoryError(), 1, "error: The memory is used up. Use fewer"),
        (OOM, 1, "error: The memory is used up (CUDA out of memory. Tried to allocate 3 GiB). Use"),
        (CPU_OOM, 1, "error: The memory is used up ([enforce fail]"),
        (RuntimeError("size\nmismatch"), 1, "unexpected error (bug): RuntimeError: size mismatch"),
        (KeyError("x"), 1, "unexpected error (bug): KeyError: 'x' (run with --debug"),
    ],
)
def test_errors_are_one_line_and_a_code(
    command: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    said: str,
) -> None:
    command.work = raiser(error)
    assert main(["show"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.count("\n") == 1
    assert main(["show", "--debug"]) == code
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert said in err


def test_the_exit_of_a_parser_is_a_code(command: SimpleNamespace) -> None:
    for stop, code in ((SystemExit(0), 0), (SystemExit(2), 2), (SystemExit(), 0)):
        command.work = raiser(stop)
        assert main(["show"]) == code


def test_a_reader_that_leaves_is_no_error() -> None:
    program = (
        "import sys; from crosslens import cli; sys.stdin.read(1)\n"
        "code = cli.main(['--help']); sys.stderr.write(str(code))"
    )
    reading, writing = os.pipe()
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
        env=buffered,
    )
    os.close(writing)
    os.close(reading)
    _, err = child.communicate(b"x")
    assert (child.returncode, err) == (0, b"0")


def test_python_m_crosslens() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "crosslens", "tarin"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: Unknown command 'tarin'. Did you mean train?\n"


# ── console ──


def test_json_is_one_object_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"a": math.nan, "b": [1.5, -math.inf, (math.inf,)], "c": "é\n", "d": None})
    out = capsys.readouterr().out
    assert out == '{"a": null, "b": [1.5, null, [null]], "c": "é\\n", "d": null}\n'


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.12345, "0.123"),
        (31.92, "31.9"),
        (999, "999"),
        (999.4, "999"),
        (999.6, "1k"),
        (27_512, "27.5k"),
        (1_999_600, "2M"),
        (4.56e9, "4.56G"),
        (-1234, "-1.23k"),
        (0, "0"),
        (math.nan, "nan"),
        ("2 %", "2 %"),
    ],
)
def test_numbers(value: float | int | str, shown: str) -> None:
    assert console.number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7440, "2h04m"), (3600, "1h00m")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert console.duration(seconds) == shown


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with console.Progress(500, "steps", "train", clock=clock) as bar:
        bar.update(1, {"fvu": 0.9})
        clock.now += 29
        bar.update(99, {"fvu": 0.5})
        assert capsys.readouterr().err == ""
        clock.now += 1
        bar.update(100, {"fvu": 0.25, "l0": 31.94, "dead": "2 %"})
        expected = (
            "train: 100/500 steps · 3.33 steps/s · ETA 2m00s · fvu 0.25 · l0 31.9 · dead 2 %\n"
        )
        assert capsys.readouterr().err == expected
        clock.now += 10
        bar.update(200)
        assert capsys.readouterr().err == ""
        clock.now += 10
        bar.update(500, {"tokens/s": 27_512.0})
    out, err = capsys.readouterr()
    assert (out, err) == ("", "train: 500/500 steps · 50s · tokens/s 27.5k\n")


def test_the_last_line_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with console.Progress(2, "steps", "train", clock=clock) as bar:
        clock.now += 100
        bar.update(2)
    assert capsys.readouterr().err == "train: 2/2 steps · 0.02 steps/s · 1m40s\n"


def test_progress_of_a_resumed_job_counts_only_its_own_speed() -> None:
    clock = Clock()
    with console.Progress(500, "steps", "train", quiet=True, start=400, clock=clock) as bar:
        clock.now += 10
        bar.update(450)
        assert bar.status() == "450/500 steps · 5 steps/s · ETA 10s"


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with console.Progress(2, "steps", "train", quiet=True, clock=clock) as bar:
        clock.now += 100
        bar.update(2)
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=100, no_color=True)
    monkeypatch.setattr(console, "stderr_console", lambda: terminal)
    with console.Progress(500, "steps", "train", clock=Clock()) as bar:
        bar.update(250, {"fvu": 0.25, "note": "[b]"})
    last = stream.getvalue().replace("\n", "\r").rsplit("train", 1)[1]
    assert "━" in last
    assert "250/500 steps · fvu 0.25 · note [b]" in last


def test_colour_heeds_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.stderr_console().no_color


# ── doctor ──


def test_nothing_to_change_on_a_good_machine() -> None:
    assert doctor.advice(WELL) == []
    assert doctor.described(WELL).endswith("→ All is well.")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"disk_free_gb": {"/here": 100.0, "/there": 1.25}}, ["/there has 1.2 GB"]),
        ({"memory_available_gb": 2.5}, ["Only 2.5 GB of memory"]),
        ({"unused_gpu": True}, ["install a CUDA build"]),
        ({"cpu": replace(WELL.cpu, bf16_speed=0.25)}, ["0.25 times", "--fit.dtype float32"]),
        ({"cpu": replace(WELL.cpu, threads=8)}, ["8 threads for 4 usable", "OMP_NUM_THREADS=4"]),
        ({"hub": "offline"}, ["HF_HUB_OFFLINE is set", "`smollm2`"]),
        ({"hub": "unreachable"}, ["does not answer"]),
        ({"builtin": ()}, ["93 MB"]),
    ],
)
def test_each_shortcoming_has_its_advice(change: dict[str, object], said: list[str]) -> None:
    [line] = doctor.advice(replace(WELL, **change))  # type: ignore[arg-type]
    for part in said:
        assert part in line


def test_slow_bfloat16_on_the_cpu_matters_little_with_a_gpu() -> None:
    slow = replace(WELL, cpu=replace(WELL.cpu, bf16_speed=0.25))
    assert doctor.advice(replace(slow, gpus=(Gpu(name="H100", memory_gb=80.0),))) == []


def test_the_flags_that_doctor_advises_exist() -> None:
    [line] = doctor.advice(replace(WELL, cpu=replace(WELL.cpu, bf16_speed=0.25)))
    flags = line.rpartition(": use ")[2].rstrip(".").split()
    config = parse(TrainConfig, flags, TrainConfig(), prog="train", description="")
    assert (config.fit.dtype, config.models["base"].dtype) == ("float32", "float32")
    parse(TrainConfig, ["--fit.buffer-gb", "1"], TrainConfig(), prog="train", description="")


def test_the_limits_of_a_container(tmp_path: Path) -> None:
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.memory_limit(tmp_path) == (math.inf, 0.0)
    for quota, cores in (("max 100000", None), ("250000 100000", 3), ("50000 100000", 1)):
        (tmp_path / "cpu.max").write_text(quota + "\n")
        assert doctor.cpu_quota(tmp_path) == cores
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory_limit(tmp_path) == (math.inf, 0.0)
    (tmp_path / "memory.max").write_text("5000\n")
    assert doctor.memory_limit(tmp_path) == (5000.0, 1000.0)


@pytest.mark.parametrize(
    ("flags", "bf16"),
    [
        ("fpu avx512_bf16 amx_bf16 amx_tile", "amx"),
        ("fpu avx512_bf16", "avx512_bf16"),
        ("fpu avx512f", "none"),
    ],
)
def test_features_of_a_cpu(flags: str, bf16: str) -> None:
    text = f"processor\t: 0\nmodel name\t: A: B @ 3 GHz\nflags\t\t: {flags}\npower management:\n"
    assert doctor.cpu_features(text) == ("A: B @ 3 GHz", bf16)
    assert doctor.cpu_features("processor\t: 0\nFeatures\t: fp bf16\n")[1] == "arm"
    assert doctor.cpu_features("")[1] == "unknown"


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """A web server here, and the list whose last entry is the status it answers with."""
    status = [200]

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status[-1])
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as web:
        thread = threading.Thread(target=web.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}", status
        web.shutdown()
        thread.join()


def test_whether_the_hub_answers(
    server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address, status = server
    assert doctor.hub_access(address, offline=True) == "offline"
    for code, hub in ((200, "reachable"), (401, "reachable"), (403, "unreachable")):
        status.append(code)
        assert doctor.hub_access(address, offline=False) == hub
    assert doctor.hub_access("http://127.0.0.1:1", offline=False) == "unreachable"
    assert doctor.hub_access("nonsense", offline=False) == "unreachable"


def test_the_fastest_of_several_calls_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(ticks))
    calls: list[int] = []
    assert doctor.fastest(lambda: calls.append(1), budget=11.0) == 2.0
    assert len(calls) == 4


def test_doctor_finds_what_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path / "not" / "yet"))
    before = doctor.examine()
    assert {"bfloat16", "float32"}.isdisjoint(before.builtin)
    assert before.disk_free_gb[str(tmp_path / "not" / "yet")] > 0
    stem = f"{doctor.BUILT_IN.name}-{doctor.BUILT_IN.sha256[:16]}"
    (tmp_path / "not" / "yet" / "models" / f"{stem}-float32").mkdir(parents=True)
    assert "float32" in doctor.examine().builtin


def test_doctor_in_words_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert out.count("\n") == 1
    assert found["hub"] == "offline"
    assert found["versions"]["crosslens"] == crosslens.__version__
    assert found["cpu"]["usable"] <= len(os.sched_getaffinity(0))
    assert found["cpu"]["bf16_speed"] > 0
    assert 0 < found["memory_available_gb"] < found["memory_gb"]
    assert any("hub" in line for line in found["advice"])
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    names = ("versions", "cores", "bfloat16", "memory", "disk free", "hub", "built-in")
    for name in (*names, "kernels", "calibrated"):
        assert any(line.startswith(name) for line in out.splitlines())


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROSSLENS_CACHE", str(tmp_path))
    return tmp_path


def line_of(out: str, name: str) -> str:
    [line] = [line for line in out.splitlines() if line.startswith(name)]
    return line


def test_doctor_calibrates_once(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    before = line_of(capsys.readouterr().out, "calibrated")
    assert "never measured" in before
    assert "below 3 % active in bfloat16, 8 % active in float32, as is assumed" in before

    small = tuple(replace(size, rows=8, latents=64) for size in measuring.SIZES[:1])
    monkeypatch.setattr(measuring, "BUDGET", 0.0)
    quickly = functools.partial(measuring.measure, sizes=small)
    monkeypatch.setattr(calibrating, "measure", quickly)
    assert main(["doctor", "--calibrate", "--device", "cpu"]) == 0
    assert "operations/s" in line_of(capsys.readouterr().out, "calibrated")
    [kept] = (own_cache / "calibration").iterdir()

    monkeypatch.setattr(calibrating, "measure", lambda *_: pytest.fail("it was measured again"))
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["calibration_path"] == str(kept)
    assert {each["dtype"] for each in speed["calibration"]["measured"]} == {"bfloat16", "float32"}
    assert all(0 <= share <= 1 for share in speed["sparse_below"].values())

    kept.write_text("{")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "is damaged" in line_of(capsys.readouterr().out, "calibrated")


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("native", "C, found to be fine"),
        ("triton_rows", "Triton"),
        ("stock", "torch's own operations, which are slower: found to be fine"),
    ],
)
def test_doctor_tells_the_kernels(monkeypatch: pytest.MonkeyPatch, form: str, said: str) -> None:
    monkeypatch.setattr(calibrating, "kernels_in_use", lambda device: form)
    monkeypatch.setattr(calibrating, "built", lambda: SimpleNamespace(reason="found to be fine"))
    assert calibrating.kernels_told(torch.device("cpu")) == said


def test_doctor_refuses_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cuda:77"]) == 2
    assert "cuda:77" in capsys.readouterr().err
