"""A second model to compare with: a LoRA fine-tune of the first, made here in a minute or two."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from crosslens.lm import ModelSpec, next_token_loss, open_model
from crosslens.storage import save_json
from crosslens.text import Corpus, TextConfig, build_blocks


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """LoRA of rank 8 on the attention's queries and values and the MLP's output."""

    steps: int = 40
    blocks: int = 4
    """Blocks of 256 tokens per step, all of them chat."""
    lr: float = 1e-3
    seed: int = 1


def fine_tuned(spec: ModelSpec, folder: Path, plan: FineTune) -> ModelSpec:
    """`spec` with the adapter in `folder`, trained first if it is not there yet."""
    if not (folder / "loss.json").is_file():
        losses = _train(spec, folder, plan)
        save_json(folder / "loss.json", {"losses": losses})
    return ModelSpec(path=spec.path, adapter=str(folder), dtype=spec.dtype, device=spec.device)


def _train(spec: ModelSpec, folder: Path, plan: FineTune) -> list[float]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(plan.seed)
    model = open_model(ModelSpec(path=spec.path, dtype="float32", device=spec.device))
    lora = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about names it will drop
        adapted = get_peft_model(model.module, lora)
    weights = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=plan.lr)
    losses = []
    for tokens_BT in _chat(model.tokenizer, plan):
        losses.append(_step(adapted, tokens_BT.to(model.device), optimizer))
    adapted.save_pretrained(folder)
    return losses


def _chat(tokenizer: object, plan: FineTune) -> list[Tensor]:
    """Token blocks [B, T] of each step."""
    wanted = plan.steps * plan.blocks * 256
    corpus = Corpus(source="stdlib-chat", chat=chat_style(tokenizer))
    text = TextConfig(corpora={"chat": corpus}, tokens=wanted, heldout=2000, block=256)
    blocks = build_blocks(text, tokenizer, plan.seed).train
    return list(blocks.tokens_NT.split(plan.blocks))[: plan.steps]


def chat_style(tokenizer: object) -> str:
    """The tokenizer's chat template if it has one."""
    return "template" if getattr(tokenizer, "chat_template", None) else "plain"


def _step(adapted: nn.Module, tokens_BT: Tensor, optimizer: torch.optim.Optimizer) -> float:
    logits_BTV = adapted(input_ids=tokens_BT.long(), use_cache=False).logits
    loss = next_token_loss(logits_BTV, tokens_BT).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
