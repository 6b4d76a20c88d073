"""Normalisation of images by mean and standard deviation of each channel, for training, probes and exported graphs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """`(pixels - mean) / std`, uint8 pixels divided by 255 before.

    Args:
        mean: of each channel, of values in [0, 1] or, for floats, in their own unit.
        std: likewise.
        fused: compute `pixels * scale + shift`: faster on a CPU, and the last bit may differ.
    """

    mean: Tensor
    std: Tensor
    byte_scale: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], fused: bool = False) -> None:
        super().__init__()
        exact_mean, exact_std = (torch.tensor(x, dtype=torch.float64)[:, None, None] for x in (mean, std))
        self.register_buffer("mean", exact_mean.float())
        self.register_buffer("std", exact_std.float())
        self.fused = fused
        if fused:
            self.register_buffer("byte_scale", (1 / (255 * exact_std)).float())
            self.register_buffer("scale", (1 / exact_std).float())
            self.register_buffer("shift", (-exact_mean / exact_std).float())

    def forward(self, pixels: Tensor) -> Tensor:
        """[..., C, H, W] uint8 or float32 -> float32, in the same memory format."""
        is_bytes = pixels.dtype == torch.uint8
        if self.fused:
            scaled = pixels.float().mul_(self.byte_scale) if is_bytes else pixels * self.scale
            return scaled.add_(self.shift)
        return ((pixels.float() / 255 if is_bytes else pixels) - self.mean) / self.std

    def restore(self, images: Tensor) -> Tensor:
        """Normalised images [..., C, H, W] back to values on the scale of `mean`."""
        return images * self.std + self.mean
