"""Transformers alone: a forward pass of the first layers, from which nothing is taken.

Beyond a site in the middle of its last layer it also computes that layer's end and the final norm.
"""

from __future__ import annotations

import torch
from transformers import AutoModel

from benchmarks.harvesters import Job
from benchmarks.task import Task, Tick

PACKAGE = "transformers"


def train(task: Task, tick: Tick) -> None:
    job = Job.read(task.folder)
    model = AutoModel.from_pretrained(
        job.model, dtype=getattr(torch, task.setting), num_hidden_layers=job.layers
    ).eval()
    with torch.inference_mode():
        for tokens_BT in job.chunks():
            tick()
            model(input_ids=tokens_BT, use_cache=False)
