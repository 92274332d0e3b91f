"""From text to a trained coder with sparsify's own trainer, on local folders and without a GPU.

python -m benchmarks.peers.sparsify_run MODEL TEXT --layer 15 …: what its command does, but that the
command places the model on `cuda:0` whatever the machine has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import load_dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from sparsify.data import chunk_and_tokenize
from transformers import AutoModel, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    for name in ("layer", "latents", "k", "tokens", "batch", "block"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", required=True)
    asked = parser.parse_args()
    model = AutoModel.from_pretrained(asked.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    text = load_dataset(str(asked.text), split="train")
    blocks = chunk_and_tokenize(text, tokenizer, max_seq_len=asked.block, num_proc=1)
    blocks = blocks.shuffle(42).select(range(asked.tokens // asked.block))
    config = TrainConfig(
        SparseCoderConfig(num_latents=asked.latents, k=asked.k),
        batch_size=asked.batch // asked.block,
        layers=[asked.layer],
        log_to_wandb=False,
        save_dir=asked.out,
    )
    Trainer(config, blocks, model).fit()


if __name__ == "__main__":
    main()
