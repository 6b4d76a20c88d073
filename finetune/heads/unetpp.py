"""UNet++ head: segmentation_models_pytorch's nested decoder on a timm pyramid, and one channel of depth."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import DecoderBlock, UnetPlusPlusDecoder
from torch import Tensor, nn

from finetune.heads.base import Head
from finetune.heads.output import DepthOutput, DepthRange
from spark.errors import UserError
from spark.model.encoder import PyramidLevel

DECODER_CHANNELS = (256, 128, 64, 32, 16)
"""Width at each resolution from half the deepest stride up to stride 1."""


class SkipDecoder(nn.Module):
    """A UNet or UNet++ decoder of segmentation_models_pytorch on a pyramid that may lack shallow levels.

    With a pyramid at strides 2, 4, 8, 16, 32 it is that package's decoder parameter for parameter. An encoder whose
    first map has stride 4 (ConvNeXt) has one skip connection fewer: the decoder then ends at stride 2, and one plain
    block (nearest upsampling, two 3x3 convolutions) leads to stride 1. No feature of zero channels is made up for it.

    Args:
        levels: The encoder's pyramid, shallow first; strides must double from level to level. A level of stride 1 is
            not used.
        decoder_channels: Width at each resolution from half the deepest stride up to stride 1, so log2(deepest
            stride) numbers (5 for stride 32).
        kind: Which decoder.

    Attributes:
        levels: Those that are used.
    """

    levels: list[PyramidLevel]

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        decoder_channels: Sequence[int] = DECODER_CHANNELS,
        kind: Literal["unet", "unetpp"] = "unetpp",
    ) -> None:
        super().__init__()
        self.levels = [level for level in levels if level.stride > 1]
        steps = int(math.log2(self.levels[-1].stride))
        if len(decoder_channels) != steps or min(decoder_channels) < 1:
            raise UserError(
                f"decoder_channels must hold {steps} positive numbers, one for each doubling from stride "
                f"{self.levels[-1].stride} to 1, got {list(decoder_channels)}."
            )
        nested = len(self.levels)  # doublings inside the decoder, the last one without a skip
        decoder = UnetDecoder if kind == "unet" else UnetPlusPlusDecoder
        self.decoder = decoder(
            # The decoder drops its first entry, which stands for the image itself.
            encoder_channels=[0, *(level.channels for level in self.levels)],
            decoder_channels=list(decoder_channels[:nested]),
            n_blocks=nested,
        )
        widths = list(decoder_channels[nested - 1 :])
        self.upsample = nn.ModuleList(
            DecoderBlock(width_in, 0, width_out) for width_in, width_out in pairwise(widths)
        )

    def initialise(self) -> None:
        """Draw the weights as segmentation_models_pytorch does."""
        initialize_decoder(self.decoder)
        initialize_decoder(self.upsample)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """From the maps of `levels` to [B, last of the widths, H, W], images of (H, W)."""
        batch, _, height, width = features[0].shape
        # UNet reads the size of the last map from the entry that stands for the image, and nothing else of it.
        image = features[0].new_empty((batch, 0, 2 * height, 2 * width))
        x = self.decoder([image, *features])
        for block in self.upsample:
            x = block(x)
        return x


class UnetPlusPlus(SkipDecoder, Head):
    """Dense UNet++ decoder (Zhou et al. 2018, arXiv 1807.10165) and a 3x3 convolution to depth; see `SkipDecoder`.

    With a pyramid at strides 2, 4, 8, 16, 32 this is `smp.UnetPlusPlus(classes=1)` parameter for parameter.

    Args:
        levels: The encoder's pyramid.
        depth_range: From the last convolution's output to metres.
        decoder_channels: Width at each resolution.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        depth_range: DepthRange,
        decoder_channels: Sequence[int] = DECODER_CHANNELS,
    ) -> None:
        super().__init__(levels, decoder_channels)
        self.project = nn.Conv2d(decoder_channels[-1], 1, kernel_size=3, padding=1)
        self.depth_range = depth_range
        self.initialise()
        # A tenth of the usual gain, so that the first predictions are the initial depth and not noise around it.
        nn.init.xavier_uniform_(self.project.weight, gain=0.1)
        nn.init.constant_(self.project.bias, depth_range.initial_logit)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at the size of the images."""
        return DepthOutput(depth=self.depth_range(self.project(self.decode(features))))
