"""crosslens: rows written into the slots of the buffer that training reads from."""

from __future__ import annotations

import json

import torch

from benchmarks.harvesters import Job
from benchmarks.task import Task, Tick
from crosslens.activations import Source, TokenPolicy, site_layout
from crosslens.activations.filling import fill
from crosslens.lm import ModelSpec, open_model
from crosslens.text import Blocks

PACKAGE = "crosslens"


def train(task: Task, tick: Tick) -> None:
    """All that a training does for a chunk: the models, the token policy, the buffer."""
    job = Job.read(task.folder)
    model = open_model(ModelSpec(path=job.model, dtype=task.setting, device="cpu"))
    blocks = Blocks.load(job.folder, "blocks")
    layout = site_layout({"base": model}, job.sites)
    job.note_norms(f"crosslens-{task.setting}", model.capture(next(job.chunks()), job.sites))
    median_P = torch.tensor(json.loads((job.folder / "median.json").read_text()))
    source = Source({"base": model}, layout, blocks, TokenPolicy(), median_P, job.blocks)
    rows_NX = torch.zeros(source.n_positions, layout.width, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    slot_N = torch.randperm(len(rows_NX), generator=generator)
    while True:
        for index in range(source.n_chunks):
            tick()
            fill(source, index, slot_N[source.rows_of(index)], rows_NX)
