"""Histograms of oriented gradients: a target of masked prediction, and how they are drawn.

Definition, that of MaskFeat's code (Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training",
CVPR 2022; `HOGLayerC` in `slowfast/models/operators.py` of facebookresearch/SlowFast, without its Gaussian window): on
each channel alone, Sobel gradients (image borders reflected); the unsigned orientation atan2(gx, gy) modulo pi falls
into one of 9 equal bins and votes there with the gradient's length, nowhere else; votes are summed over cells of 8x8
pixels; the 9 numbers of a cell and channel are divided by their Euclidean length. A cell without any gradient is zero.

Nothing of it depends on the scale of a channel, so images may be normalised as the encoder expects.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9
CELL = 8  # [px]


@torch.no_grad()
def hog(images: Tensor) -> Tensor:
    """Histogram of every cell of images [B, C, H, W], whose sides are multiples of 8.

    Returns:
        [B, C * 9, H / 8, W / 8], the bins of a channel side by side; of the images' type, fp32 at least.
    """
    b, c, h, w = images.shape
    padded = F.pad(images.to(torch.promote_types(images.dtype, torch.float32)), (1, 1, 1, 1), mode="reflect")
    dx = padded[..., 2:] - padded[..., :-2]
    dy = padded[..., 2:, :] - padded[..., :-2, :]
    gx = dx[..., :-2, :] + 2 * dx[..., 1:-1, :] + dx[..., 2:, :]
    gy = dy[..., :-2] + 2 * dy[..., 1:-1] + dy[..., 2:]
    length = (gx.square() + gy.square()).sqrt()
    fullest = (torch.atan2(gx, gy) / math.pi * BINS).floor().remainder(BINS)
    # One bin after the other: a histogram of every pixel would be nine times the image.
    votes = [
        (length * (fullest == k)).view(b, c, h // CELL, CELL, w // CELL, CELL).sum((3, 5))
        for k in range(BINS)
    ]
    return F.normalize(torch.stack(votes, 2), dim=2).flatten(1, 2)


def draw_hog(histograms: Tensor) -> Tensor:
    """Draw in every cell one stroke a bin, along the edge that its gradients cross, as bright as the bin is full.

    Histograms [B, C * 9, h, w] are averaged over the channels, and negative numbers count as 0.

    Returns:
        [B, 1, h * 8, w * 8], between 0 and 1.
    """
    b, _, h, w = histograms.shape
    votes = histograms.float().unflatten(1, (-1, BINS)).mean(1).clamp(min=0)
    angle = (torch.arange(BINS, device=votes.device) + 0.5) * math.pi / BINS
    place = torch.arange(CELL, device=votes.device) - (CELL - 1) / 2
    # The gradient of a bin points to (sin, cos); its edge is the line of the cell's centre that is orthogonal to it.
    distance = (
        angle.sin()[:, None, None] * place[None, None, :] + angle.cos()[:, None, None] * place[None, :, None]
    )
    strokes = (1 - distance.abs()).clamp(min=0)
    drawn = torch.einsum("bkhw,kyx->bhywx", votes, strokes)
    return drawn.reshape(b, 1, h * CELL, w * CELL).clamp(max=1)
