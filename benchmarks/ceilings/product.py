"""How fast this machine multiplies: the encoder's product, and nothing else, is a step."""

from __future__ import annotations

import torch

from benchmarks.task import Task, Tick

PACKAGE = "torch"


def train(task: Task, tick: Tick) -> None:
    """rows × weightsᵀ in the task's number format, into memory that is there already."""
    shape, dtype = task.shape, getattr(torch, task.setting)
    rows_BX = task.rows().to(dtype)
    weights_LX = torch.empty(shape.latents, shape.row, dtype=dtype).normal_()
    product_BL = torch.empty(shape.batch, shape.latents, dtype=dtype)
    while True:
        tick()
        torch.mm(rows_BX, weights_LX.T, out=product_BL)
