"""TransformerLens: its bridge over the same weights, `run_with_cache` of the sites, stopped after
the layer of the deepest."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.harvesters import Job
from benchmarks.task import Task, Tick

PACKAGE = "transformer-lens"


def train(task: Task, tick: Tick) -> None:
    job = Job.read(task.folder)
    dtype = getattr(torch, task.setting)
    bridge = TransformerBridge.boot_transformers(job.model, device="cpu", dtype=dtype).eval()
    names = [hook(site) for site in job.sites]

    def harvest(tokens_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        _, cache = bridge.run_with_cache(
            tokens_BT, names_filter=names, stop_at_layer=job.layers, return_cache_object=False
        )
        return {site: cache[name] for site, name in zip(job.sites, names, strict=True)}

    with torch.inference_mode():
        job.note_norms(f"transformer_lens-{task.setting}", harvest(next(job.chunks())))
        for tokens_BT in job.chunks():
            tick()
            harvest(tokens_BT)


def hook(site: str) -> str:
    """`resid_mid.5` as it calls it."""
    kind, _, layer = site.partition(".")
    return f"blocks.{layer}.hook_{kind}"
