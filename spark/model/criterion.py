"""What the decoder must predict, and how wrong it was.

Shapes: B images, C channels, patches of p x p pixels on a grid of fh x fw.
Source: SparK (ICLR 2023), section 3.3, with MAE's per-patch normalised pixels.  A patch is normalised over all its
values, channels included.  Everything works on a view [B, C, fh, p, fw, p]; no patch is ever moved in memory.

Other targets are for ablations: pixels as they are, and MaskFeat's histograms of oriented gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spark.model.hog import BINS, CELL, hog

_PATCH_VALUES = (1, 3, 5)  # channel, row in patch, column in patch


def patch_view(images: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> view [B, C, fh, p, fw, p]."""
    b, c, h, w = images.shape
    return images.reshape(b, c, h // patch_size, patch_size, w // patch_size, patch_size)


def patch_statistics(images: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(unbiased variance + 1e-6) of each patch, each [B, 1, fh, 1, fw, 1]."""
    view = patch_view(images, patch_size)
    mean = view.mean(_PATCH_VALUES, keepdim=True)
    std = (view.var(_PATCH_VALUES, keepdim=True, unbiased=True) + 1e-6).sqrt()
    return mean, std


def normalise_patches(images: Tensor, patch_size: int) -> Tensor:
    """The target: every patch with its own mean taken off and its own deviation divided out, [B, C, H, W]."""
    mean, std = patch_statistics(images, patch_size)
    return ((patch_view(images, patch_size) - mean) / std).reshape(images.shape)


def restore_patches(normalised: Tensor, images: Tensor, patch_size: int) -> Tensor:
    """Undo `normalise_patches` with the statistics of `images`: [B, C, H, W] -> [B, C, H, W]."""
    mean, std = patch_statistics(images, patch_size)
    return (patch_view(normalised, patch_size) * std + mean).reshape(images.shape)


@dataclass(frozen=True)
class Target:
    """What the decoder predicts.

    Attributes:
        make: (images [B, C, H, W], patch size [px]) -> target [B, C * features, H / cell, W / cell].
        restore: (prediction, images, patch size) -> images that it stands for, [B, C, H, W]; None where there are none.
        features: predicted numbers for each channel of the image.
        cell: side of the square of pixels that one position of the target stands for.
    """

    make: Callable[[Tensor, int], Tensor]
    restore: Callable[[Tensor, Tensor, int], Tensor] | None
    features: int = 1
    cell: int = 1


TARGETS = {
    "normalised": Target(normalise_patches, restore_patches),
    "pixels": Target(lambda images, _: images, lambda prediction, _, __: prediction),
    "hog": Target(lambda images, _: hog(images), None, BINS, CELL),
}


def masked_patch_loss(
    prediction: Tensor, target: Tensor, visible: Tensor, patch_size: int, everywhere: bool = False
) -> Tensor:
    """Mean squared error of the masked patches, or with `everywhere` of all; a scalar.

    Sum over masked patches of the patch's mean squared error / (number of masked patches + 1e-8), the official form.

    Args:
        prediction: [B, C, H, W]; compared in at least fp32.
        target: [B, C, H, W].
        visible: [B, 1, fh, fw] bool.
        patch_size: side of a patch in positions of the target.
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = patch_view(prediction.to(dtype) - target.to(dtype), patch_size).square().mean(_PATCH_VALUES)
    masked = torch.ones_like(error) if everywhere else (~visible.squeeze(1)).to(dtype)
    return (error * masked).sum() / (masked.sum() + 1e-8)
