"""Rules that read the same in every layout.

Every rule is called as `rule(func, *args, **kwargs)` with the function PyTorch was asked for.  "Preserves zero" means
that masked sites, which hold 0, hold 0 afterwards without further work.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spark.sparse.channel_ops import CHANNEL_RULES
from spark.sparse.sites import Sites
from spark.sparse.tensor import Layout, MissingRuleError, Rule, SparseTensor


def is_inplace(func: Callable, kwargs: dict[str, Any]) -> bool:
    """Whether this call changes its first argument."""
    name = func.__name__
    return bool(kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__"))


def finish(func: Callable, kwargs: dict[str, Any], x: SparseTensor, data: Tensor) -> SparseTensor:
    """The result of an elementwise call: x itself with new data where the call was in place."""
    if is_inplace(func, kwargs):
        x.data = data
        return x
    return x.like(data)


def elementwise(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """f(x) site by site.  Right as it is where f(0) = 0, and in the packed layout for any f."""
    return finish(func, kwargs, x, func(x.data, *args, **kwargs))


def convert(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Change of type, device or memory: `to`, `float`, `contiguous`, `clone`, `detach`.  Preserves zero.

    A memory format is one of the dense array; rows have only one, so it is ignored there.
    """
    if x.data.ndim != 4:
        kwargs.pop("memory_format", None)
    return x.like(func(x.data, *args, **kwargs))


def new_dense(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> Tensor:
    """`new_empty` and relatives: a plain tensor of the same type and device (drop path draws its noise so)."""
    return func(x.data, *args, **kwargs)


def expand_as(func: Callable, dense: Tensor, x: SparseTensor) -> Tensor:
    """A plain operand of x stays as it is: the rules of arithmetic broadcast it."""
    if not isinstance(dense, Tensor):
        raise MissingRuleError("no sparse rule for expand_as on a sparse value")
    torch.broadcast_shapes(dense.shape, x.shape)
    return dense


def permute(func: Callable, x: SparseTensor, *dims: Any) -> SparseTensor:
    """Between [B, C, h, w] and [B, h, w, C] only.  Rows have no order to change, the dense array has."""
    order = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], Sequence) else tuple(dims)
    expected = (0, 3, 1, 2) if x.channels_last else (0, 2, 3, 1)
    if order == (0, 1, 2, 3):
        return x
    if order != expected:
        raise MissingRuleError(
            f"no sparse rule for permute{order} on {x!r}: only {expected} keeps sites in order"
        )
    if x.data.ndim == 4:
        return x.like(x.data.permute(order), channels_last=not x.channels_last)
    result = x.like(x.data, channels_last=not x.channels_last)
    result.recipe, result.product = x.recipe, x.product
    return result


