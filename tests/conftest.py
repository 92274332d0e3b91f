"""Small models and a tokenizer made on the spot: no test needs a network."""

from __future__ import annotations

import os

# Set before any library reads them: no test may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import inspect
import json
import shutil
from pathlib import Path

import pytest


def build_tiny_tokenizer(size: int = 400):
    """A byte-level BPE tokenizer of `size` entries, trained on the source of `json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([inspect.getsource(json)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
    )


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return build_tiny_tokenizer()


@pytest.fixture(scope="session")
def other_tokenizer():
    """Tokenises otherwise than `tiny_tokenizer`."""
    return build_tiny_tokenizer(size=350)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tiny_tokenizer) -> Path:
    """A folder with a random Llama of four layers and its tokenizer, as users have them."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=tiny_tokenizer.bos_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory, tiny_model_folder) -> dict[str, Path]:
    """The tiny model, and one whose weights differ a little, as a fine-tuned one's do."""
    import torch
    from safetensors.torch import load_file, save_file

    chat = tmp_path_factory.mktemp("tiny-chat") / "model"
    shutil.copytree(tiny_model_folder, chat)
    weights = load_file(chat / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        weights[name] = weight + 0.01 * torch.randn(weight.shape, generator=generator)
    save_file(weights, chat / "model.safetensors", metadata={"format": "pt"})
    return {"base": tiny_model_folder, "chat": chat}
