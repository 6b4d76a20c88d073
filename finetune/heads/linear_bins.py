"""Linear head over bins of depth, as DINOv2 and DINOv3 compare frozen encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads.base import Head
from finetune.heads.output import DepthOutput, DepthRange, at_least_fp32, full_precision
from spark.errors import UserError
from spark.model.encoder import PyramidLevel


class LinearBins(Head):
    """Batch norm and a 1x1 convolution on the deepest maps of a frozen encoder; depth is a mean over uniform bins.

    Bin k counts with weight relu(x_k) + 0.1, and the weights sum to one. Bins lie evenly from `min_depth` to
    `max_depth`, both included. With several maps, deeper ones are enlarged bilinearly to the largest.

    Source: facebookresearch/dinov3 6876159, eval/depth/models/{linear_head,__init__}.py with configs/config-nyu.yaml
    (`maps=1`; 4 is the "lin. 4" of DINOv2). There the encoder's final layer norm comes first; its scale and shift make
    no difference before batch norm, so here it has none.

    Args:
        levels: The encoder's pyramid, shallow first.
        depth_range: Gives the ends of the bins.
        maps: Feature maps that are read, the deepest ones.
        bins: Number of bins.
        layer_norm: Normalise the channels of each position of the deepest map first: for encoders that end with a
            layer norm, such as ConvNeXt.
    """

    frozen_encoder = True

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        depth_range: DepthRange,
        maps: int = 1,
        bins: int = 256,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= maps <= len(levels):
            raise UserError(f"maps must be 1 to {len(levels)}, the maps of this encoder, got {maps}.")
        if bins < 2:
            raise UserError(f"bins must be at least 2, got {bins}.")
        self.levels = list(levels[-maps:])
        channels = sum(level.channels for level in self.levels)
        self.standardise = nn.BatchNorm2d(channels)
        self.project = nn.Conv2d(channels, bins, kernel_size=1)
        self.layer_norm = layer_norm
        self.register_buffer(
            "bins", torch.linspace(depth_range.min_depth, depth_range.max_depth, bins), persistent=False
        )
        nn.init.normal_(self.project.weight, std=0.01)
        nn.init.zeros_(self.project.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at the size of the largest map that is read."""
        *shallower, deepest = features
        if self.layer_norm:
            channels = (self.levels[-1].channels,)
            deepest = F.layer_norm(deepest.permute(0, 2, 3, 1), channels, eps=1e-6).permute(0, 3, 1, 2)
        largest = features[0].shape[-2:]
        maps = [
            F.interpolate(x, largest, mode="bilinear", align_corners=False) for x in (*shallower, deepest)
        ]
        x = self.project(self.standardise(torch.cat(maps, 1)))
        with full_precision(x):
            weights = at_least_fp32(x).relu() + 0.1
            weights = weights / weights.sum(1, keepdim=True)
            return DepthOutput(depth=torch.einsum("bkhw,k->bhw", weights, self.bins.to(weights))[:, None])
