"""Weights and statistics for images with another number of channels.

The convolution that reads the image follows timm's rule (`timm.models.adapt_input_conv`): for one channel the kernels
are added up, so that a grey image gives the same as that image in colour; for more channels they are repeated in turn
(R, G, B, R, ...) and scaled by old / new, so that features keep their size. Values for each channel (statistics, and
weights that predict the image) are repeated likewise: new channel i takes the value of old channel i modulo their
number; one channel takes the mean over the old ones, weighted by brightness where these are red, green and blue.
"""

from collections.abc import Sequence

import torch
from timm.models import adapt_input_conv
from torch import Tensor

# Weights of R, G, B in brightness (ITU-R BT.601), as Pillow's conversion to grey uses them.
LUMA = (0.299, 0.587, 0.114)


def adapt_input(weight: Tensor, in_chans: int) -> Tensor:
    """Kernels of the convolution that reads the image: [O, C, kh, kw] -> [O, in_chans, kh, kw]."""
    return adapt_input_conv(in_chans, weight, base_chans=weight.shape[1])


def adapt_output(values: Tensor, channels: int, in_chans: int) -> Tensor:
    """Weights or bias of a layer that predicts the image: [C * n, ...] -> [in_chans * n, ...], C being `channels`."""
    grouped = values.unflatten(0, (channels, -1))
    mixed = torch.einsum("ic,c...->i...", _mixture(channels, in_chans).to(values), grouped)
    return mixed.flatten(0, 1)


def adapt_statistics(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    """Mean or standard deviation of each channel: C numbers -> `in_chans` numbers."""
    mixed = _mixture(len(values), in_chans) @ torch.tensor(list(values), dtype=torch.float64)
    return tuple(mixed.tolist())


def _mixture(old: int, new: int) -> Tensor:
    """Shares of the old channels in the new ones: [new, old]."""
    if old == new:
        return torch.eye(old, dtype=torch.float64)
    if new == 1:
        shares = LUMA if old == 3 else (1 / old,) * old
        return torch.tensor([shares], dtype=torch.float64)
    return torch.eye(old, dtype=torch.float64)[torch.arange(new) % old]
