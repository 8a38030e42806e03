"""Kernels of batch norms for a GPU, in Triton: all branches of a joined batch pass in one launch.

A map is in channels_last memory: rows of C channels, one row per pixel. The rows of one branch follow those of the branch
before. Values are computed in float32, whatever the dtype of the map.

Suffixes of tensor names: B branches, N images, C channels, H height, W width, S parts of a branch's rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Number of elements that one program holds at a time."""

PROGRAMS = 2048
"""Number of programs between which the rows are divided to gather statistics: enough to fill a GPU."""

MOST_PARTS = 64
"""Maximum number of parts of a branch's rows."""


@triton.jit(do_not_specialize=["rows", "per_part", "parts"])  # type: ignore[untyped-decorator]
def _moments(x, means, squares, rows, per_part, channels, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write mean and sum of squared deviations of each channel over one part of one branch's rows.

    Four rows at a time are merged with the rows before them (Chan et al. 1979); the rest follow one by one (Welford 1962).
    """
    part, branch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    lanes = tl.arange(0, ROWS)
    first = part * per_part
    last = tl.minimum(first + per_part, rows)
    of_channel = (columns < channels)[None, :]
    place = x + (branch * rows + first + lanes)[:, None] * channels + columns[None, :]
    mean = tl.zeros([ROWS, COLUMNS], tl.float32)
    square = tl.zeros([ROWS, COLUMNS], tl.float32)
    step = 0.0
    fours = (last - first) // (4 * ROWS)
    for _ in range(fours):
        a = tl.load(place, mask=of_channel, other=0.0).to(tl.float32)
        b = tl.load(place + ROWS * channels, mask=of_channel, other=0.0).to(tl.float32)
        c = tl.load(place + 2 * ROWS * channels, mask=of_channel, other=0.0).to(tl.float32)
        d = tl.load(place + 3 * ROWS * channels, mask=of_channel, other=0.0).to(tl.float32)
        place += 4 * ROWS * channels
        four = (a + b + c + d) * 0.25
        a, b, c, d = a - four, b - four, c - four, d - four
        away = four - mean
        share = 4.0 / (step + 4.0)
        mean += away * share
        square += (a * a + b * b) + (c * c + d * d) + away * away * (step * share)
        step += 4.0
    for start in range(first + fours * 4 * ROWS, last, ROWS):
        inside = (start + lanes < last)[:, None] & of_channel
        value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        place += ROWS * channels
        step += 1.0
        away = tl.where(inside, value - mean, 0.0)
        mean += away * (1.0 / step)
        square += away * tl.where(inside, value - mean, 0.0)
    count = tl.maximum((last - first - lanes + ROWS - 1) // ROWS, 0).to(tl.float32)[:, None]
    whole = tl.sum(mean * count, 0) / tl.maximum(last - first, 1)
    away = mean - whole[None, :]
    total = tl.sum(square + count * away * away, 0)
    target = (branch * parts + part) * channels + columns
    tl.store(means + target, whole, mask=columns < channels)
    tl.store(squares + target, total, mask=columns < channels)


@triton.jit(do_not_specialize=["rows", "per_part", "parts", "stride", "weight_stride"])  # type: ignore[untyped-decorator]
def _merge(
    means, squares, table_mean, table_var, stride, nodes, kept, momentum, weight, weight_stride, eps, mean_out, scale_out,
    rows, per_part, channels, parts, WEIGHTED: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one branch (Chan et al. 1979), update its node's running statistics, and write mean and scale."""
    branch = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    part = tl.arange(0, PARTS)
    count = tl.maximum(tl.minimum(rows - part * per_part, per_part), 0).to(tl.float32)[:, None]
    place = (branch * parts + part)[:, None] * channels + columns[None, :]
    present = (part < parts)[:, None] & inside[None, :]
    means_SC = tl.load(means + place, mask=present, other=0.0)
    squares_SC = tl.load(squares + place, mask=present, other=0.0)
    mean = tl.sum(means_SC * count, 0) / rows
    away = means_SC - mean[None, :]
    square = tl.sum(squares_SC + count * away * away, 0)
    node = tl.load(nodes + branch) * stride + columns
    running_mean = tl.load(table_mean + node, mask=inside, other=0.0)
    running_var = tl.load(table_var + node, mask=inside, other=1.0)
    gathers = inside & (tl.load(kept + branch + 0 * columns) == 0)
    share = tl.load(momentum)
    tl.store(table_mean + node, (1 - share) * running_mean + share * mean, mask=gathers)
    tl.store(table_var + node, (1 - share) * running_var + share * (square / (rows - 1)), mask=gathers)
    mean = tl.where(gathers, mean, running_mean)
    scale = 1 / tl.sqrt(tl.where(gathers, square / rows, running_var) + eps)
    if WEIGHTED:
        scale *= tl.load(weight + branch * weight_stride + columns, mask=inside, other=1.0)
    place = branch * channels + columns
    tl.store(mean_out + place, mean, mask=inside)
    tl.store(scale_out + place, scale, mask=inside)


@triton.jit(do_not_specialize=["rows", "bias_stride"])  # type: ignore[untyped-decorator]
def _transform(
    x, out, plus, mean, scale, bias, bias_stride, rows, channels,
    BIASED: tl.constexpr, ADDS: tl.constexpr, RECTIFIES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write (x - mean) * scale + bias of a tile of one branch, plus a map if there is one, and rectified if asked for."""
    branch = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    of_channel = columns < channels
    inside = (row < rows)[:, None] & of_channel[None, :]
    place = (branch * rows + row)[:, None] * channels + columns[None, :]
    mean_C = tl.load(mean + branch * channels + columns, mask=of_channel, other=0.0)
    scale_C = tl.load(scale + branch * channels + columns, mask=of_channel, other=0.0)
    value = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - mean_C[None, :]) * scale_C[None, :]
    if BIASED:
        value += tl.load(bias + branch * bias_stride + columns, mask=of_channel, other=0.0)[None, :]
    if ADDS:
        value += tl.load(plus + place, mask=inside, other=0.0).to(tl.float32)
    if RECTIFIES:
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def in_rows(x_NCHW: Tensor) -> Tensor:
    """Return a map in channels_last memory: the map itself if it is."""
    return x_NCHW.contiguous(memory_format=torch.channels_last)


def _stride(values: Tensor | None) -> int:
    """Return the distance between the values of two branches: 0 if they share them."""
    return 0 if values is None or values.dim() == 1 else values.stride(0)


def gather(
    x_NCHW: Tensor,
    table_mean_RC: Tensor,
    table_var_RC: Tensor,
    nodes_B: Tensor,
    kept_B: Tensor,
    momentum: Tensor,
    weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gather the batch statistics of each branch, and update the running statistics of its node.

    Args:
        x_NCHW: a joined map in channels_last memory; each branch has the same number of images, at least two pixels in all.
        table_mean_RC: running means, a row for each node; the columns are adjacent in memory.
        table_var_RC: running unbiased variances, of the same layout.
        nodes_B: the row of each branch's node, int64; no row occurs twice.
        kept_B: 1 for a branch that is normalised by its running statistics, which stay as they are; otherwise 0. int64.
        momentum: weight of the new statistics, a float32 scalar.
        weight: scale of the batch norm, (C,), or that of each branch, (B, C), without gaps; None for a batch norm without.
        eps: added to the variance.

    Returns:
        Mean and scale by which each branch is normalised, float32 (B, C).
    """
    branches, channels = len(nodes_B), x_NCHW.shape[1]
    rows = x_NCHW.numel() // channels // branches
    columns = min(128, max(16, triton.next_power_of_2(channels)))
    lanes = TILE // 4 // columns
    blocks = triton.cdiv(channels, columns)
    parts = max(1, min(MOST_PARTS, PROGRAMS // (branches * blocks), rows // (16 * lanes)))
    per_part = triton.cdiv(triton.cdiv(rows, parts), lanes) * lanes
    parts = triton.cdiv(rows, per_part)
    means, squares = x_NCHW.new_empty(2, branches, parts, channels, dtype=torch.float32)
    mean_BC, scale_BC = x_NCHW.new_empty(2, branches, channels, dtype=torch.float32)
    _moments[parts, branches, blocks](
        x_NCHW, means, squares, rows, per_part, channels, parts, ROWS=lanes, COLUMNS=columns, num_warps=4
    )
    _merge[branches, triton.cdiv(channels, 32)](
        means, squares, table_mean_RC, table_var_RC, table_mean_RC.stride(0), nodes_B, kept_B, momentum,
        table_mean_RC if weight is None else weight, _stride(weight), eps, mean_BC, scale_BC, rows, per_part, channels, parts,
        WEIGHTED=weight is not None, PARTS=triton.next_power_of_2(parts), COLUMNS=32, num_warps=4,
    )  # fmt: skip
    return mean_BC, scale_BC


def transform(
    x_NCHW: Tensor,
    mean_BC: Tensor,
    scale_BC: Tensor,
    bias: Tensor | None,
    *,
    out_NCHW: Tensor,
    plus_NCHW: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Normalise each branch of a joined map, in one pass over the memory: (x - mean) * scale + bias.

    Args:
        x_NCHW: a joined map in channels_last memory.
        mean_BC: what is subtracted from each branch, float32.
        scale_BC: what each branch is then multiplied by, float32.
        bias: one bias for all branches, (C,), or one for each branch, (B, C), contiguous; or None.
        out_NCHW: where the result is written, in channels_last memory; it may be `x_NCHW`.
        plus_NCHW: a map in channels_last memory that is added to the normalised one.
        relu: whether the sum is rectified.
    """
    branches, channels = mean_BC.shape
    rows = x_NCHW.numel() // channels // branches
    columns = min(256, max(16, triton.next_power_of_2(channels)))
    lanes = TILE // columns
    _transform[triton.cdiv(rows, lanes), branches, triton.cdiv(channels, columns)](
        x_NCHW, out_NCHW, x_NCHW if plus_NCHW is None else plus_NCHW, mean_BC, scale_BC,
        mean_BC if bias is None else bias, _stride(bias), rows, channels,
        BIASED=bias is not None, ADDS=plus_NCHW is not None, RECTIFIES=relu, ROWS=lanes, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out_NCHW
