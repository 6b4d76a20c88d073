"""Triton kernels for packed rows, and the functions that launch them on plain tensors.

Legend: B images, fh x fw patches, ph x pw sites along a patch, M visible patches, N = M * ph * pw rows, C channels of
the input, O of the output, kh x kw taps, S splits of the rows.

No kernel reads a table of neighbours as long as the rows.  One small table says which patch lies where, and a kernel
finds the row of a neighbour by arithmetic (`_neighbours`), at every resolution from the same table.

Accumulation is in fp32 (fp64 for fp64).  What is summed over rows is summed in two stages, in an order that depends on
the shape only: results repeat bit by bit.  Nothing here waits for the device.

Under `TRITON_INTERPRET=1`, set before this module is imported, everything runs on CPU tensors: for tests, slowly.
"""

# Triton's own annotations do not describe its language: constants are plain numbers, loops run over `static_range`.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from spark.errors import UserError

# Patches that the table of slots is padded by: what a window may reach at patches of one site.
RING = 3
# Programs that keep a large GPU busy: a few on each of its about 130 multiprocessors.
PROGRAMS = 528
# Blocks of rows below which a sum over rows is not split further, and the most splits of one.
LEAST_BLOCKS, MOST_SPLITS = 4, 256
# Rows that a program reads again for every tap of a depthwise convolution: they stay in the first-level cache.
CACHED_ROWS = 256


class Geometry(NamedTuple):
    """Where the patches are.

    Attributes:
        table: number of each patch among the visible ones, -1 where masked or outside:
            [B, fh + 2 * RING, fw + 2 * RING] int32.
        corners: flat index into the table of the place RING patches up and left of each visible patch: [M] int32.
        sides: sites along a patch (ph, pw).
    """

    table: Tensor
    corners: Tensor
    sides: tuple[int, int]


class Statistics(NamedTuple):
    """Of each channel over all rows, [C] each: mean, variance (divided by the count), 1 / sqrt(variance + eps)."""

    mean: Tensor
    var: Tensor
    invstd: Tensor


def require_device(rows: Tensor) -> None:
    """Kernels run on a GPU.

    Raises:
        UserError: the rows lie on a CPU, and Triton's interpreter was not on when this module was imported.
    """
    if not rows.is_cuda and isinstance(_normalise_kernel, triton.JITFunction):
        raise UserError(
            "layout 'triton' needs a CUDA device: use layout 'packed' on a CPU (TRITON_INTERPRET=1 in the environment "
            "runs it there for tests, slowly)"
        )


# --- neighbours --------------------------------------------------------------------------------------------------


