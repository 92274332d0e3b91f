"""Command lines over configuration classes made up here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import tyro

from crosslens.cli.arguments import parse, parse_with, take_option
from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """Keeps what is positive."""


@dataclass(frozen=True, kw_only=True)
class TopK:
    """Keeps the k largest of a row."""

    k: int
    """How many latents of a row stay active."""


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    """Keeps the B·k largest of a batch."""

    k: int = 32
    """How many latents of a row stay active, on average."""
    decay: float = 0.9

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, found {self.k}")


@dataclass(frozen=True, kw_only=True)
class Gated:
    """A choice within a choice."""

    inner: ReLU | BatchTopK = ReLU()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model under study."""

    path: str = "smollm2"
    """Built-in name, hub id, folder or file."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Coder:
    """The coder."""

    latents: int = 4096
    """How many latents the coder has."""
    activation: ReLU | TopK | BatchTopK = BatchTopK()
    gate: ReLU | TopK | Gated | None = None
    skip_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything.

    Attributes:
        lr: Learning rate.
    """

    models: dict[str, Model] = field(default_factory=lambda: {"base": Model()})
    terms: dict[str, ReLU | BatchTopK] = field(default_factory=lambda: {"aux": ReLU()})
    coder: Coder = Coder()
    probe: Coder | None = None
    sites: tuple[str, ...] = ("resid_post.*",)
    betas: tuple[float, float] = (0.9, 0.999)
    lr: float = 1e-3

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError("lr must be positive")


def parsed(*argv: str, default: Config | None = None) -> Config:
    return parse(Config, argv, default or Config(), prog="crosslens train", description="Train.")


def coder(**changes: object) -> Config:
    return Config(coder=replace(Coder(), **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", Config()),
        ("--lr 0.5", Config(lr=0.5)),
        ("--lr=1e-4", Config(lr=1e-4)),
        ("--sites resid_mid.3 final", Config(sites=("resid_mid.3", "final"))),
        ("--sites resid_post.* --lr 1", Config(lr=1.0)),
        ("--betas 0.5 0.75", Config(betas=(0.5, 0.75))),
        ("--coder.latents 7", coder(latents=7)),
        ("--coder.skip-bias", coder(skip_bias=True)),
        ("--coder.skip_bias", coder(skip_bias=True)),
        ("--coder.no-skip-bias", Config()),
        ("--coder.activation relu", coder(activation=ReLU())),
        ("--coder.activation=BatchTopK --coder.activation.k=3", coder(activation=BatchTopK(k=3))),
        ("--coder.activation.k 5 --coder.activation topk", coder(activation=TopK(k=5))),
        ("--coder.activation relu --coder.activation batchtopk", Config()),
        ("--coder.gate topk --coder.gate.k 2", coder(gate=TopK(k=2))),
        (
            "--coder.gate.inner.k 4 --coder.gate.inner batchtopk --coder.gate gated",
            coder(gate=Gated(inner=BatchTopK(k=4))),
        ),
        ("--models.base.revision None", Config()),
        ("--models.base.path x", Config(models={"base": Model(path="x")})),
        (
            "--models.chat.path x --models.base.dtype float32",
            Config(models={"base": Model(dtype="float32"), "chat": Model(path="x")}),
        ),
        (
            "--models.my-chat.path x --models.my_chat.dtype float32 --models.base none",
            Config(models={"my-chat": Model(path="x", dtype="float32")}),
        ),
        (
            "--terms.l1.k 9 --terms.l1 batchtopk",
            Config(terms={"aux": ReLU(), "l1": BatchTopK(k=9)}),
        ),
        ("--terms.aux none", Config(terms={})),
        ("--probe.latents 5", Config(probe=Coder(latents=5))),
        ("--probe.skip-bias", Config(probe=Coder(skip_bias=True))),
        ("--probe.no-skip-bias", Config(probe=Coder())),
        ("--probe coder", Config(probe=Coder())),
        (
            "--probe.activation topk --probe.activation.k 1",
            Config(probe=Coder(activation=TopK(k=1))),
        ),
    ],
)
def test_flags(line: str, expected: Config) -> None:
    assert parsed(*line.split()) == expected


def test_values_of_the_default_stay_where_no_flag_speaks() -> None:
    default = Config(
        models={"a": Model(path="x")},
        coder=Coder(activation=BatchTopK(k=7, decay=0.5)),
        probe=Coder(latents=3),
    )
    assert parsed("--lr", "2", default=default) == replace(default, lr=2.0)
    same_kind = parsed(
        *["--coder.activation", "batchtopk", "--coder.activation.k", "8"], default=default
    )
    assert same_kind.coder.activation == BatchTopK(k=8, decay=0.5)
    assert parsed("--probe", "none", default=default).probe is None


