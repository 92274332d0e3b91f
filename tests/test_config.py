"""Configurations as plain data and files: strict, exact, and free of surprises."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crosslens.config import differences, from_plain, load_file, to_plain, to_yaml
from crosslens.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ReLU:
    """Nothing to choose."""


@dataclass(frozen=True, kw_only=True)
class BatchTopK:
    k: int = 32
    decay: float = 0.9

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, found {self.k}.")


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str = "smollm2"
    revision: str | None = "main"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


@dataclass(frozen=True, kw_only=True)
class Coder:
    latents: int = 4096
    activation: ReLU | BatchTopK = BatchTopK()
    gate: ReLU | BatchTopK | None = None
    tied: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    models: dict[str, Model] = field(default_factory=lambda: {"base": Model()})
    terms: dict[str, ReLU | BatchTopK] = field(default_factory=dict)
    coder: Coder = Coder()
    probe: Coder | None = None
    sites: tuple[str, ...] = ("resid_post.*",)
    betas: tuple[float, float] = (0.9, 0.999)
    lr: float = 1e-3
    steps: int | Literal["auto"] = "auto"
    folder: Path | None = None


names = st.text(alphabet="abc-_1", min_size=1, max_size=4)
texts = st.text(max_size=6) | st.sampled_from(["1e-3", "null", "yes", "2024-01-01", "12", "é\n"])
floats = st.floats(allow_nan=False, allow_infinity=False)
activations = st.just(ReLU()) | st.builds(BatchTopK, k=st.integers(1), decay=floats)
models = st.builds(Model, path=texts, revision=st.none() | texts)
coders = st.builds(
    Coder,
    latents=st.integers(),
    activation=activations,
    gate=st.none() | activations,
    tied=st.booleans(),
)
configs = st.builds(
    Config,
    models=st.dictionaries(names, models, max_size=2),
    terms=st.dictionaries(names, activations, max_size=2),
    coder=coders,
    probe=st.none() | coders,
    sites=st.lists(texts, max_size=3).map(tuple),
    betas=st.tuples(floats, floats),
    lr=floats,
    steps=st.just("auto") | st.integers(),
    folder=st.none() | st.just(Path("a/b")),
)


def changed(plain: dict[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    """`plain` with what stands at dotted keys put in, or taken out if None and an entry there;
    written apart from the code under test."""
    tree: dict[str, Any] = copy.deepcopy(plain)
    for path, value in flat.items():
        *above, last = path.split(".")
        place = tree
        for key in above:
            if place.get(key) is None:
                place[key] = {}
            place = place[key]
        if last == "kind":
            place.clear()
        if value is None and above and above[-1] in ("models", "terms"):
            del place[last]
        else:
            place[last] = value
    return tree


@settings(deadline=None)
@given(configs)
def test_plain_data_round_trips_through_json(config: Config) -> None:
    plain = to_plain(config)
    assert json.loads(json.dumps(plain)) == plain
    assert from_plain(Config, plain, "memory") == config


@settings(deadline=None)
@given(config=configs, default=configs)
def test_a_whole_file_is_the_config_whatever_the_default(
    config: Config, default: Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tmp_path_factory.getbasetemp() / "whole.yaml"
    whole.write_text(to_yaml(config), encoding="utf-8")
    assert load_file(Config, whole, default) == config


@settings(deadline=None)
@given(config=configs, default=configs)
def test_the_differences_turn_the_default_into_the_config(config: Config, default: Config) -> None:
    plain = changed(to_plain(default), differences(config, default))
    assert from_plain(Config, plain, "memory") == config


def test_plain_form() -> None:
    config = Config(terms={"l1": ReLU()}, coder=Coder(gate=ReLU()), steps=3)
    assert to_plain(config) == {
        "models": {"base": {"path": "smollm2", "revision": "main", "dtype": "bfloat16"}},
        "terms": {"l1": {"kind": "relu"}},
        "coder": {
            "latents": 4096,
            "activation": {"kind": "batchtopk", "k": 32, "decay": 0.9},
            "gate": {"kind": "relu"},
            "tied": False,
        },
        "probe": None,
        "sites": ["resid_post.*"],
        "betas": [0.9, 0.999],
        "lr": 0.001,
        "steps": 3,
        "folder": None,
    }


def test_differences_name_only_what_changed() -> None:
    default = Config()
    changed = replace(
        default,
        lr=0.1,
        coder=replace(default.coder, activation=ReLU()),
        models={"chat": Model(path="x")},
    )
    assert differences(default, default) == {}
    assert differences(changed, default) == {
        "models.chat.path": "x",
        "models.chat.revision": "main",
        "models.chat.dtype": "bfloat16",
        "models.base": None,
        "coder.activation.kind": "relu",
        "lr": 0.1,
    }


def test_whole_numbers_become_floats_where_floats_are_meant() -> None:
    lr = from_plain(Config, {"lr": 1}, "memory").lr
    assert type(lr) is float
    assert lr == 1.0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"coder": {"activaton": {}}}, ["coder.activaton: unknown key.", "activation?"]),
        ({"zzz": 1}, ["zzz: unknown key", "known here: models, terms"]),
        ({"models": {"chat": {"pth": "x"}}}, ["models.chat.pth:", "mean path?"]),
        ({"terms": {"a": {"kind": "batchtopk", "kk": 1}}}, ["terms.a.kk: unknown key."]),
        ({"coder": {"latents": "many"}}, ["coder.latents:", "a whole number", "'many' (str)"]),
        ({"coder": {"latents": 1.5}}, ["coder.latents:", "1.5 (float)"]),
        ({"coder": {"latents": 2.0}}, ["coder.latents:", "2.0 (float)"]),
        ({"coder": {"latents": True}}, ["coder.latents:", "True (bool)"]),
        ({"coder": {"latents": None}}, ["coder.latents:", "found nothing (null)"]),
        ({"coder": {"tied": 1}}, ["coder.tied:", "true or false", "1 (int)"]),
        ({"coder": 3}, ["coder:", "a mapping", "3 (int)"]),
        ({"coder": {"activation": "relu"}}, ["coder.activation:", "relu, batchtopk"]),
        ({"coder": {"activation": {"k": 3}}}, ["coder.activation:", "`kind` is missing"]),
        ({"coder": {"activation": {"kind": "batchtop"}}}, ["'batchtop'", "Did you mean batchtopk"]),
        ({"coder": {"activation": {"kind": ["relu"]}}}, ["coder.activation:", "known kind"]),
        ({"coder": {"activation": {"kind": "batchtopk", "k": 0}}}, ["coder.activation: k must"]),
        ({"lr": True}, ["lr:", "a number"]),
        ({"lr": "1"}, ["lr:", "'1' (str)"]),
        ({"sites": "resid"}, ["sites:", "a list", "'resid' (str)"]),
        ({"sites": ["a", 3]}, ["sites.1:", "text", "3 (int)", "quotes"]),
        ({"betas": [0.9]}, ["betas:"]),
        ({"betas": [0.9, "x"]}, ["betas.1:"]),
        ({"models": ["base"]}, ["models:", "a mapping"]),
        ({"models": {"base": {"dtype": "bfloat"}}}, ["models.base.dtype:", "mean bfloat16"]),
        ({"steps": "atuo"}, ["steps:", "a whole number or one of auto"]),
        ({"steps": [1]}, ["steps:", "[1] (list)"]),
        ({"lr": "x", "sites": 3}, ["sites:", "(1 more"]),
    ],
)
def test_wrong_data_is_refused_with_its_path(data: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        from_plain(Config, data, "run.json")
    message = str(caught.value)
    assert message.startswith("run.json: ")
    for part in said:
        assert part in message


@dataclass(frozen=True, kw_only=True)
class Needs:
    k: int


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UsageError, match=r"^a: k: this key is missing"):
        from_plain(Needs, {}, "a")


@dataclass(frozen=True, kw_only=True)
class Level:
    level: Literal[0, 1] = 0


def test_true_is_not_one() -> None:
    assert from_plain(Level, {"level": 1}, "a").level == 1
    with pytest.raises(UsageError, match=r"level: expected one of 0, 1, found True \(bool\)"):
        from_plain(Level, {"level": True}, "a")


@dataclass(frozen=True, kw_only=True)
class Buggy:
    k: int = 0

    def __post_init__(self) -> None:
        assert self.k == 0, "a bug in the class"


def test_a_bug_is_not_passed_off_as_the_users_mistake() -> None:
    with pytest.raises(AssertionError, match="a bug in the class"):
        from_plain(Buggy, {"k": 1}, "a")


def overlaid(tmp_path: Path, text: str, default: Config | None = None) -> Config:
    path = tmp_path / "a.yaml"
    path.write_text(text, encoding="utf-8")
    return load_file(Config, path, default or Config())


def test_a_file_is_laid_over_the_default(tmp_path: Path) -> None:
    default = Config(lr=0.5, coder=Coder(latents=8, activation=BatchTopK(k=7, decay=0.5)))
    got = overlaid(tmp_path, "coder: {activation: {k: 3}, tied: true}\nlr: 1e-5\n", default)
    expected = Coder(latents=8, activation=BatchTopK(k=3, decay=0.5), tied=True)
    assert got == replace(default, coder=expected, lr=1e-5)


def test_another_kind_starts_from_its_own_defaults(tmp_path: Path) -> None:
    default = Config(coder=Coder(activation=ReLU()))
    got = overlaid(tmp_path, "coder: {activation: {kind: batchtopk, decay: 0.25}}", default)
    assert got.coder.activation == BatchTopK(k=32, decay=0.25)


def test_entries_are_those_that_the_file_lists(tmp_path: Path) -> None:
    default = Config(models={"a": Model(path="x", revision="r"), "b": Model()})
    got = overlaid(tmp_path, "models: {a: {path: y}, c: {revision: s}}", default)
    assert got.models == {"a": Model(path="y", revision="r"), "c": Model(revision="s")}
    assert overlaid(tmp_path, "lr: 0.5", default).models == default.models


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert overlaid(tmp_path, "# nothing yet\n") == Config()


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "lr: 0.1\ncoder:\n  activaton: 3\n", "a.yaml:3: coder.activaton: unknown"),
        ("a.yaml", "lr: 0.1\nsites:\n- a\n- 3\n", "a.yaml:2: sites.1: expected text"),
        ("a.yaml", "lr: 1\nlr: 2\n", "line 2: the key 'lr' stands there twice"),
        ("a.json", '{"lr": 1, "lr": 2}', "the key 'lr' stands there twice"),
        ("a.yaml", "- 1\n", "must hold keys and values"),
        ("a.yaml", "lr: [1\n", "not a valid configuration file"),
        ("a.json", "{lr: 1}", "not a valid configuration file"),
        ("a.yaml", "lr: &a [*a]\n", "used again by a YAML alias"),
        ("a.yaml", "lr: " + "[" * 5000, "nested too deeply"),
        ("a.yaml", "? [a]\n: 1\n", "not a valid configuration file"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load_file(Config, path, Config())
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_nested_aliases_do_not_unfold(tmp_path: Path) -> None:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(UsageError, match="alias"):
        overlaid(tmp_path, "\n".join(["a0: &a0 [x]", *levels]))


def test_a_missing_and_an_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml could not be read: No such file"):
        load_file(Config, tmp_path / "nowhere.yaml", Config())
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.yaml is not a valid"):
        load_file(Config, tmp_path / "binary.yaml", Config())


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system"])
def test_a_file_cannot_run_code(tmp_path: Path, tag: str) -> None:
    witness = tmp_path / "witness"
    with pytest.raises(UsageError, match="could not determine a constructor"):
        overlaid(tmp_path, f"lr: {tag} ['touch {witness}']\n")
    assert not witness.exists()