def window(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """Convolution, pooling, interpolation: the dense operator on the zero-filled map, at its output's visible sites.

    A visible site sees zeros at masked neighbours: max pooling competes with 0 there (and with -inf beyond the image's
    border), average pooling divides as it does on a dense map.  Biases do not reach masked sites.
    """
    require_channels_first(func, x)
    out = func(x.layout.to_dense(x.data, x.sites, x.size4, None), *args, **kwargs)
    if not isinstance(out, Tensor):
        raise MissingRuleError(
            f"no sparse rule for {func.__name__} with more than one result (return_indices?)"
        )
    layout = x.layout if not isinstance(x.layout, PaddedLayout) else x.layout.base
    return SparseTensor(layout.from_dense(out, x.sites), x.sites, layout, _size4(out))


def pad(func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
    """`F.pad` before a convolution or a pooling without padding of its own (TensorFlow's "same", blur pooling)."""
    require_channels_first(func, x)
    dense = func(x.layout.to_dense(x.data, x.sites, x.size4, None), *args, **kwargs)
    base = x.layout if not isinstance(x.layout, PaddedLayout) else x.layout.base
    return SparseTensor(dense, x.sites, PaddedLayout(base), _size4(dense))


def require_channels_first(func: Callable, x: SparseTensor) -> None:
    """Spatial operators need the order [B, C, h, w]."""
    if x.channels_last:
        raise MissingRuleError(f"no sparse rule for {func.__name__} in the order [B, h, w, C]")


def require_channels_last(func: Callable, x: SparseTensor) -> None:
    """Operators over the last dimension have a meaning per site only in the order [B, h, w, C]."""
    if not x.channels_last:
        raise MissingRuleError(f"no sparse rule for {func.__name__} in the order [B, C, h, w]")


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """Type for sums over many sites, too large or too long for half precision."""
    return torch.promote_types(dtype, torch.float32)


def result_type(x: SparseTensor, weight: Tensor | None) -> torch.dtype:
    """Type of x, or that of the weight where it is wider, as under autocast."""
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


def require_norm_over_channels(func: Callable, x: SparseTensor, normalized_shape: Any) -> None:
    """A layer norm over sites would mix visible ones with masked ones."""
    require_channels_last(func, x)
    if tuple(normalized_shape) != (x.size4[1],):
        raise MissingRuleError(
            f"no sparse rule for layer_norm over {tuple(normalized_shape)}: only over channels"
        )


def exact_layer_norm(data: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`F.layer_norm`; under autocast on a CPU in fp32, of which the backward pass keeps a copy of the data.

    PyTorch's CPU kernel adds them up in the type of the data: in bf16, three quarters of the bias gradient are gone
    after 20,000 sites.
    """
    half = data.dtype in (torch.bfloat16, torch.float16)
    if half and data.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return F.layer_norm(data.float(), *args, **kwargs).to(data.dtype)
    return F.layer_norm(data, *args, **kwargs)


def arithmetic_of(
    as_operand: Callable[[Any, SparseTensor], Any], clean: Callable[[Callable, SparseTensor, Tensor], Tensor]
) -> Rule:
    """Make the rule of a + b, a - b, a * b, a / b: of two sparse values, or of one and what broadcasts to its shape.

    Args:
        as_operand: (operand, x) -> a number, or a tensor that broadcasts to x's data.
        clean: (func, x, data) -> the result of func on x, with masked sites at zero again.
    """

    def arithmetic(func: Callable, a: Any, b: Any, **kwargs: Any) -> SparseTensor:
        x = a if isinstance(a, SparseTensor) else b
        if isinstance(a, SparseTensor) and isinstance(b, SparseTensor):
            x = a if a.size4[1] >= b.size4[1] else b  # one of them may be a statistic per site: one channel
            if x.shape != torch.broadcast_shapes(a.shape, b.shape):
                raise MissingRuleError(
                    f"no sparse rule for {func.__name__} of {a!r} and {b!r}: shapes differ"
                )
        out = func(as_operand(a, x), as_operand(b, x), **kwargs)
        axis = 3 if x.channels_last and out.ndim == 4 else 1
        if out.ndim == x.data.ndim and x.size4[1] == 1 != out.shape[axis] and not is_inplace(func, kwargs):
            x = x.like(x.data, channels=out.shape[axis])  # a gate for each site, times what each channel gets
        elif out.shape != x.data.shape:
            raise MissingRuleError(
                f"no sparse rule for {func.__name__}: its result {list(out.shape)} outgrows {x!r}"
            )
        return finish(func, kwargs, x, clean(func, x, out))

    return arithmetic


def over_channels(x: SparseTensor, dim: Any) -> bool:
    """Whether a reduction over `dim` runs over the channels of each site."""
    return _dims(dim) == ({3} if x.channels_last else {1})


def per_site(
    func: Callable, x: SparseTensor, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> SparseTensor:
    """`mean` or `var` over channels, kept as a map of one channel.  A statistic per site; preserves zero."""
    if not over_channels(x, dim) or not keepdim:
        raise MissingRuleError(
            f"no sparse rule for {func.__name__} over dimensions {dim} of {x!r}: only channels, kept"
        )
    axis = 3 if x.channels_last and x.data.ndim == 4 else 1
    return x.like(func(x.data, dim=axis, keepdim=True, **kwargs), channels=1)


def mean_of(sum_over_sites: Callable[[SparseTensor], Tensor]) -> Rule:
    """Make the rule of `mean`, given how a layout adds up sites to [B, C], in at least fp32.

    Over both spatial dimensions: a statistic per image, the mean over its visible sites, as a plain tensor. Over
    channels: a statistic per site.
    """

    def mean(func: Callable, x: SparseTensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
        if over_channels(x, dim):
            return per_site(func, x, dim, keepdim, **kwargs)
        if _dims(dim) != _spatial(x) or kwargs:
            raise MissingRuleError(
                f"no sparse rule for mean over dimensions {dim} of {x!r}: only both spatial ones, or channels"
            )
        count = x.sites.sites_per_image(*x.size4[2:]).clamp(min=1)
        value = (sum_over_sites(x) / count[:, None]).to(x.dtype)  # a sum may be too large for half precision
        if not keepdim:
            return value
        return value[:, None, None, :] if x.channels_last else value[:, :, None, None]

    return mean


def require_one_site(func: Callable, x: SparseTensor, output_size: Any) -> None:
    """Adaptive pooling to more than one site would mix patches."""
    require_channels_first(func, x)
    if output_size not in (1, (1, 1), [1, 1]):
        raise MissingRuleError(f"no sparse rule for {func.__name__} to {output_size}: only to one site")


def global_pool_of(mean: Rule) -> Rule:
    """Make the rule of adaptive average pooling to one site."""

    def adaptive_avg_pool2d(func: Callable, x: SparseTensor, output_size: Any) -> Tensor:
        require_one_site(func, x, output_size)
        return mean(func, x, (2, 3), keepdim=True)

    return adaptive_avg_pool2d


def spatial_norm_of(sum_over_sites: Callable[[SparseTensor], Tensor]) -> Rule:
    """Make the rule of `norm` over both spatial dimensions, given how a layout adds up sites to [B, C].

    A statistic per image, over its visible sites: the Euclidean norm of each channel, as a plain tensor, as global
    response normalisation wants it. Its gradient where all is 0 is 0, as of a dense map.
    """

    def norm(
        func: Callable, x: SparseTensor, p: Any = "fro", dim: Any = None, keepdim: bool = False
    ) -> Tensor:
        if p not in (2, "fro") or _dims(dim) != _spatial(x) or not keepdim:
            raise MissingRuleError(
                f"no sparse rule for norm of order {p} over dimensions {dim} of {x!r}: only 2, over both spatial ones, "
                "kept"
            )
        wide = x.like(x.data.to(at_least_fp32(x.dtype)).square())
        total = sum_over_sites(wide)
        value = torch.where(total > 0, torch.where(total > 0, total, 1).sqrt(), 0).to(x.dtype)
        return value[:, None, None, :] if x.channels_last else value[:, :, None, None]

    return norm


def _dims(dim: Any) -> set[int] | None:
    """Dimensions of a reduction as numbers from 0; None for all."""
    return None if dim is None else {d % 4 for d in (dim if isinstance(dim, Sequence) else [dim])}


def _spatial(x: SparseTensor) -> set[int]:
    return {1, 2} if x.channels_last else {2, 3}


def amax(func: Callable, x: SparseTensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """The largest value over both spatial dimensions: a statistic per image, over its visible sites."""
    if _dims(dim) != {2, 3} or x.channels_last:
        raise MissingRuleError(
            f"no sparse rule for {func.__name__} over dimensions {dim} of {x!r}: only both spatial ones"
        )
    lowest = torch.full((1, x.size4[1], 1, 1), -math.inf, dtype=x.dtype, device=x.device)
    return x.to_dense(lowest).amax((2, 3), keepdim=keepdim)


def adaptive_max_pool2d(
    func: Callable, x: SparseTensor, output_size: Any, *args: Any, **kwargs: Any
) -> Tensor:
    """Pooling to one site: over the visible ones of each image."""
    require_one_site(func, x, output_size)
    return amax(func, x, (2, 3), keepdim=True)


def addcmul(func: Callable, a: Any, b: Any, c: Any, *, value: float = 1) -> Any:
    """a + value * b * c, by the arithmetic of the layout."""
    product = torch.mul(b, c)
    return torch.add(a, product if value == 1 else product * value)


def instance_norm(
    func: Callable,
    x: SparseTensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> SparseTensor:
    """Statistics per image and channel, over its visible sites: group norm with a group for each channel."""
    if running_mean is not None or not use_input_stats:
        raise MissingRuleError("no sparse rule for instance_norm with running statistics: only of each image")
    return x.layout.rules["group_norm"](F.group_norm, x, x.size4[1], weight, bias, eps)


def _size4(dense: Tensor) -> tuple[int, int, int, int]:
    b, c, h, w = dense.shape
    return b, c, h, w


class PaddedLayout(Layout):
    """A dense map with a border around it; the window operator that follows returns to the layout it came from."""

    base: Layout

    def __init__(self, base: Layout):
        super().__init__(
            f"{base.name} (padded)",
            {"conv2d": window, "max_pool2d": window, "avg_pool2d": window, "pad": pad},
            base.from_dense,
            _as_it_is,
        )
        object.__setattr__(self, "base", base)


def _as_it_is(data: Tensor, sites: Sites, size: tuple[int, int, int, int], fill: Tensor | None) -> Tensor:
    return data


# f(0) = 0
ZERO_PRESERVING = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "hardswish"),
    *("tanh", "softsign", "dropout", "neg", "abs", "sign", "square", "sqrt"),
)
# f(0) != 0, at least for some arguments: exponents up to 0, limits that leave 0 out
NOT_ZERO_PRESERVING = (
    *("sigmoid", "hardsigmoid", "logsigmoid", "softplus", "exp", "cos", "rsqrt", "reciprocal"),
    *("pow", "hardtanh", "alpha_dropout"),
)
ARITHMETIC = ("add", "sub", "mul", "div")
CONVERSIONS = ["to", "float", "half", "bfloat16", "double", "type", "contiguous", "clone", "detach"]
NEW = ["new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"]


def with_inplace(names: Sequence[str], rule: Rule) -> dict[str, Rule]:
    """The same rule for `f` and `f_`."""
    return {name + suffix: rule for name in names for suffix in ("", "_")}


SHARED_RULES: dict[str, Rule] = {
    **CHANNEL_RULES,
    **dict.fromkeys(CONVERSIONS, convert),
    **dict.fromkeys(NEW, new_dense),
    **with_inplace(ZERO_PRESERVING, elementwise),
    "expand_as": expand_as,
    "permute": permute,
    "var": per_site,
    "amax": amax,
    "adaptive_max_pool2d": adaptive_max_pool2d,
    "addcmul": addcmul,
    "interpolate": window,
    "instance_norm": instance_norm,
    "pad": pad,
    "max_pool2d": window,
    "avg_pool2d": window,
}
