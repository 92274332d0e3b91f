"""crosscode: its BatchTopK crosscoder, from the folder that the user names.

Its trainer holds the step inside a loop over a language model's activations, so the step is put
together here from the same parts in the same order: forward, firing statistics, squared errors
summed over models, sites and widths, backward, clipping to norm 1, Adam with β1 = 0 and β2 = 0.999.
`bfloat16_weights` is its own `dtype`.
"""

from __future__ import annotations

import torch
from crosscode.models.acausal_crosscoder import ModelHookpointAcausalCrosscoder
from crosscode.models.activations.topk import BatchTopkActivation
from crosscode.models.initialization.anthropic_transpose import AnthropicTransposeInit
from crosscode.trainers.firing_tracker import FiringTracker

from benchmarks.task import Task, Tick

PACKAGE = "crosscode"


def train(task: Task, tick: Tick) -> None:
    shape = task.shape
    dtype = torch.bfloat16 if task.setting == "bfloat16_weights" else torch.float32
    rows_BMPD = task.rows().to(dtype).reshape(shape.batch, 1, shape.sites, shape.width)
    torch.manual_seed(0)
    coder = ModelHookpointAcausalCrosscoder(
        n_models=1,
        n_hookpoints=shape.sites,
        d_model=shape.width,
        n_latents=shape.latents,
        activation_fn=BatchTopkActivation(k_per_example=shape.k),
        init_strategy=AnthropicTransposeInit(dec_init_norm=0.1),
        dtype=dtype,
    )
    tracker = FiringTracker(activation_size=shape.latents, device=torch.device("cpu"))
    optimizer = torch.optim.Adam(coder.parameters(), lr=5e-5, betas=(0.0, 0.999))
    while True:
        tick()
        optimizer.zero_grad()
        shown = coder.forward_train(rows_BMPD)
        tracker.add_batch(shown.latents_BL)
        error_BMPD = shown.recon_acts_BMPD - rows_BMPD
        error_BMPD.pow(2).sum((1, 2, 3)).mean().backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
