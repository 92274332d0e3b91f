"""What a training step costs at least, from what the machine does in the same run.

One encoder product at the measured rate, plus at the measured bandwidth of a copy: the sparse
passes, each of which reads a row's width for every active latent of every row (decode, the
decoder's weight gradient, the sampled product that is the code's gradient, the encoder's weight
gradient), and one pass of Adam.

Bytes are counted alike on both sides: every byte read and every byte written. A copy of n bytes
counts 2 n. A sparse pass counts its reads, batch × k × width × 2 bytes (bfloat16), its writes being
a k-th of that or less. Adam reads weight, gradient and two moments and writes all but the gradient:
7 × 4 = 28 bytes a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.task import Shape

SPARSE_PASSES = 4
BFLOAT16 = 2
ADAM = 28
"""Bytes read and written per parameter."""
COPIED = 2**29
"""Bytes that the copy reads, and as many that it writes: far more than any cache holds."""


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds of one step at least, part by part."""

    encoder: float
    sparse: float
    optimizer: float
    batch: int

    @property
    def tokens_per_s(self) -> float:
        return self.batch / (self.encoder + self.sparse + self.optimizer)


def roofline(shape: Shape, flop_per_s: float, bytes_per_s: float) -> Roofline:
    """The least time for one step.

    Args:
        flop_per_s: of the encoder's product; a multiplication with its addition counts as 2.
        bytes_per_s: of a copy, read and written together.
    """
    return Roofline(
        encoder=product_flop(shape) / flop_per_s,
        sparse=SPARSE_PASSES * shape.batch * shape.k * shape.row * BFLOAT16 / bytes_per_s,
        optimizer=ADAM * shape.parameters / bytes_per_s,
        batch=shape.batch,
    )


def product_flop(shape: Shape) -> int:
    """Operations of rows × read width × latents."""
    return 2 * shape.batch * shape.row * shape.latents
