"""How fast this machine copies: one copy from one place to another is a step."""

from __future__ import annotations

import torch

from benchmarks.roofline import COPIED
from benchmarks.task import Task, Tick

PACKAGE = "torch"


def train(task: Task, tick: Tick) -> None:
    source = torch.zeros(COPIED // 4)
    target = torch.empty_like(source).zero_()
    while True:
        tick()
        target.copy_(source)
