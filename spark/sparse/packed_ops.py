"""The packed layout: rows [N, C] of the visible sites, in the order of `sites.py`.

Operators that work site by site (pointwise convolution, linear layers, norms, activations) run on the rows, and masked
sites cost nothing.  Operators that look at neighbours read patches with their surroundings (`packed_conv.py`).

Norms and activations leave a recipe with their result: how to compute it again in the backward pass.  A convolution
then keeps nothing of its own, so that of convolution, norm and activation one tensor stays in memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark.sparse import common_ops as common
from spark.sparse.batch_norm import BatchNormCall
from spark.sparse.batch_norm import batch_norm as synced_batch_norm
from spark.sparse.packed_conv import Window, packed_conv, packed_max_pool, scaled_product
from spark.sparse.sites import Sites
from spark.sparse.tensor import Layout, MissingRuleError, Product, Recipe, SparseTensor, versions_of


def from_dense(dense: Tensor, sites: Sites) -> Tensor:
    """Gather: [B, C, h, w] -> [N, C]."""
    b, c, h, w = dense.shape
    ph, pw = sites.patch_sides(h, w)
    image, row, column = sites.patches().unbind(1)
    patches = dense.view(b, c, h // ph, ph, w // pw, pw)[image, :, row, :, column]
    return patches.permute(0, 2, 3, 1).reshape(-1, c)


def to_dense(data: Tensor, sites: Sites, size: tuple[int, int, int, int], fill: Tensor | None) -> Tensor:
    """Scatter: [N, C] -> [B, C, h, w] in channels_last memory, the fill or zero at masked sites."""
    b, c, h, w = size
    row = None if fill is None else fill.view(1, c).to(data.dtype)
    flat = _Scatter.apply(data, row, sites.rows(h, w), (b * h, w))
    return flat.view(b, h, w, c).permute(0, 3, 1, 2)  # type: ignore[union-attr]


class _Scatter(torch.autograd.Function):
    """Rows [N, C] at their places among those of lines [number, length], the others equal to one row [1, C] or 0."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, fill: Tensor | None, places: Tensor, lines: tuple[int, int]
    ) -> Tensor:
        ctx.lines = lines
        ctx.save_for_backward(places)
        out = rows.new_empty(lines[0] * lines[1], rows.shape[1])
        out.copy_(fill) if fill is not None else out.zero_()
        return out.index_copy_(0, places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        need_rows, need_fill = ctx.needs_input_grad[:2]
        grad_fill = None
        if need_fill:
            number, length = ctx.lines
            filled = grad.new_ones(len(grad)).index_fill_(0, places, 0).view(number, 1, length)
            grad_fill = (filled @ grad.view(number, length, -1)).sum(0)  # by lines: a long sum loses digits
        return grad.index_select(0, places) if need_rows else None, grad_fill, None, None


def recipe(
    compute: Callable[..., Tensor], inputs: tuple[Tensor, ...], data: Tensor, terms: int = 1
) -> Recipe | None:
    """How to compute a result again; None where nothing is differentiated."""
    if torch.compiler.is_compiling():  # the compiler decides itself what is kept and what is computed again
        return None
    return Recipe(compute, inputs, data._version, terms) if data.requires_grad else None


def valid_recipe(x: SparseTensor) -> Recipe | None:
    """The recipe of x, unless its data were changed in place through an alias."""
    return x.recipe if x.recipe is not None and x.recipe.version == x.data._version else None


class ConvCall(NamedTuple):
    """What `F.conv2d` is called with beside its input."""

    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def window(self) -> Window | None:
        """See `window_of`."""
        return window_of(self.weight.shape[2:], self.stride, self.padding, self.dilation)


def conv2d(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """From tiles, columns or a zero-filled map, see `packed_conv.py`."""
    common.require_channels_first(func, x)
    call = ConvCall(*args, **kwargs)
    window = call.window
    if window is None:
        return common.window(func, x, *call)
    b, _, h, w = x.size4
    before = valid_recipe(x)
    rows = packed_conv(x.data, x.sites, h, w, window, call.weight, call.bias, call.groups, before)
    result = SparseTensor(rows, x.sites, x.layout, (b, len(call.weight), *window.output_size(h, w)))
    if window == _POINTWISE and call.groups == 1:
        result.product = _product(x.data, call.weight, call.bias, before, rows)
    return result


_POINTWISE = Window((1, 1), (1, 1), (0, 0))


def _product(
    rows: Tensor, weight: Tensor, bias: Tensor | None, before: Recipe | None, data: Tensor
) -> Product | None:
    """What `multiply` may fold a layer scale into: products with bias, which no norm follows.

    In full precision: the sums over weights in place of rows were not shown to be as exact in half.
    """
    wide = rows.dtype == weight.dtype == data.dtype and rows.dtype in (torch.float32, torch.float64)
    if bias is None or not wide or not data.requires_grad or torch.compiler.is_compiling():
        return None
    return Product(rows, weight, bias, before, versions_of(rows, weight, bias, data))


def max_pool2d(
    func: Callable,
    x: SparseTensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> SparseTensor:
    """Over tiles of the rows; through the zero-filled map where windows do not keep to patches."""
    common.require_channels_first(func, x)
    stride = kernel_size if stride is None else stride
    window = window_of(_pair(kernel_size), stride, padding, dilation)
    if window is not None and not ceil_mode and not return_indices:
        b, c, h, w = x.size4
        rows = packed_max_pool(x.data, x.sites, h, w, window, valid_recipe(x))
        if rows is not None:
            return SparseTensor(rows, x.sites, x.layout, (b, c, h // window.stride[0], w // window.stride[1]))
    return common.window(func, x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value if len(value) == 2 else (value[0], value[0])
    return int(first), int(second)


def window_of(kernel: Any, stride: Any, padding: Any, dilation: Any) -> Window | None:
    """The window of an operator's arguments; None for padding by name where its two sides would differ."""
    kernel, dilation = _pair(kernel), _pair(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        if any(n % 2 for n in total):
            return None
        padding = [n // 2 for n in total]
    return Window(kernel, _pair(stride), _pair(padding), dilation)


def _as_rows(operand: Any, x: SparseTensor) -> Any:
    """What an operand is at the rows of x: numbers stay, a tensor broadcast to x's shape becomes [N or 1, C or 1]."""
    if isinstance(operand, SparseTensor):
        return operand.data
    if not isinstance(operand, Tensor) or operand.ndim == 0:
        return operand
    if operand.ndim > 4:
        raise MissingRuleError(f"no sparse rule for an operand of shape {list(operand.shape)} with {x!r}")
    full = operand.reshape([1] * (4 - operand.ndim) + list(operand.shape))
    by_site = full if x.channels_last else full.permute(0, 2, 3, 1)  # [B or 1, h or 1, w or 1, C or 1]
    b, _, h, w = x.size4
    if by_site.shape[1:3] == (1, 1):
        per_image = by_site[:, 0, 0]
        return per_image if per_image.shape[0] == 1 else _to_rows(per_image, x)
    return by_site.expand(b, h, w, -1).flatten(0, 2).index_select(0, x.sites.rows(h, w))


def _to_rows(per_image: Tensor, x: SparseTensor) -> Tensor:
    """[B, C] -> [N, C]. By patches, so that its gradient is added up as in `_sum_per_image`."""
    image, sides = x.sites.patches()[:, 0], x.sites.patch_sides(*x.size4[2:])
    by_patch = per_image.index_select(0, image)[:, None]
    return by_patch.expand(-1, sides[0] * sides[1], -1).reshape(-1, per_image.shape[1])


def _sum_per_image(rows: Tensor, x: SparseTensor) -> Tensor:
    """Rows [N, C] added up over each image: [B, C], in at least fp32.

    Over each patch first. Thousands of rows added one after the other lose digits, in half precision (on a GPU, where
    that is the type of the sum, too) all of them.
    """
    image, sides = x.sites.patches()[:, 0], x.sites.patch_sides(*x.size4[2:])
    by_patch = rows.view(len(image), sides[0] * sides[1], rows.shape[1])
    patches = by_patch.sum(1, dtype=common.at_least_fp32(rows.dtype))
    return patches.new_zeros(x.size4[0], rows.shape[1]).index_add(0, image, patches)


def batch_norm(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Statistics per batch: over the rows, which are the visible sites (of all processes where `sites.sync`)."""
    common.require_channels_first(func, x)
    call = BatchNormCall(*args, **kwargs)
    out, mean, invstd = synced_batch_norm(x.data, call, sync=x.sites.sync)
    result = x.like(out)
    if call.training:
        kept = tuple(t.detach() for t in (mean, invstd, call.weight, call.bias) if t is not None)
        if len(kept) == 4:
            result.recipe = recipe(_normalise, (x.data, *kept), out)
    return result


def _normalise(x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The result of batch norm."""
    scale = invstd * weight
    return torch.addcmul(bias - mean * scale, x.to(scale.dtype), scale).to(x.dtype)


def relu(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Of what a recipe can compute again, the backward pass finds the signs by computing it: nothing is kept."""
    before = valid_recipe(x)
    if before is None:
        return common.elementwise(func, x, *args, **kwargs)
    compute = _ReLUOf(before.compute)
    rows = _RecomputedReLU.apply(x.data, compute, before.inputs, common.is_inplace(func, kwargs))
    result = common.finish(func, kwargs, x, rows)
    result.recipe = recipe(compute, before.inputs, rows, before.terms)
    return result


class _ReLUOf:
    """ReLU of what a recipe computes again. The last result is kept for its next use, which removes it:
    the ReLU's own backward pass, right after that of the convolution which computed its input again.
    """

    def __init__(self, compute: Callable[..., Tensor]):
        self.compute = compute
        self.last: tuple[Tensor, int] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        result = self.compute(*inputs).relu_()
        self.last = result, result._version
        return result

    def take(self, *inputs: Tensor) -> Tensor:
        """The last result, unless it was changed since; computed again otherwise."""
        last, self.last = self.last, None
        return last[0] if last is not None and last[0]._version == last[1] else self.compute(*inputs)


class _RecomputedReLU(torch.autograd.Function):
    """ReLU of what a recipe can compute again."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, compute: _ReLUOf, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        if not inplace:
            return rows.relu()
        ctx.mark_dirty(rows)
        return rows.relu_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        result = ctx.compute.take(*ctx.saved_tensors)
        # Nobody else has this result: it makes room.
        out = torch.ops.aten.threshold_backward.grad_input(grad, result, 0, grad_input=result)
        return out, None, None, None


def gelu(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Its own backward keeps x, from which the result can be computed again."""
    result = common.elementwise(func, x, *args, **kwargs)
    result.recipe = recipe(partial(_call, func, args, kwargs), (x.data,), result.data)
    return result


def _call(func: Callable, args: Any, kwargs: Any, *inputs: Tensor) -> Tensor:
    return func(*inputs, *args, **kwargs)


def dropout(
    func: Callable, x: SparseTensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> SparseTensor:
    """Site by site; x itself where nothing is dropped."""
    return x if p == 0 or not training else common.elementwise(func, x, p, training, inplace)


_arithmetic = common.arithmetic_of(_as_rows, lambda func, x, data: data)


def add(func: Callable, a: Any, b: Any, **kwargs: Any) -> SparseTensor:
    """A sum of two things that can be computed again can be, too: a residual branch and a shortcut with its own norm.

    Not a sum of sums: that would go back over all blocks of a stage.
    """
    recipes = [valid_recipe(x) for x in (a, b) if isinstance(x, SparseTensor)]
    alike = len(recipes) == 2 and a.shape == b.shape and not kwargs
    result = _arithmetic(func, a, b, **kwargs)
    if alike and all(r is not None and r.terms == 1 for r in recipes):
        first, second = (r for r in recipes if r is not None)
        compute = partial(_sum_of, first.compute, second.compute, len(first.inputs))
        result.recipe = recipe(compute, first.inputs + second.inputs, result.data, 2)
    return result


def _sum_of(
    first: Callable[..., Tensor], second: Callable[..., Tensor], split: int, *inputs: Tensor
) -> Tensor:
    return first(*inputs[:split]).add_(second(*inputs[split:]))


def multiply(func: Callable, a: Any, b: Any, **kwargs: Any) -> SparseTensor:
    """A layer scale joins the product before it."""
    for x, factor in ((a, b), (b, a)):
        product = x.product if isinstance(x, SparseTensor) else None
        if product is None or not isinstance(factor, Tensor) or kwargs or not product.fits(x.data):
            continue
        scale = _as_rows(factor, x) if factor.numel() == x.data.shape[1] else factor
        if scale.shape == (1, x.data.shape[1]) and scale.dtype == x.data.dtype:
            return x.like(scaled_product(product, x.data, scale.squeeze(0)))
    return _arithmetic(func, a, b, **kwargs)


def group_norm(
    func: Callable,
    x: SparseTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> SparseTensor:
    """Statistics per image and group of channels: over the rows of that image, two passes."""
    common.require_channels_first(func, x)
    _, c, h, w = x.size4
    grouped = x.data.view(-1, num_groups, c // num_groups).to(common.at_least_fp32(x.dtype))
    count = x.sites.sites_per_image(h, w)[:, None] * (c // num_groups)

    def per_image(rows: Tensor) -> Tensor:
        """[N, groups] summed over the rows of each image, divided by the number of values: [B, groups]."""
        return _sum_per_image(rows, x) / count

    centred = grouped - _to_rows(per_image(grouped.sum(2)), x)[:, :, None]
    var = per_image(centred.square().sum(2))
    rows = (centred * _to_rows((var + eps).rsqrt(), x)[:, :, None]).flatten(1)
    if weight is not None:
        rows = rows * weight
    rows = rows if bias is None else rows + bias
    return x.like(rows.to(common.result_type(x, weight)))


def layer_norm(
    func: Callable, x: SparseTensor, normalized_shape: Any, *args: Any, **kwargs: Any
) -> SparseTensor:
    """Statistics per site, over channels."""
    common.require_norm_over_channels(func, x, normalized_shape)
    rows = common.exact_layer_norm(x.data, normalized_shape, *args, **kwargs)
    result = x.like(rows)
    result.recipe = recipe(
        partial(_layer_norm_of, normalized_shape, rows.dtype, args, kwargs), (x.data,), rows
    )
    return result


def _layer_norm_of(shape: Any, dtype: torch.dtype, args: Any, kwargs: Any, rows: Tensor) -> Tensor:
    return common.exact_layer_norm(rows.to(dtype), shape, *args, **kwargs)


def linear(func: Callable, x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    """Per site, over channels: a pointwise convolution."""
    common.require_channels_last(func, x)
    kernel, before = weight[:, :, None, None], valid_recipe(x)
    rows = packed_conv(x.data, x.sites, *x.size4[2:], _POINTWISE, kernel, bias, recipe=before)
    result = x.like(rows, channels=len(weight))
    result.product = _product(x.data, kernel, bias, before, rows)
    return result


def _sum_over_sites(x: SparseTensor) -> Tensor:
    return _sum_per_image(x.data, x)


_mean = common.mean_of(_sum_over_sites)

PACKED = Layout(
    "packed",
    {
        **common.SHARED_RULES,
        **common.with_inplace(common.NOT_ZERO_PRESERVING, common.elementwise),
        **common.with_inplace(common.ARITHMETIC, _arithmetic),
        **dict.fromkeys(("add", "add_"), add),
        "mul": multiply,
        **dict.fromkeys(("relu", "relu_"), relu),
        "gelu": gelu,
        "dropout": dropout,
        "conv2d": conv2d,
        "max_pool2d": max_pool2d,
        "batch_norm": batch_norm,
        "group_norm": group_norm,
        "layer_norm": layer_norm,
        "linear": linear,
        "mean": _mean,
        "norm": common.spatial_norm_of(_sum_over_sites),
        "adaptive_avg_pool2d": common.global_pool_of(_mean),
    },
    from_dense,
    to_dense,
)
