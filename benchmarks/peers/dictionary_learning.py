"""dictionary_learning: its BatchTopK SAE, stepped by its own trainer.

`BatchTopKTrainer.update` does it all: forward, losses, backward, the decoder's gradient projected,
clipping to norm 1, Adam, the decoder's norms. `bfloat16` runs it under autocast, as the library's
`autocast_dtype` does on a GPU; on a CPU the library itself switches that off.
"""

from __future__ import annotations

import itertools

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

from benchmarks.task import Task, Tick

PACKAGE = "dictionary-learning"


def train(task: Task, tick: Tick) -> None:
    shape, rows_BX = task.shape, task.rows()
    trainer = BatchTopKTrainer(
        steps=10**9,
        activation_dim=shape.row,
        dict_size=shape.latents,
        k=shape.k,
        layer=0,
        lm_name="random rows",
        seed=0,
        device="cpu",
    )
    for step in itertools.count():
        tick()
        with torch.autocast("cpu", torch.bfloat16, enabled=task.setting == "bfloat16"):
            trainer.update(step, rows_BX)
