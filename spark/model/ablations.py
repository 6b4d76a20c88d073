"""The dense encoder of ablations: masked patches are filled with a value, and the stock network sees the whole image.

Batch statistics then count every site, filled ones too; that is what sparse encoding avoids.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spark.model.encoder import PyramidLevel, pyramid
from spark.sparse.batch_norm import BatchNormCall, batch_norm, world_size


def fill_masked(images: Tensor, visible: Tensor, value: Tensor | float) -> Tensor:
    """Images [B, C, H, W] with a value, a number or [1, C, 1, 1], where `visible` [B, 1, fh, fw] is False."""
    ph, pw = images.shape[2] // visible.shape[2], images.shape[3] // visible.shape[3]
    seen = visible.repeat_interleave(ph, 2).repeat_interleave(pw, 3)
    value = value.to(images.dtype) if isinstance(value, Tensor) else value
    return torch.where(seen, images, value)


def dense_pyramid(
    encoder: nn.Module, images: Tensor, levels: Sequence[PyramidLevel], sync_bn: bool
) -> list[Tensor]:
    """Feature maps of whole images, [B, C_i, h_i, w_i]; with `sync_bn`, batch statistics are those of all processes."""
    if not (sync_bn and encoder.training and world_size() > 1):
        return pyramid(encoder, images, levels)
    with _SyncedBatchNorm():
        return pyramid(encoder, images, levels)


class _SyncedBatchNorm(TorchFunctionMode):
    """Gives every `F.batch_norm` in training the statistics of all processes; the network stays as it is."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            images, *others = args
            return batch_norm(images, BatchNormCall(*others, **kwargs), sync=True).values
        return func(*args, **kwargs)
