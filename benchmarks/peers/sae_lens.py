"""SAELens: its TopK SAE, stepped by its own trainer.

TopK, not BatchTopK: its BatchTopK sorts all of rows × latents and is slower. `SAETrainer.step`
does it all: forward, losses, firing statistics, backward, clipping to norm 1, Adam, schedules.
`float32_sparse` is its `use_sparse_activations`, which on a CPU works only without
`rescale_acts_by_decoder_norm`; `bfloat16` its `autocast`; `bfloat16_weights` its `dtype`.
"""

from __future__ import annotations

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer

from benchmarks.task import Task, Tick

PACKAGE = "sae-lens"
LR = 3e-4


def train(task: Task, tick: Tick) -> None:
    shape, rows_BX = task.shape, task.rows()
    sparse, small = task.setting == "float32_sparse", task.setting == "bfloat16_weights"
    torch.manual_seed(0)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=shape.row,
            d_sae=shape.latents,
            k=shape.k,
            use_sparse_activations=sparse,
            rescale_acts_by_decoder_norm=not sparse,
            dtype="bfloat16" if small else "float32",
        )
    )
    config = SAETrainerConfig(
        total_training_samples=10**12,
        train_batch_size_samples=shape.batch,
        lr=LR,
        lr_end=LR / 10,
        autocast=task.setting == "bfloat16",
    )
    trainer = SAETrainer(config, sae, iter(()))
    if small:
        rows_BX = rows_BX.bfloat16()
    while True:
        tick()
        trainer.step(rows_BX)
        trainer.n_training_steps += 1  # its loop does, outside of `step`
