"""What every depth head returns, and the bounded map from a network's output to metres."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spark.errors import UserError


@dataclass(frozen=True)
class DepthOutput:
    """What a depth model, or its head, returns; None is what the head does not give."""

    depth: Tensor | None = None
    """Depth along the optical axis [B, 1, H, W] [m], fp32 or wider."""

    disparity_affine: Tensor | None = None
    """Inverse depth up to an unknown scale and shift [B, 1, H, W], larger is nearer."""

    extras: dict[str, Tensor] = field(default_factory=dict)
    """Further maps [B, C, h, w] by name, at any stride, of the padded images: what the head names in `Head.extras`,
    and what modules of losses make of it."""

    def disparity(self) -> Tensor | None:
        """Inverse depth [B, 1, H, W]: the affine-invariant one of a head that gives it, else 1 / depth [1/m]."""
        if self.disparity_affine is not None or self.depth is None:
            return self.disparity_affine
        return self.depth.reciprocal()

    def get(self, name: str) -> Tensor | None:
        """A map by name: depth, disparity, disparity_affine or one of `extras`."""
        if name == "disparity":
            return self.disparity()
        return getattr(self, name) if name in ("depth", "disparity_affine") else self.extras.get(name)


def at_least_fp32(values: Tensor) -> Tensor:
    """The values in fp32, or in fp64 where they are."""
    return values if values.dtype == torch.float64 else values.float()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Out of autocast, on devices that have it (shapes without values, device meta, have none)."""
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


class DepthRange(nn.Module):
    """`depth = min_depth + (max_depth - min_depth) * sigmoid(x)`, in fp32 also inside autocast (bf16 has 3 digits).

    Args:
        min_depth: Nearest depth the model can say [m].
        max_depth: Farthest depth the model can say [m].
        initial_depth: Depth near which an untrained head starts [m]: `initial_logit` is what its last bias is set to.
            Starting at the data's typical depth spares the first steps, which otherwise only move the sigmoid from
            the middle of the range.
    """

    def __init__(self, min_depth: float, max_depth: float, initial_depth: float) -> None:
        super().__init__()
        if not 0 < min_depth < initial_depth < max_depth:
            raise UserError(
                "depths must satisfy 0 < min_depth < initial_depth < max_depth [m], got "
                f"min_depth={min_depth}, initial_depth={initial_depth}, max_depth={max_depth}."
            )
        self.min_depth = min_depth
        self.max_depth = max_depth
        self.initial_depth = initial_depth
        share = (initial_depth - min_depth) / (max_depth - min_depth)
        self.initial_logit = math.log(share / (1 - share))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, 1, H, W] of any real values to metres of the same shape."""
        with full_precision(x):
            return self.min_depth + (self.max_depth - self.min_depth) * at_least_fp32(x).sigmoid()
