"""What the kernels in Triton run on the GPU. One program does one item: each sum has one order.

Arguments are as in `rows.c`. Triton reads this source, in which no type can be given.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _weighed_sum(index, weight, start, end, table, width, at, PAIRS: tl.constexpr):
    """Σ of weight · table[index, at] over the pairs from start to end."""
    sum_X = tl.zeros(at.shape, tl.float32)
    for first in range(start, end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        row = tl.load(index + pair, mask=pair < end, other=0).to(tl.int64)
        factor = tl.load(weight + pair, mask=pair < end, other=0.0).to(tl.float32)
        inside = (pair < end)[:, None] & (at < width)[None, :]
        part = tl.load(table + row[:, None] * width + at[None, :], mask=inside, other=0.0)
        sum_X += tl.sum(part.to(tl.float32) * factor[:, None], axis=0)
    return sum_X


@triton.jit
@no_type_check
def bag_sum(starts, index, weight, table, width, out, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, end = tl.load(starts + item), tl.load(starts + item + 1)
    sum_X = _weighed_sum(index, weight, start, end, table, width, at, PAIRS)
    tl.store(out + item * width + at, sum_X, mask=at < width)


@triton.jit
@no_type_check
def products(starts, index, rows, table, width, out, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    end = tl.load(starts + item + 1)
    for first in range(tl.load(starts + item), end, PAIRS):
        pair = first + tl.arange(0, PAIRS)
        picked = tl.load(index + pair, mask=pair < end, other=0).to(tl.int64)
        sum_N = tl.zeros((PAIRS,), tl.float32)
        for column in range(0, width, COLUMNS):
            at = column + tl.arange(0, COLUMNS)
            row = tl.load(rows + item * width + at, mask=at < width, other=0.0).to(tl.float32)
            inside = (pair < end)[:, None] & (at < width)[None, :]
            part = tl.load(table + picked[:, None] * width + at[None, :], mask=inside, other=0.0)
            sum_N += tl.sum(part.to(tl.float32) * row[None, :], axis=1)
        tl.store(out + pair, sum_N, mask=pair < end)


@triton.jit
@no_type_check
def _share_along(
    index, weight, start, end, table, width, weights, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):
    """What part of a weight row its gradient has in it; 0 of a row that is 0."""
    along = tl.zeros((COLUMNS,), tl.float32)
    square = tl.zeros((COLUMNS,), tl.float32)
    for column in range(0, width, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        w = tl.load(weights + at, mask=at < width, other=0.0).to(tl.float32)
        along += w * _weighed_sum(index, weight, start, end, table, width, at, PAIRS)
        square += w * w
    length = tl.sum(square)
    return tl.where(length > 0, tl.sum(along) / tl.where(length > 0, length, 1.0), 0.0)


@triton.jit
@no_type_check
def row_squares(
    starts, index, weight, table, width, weights, out, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):
    item = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + item), tl.load(starts + item + 1)
    if weights is not None:
        weights += item * width
        share = _share_along(index, weight, start, end, table, width, weights, PAIRS, COLUMNS)
    square = tl.zeros((COLUMNS,), tl.float32)
    for column in range(0, width, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        g = _weighed_sum(index, weight, start, end, table, width, at, PAIRS)
        if weights is not None:
            g -= share * tl.load(weights + at, mask=at < width, other=0.0).to(tl.float32)
        square += g * g
    tl.store(out + item, tl.sum(square))


@triton.jit
@no_type_check
def _kept(value, place, salt, like, BITS: tl.constexpr):
    """In the format of what it goes to: `functional.adam.rounded` where that is bfloat16."""
    hashed = (place + salt).to(tl.uint32)
    hashed = ((hashed ^ (hashed >> 16)) * 0x7FEB352D).to(tl.uint32)
    hashed = ((hashed ^ (hashed >> 15)) * 0x846CA68B).to(tl.uint32)
    hashed = ((hashed ^ (hashed >> 16)) >> BITS) & 0xFFFF
    bits = value.to(tl.uint32, bitcast=True)
    drawn = ((bits + hashed) & 0xFFFF0000).to(tl.float32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, drawn, value).to(like.dtype.element_ty)


@triton.jit
@no_type_check
def adam_rows(
    starts,
    index,
    weight,
    table,
    width,
    weights,
    mean,
    square,
    seen,
    copy,
    scale,
    lr,
    fresh1,
    fresh2,
    beta2,
    log2_beta2,
    over,
    eps,
    step,
    salt,
    PROJECTED: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    start, end = tl.load(starts + item), tl.load(starts + item + 1)
    decay, stop = beta2, width
    if mean is None:  # a row without pairs does not move: its decay is made up for later
        stop = tl.where(start < end, width, 0)
        decay = tl.exp2((step - tl.load(seen + item)).to(tl.float32) * log2_beta2)
        tl.store(seen + item, step, mask=start < end)
    share = 0.0
    if PROJECTED:
        share = _share_along(
            index, weight, start, end, table, width, weights + item * width, PAIRS, COLUMNS
        )
    factor = tl.load(scale)
    for column in range(0, stop, COLUMNS):
        at = column + tl.arange(0, COLUMNS)
        place, inside = item * width + at, at < width
        g = _weighed_sum(index, weight, start, end, table, width, at, PAIRS)
        w = tl.load(weights + place, mask=inside, other=0.0)
        g = (g - share * w) * factor
        v = decay * tl.load(square + place, mask=inside, other=0.0).to(tl.float32)
        v += fresh2 * g * g
        kept = v if square.dtype.element_ty == tl.float32 else _kept(v, place, salt, square, 0)
        tl.store(square + place, kept, mask=inside)
        if mean is not None:
            m = tl.load(mean + place, mask=inside, other=0.0).to(tl.float32)
            g = m + fresh1 * (g - m)
            kept = g if mean.dtype.element_ty == tl.float32 else _kept(g, place, salt, mean, 16)
            tl.store(mean + place, kept, mask=inside)
        w -= lr * g / (tl.sqrt(v) * over + eps)
        tl.store(weights + place, w, mask=inside)
        if copy is not None:
            tl.store(copy + place, w.to(copy.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _keys(row, at, width, ABSOLUTE: tl.constexpr, SHIFT: tl.constexpr):
    """Integers in the order of the numbers; of their sizes where ABSOLUTE. A NaN is above all."""
    number = tl.load(row + at, mask=at < width, other=0.0).to(tl.float32)
    bits = number.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = size if ABSOLUTE else tl.where(bits < 0, -size, size)
    return tl.where(number == number, key, 0x7FFFFFFF) >> SHIFT


@triton.jit
@no_type_check
def _count_keys(row, width, bar, ABSOLUTE: tl.constexpr, SHIFT: tl.constexpr, SPAN: tl.constexpr):
    """How many of a row have a key above `bar`."""
    n = tl.zeros((SPAN,), tl.int32)
    for first in range(0, width, SPAN):
        at = first + tl.arange(0, SPAN)
        key = _keys(row, at, width, ABSOLUTE, SHIFT)
        n += ((key > bar) & (at < width)).to(tl.int32)
    return tl.sum(n)


@triton.jit
@no_type_check
def largest(
    pre,
    width,
    k,
    out,
    counts,
    ABSOLUTE: tl.constexpr,
    POSITIVE: tl.constexpr,
    SHIFT: tl.constexpr,
    SPAN: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    pre += row * width
    out += row * k
    # The largest cut that at least k keys reach.
    low = tl.full((), 1 if POSITIVE else -(0x7FFFFFFF >> SHIFT), tl.int32)
    high = tl.full((), 0x7FFFFFFF >> SHIFT, tl.int32)
    enough = _count_keys(pre, width, low - 1, ABSOLUTE, SHIFT, SPAN)
    while (low < high) & (enough > k):
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        n = _count_keys(pre, width, middle - 1, ABSOLUTE, SHIFT, SPAN)
        low, high = tl.where(n >= k, middle, low), tl.where(n >= k, high, middle - 1)
        enough = tl.where(n >= k, n, enough)
    ties = k - _count_keys(pre, width, low, ABSOLUTE, SHIFT, SPAN)  # how many of these may come in
    done = tl.zeros((), tl.int32)
    for first in range(0, width, SPAN):
        at = first + tl.arange(0, SPAN)
        key = _keys(pre, at, width, ABSOLUTE, SHIFT)
        tied = ((key == low) & (at < width)).to(tl.int32)
        chosen = ((key > low) & (at < width)) | ((tied > 0) & (tl.cumsum(tied, 0) <= ties))
        place = done + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(out + place, at, mask=chosen)
        ties -= tl.sum(tied)
        done += tl.sum(chosen.to(tl.int32))
    tl.store(counts + row, done)


@triton.jit
@no_type_check
def _is_above(pre, bar, at, width):
    number = tl.load(pre + at, mask=at < width, other=0.0).to(tl.float32)
    limit = tl.load(bar + at, mask=at < width, other=0.0).to(tl.float32)
    return (~(number <= limit) & (at < width)).to(tl.int32)


@triton.jit
@no_type_check
def count_above(pre, width, bar, counts, SPAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    n = tl.zeros((SPAN,), tl.int32)
    for first in range(0, width, SPAN):
        n += _is_above(pre + row * width, bar, first + tl.arange(0, SPAN), width)
    tl.store(counts + row, tl.sum(n))


@triton.jit
@no_type_check
def places_above(pre, width, bar, starts, out, SPAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out += tl.load(starts + row)
    for first in range(0, width, SPAN):
        at = first + tl.arange(0, SPAN)
        on = _is_above(pre + row * width, bar, at, width)
        tl.store(out + tl.cumsum(on, 0) - 1, at, mask=on > 0)
        out += tl.sum(on)
