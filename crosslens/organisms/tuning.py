"""LoRA fine-tuning on the answers of chat rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crosslens.errors import Diverged, UsageError
from crosslens.organisms.plan import OrganismPlan, Report
from crosslens.organisms.rows import Row

_WARMUP = 5  # steps


def with_lora(module: nn.Module, plan: OrganismPlan) -> Any:
    """A PEFT model around `module`, which gets the layers of a fresh LoRA: at first they do
    nothing. Drawn from torch's generator; in float32 whatever the module's format.

    Raises:
        UsageError: the module has none of the plan's.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules=list(plan.modules),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it uses a name of old itself
            return get_peft_model(module, config)
    except ValueError as error:
        last = sorted({name.rpartition(".")[2] for name, _ in linear_layers(module)})
        raise UsageError(
            f"modules: {type(module).__name__} has none called {', '.join(plan.modules)}. Its "
            f"linear layers are called {', '.join(last)}."
        ) from error


def linear_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer and its name."""
    return [each for each in module.named_modules() if isinstance(each[1], nn.Linear)]


def train(adapted: Any, rows: Sequence[Row], plan: OrganismPlan, report: Report) -> list[float]:
    """Train a PEFT model's adapter on `plan.rows` rows a step, in order; the loss of each step.

    Raises:
        Diverged: the loss is not finite.
    """
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=plan.lr, weight_decay=0.0)
    losses: list[float] = []
    for step in range(plan.steps):
        loss = row_loss(adapted, rows[step * plan.rows : (step + 1) * plan.rows])
        losses.append(loss.item())
        if not loss.isfinite():
            raise Diverged(f"The loss is {losses[-1]} at step {step + 1}. Try a smaller lr.")
        optimizer.param_groups[0]["lr"] = plan.lr * _share(step, plan.steps)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report("train", step + 1, plan.steps, {"loss": losses[-1]})
    return losses


def row_loss(adapted: Any, rows: Sequence[Row]) -> Tensor:
    """Mean over positions, in nats, of what the rows ask for.

    Rows to learn: the cross-entropy of each token of the answer. Rows to keep: at each position the
    KL divergence of the model from itself without the adapter. Every position counts alike, so that
    neither kind has the say over how an answer begins.
    """
    learn = [row for row in rows if row.learn]
    keep = [row for row in rows if not row.learn]
    parts = [_learning(adapted, learn)] if learn else []
    parts += [_keeping(adapted, keep)] if keep else []
    losses_R = torch.cat(parts)
    return losses_R.mean()


def _learning(adapted: Any, rows: Sequence[Row]) -> Tensor:
    tokens_BT, _ = _padded(rows, adapted.device)
    answer_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
    for i, row in enumerate(rows):
        answer_BT[i, len(row.prompt) : len(row.prompt) + len(row.answer)] = True
    picked_BT = answer_BT[:, 1:]
    logits_RV = _logits(adapted, tokens_BT)[:, :-1][picked_BT]
    return F.cross_entropy(logits_RV.float(), tokens_BT[:, 1:][picked_BT], reduction="none")


def _keeping(adapted: Any, rows: Sequence[Row]) -> Tensor:
    tokens_BT, real_BT = _padded(rows, adapted.device)
    with torch.no_grad(), adapted.disable_adapter():
        before_RV = _logits(adapted, tokens_BT)[real_BT].float().log_softmax(-1)
    after_RV = _logits(adapted, tokens_BT)[real_BT].float().log_softmax(-1)
    return F.kl_div(after_RV, before_RV, reduction="none", log_target=True).sum(-1)


def _padded(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens, padded on the right, where a causal model needs no mask; and which are real."""
    width = max(len(row.prompt) + len(row.answer) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    real_BT = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids = row.prompt + row.answer
        tokens_BT[i, : len(ids)] = torch.tensor(ids)
        real_BT[i, : len(ids)] = True
    return tokens_BT.to(device), real_BT.to(device)


def _logits(adapted: Any, tokens_BT: Tensor) -> Tensor:
    logits_BTV: Tensor = adapted(input_ids=tokens_BT, use_cache=False).logits
    return logits_BTV


def _share(step: int, steps: int) -> float:
    return min((step + 1) / _WARMUP, (steps - step) / steps)