@triton.jit
def _places(row, num_rows, corners, RING: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """The corner of each row's patch, -1 beyond the rows, and the row's site (y, x) counted from it.  All [R] int32."""
    corner = tl.load(corners + row // (PH * PW), mask=row < num_rows, other=-1)
    inside = row % (PH * PW)
    return corner, RING * PH + inside // PW, RING * PW + inside % PW


@triton.jit
def _neighbours(table, width, corner, y, x, PH: tl.constexpr, PW: tl.constexpr):
    """Rows under the sites (y, x) counted from the corners; -1 where there is none.  All [R] int32."""
    slot = tl.load(table + corner + (y // PH) * width + x // PW, mask=corner >= 0, other=-1)
    return tl.where(slot < 0, -1, (slot * PH + y % PH) * PW + x % PW)


@triton.jit
def _load_rows(values, row, c, C: tl.constexpr):
    """Values [R, len(c)] of the rows of an array [N, C]; 0 where the row is -1 or the channel beyond C."""
    mask = (row >= 0)[:, None] & (c < C)[None, :]
    return tl.load(values + row.to(tl.int64)[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(out, values, row, num_rows, c, C: tl.constexpr):
    """Values [R, len(c)] to the rows of an array [N, C], in its type; not beyond N rows and C channels."""
    place = out + row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(place, values.to(out.dtype.element_ty), mask=(row < num_rows)[:, None] & (c < C)[None, :])


@triton.jit
def _per_channel(vector, c, C: tl.constexpr, ACC: tl.constexpr, DEFAULT: tl.constexpr):
    """[1, len(c)] of a vector [C], or of a constant where there is none."""
    if vector is None:
        values = tl.full((1, c.shape[0]), DEFAULT, ACC)
    else:
        values = tl.load(vector + c, mask=c < C, other=0.0).to(ACC)[None, :]
    return values


# --- convolution -------------------------------------------------------------------------------------------------


@triton.jit
def _convolution_kernel(
    rows,
    weight,
    bias,
    out,
    table,
    corners,
    num_rows,
    width,
    stride_o,
    stride_c,
    stride_y,
    stride_x,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    KH: tl.constexpr,
    KW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RING: tl.constexpr,
    REVERSED: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """An implicit matrix product: [rows, taps x C] gathered on the way, times [taps x C, O]."""
    blocks_o: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    # Programs of the same rows follow each other, so that what they gather is in the cache.
    pid = tl.program_id(0)
    row = (pid // blocks_o) * BLOCK_R + tl.arange(0, BLOCK_R)
    o = (pid % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    corner, y, x = _places(row, num_rows, corners, RING, PH, PW)
    acc = tl.full((BLOCK_R, BLOCK_O), 0, ACC)
    # One loop over taps and channels: a nested one would start its pipeline of loads anew at every tap.
    for step in range(KH * KW * blocks_c):
        ky = step // blocks_c // KW
        kx = step // blocks_c % KW
        c = (step % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        if REVERSED:
            near = _neighbours(table, width, corner, y + KH // 2 - ky, x + KW // 2 - kx, PH, PW)
        else:
            near = _neighbours(table, width, corner, y - KH // 2 + ky, x - KW // 2 + kx, PH, PW)
        values = _load_rows(rows, near, c, C)
        taps = weight + ky * stride_y + kx * stride_x
        filters = tl.load(
            taps + c[:, None] * stride_c + o[None, :] * stride_o,
            mask=(c < C)[:, None] & (o < O)[None, :],
            other=0.0,
        )
        acc = tl.dot(values, filters, acc, input_precision=PRECISION, out_dtype=ACC)
    _store_rows(out, acc + _per_channel(bias, o, O, ACC, 0), row, num_rows, o, O)


@triton.jit
def _weight_gradient_kernel(
    grad,
    rows,
    partial,
    table,
    corners,
    num_rows,
    width,
    rows_per_split,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    KH: tl.constexpr,
    KW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RING: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tap: [O, rows of a split] times the gathered [rows of a split, C], to partial [S, O, taps, C]."""
    blocks_o: tl.constexpr = (O + BLOCK_O - 1) // BLOCK_O
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid, split = tl.program_id(0), tl.program_id(1)
    tap = pid // (blocks_o * blocks_c)
    o = (pid // blocks_c % blocks_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    move_y = tap // KW - KH // 2
    move_x = tap % KW - KW // 2
    acc = tl.full((BLOCK_O, BLOCK_C), 0, ACC)
    for start in range(0, rows_per_split, BLOCK_R):
        row = split * rows_per_split + start + tl.arange(0, BLOCK_R)
        corner, y, x = _places(row, num_rows, corners, RING, PH, PW)
        near = _neighbours(table, width, corner, y + move_y, x + move_x, PH, PW)
        # Rows without that neighbour add nothing, whatever their gradient.
        of_out = _load_rows(grad, tl.where(near < 0, -1, row), o, O)
        values = _load_rows(rows, near, c, C)
        acc = tl.dot(tl.trans(of_out), values, acc, input_precision=PRECISION, out_dtype=ACC)
    place = ((split.to(tl.int64) * O + o)[:, None] * (KH * KW) + tap) * C + c[None, :]
    tl.store(partial + place, acc, mask=(o < O)[:, None] & (c < C)[None, :])


def convolution(
    rows: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, reverse: bool = False
) -> Tensor:
    """Convolve rows with odd windows, stride 1 and as much padding on either side, to the same sites.

    Weights are read where they lie; channels_last memory is the fastest.

    Args:
        rows: [N, C].
        weight: [O, C, kh, kw], of the same type; any memory format.
        bias: [O] or None.
        geometry: of the map.
        reverse: the gradient of the input, given rows [N, O] of the output's: read weight (o, c, y, x) as
            (c, o, kh - 1 - y, kw - 1 - x).

    Returns:
        Rows [N, O]; in reverse [N, C].
    """
    rows = rows.contiguous()
    weight = weight.transpose(0, 1) if reverse else weight
    (num_rows, c), (o, _, kh, kw) = rows.shape, weight.shape
    out = rows.new_empty(num_rows, o)
    blocks = _convolution_blocks(num_rows, o, c, rows.element_size())
    programs = triton.cdiv(num_rows, blocks["BLOCK_R"]) * triton.cdiv(o, blocks["BLOCK_O"])
    stride_o, stride_c, stride_y, stride_x = weight.stride()
    with torch.cuda.device_of(rows):
        _convolution_kernel[(programs,)](
            *(rows, weight, bias, out, geometry.table, geometry.corners, num_rows, geometry.table.shape[2]),
            *(stride_o, stride_c, stride_y, stride_x),
            **_shape(geometry, rows, (kh, kw)),
            O=o,
            REVERSED=reverse,
            PRECISION=_precision(),
            **blocks,
        )
    return out


def weight_gradient(grad: Tensor, rows: Tensor, geometry: Geometry, kernel: tuple[int, int]) -> Tensor:
    """Gradient of the weights of `convolution`: [O, C, kh, kw] in channels_last memory.

    Args:
        grad: of the output, [N, O].
        rows: input, [N, C], of the same type.
        geometry: of the map.
        kernel: (kh, kw).
    """
    grad, rows = grad.contiguous(), rows.contiguous()
    (num_rows, c), o, (kh, kw) = rows.shape, grad.shape[1], kernel
    blocks = _weight_gradient_blocks(o, c, rows.element_size())
    programs = kh * kw * triton.cdiv(o, blocks["BLOCK_O"]) * triton.cdiv(c, blocks["BLOCK_C"])
    splits, rows_per_split = _split(num_rows, programs, blocks["BLOCK_R"])
    partial = rows.new_empty(splits, o, kh, kw, c, dtype=_wide(rows))
    with torch.cuda.device_of(rows):
        _weight_gradient_kernel[(programs, splits)](
            *(grad, rows, partial, geometry.table, geometry.corners, num_rows, geometry.table.shape[2]),
            rows_per_split,
            **_shape(geometry, rows, kernel),
            O=o,
            PRECISION=_precision(),
            **blocks,
        )
    return partial.sum(0).to(rows.dtype).permute(0, 3, 1, 2)


# --- depthwise convolution ---------------------------------------------------------------------------------------


@triton.jit
def _depthwise_kernel(
    rows,
    filters,
    bias,
    out,
    table,
    corners,
    num_rows,
    width,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RING: tl.constexpr,
    REVERSED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum of the gathered neighbours [R, C] times the filters [taps, C]; neighbours are in the first-level cache."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    corner, y, x = _places(row, num_rows, corners, RING, PH, PW)
    acc = tl.full((BLOCK_R, BLOCK_C), 0, ACC)
    for ky in range(KH):
        for kx in tl.static_range(KW):
            near = _neighbours(table, width, corner, y - KH // 2 + ky, x - KW // 2 + kx, PH, PW)
            tap = ky * KW + kx
            if REVERSED:
                tap = KH * KW - 1 - tap
            factor = tl.load(filters + tap * C + c, mask=c < C, other=0.0).to(ACC)
            acc = tl.fma(
                _load_rows(rows, near, c, C).to(ACC), factor[None, :].broadcast_to(BLOCK_R, BLOCK_C), acc
            )
    _store_rows(out, acc + _per_channel(bias, c, C, ACC, 0), row, num_rows, c, C)


@triton.jit
def _depthwise_weight_gradient_kernel(
    grad,
    rows,
    partial,
    table,
    corners,
    num_rows,
    width,
    rows_per_split,
    C: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    RING: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum over the rows of a split of gradient times neighbour, tap by tap, to partial [S, taps, C]."""
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    for tap in range(KH * KW):
        move_y = tap // KW - KH // 2
        move_x = tap % KW - KW // 2
        acc = tl.full((BLOCK_R, BLOCK_C), 0, ACC)
        for start in range(0, rows_per_split, BLOCK_R):
            row = split * rows_per_split + start + tl.arange(0, BLOCK_R)
            corner, y, x = _places(row, num_rows, corners, RING, PH, PW)
            near = _neighbours(table, width, corner, y + move_y, x + move_x, PH, PW)
            of_out = _load_rows(grad, tl.where(near < 0, -1, row), c, C).to(ACC)
            acc = tl.fma(of_out, _load_rows(rows, near, c, C).to(ACC), acc)
        place = partial + (split * (KH * KW) + tap) * C + c
        tl.store(place, tl.sum(acc, 0), mask=c < C)


def depthwise_convolution(
    rows: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, reverse: bool = False
) -> Tensor:
    """`convolution` of every channel with a filter of its own.

    Args:
        rows: [N, C].
        weight: [C, 1, kh, kw].
        bias: [C] or None.
        geometry: of the map.
        reverse: the gradient of the input: read tap (y, x) as (kh - 1 - y, kw - 1 - x).

    Returns:
        Rows [N, C].
    """
    rows = rows.contiguous()
    num_rows, c = rows.shape
    out = torch.empty_like(rows)
    filters = weight.reshape(
        c, -1
    ).T.contiguous()  # [taps, C]: neighbouring threads read neighbouring channels
    blocks = _depthwise_blocks(c)
    grid = (triton.cdiv(num_rows, blocks["BLOCK_R"]), triton.cdiv(c, blocks["BLOCK_C"]))
    with torch.cuda.device_of(rows):
        _depthwise_kernel[grid](
            *(rows, filters, bias, out, geometry.table, geometry.corners, num_rows, geometry.table.shape[2]),
            **_shape(geometry, rows, (weight.shape[2], weight.shape[3])),
            REVERSED=reverse,
            **blocks,
        )
    return out


def depthwise_weight_gradient(
    grad: Tensor, rows: Tensor, geometry: Geometry, kernel: tuple[int, int]
) -> Tensor:
    """Gradient of the weights of `depthwise_convolution`: [C, 1, kh, kw].

    Args:
        grad: of the output, [N, C].
        rows: input, [N, C].
        geometry: of the map.
        kernel: (kh, kw).
    """
    grad, rows = grad.contiguous(), rows.contiguous()
    (num_rows, c), (kh, kw) = rows.shape, kernel
    blocks = _depthwise_blocks(c)
    channel_blocks = triton.cdiv(c, blocks["BLOCK_C"])
    splits = triton.cdiv(num_rows, CACHED_ROWS)
    partial = rows.new_empty(splits, kh * kw, c, dtype=_wide(rows))
    with torch.cuda.device_of(rows):
        _depthwise_weight_gradient_kernel[(splits, channel_blocks)](
            *(grad, rows, partial, geometry.table, geometry.corners, num_rows, geometry.table.shape[2]),
            CACHED_ROWS,
            **_shape(geometry, rows, kernel),
            **blocks,
        )
    return partial.sum(0).to(rows.dtype).T.reshape(c, 1, kh, kw)


# --- batch norm --------------------------------------------------------------------------------------------------


@triton.jit
def _statistics_kernel(
    rows,
    partial,
    num_rows,
    rows_per_split,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and M2, the sum of squared differences from it, of the rows of a split: partial [S, 2, C].

    A block has its mean first and then its M2; blocks are merged by Chan et al., "Updating formulae and a pairwise
    algorithm for computing sample variances" (1979).
    """
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.full((BLOCK_C,), 0, ACC)
    m2 = tl.full((BLOCK_C,), 0, ACC)
    for start in range(0, rows_per_split, BLOCK_R):
        first = split * rows_per_split + start
        row = first + tl.arange(0, BLOCK_R)
        before = (first - split * rows_per_split).to(ACC)  # rows merged so far; more than that once all are
        count = tl.minimum(tl.maximum(num_rows - first, 0), BLOCK_R).to(ACC)
        values = _load_rows(rows, tl.where(row < num_rows, row, -1), c, C).to(ACC)
        block_mean = tl.sum(values, 0) / tl.maximum(count, 1.0)
        centred = tl.where((row < num_rows)[:, None], values - block_mean[None, :], 0.0)
        delta = block_mean - mean
        share = count / (before + count)
        mean += delta * share
        m2 += tl.sum(centred * centred, 0) + delta * delta * before * share
    place = partial + split * 2 * C + c
    tl.store(place, mean, mask=c < C)
    tl.store(place + C, m2, mask=c < C)


@triton.jit
def _merge_statistics_kernel(
    partial,
    mean,
    var,
    invstd,
    num_rows,
    rows_per_split,
    splits,
    eps,
    C: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge all splits at once: partial [S, 2, C] to mean, variance and 1 / sqrt(variance + eps), [C] each."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None] & (c < C)[None, :]
    count = tl.minimum(tl.maximum(num_rows - split * rows_per_split, 0), rows_per_split).to(ACC)[:, None]
    place = partial + split[:, None] * (2 * C) + c[None, :]
    means = tl.load(place, mask=mask, other=0.0)
    m2s = tl.load(place + C, mask=mask, other=0.0)
    total_mean = tl.sum(means * count, 0) / num_rows
    difference = means - total_mean[None, :]
    total_var = tl.sum(m2s + difference * difference * count, 0) / num_rows
    tl.store(mean + c, total_mean, mask=c < C)
    tl.store(var + c, total_var, mask=c < C)
    tl.store(invstd + c, 1.0 / tl.sqrt(total_var + eps), mask=c < C)


@triton.jit
def _normalise_kernel(
    rows,
    mean,
    invstd,
    weight,
    bias,
    out,
    num_rows,
    C: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """(rows - mean) * invstd * weight + bias, and ReLU of it."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = _per_channel(invstd, c, C, ACC, 1) * _per_channel(weight, c, C, ACC, 1)
    centred = _load_rows(rows, tl.where(row < num_rows, row, -1), c, C).to(ACC) - _per_channel(
        mean, c, C, ACC, 0
    )
    values = centred * scale + _per_channel(bias, c, C, ACC, 0)
    if RELU:
        values = tl.maximum(values, 0.0)
    _store_rows(out, values, row, num_rows, c, C)


@triton.jit
def _gated(grad, normalised, weight, bias, c, C: tl.constexpr, RELU: tl.constexpr, ACC: tl.constexpr):
    """The gradient of the normalised rows [R, len(c)]: that of the output, and 0 where ReLU cut it off."""
    if RELU:
        out = normalised * _per_channel(weight, c, C, ACC, 1) + _per_channel(bias, c, C, ACC, 0)
        grad = tl.where(out > 0, grad, 0.0)
    return grad


@triton.jit
def _normalise_sums_kernel(
    grad,
    rows,
    mean,
    invstd,
    weight,
    bias,
    partial,
    num_rows,
    rows_per_split,
    C: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums over the rows of a split of the gradient, and of gradient times normalised rows: partial [S, 2, C]."""
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    centre = _per_channel(mean, c, C, ACC, 0)
    scale = _per_channel(invstd, c, C, ACC, 1)
    of_bias = tl.full((BLOCK_R, BLOCK_C), 0, ACC)
    of_weight = tl.full((BLOCK_R, BLOCK_C), 0, ACC)
    for start in range(0, rows_per_split, BLOCK_R):
        row = split * rows_per_split + start + tl.arange(0, BLOCK_R)
        row = tl.where(row < num_rows, row, -1)
        normalised = (_load_rows(rows, row, c, C).to(ACC) - centre) * scale
        of_out = _load_rows(grad, row, c, C).to(ACC)  # 0 beyond the rows
        of_out = _gated(of_out, normalised, weight, bias, c, C, RELU, ACC)
        of_bias += of_out
        of_weight += of_out * normalised
    place = partial + split * 2 * C + c
    tl.store(place, tl.sum(of_bias, 0), mask=c < C)
    tl.store(place + C, tl.sum(of_weight, 0), mask=c < C)


@triton.jit
def _normalise_backward_kernel(
    grad,
    rows,
    mean,
    invstd,
    weight,
    bias,
    sums,
    out,
    num_rows,
    C: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of the rows, mean and variance being functions of them; sums [2, C] as of `_normalise_sums_kernel`."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = tl.where(row < num_rows, row, -1)
    scale = _per_channel(invstd, c, C, ACC, 1)
    normalised = (_load_rows(rows, live, c, C).to(ACC) - _per_channel(mean, c, C, ACC, 0)) * scale
    of_out = _gated(_load_rows(grad, live, c, C).to(ACC), normalised, weight, bias, c, C, RELU, ACC)
    of_bias = _per_channel(sums, c, C, ACC, 0) / num_rows
    of_weight = _per_channel(sums + C, c, C, ACC, 0) / num_rows
    values = (of_out - of_bias - normalised * of_weight) * scale * _per_channel(weight, c, C, ACC, 1)
    _store_rows(out, values, row, num_rows, c, C)


def batch_norm_statistics(rows: Tensor, eps: float) -> Statistics:
    """Mean and variance of each channel over all rows, in fp32 or wider.

    Args:
        rows: [N, C], N at least 1.
        eps: added to the variance under the root.
    """
    rows = rows.contiguous()
    num_rows, c = rows.shape
    blocks = _elementwise_blocks(c)
    channel_blocks = triton.cdiv(c, blocks["BLOCK_C"])
    splits, rows_per_split = _split(num_rows, channel_blocks, blocks["BLOCK_R"])
    partial = rows.new_empty(splits, 2, c, dtype=_wide(rows))
    mean, var, invstd = (rows.new_empty(c, dtype=_wide(rows)) for _ in range(3))
    with torch.cuda.device_of(rows):
        _statistics_kernel[(splits, channel_blocks)](
            *(rows, partial, num_rows, rows_per_split), C=c, ACC=_accumulator(rows), **blocks
        )
        _merge_statistics_kernel[(triton.cdiv(c, 16),)](
            *(partial, mean, var, invstd, num_rows, rows_per_split, splits, eps),
            C=c,
            ACC=_accumulator(rows),
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_C=16,
        )
    return Statistics(mean, var, invstd)


def normalise(
    rows: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool = False,
) -> Tensor:
    """(rows - mean) * invstd * weight + bias, with ReLU if asked for: [N, C] in the type of the rows.

    Args:
        rows: [N, C].
        mean, invstd, weight, bias: [C] each; without weight 1, without bias 0.
        relu: cut off at 0.
    """
    rows = rows.contiguous()
    num_rows, c = rows.shape
    out = torch.empty_like(rows)
    blocks = _elementwise_blocks(c)
    grid = (triton.cdiv(num_rows, blocks["BLOCK_R"]), triton.cdiv(c, blocks["BLOCK_C"]))
    with torch.cuda.device_of(rows):
        _normalise_kernel[grid](
            *(rows, mean, invstd, weight, bias, out, num_rows),
            C=c,
            RELU=relu,
            ACC=_accumulator(rows),
            **blocks,
        )
    return out


def normalise_backward(
    grad: Tensor,
    rows: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `normalise` by the statistics of the rows themselves.

    Args:
        grad: of the output, [N, C].
        rows, mean, invstd, weight, bias, relu: as they were.

    Returns:
        Gradients of rows [N, C], weight [C] and bias [C].
    """
    grad, rows = grad.contiguous(), rows.contiguous()
    num_rows, c = rows.shape
    out = torch.empty_like(rows)
    options = {"C": c, "RELU": relu, "ACC": _accumulator(rows), **_elementwise_blocks(c)}
    channel_blocks = triton.cdiv(c, options["BLOCK_C"])
    splits, rows_per_split = _split(num_rows, channel_blocks, options["BLOCK_R"])
    partial = rows.new_empty(splits, 2, c, dtype=_wide(rows))
    with torch.cuda.device_of(rows):
        _normalise_sums_kernel[(splits, channel_blocks)](
            *(grad, rows, mean, invstd, weight, bias, partial, num_rows, rows_per_split), **options
        )
        sums = partial.sum(0)
        _normalise_backward_kernel[(triton.cdiv(num_rows, options["BLOCK_R"]), channel_blocks)](
            *(grad, rows, mean, invstd, weight, bias, sums, out, num_rows), **options
        )
    return out, sums[1], sums[0]


# --- how a shape is cut ------------------------------------------------------------------------------------------


def _shape(geometry: Geometry, rows: Tensor, kernel: tuple[int, int]) -> dict[str, Any]:
    """Constants of a convolution's kernel; it is compiled for them."""
    (ph, pw), (kh, kw) = geometry.sides, kernel
    constants = {"C": rows.shape[1], "KH": kh, "KW": kw, "PH": ph, "PW": pw, "RING": RING}
    return {**constants, "ACC": _accumulator(rows)}


def _wide(rows: Tensor) -> torch.dtype:
    """Type of sums."""
    return torch.promote_types(rows.dtype, torch.float32)


def _accumulator(rows: Tensor) -> tl.dtype:
    """The same for a kernel."""
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


def _precision() -> str:
    """Of products of fp32 on tensor cores: what PyTorch's own convolutions are allowed."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"


def _side(channels: int, most: int) -> int:
    """A block's side for that many channels; tensor cores take 16 and more."""
    return min(max(triton.next_power_of_2(channels), 16), most)


def _tight_side(channels: int, most: int) -> int:
    """The largest side of a block among those that reach least beyond the channels: 96 are 3 times 32."""
    sides = [16 * 2**i for i in range(most.bit_length() - 4)]
    return min(sides, key=lambda side: (-channels % side, -side))


def _convolution_blocks(num_rows: int, o: int, c: int, itemsize: int) -> dict[str, int]:
    """Blocks by shape: 128 x 128 x 64 on tensor cores, fewer rows where that leaves multiprocessors idle."""
    if itemsize > 2:  # fp32, fp64: twice and four times the memory on chip
        return _blocks(64, BLOCK_O=_side(o, 64), BLOCK_C=_side(c, 128 // itemsize), num_warps=4, num_stages=3)
    block_o = _side(o, 128)
    fills = triton.cdiv(num_rows, 128) * triton.cdiv(o, block_o) >= PROGRAMS // 4
    warps = 8 if fills and block_o == 128 else 4
    return _blocks(128 if fills else 64, BLOCK_O=block_o, BLOCK_C=_side(c, 64), num_warps=warps, num_stages=4)


def _weight_gradient_blocks(o: int, c: int, itemsize: int) -> dict[str, int]:
    """Blocks by shape: squares of the weights, 64 rows at a time."""
    if itemsize > 2:
        return _blocks(32, BLOCK_O=_side(o, 64), BLOCK_C=_side(c, 64), num_warps=4, num_stages=3)
    block_o, block_c = _side(o, 128), _side(c, 128)
    warps = 8 if block_o * block_c == 128 * 128 else 4
    return _blocks(64, BLOCK_O=block_o, BLOCK_C=block_c, num_warps=warps, num_stages=4)


def _depthwise_blocks(c: int) -> dict[str, int]:
    """Blocks by shape: 16 values a thread, that its registers hold them and the loads of 7 taps."""
    block_c = _tight_side(c, 64)
    return _blocks(32 * 64 // block_c, BLOCK_C=block_c, num_warps=4)


def _elementwise_blocks(c: int) -> dict[str, int]:
    """Blocks by shape: whole rows of up to 128 channels, 32 values a thread."""
    block_c = _tight_side(c, 128)
    return _blocks(32 * 128 // block_c, BLOCK_C=block_c, num_warps=4)


def _blocks(rows: int, **others: int) -> dict[str, int]:
    return {"BLOCK_R": rows, **others}


def _split(num_rows: int, programs: int, block: int) -> tuple[int, int]:
    """Splits of a sum over rows of which there are `programs` already, and rows of each (a multiple of the block)."""
    splits = min(triton.cdiv(PROGRAMS, programs), triton.cdiv(num_rows, LEAST_BLOCKS * block), MOST_SPLITS)
    rows_per_split = triton.cdiv(triton.cdiv(num_rows, max(splits, 1)), block) * block
    return max(triton.cdiv(num_rows, max(rows_per_split, 1)), 1), rows_per_split
