"""EleutherAI's sparsify: its TopK SAE with fused encoder and bag decoder.

Its trainer holds the step inside a hook on a language model, so the step is put together here from
the same parts in the same order: the decoder's norms, forward, FVU and its backward pass, the
decoder's gradient projected, schedule-free sign descent (its default; it clips nothing), firing
statistics. `bfloat16` is the autocast that its forward pass has on a GPU. Without Triton, as here,
it decodes with torch's `embedding_bag`.
"""

from __future__ import annotations

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder

from benchmarks.task import Task, Tick

PACKAGE = "eai-sparsify"


def train(task: Task, tick: Tick) -> None:
    shape, rows_BX = task.shape, task.rows()
    torch.manual_seed(0)
    config = SparseCoderConfig(num_latents=shape.latents, k=shape.k)
    sae = SparseCoder(shape.row, config, "cpu", dtype=torch.float32)
    sae.b_dec.data = rows_BX.mean(0)
    lr = 5e-3 / (shape.latents / 2**14) ** 0.5
    optimizer = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=lr), momentum=0.95)
    optimizer.train()
    idle_L = torch.zeros(shape.latents, dtype=torch.long)
    while True:
        tick()
        sae.set_decoder_norm_to_unit_norm()
        variance = (rows_BX - rows_BX.mean(0)).pow(2).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=task.setting == "bfloat16"):
            out = sae(x=rows_BX, y=rows_BX, total_variance=variance)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        idle_L += shape.batch
        idle_L[out.latent_indices.flatten()] = 0
