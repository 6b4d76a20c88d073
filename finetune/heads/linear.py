"""Linear head: one convolution on a frozen encoder, to compare encoders and not heads."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads.base import Head
from finetune.heads.output import DepthOutput, DepthRange
from spark.model.encoder import PyramidLevel


class Linear(Head):
    """All feature maps from stride 4 on, standardised and brought to one size, and a 1x1 convolution to depth.

    The standardisation (batch norm without weights) has nothing to learn; it lets channels of any magnitude be read at
    one learning rate. Maps are enlarged bilinearly to the largest of them, depth to the image.

    Args:
        levels: The encoder's pyramid, shallow first. The level of stride 2, the stem of a ResNet, is not used: other
            encoders have none.
        depth_range: From the convolution's output to metres.
    """

    frozen_encoder = True

    def __init__(self, levels: Sequence[PyramidLevel], depth_range: DepthRange) -> None:
        super().__init__()
        self.levels = [level for level in levels if level.stride >= 4] or list(levels[-1:])
        channels = sum(level.channels for level in self.levels)
        self.standardise = nn.BatchNorm2d(channels, affine=False)
        self.project = nn.Conv2d(channels, 1, kernel_size=1)
        self.depth_range = depth_range
        nn.init.zeros_(self.project.weight)
        nn.init.constant_(self.project.bias, depth_range.initial_logit)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at the size of the images."""
        largest = features[0].shape[-2:]
        maps = [F.interpolate(m, largest, mode="bilinear", align_corners=False) for m in features]
        x = self.project(self.standardise(torch.cat(maps, 1)))
        # Before the sigmoid of the range: a model's own resize would come after it.
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return DepthOutput(depth=self.depth_range(x))