def test_files_lie_between_the_default_and_the_flags(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.json"
    first.write_text("lr: 0.5\ncoder: {latents: 8, activation: {kind: topk, k: 3}}\n")
    second.write_text('{"coder": {"latents": 9}, "models": {"base": {}, "chat": {"path": "x"}}}')
    got = parsed(
        *f"--models.chat.dtype float32 --config {first} --lr 0.25 --config={second}".split()
    )
    assert got == Config(
        lr=0.25,
        coder=Coder(latents=9, activation=TopK(k=3)),
        models={"base": Model(), "chat": Model(path="x", dtype="float32")},
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--coder.latens 3", ["Unknown flag --coder.latens.", "Did you mean --coder.latents"]),
        ("--coder.skip_bais", ["Unknown flag --coder.skip_bais.", "--coder.skip-bias"]),
        ("--confg x", ["Unknown flag --confg.", "--config"]),
        ("--models.chat.pth x", ["Unknown flag --models.chat.pth.", "--models.chat.path"]),
        ("--qqqqqq", ["Unknown flag --qqqqqq.", "See `crosslens train --help`"]),
        ("stray", ["Unexpected argument 'stray'"]),
        ("--config", ["--config needs a value"]),
        ("--config nowhere.yaml", ["nowhere.yaml could not be read"]),
        ("--coder.activation", ["--coder.activation needs a value"]),
        ("--coder.activation --lr 3", ["--coder.activation needs a value"]),
        ("--coder.activation tpk", ["relu, topk, batchtopk", "found 'tpk'", "mean topk"]),
        ("--coder.activation topk", ["Not given", "--coder.activation.k"]),
        (
            "--coder.activation relu --coder.activation.k 3",
            ["--coder.activation is relu;", "use --coder.activation topk or batchtopk"],
        ),
        ("--coder.gate.k 3", ["Say what --coder.gate is", "relu, topk, gated, none"]),
        ("--terms.l1.k 3", ["Say what --terms.l1 is", "relu, batchtopk, none"]),
        ("--coder.latents x", ["--coder.latents: expected a whole number, found 'x'"]),
        ("--coder.latents 1.5", ["--coder.latents: expected a whole number, found '1.5'"]),
        ("--lr x", ["--lr: expected a number, found 'x'"]),
        ("--lr", ["--lr"]),
        ("--models.base.dtype float", ["--models.base.dtype", "float32", "bfloat16"]),
        ("--coder.activation.k 0", ["coder.activation: k must be at least 1, found 0."]),
        ("--lr 0", ["lr must be positive."]),
    ],
)
def test_each_mistake_is_one_sentence(
    line: str, said: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(*line.split())
    message = str(caught.value)
    for part in said:
        assert part in message
    assert "\n" not in message
    assert not set("│─╭╯\x1b") & set(message)
    assert "config." not in message
    assert capfd.readouterr() == ("", "")


def test_a_config_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("coder:\n  activaton: {}\n")
    with pytest.raises(UsageError, match=r"a\.yaml:2: coder\.activaton: unknown key\. Did you"):
        parsed("--config", str(path))


def test_help_is_readable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parsed("--coder.activation", "topk", "--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for part in (
        "usage: crosslens train",
        "Train.",
        "--coder.latents INT",
        "How many latents the coder has. (default: 4096)",
        "How many latents of a row stay active. (required)",
        "Learning rate. (default: 0.001)",
        "--config FILE",
        "--coder.activation {relu,topk,batchtopk}  now topk;",
        "--models.NAME...",
        "--models.base none",
        "--terms.aux {relu,batchtopk,none}",
    ):
        assert part in out
    assert "decay" not in out


@dataclass(frozen=True, kw_only=True)
class Switches:
    json: bool = False
    """Print one JSON object."""
    dry_run: bool = False


def test_a_command_may_have_flags_beside_its_configuration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def with_switches(*argv: str) -> tuple[Switches, Config]:
        return parse_with(Switches(), argv, Config(), prog="crosslens train", description="Train.")

    assert with_switches("--dry-run", "--lr", "3") == (Switches(dry_run=True), Config(lr=3.0))
    assert with_switches() == (Switches(), Config())
    with pytest.raises(UsageError, match="Did you mean --dry-run"):
        with_switches("--dry-rn")
    with pytest.raises(SystemExit):
        with_switches("-h")
    assert "Print one JSON object. (default: False)" in capsys.readouterr().out


@dataclass(frozen=True, kw_only=True)
class Show:
    run: tyro.conf.Positional[str]
    """Folder of the run."""
    latent: tyro.conf.Positional[int]
    top: int = 5


def show(*argv: str) -> Show:
    return parse(Show, argv, None, prog="crosslens show", description="Show.")


def test_positional_values() -> None:
    assert show("runs/a", "3", "--top", "2") == Show(run="runs/a", latent=3, top=2)
    with pytest.raises(UsageError, match=r"^Not given, and there is no default: RUN, LATENT\. See"):
        show()
    with pytest.raises(UsageError, match="LATENT: expected a whole number, found 'x'"):
        show("a", "x")
    with pytest.raises(UsageError, match="Unexpected argument 'extra'"):
        show("a", "3", "extra")
    with pytest.raises(UsageError, match="Unknown flag --config"):
        show("a", "3", "--config=x.yaml")


def test_take_option() -> None:
    argv = ["--a", "1", "x", "--a=2", "--ab", "3"]
    assert take_option(argv, "--a") == (["1", "2"], ["x", "--ab", "3"])


def test_the_default_is_left_as_it_was() -> None:
    default = Config()
    before = dataclasses.asdict(default)
    line = "--models.chat.path x --models.base none --coder.activation relu"
    parsed(*line.split(), default=default)
    assert dataclasses.asdict(default) == before
