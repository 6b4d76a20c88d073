"""Rules that move channels and leave sites alone: concatenation, split, slices, shuffle, and groups of channels.

They read the same in every layout: the channels of data [N, C] (packed) and [B, C, h, w] (masked) are both dimension 1,
those of [B, h, w, C] dimension 3. All of them preserve zero. Pieces are views, as with tensors, so that what is changed
in place in one of them changes in the whole.

Networks that attend over groups of channels (split attention, selective kernels) hold them as [B, G, C / G, h, w]:
a `GroupedTensor`, with the few rules that such networks need.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spark.sparse.tensor import MissingRuleError, Rule, SparseTensor


class GroupedTensor(SparseTensor):
    """A sparse value whose channels are seen as groups: [B, G, C / G, h, w]. Its data are those of [B, C, h, w].

    Args:
        x: the ungrouped value, in the order [B, C, h, w].
        groups: G, a divisor of C.
    """

    __slots__ = ("groups", "whole")

    def __init__(self, x: SparseTensor, groups: int):
        if x.channels_last:
            raise MissingRuleError(
                f"no sparse rule for groups of channels of {x!r}: only in the order [B, C, h, w]"
            )
        super().__init__(x.data, x.sites, x.layout, x.size4)
        self.groups = groups
        self.whole = x

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Of groups."""
        return _GROUPED_RULES

    @property
    def shape(self) -> torch.Size:
        """[B, G, C / G, h, w]."""
        b, c, h, w = self.size4
        return torch.Size((b, self.groups, c // self.groups, h, w))

    def dim(self) -> int:
        """Always 5."""
        return 5

    @property
    def ndim(self) -> int:
        """Always 5."""
        return 5


def channel_axis(func: Callable, x: SparseTensor, dim: int) -> int:
    """The axis of the data that a dimension of x means; MissingRuleError if it does not mean the channels."""
    if dim % 4 != (3 if x.channels_last else 1):
        raise MissingRuleError(
            f"no sparse rule for {func.__name__} along dimension {dim} of {x!r}: only channels"
        )
    return 3 if x.channels_last and x.data.ndim == 4 else 1


def cat(func: Callable, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> SparseTensor:
    """Maps of one size, one behind the other along their channels."""
    first = next(x for x in tensors if isinstance(x, SparseTensor))
    axis = channel_axis(func, first, kwargs.pop("axis", dim))
    channels = 3 if first.channels_last else 1
    for x in tensors:
        alike = isinstance(x, SparseTensor) and x.channels_last == first.channels_last
        if not alike or x.size4[2:] != first.size4[2:]:
            raise MissingRuleError(f"no sparse rule for {func.__name__} of {first!r} and {x!r}")
    data = func([x.data for x in tensors], axis, **kwargs)
    return first.like(data, channels=sum(x.shape[channels] for x in tensors))


def split(func: Callable, x: SparseTensor, sizes: Any, dim: int = 0) -> tuple[SparseTensor, ...]:
    """`split`, `split_with_sizes` and `chunk` along the channels."""
    return _pieces(x, func(x.data, sizes, channel_axis(func, x, dim)), x.channels_last)


def _pieces(x: SparseTensor, data: Sequence[Tensor], last: bool) -> tuple[SparseTensor, ...]:
    axis = 3 if last and x.data.ndim == 4 else 1
    return tuple(x.like(piece, channels=piece.shape[axis]) for piece in data)


def getitem(func: Callable, x: SparseTensor, index: Any) -> SparseTensor:
    """A slice of channels, and all of every other dimension: `x[:, a:b]`."""
    index = list(index) if isinstance(index, tuple) else [index]
    if index.count(Ellipsis) == 1:
        place = index.index(Ellipsis)
        index[place : place + 1] = [slice(None)] * (x.ndim - len(index) + 1)
    channels = 3 if x.channels_last else 1
    whole = all(part == slice(None) for dim, part in enumerate(index) if dim != channels)
    if not whole or not all(isinstance(part, slice) for part in index) or len(index) > 4:
        raise MissingRuleError(
            f"no sparse rule for the index {tuple(index)} on {x!r}: only slices of channels"
        )
    chosen = index[channels] if len(index) > channels else slice(None)
    axis = channel_axis(func, x, channels)
    data = x.data[(slice(None),) * axis + (chosen,)]
    return x.like(data, channels=data.shape[axis])


def stack(func: Callable, tensors: Sequence[SparseTensor], dim: int = 0) -> GroupedTensor:
    """Maps of one shape as groups: [B, C, h, w] each -> [B, G, C, h, w]."""
    if dim != 1 or len({x.size4 for x in tensors}) != 1:
        raise MissingRuleError(f"no sparse rule for stack of {list(tensors)} along dimension {dim}")
    return GroupedTensor(cat(torch.cat, tensors, 1), len(tensors))


def reshape(func: Callable, x: SparseTensor, *shape: Any) -> SparseTensor:
    """Between [B, C, h, w] and groups of channels [B, G, C / G, h, w]; nothing that mixes sites."""
    wanted = list(shape[0] if len(shape) == 1 and isinstance(shape[0], Sequence) else shape)
    if wanted.count(-1) == 1:
        wanted[wanted.index(-1)] = x.shape.numel() // -math.prod(wanted)
    b, c, h, w = x.size4
    whole = x.whole if isinstance(x, GroupedTensor) else x
    if wanted == list(x.shape):
        return x
    if wanted == [b, c, h, w]:
        return whole
    if len(wanted) == 5 and [wanted[0], wanted[1] * wanted[2], *wanted[3:]] == [b, c, h, w]:
        return GroupedTensor(whole, wanted[1])
    raise MissingRuleError(
        f"no sparse rule for {func.__name__} of {x!r} to {wanted}: only to groups of channels"
    )


def channel_shuffle(func: Callable, x: SparseTensor, groups: int) -> SparseTensor:
    """Channel i of group j becomes channel j of group i."""
    return transpose(func, GroupedTensor(x, groups), 1, 2).whole


def transpose(func: Callable, x: GroupedTensor, dim0: int, dim1: int) -> GroupedTensor:
    """Groups become channels of a group, and those groups."""
    if {dim0 % 5, dim1 % 5} != {1, 2}:
        raise MissingRuleError(f"no sparse rule for {func.__name__} of dimensions {dim0} and {dim1} of {x!r}")
    data = x.data.unflatten(1, (x.groups, -1)).transpose(1, 2).flatten(1, 2)
    return GroupedTensor(x.whole.like(data), x.size4[1] // x.groups)


def sum_of_groups(func: Callable, x: GroupedTensor, dim: Any = None, **kwargs: Any) -> SparseTensor:
    """[B, G, C / G, h, w] -> [B, C / G, h, w]: the sum over groups."""
    if dim not in (1, (1,), [1], -4) or kwargs.get("keepdim"):
        raise MissingRuleError(f"no sparse rule for sum over dimensions {dim} of {x!r}: only over groups")
    return x.whole.like(x.data.unflatten(1, (x.groups, -1)).sum(1), channels=x.size4[1] // x.groups)


def multiply_groups(func: Callable, a: Any, b: Any) -> GroupedTensor:
    """Groups times a factor for each image and channel of a group, [B or 1, G or 1, C / G or 1, 1, 1]."""
    x, factor = (a, b) if isinstance(a, GroupedTensor) else (b, a)
    if not isinstance(factor, Tensor) or factor.ndim != 5 or factor.shape[3:] != (1, 1):
        raise MissingRuleError(f"no sparse rule for {func.__name__} of {a!r} and {b!r}")
    per_channel = factor.expand(-1, *x.shape[1:3], 1, 1).flatten(1, 2)
    return GroupedTensor(x.whole * per_channel, x.groups)


CHANNEL_RULES: dict[str, Rule] = {
    **dict.fromkeys(("cat", "concat", "concatenate"), cat),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), split),
    **dict.fromkeys(("reshape", "view"), reshape),
    "__getitem__": getitem,
    "stack": stack,
    "channel_shuffle": channel_shuffle,
}

_GROUPED_RULES: dict[str, Rule] = {
    **dict.fromkeys(("reshape", "view"), reshape),
    "transpose": transpose,
    "sum": sum_of_groups,
    "mul": multiply_groups,
    "contiguous": lambda func, x, *args, **kwargs: x,
}
