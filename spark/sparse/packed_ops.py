"""The packed layout: rows [N, C] of the visible sites, in the order of `sites.py`.

What works site by site (pointwise convolution, linear layers, norms, activations) runs on the rows as they are, and
masked sites cost nothing.  What looks at neighbours scatters the rows into a zero-filled map, runs the dense operator
and gathers the visible sites of its output.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spark.sparse import common_ops as common
from spark.sparse.batch_norm import batch_norm as synced_batch_norm
from spark.sparse.sites import Sites
from spark.sparse.tensor import Layout, MissingRuleError, SparseTensor


def from_dense(dense: Tensor, sites: Sites) -> Tensor:
    """Gather: [B, C, h, w] -> [N, C]."""
    h, w = dense.shape[2:]
    return dense.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, sites.rows(h, w))


def to_dense(data: Tensor, sites: Sites, size: tuple[int, int, int, int]) -> Tensor:
    """Scatter: [N, C] -> [B, C, h, w] in channels_last memory, zero at masked sites."""
    b, c, h, w = size
    flat = data.new_zeros(b * h * w, c).index_copy(0, sites.rows(h, w), data)
    return flat.view(b, h, w, c).permute(0, 3, 1, 2)


def conv2d(
    func: Callable,
    x: SparseTensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> SparseTensor:
    """A pointwise convolution is a linear layer on rows; any other one goes through the zero-filled map."""
    common.require_channels_first(func, x)
    pointwise = weight.shape[2:] == (1, 1) and groups == 1
    if pointwise and stride in (1, (1, 1)) and padding in (0, (0, 0), "valid", "same"):
        return x.like(F.linear(x.data, weight.flatten(1), bias), channels=weight.shape[0])
    return common.window(func, x, weight, bias, stride, padding, dilation, groups)


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
        return per_image if per_image.shape[0] == 1 else per_image.index_select(0, x.sites.row_images(h, w))
    return by_site.expand(b, h, w, -1).flatten(0, 2).index_select(0, x.sites.rows(h, w))


def batch_norm(
    func: Callable,
    x: SparseTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> SparseTensor:
    """Statistics per batch: over the rows, which are the visible sites (of all processes where `sites.sync`)."""
    common.require_channels_first(func, x)
    rows = synced_batch_norm(
        x.data, running_mean, running_var, weight, bias, training, momentum, eps, sync=x.sites.sync
    )
    return x.like(rows)


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
    b, c, h, w = x.size4
    images = x.sites.row_images(h, w)
    grouped = x.data.view(-1, num_groups, c // num_groups)
    count = x.sites.sites_per_image(h, w)[:, None] * (c // num_groups)

    def per_image(rows: Tensor) -> Tensor:
        """[N, groups] summed over the rows of each image, divided by the number of values: [B, groups]."""
        return rows.new_zeros(b, num_groups).index_add(0, images, rows) / count

    centred = grouped - per_image(grouped.sum(2)).index_select(0, images)[:, :, None]
    var = per_image(centred.square().sum(2))
    rows = (centred * (var + eps).rsqrt().index_select(0, images)[:, :, None]).flatten(1)
    if weight is not None:
        rows = rows * weight
    return x.like(rows if bias is None else rows + bias)


def layer_norm(
    func: Callable, x: SparseTensor, normalized_shape: Any, *args: Any, **kwargs: Any
) -> SparseTensor:
    """Statistics per site, over channels."""
    common.require_channels_last(func, x)
    if tuple(normalized_shape) != (x.size4[1],):
        raise MissingRuleError(
            f"no sparse rule for layer_norm over {tuple(normalized_shape)}: only over channels"
        )
    return x.like(func(x.data, normalized_shape, *args, **kwargs))


def linear(func: Callable, x: SparseTensor, weight: Tensor, bias: Tensor | None = None) -> SparseTensor:
    """Per site, over channels."""
    common.require_channels_last(func, x)
    return x.like(F.linear(x.data, weight, bias), channels=weight.shape[0])


def _sum_over_sites(x: SparseTensor) -> Tensor:
    b, c, h, w = x.size4
    return x.data.new_zeros(b, c).index_add(0, x.sites.row_images(h, w), x.data)


_mean = common.mean_of(_sum_over_sites)

PACKED = Layout(
    "packed",
    {
        **common.SHARED_RULES,
        **common.with_inplace(common.NOT_ZERO_PRESERVING, common.elementwise),
        **common.with_inplace(common.ARITHMETIC, common.arithmetic_of(_as_rows, lambda x, data: data)),
        "conv2d": conv2d,
        "batch_norm": batch_norm,
        "group_norm": group_norm,
        "layer_norm": layer_norm,
        "linear": linear,
        "mean": _mean,
        "adaptive_avg_pool2d": common.global_pool_of(_mean),
    },
    from_dense,
    to_dense,
)
