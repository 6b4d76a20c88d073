"""The masked layout: a dense array [B, C, h, w], zero at masked sites; the reference that all layouts must equal.

Each rule is the dense operator, then the mask.  Source of the semantics: the official SparK code's sparse modules.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spark.sparse import common_ops as common
from spark.sparse.batch_norm import BatchNormCall
from spark.sparse.batch_norm import batch_norm as synced_batch_norm
from spark.sparse.sites import Sites, as_rows
from spark.sparse.tensor import Layout, SparseTensor


def from_dense(dense: Tensor, sites: Sites) -> Tensor:
    """Zero the masked sites (chosen, not multiplied: what lies there may be infinite)."""
    return torch.where(sites.mask(*dense.shape[2:]), dense, 0)


def to_dense(data: Tensor, sites: Sites, size: tuple[int, int, int, int], fill: Tensor | None) -> Tensor:
    """The array as it is, or with the fill at masked sites."""
    return data if fill is None else torch.where(sites.mask(*size[2:]), data, fill.to(data.dtype))


def mask_of(x: SparseTensor) -> Tensor:
    """The visible sites of x, in its order of dimensions."""
    mask = x.sites.mask(*x.size4[2:])
    return mask.permute(0, 2, 3, 1) if x.channels_last else mask


def remask(x: SparseTensor, data: Tensor) -> Tensor:
    """Zero the masked sites of data that lie in x's order of dimensions."""
    return torch.where(mask_of(x), data, 0)


def elementwise_remasked(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """f(x) where f(0) != 0.  Masked sites are computed at 1, where f has a gradient, then zeroed."""
    inside = torch.where(mask_of(x), x.data, 1)
    out = remask(x, func(inside, *args, **kwargs))
    return common.finish(func, kwargs, x, x.data.copy_(out) if common.is_inplace(func, kwargs) else out)


def clean(func: Callable, x: SparseTensor, data: Tensor) -> Tensor:
    """Zero the masked sites of what arithmetic made of x, in place where that worked in place."""
    if not common.is_inplace(func, {}):
        return remask(x, data)
    if torch.compiler.is_compiling():
        # masked_fill_ of a view in another order of dimensions cannot be traced.
        return data.copy_(remask(x, data))
    return data.masked_fill_(~mask_of(x), 0)


def batch_norm(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Statistics per batch: over the visible sites of all images (of all processes where `sites.sync`)."""
    common.require_channels_first(func, x)
    b, c, h, w = x.size4
    # Not the mask: a GPU would have to be waited for, to learn how many sites it selects.
    places = x.sites.rows(h, w)
    sites = as_rows(x.data)
    call = BatchNormCall(*args, **kwargs)
    rows = synced_batch_norm(sites.index_select(0, places), call, sync=x.sites.sync).values
    return x.like(
        rows.new_zeros(sites.shape).index_copy(0, places, rows).view(b, h, w, c).permute(0, 3, 1, 2)
    )


def group_norm(
    func: Callable,
    x: SparseTensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> SparseTensor:
    """Statistics per image and group of channels: over the visible sites of that image."""
    common.require_channels_first(func, x)
    b, c, h, w = x.size4
    grouped = x.data.view(b, num_groups, c // num_groups, h, w).to(common.at_least_fp32(x.dtype))
    mask = x.sites.mask(h, w)[:, None]
    count = mask.sum((2, 3, 4), keepdim=True).clamp(min=1) * (c // num_groups)  # 0 / 0 has no gradient either
    mean = grouped.sum((2, 3, 4), keepdim=True) / count
    centred = torch.where(mask, grouped - mean, 0)
    var = centred.square().sum((2, 3, 4), keepdim=True) / count
    out = (centred * (var + eps).rsqrt()).view(b, c, h, w)
    if weight is not None:
        out = out * weight[:, None, None]
    if bias is not None:
        out = out + bias[:, None, None]
    return x.like(remask(x, out).to(common.result_type(x, weight)))


def layer_norm(
    func: Callable, x: SparseTensor, normalized_shape: Any, *args: Any, **kwargs: Any
) -> SparseTensor:
    """Statistics per site, over channels.  A masked site would become the bias, so it is zeroed."""
    common.require_norm_over_channels(func, x, normalized_shape)
    return x.like(remask(x, common.exact_layer_norm(x.data, normalized_shape, *args, **kwargs)))


def linear(func: Callable, x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    """Per site, over channels; the bias is kept from masked sites."""
    common.require_channels_last(func, x)
    return x.like(remask(x, F.linear(x.data, weight, bias)), channels=weight.shape[0])


def _sum_over_sites(x: SparseTensor) -> Tensor:
    return x.data.sum((1, 2) if x.channels_last else (2, 3), dtype=common.at_least_fp32(x.dtype))


def _operand(operand: Any, x: SparseTensor) -> Any:
    return operand.data if isinstance(operand, SparseTensor) else operand


_mean = common.mean_of(_sum_over_sites)

MASKED = Layout(
    "masked",
    {
        **common.SHARED_RULES,
        **common.with_inplace(common.NOT_ZERO_PRESERVING, elementwise_remasked),
        **common.with_inplace(common.ARITHMETIC, common.arithmetic_of(_operand, clean)),
        "conv2d": common.window,
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
