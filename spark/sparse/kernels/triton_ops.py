"""The triton layout: packed rows whose convolutions and batch norms run in Triton kernels.

Everything else is the packed layout's, and so is what the backward pass keeps.  Triton is imported when the layout is
asked for, not before.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark.errors import UserError
from spark.sparse import common_ops as common
from spark.sparse import packed_ops as packed
from spark.sparse.batch_norm import (
    BatchNormCall,
    in_recomputation,
    move_running_statistics,
    require_statistics,
    world_size,
)
from spark.sparse.tensor import Layout, SparseTensor


@cache
def triton_layout() -> Layout:
    """The packed layout with Triton's convolutions and batch norms; always the same object.

    Raises:
        UserError: the package triton is missing.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"layout 'triton' needs the package triton, which does not import here ({error}): install it, or use "
            "layout 'packed'"
        ) from error
    rules = {
        **packed.PACKED.rules,
        **dict.fromkeys(("relu", "relu_"), relu),
        "conv2d": conv2d,
        "batch_norm": batch_norm,
    }
    return Layout("triton", rules, packed.PACKED.from_dense, packed.PACKED.to_dense)


def conv2d(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Ungrouped and depthwise windows of odd sides with stride 1 and "same" padding, on the rows as they lie.

    The packed rule does the rest: pointwise convolutions (one matrix product there, too), strides, dilation, groups.
    """
    from spark.sparse.kernels import triton_conv

    common.require_channels_first(func, x)
    call = packed.ConvCall(*args, **kwargs)
    window, (b, c, h, w) = call.window, x.size4
    depthwise = call.groups == c == len(call.weight)
    if (
        window is None
        or window.kernel == (1, 1)
        or not (call.groups == 1 or depthwise)
        or not triton_conv.fits(x.sites, h, w, window)
    ):
        return packed.conv2d(func, x, *call)
    rows = triton_conv.submanifold_conv(
        x.data, call.weight, call.bias, x.sites, h, w, call.groups, packed.valid_recipe(x)
    )
    return SparseTensor(rows, x.sites, x.layout, (b, len(call.weight), h, w))


def batch_norm(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Statistics per batch: over the rows.  In evaluation, and over several processes, the packed rule."""
    from spark.sparse.kernels import triton_kernels as kernels

    common.require_channels_first(func, x)
    call = BatchNormCall(*args, **kwargs)
    if not call.training or (x.sites.sync and world_size() > 1):
        return packed.batch_norm(func, x, *call)
    rows, weight, bias = x.data, call.weight, call.bias
    kernels.require_device(rows)
    require_statistics(len(rows))
    mean, var, invstd = kernels.batch_norm_statistics(rows.detach(), call.eps)
    if not in_recomputation():
        move_running_statistics(call, mean, var, len(rows))
    out = _Normalise.apply(rows, mean, invstd, weight, bias, False)
    result = x.like(out)  # type: ignore[arg-type]
    if weight is not None and bias is not None:
        result.recipe = packed.recipe(kernels.normalise, (rows, mean, invstd, weight, bias), result.data)
    return result


def relu(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """After a batch norm one operator with it, computed from what the norm read; else the packed rule."""
    from spark.sparse.kernels import triton_kernels as kernels

    before = packed.valid_recipe(x)
    if before is None or before.compute is not kernels.normalise:
        return packed.relu(func, x, *args, **kwargs)
    rows: Tensor = _Normalise.apply(*before.inputs, True)  # type: ignore[assignment]
    result = common.finish(func, kwargs, x, rows)
    result.recipe = packed.recipe(partial(kernels.normalise, relu=True), before.inputs, rows)
    return result


class _Normalise(torch.autograd.Function):
    """Rows normalised by their own mean and deviation, and ReLU if asked for.

    Its gradient is that of batch norm: mean and deviation come as numbers, but count as functions of the rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        relu: bool,
    ) -> Tensor:
        from spark.sparse.kernels import triton_kernels as kernels

        ctx.relu = relu
        ctx.save_for_backward(rows, mean, invstd, weight, bias)
        return kernels.normalise(rows, mean, invstd, weight, bias, relu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        from spark.sparse.kernels import triton_kernels as kernels

        rows, mean, invstd, weight, bias = ctx.saved_tensors
        of_rows, of_weight, of_bias = kernels.normalise_backward(
            grad, rows, mean, invstd, weight, bias, ctx.relu
        )
        need_rows, _, _, need_weight, need_bias, _ = ctx.needs_input_grad
        return (
            of_rows if need_rows else None,
            None,
            None,
            of_weight if need_weight else None,
            of_bias if need_bias else None,
            None,
        )
