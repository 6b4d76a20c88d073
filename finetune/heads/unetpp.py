"""UNet++ head: segmentation_models_pytorch's nested decoder on a timm pyramid, and one channel of depth."""

import math
from collections.abc import Sequence
from itertools import pairwise

from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import DecoderBlock, UnetPlusPlusDecoder
from torch import Tensor, nn

from finetune.heads.base import Head
from finetune.heads.output import DepthOutput, DepthRange
from spark.errors import UserError
from spark.model.encoder import PyramidLevel


class UnetPlusPlus(Head):
    """Dense UNet++ decoder (Zhou et al. 2018, arXiv 1807.10165) and a 3x3 convolution to depth.

    With a pyramid at strides 2, 4, 8, 16, 32 this is `smp.UnetPlusPlus(classes=1)` parameter for parameter. An
    encoder whose first map has stride 4 (ConvNeXt) has one skip connection fewer: the nested part then ends at stride
    2, and one plain block (nearest upsampling, two 3x3 convolutions) leads to stride 1. No feature of zero channels
    is made up for it.

    Args:
        levels: The encoder's pyramid, shallow first; strides must double from level to level. A level of stride 1 is
            not used.
        depth_range: From the last convolution's output to metres.
        decoder_channels: Width at each resolution from half the deepest stride up to stride 1, so log2(deepest
            stride) numbers (5 for stride 32).
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        depth_range: DepthRange,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        self.levels = [level for level in levels if level.stride > 1]
        steps = int(math.log2(self.levels[-1].stride))
        if len(decoder_channels) != steps or min(decoder_channels) < 1:
            raise UserError(
                f"decoder_channels must hold {steps} positive numbers, one for each doubling from stride "
                f"{self.levels[-1].stride} to 1, got {list(decoder_channels)}."
            )
        nested = len(self.levels)  # doublings inside the nested decoder, the last one without a skip
        self.decoder = UnetPlusPlusDecoder(
            # The decoder drops its first entry, which stands for the image itself.
            encoder_channels=[0, *(level.channels for level in self.levels)],
            decoder_channels=list(decoder_channels[:nested]),
            n_blocks=nested,
        )
        widths = list(decoder_channels[nested - 1 :])
        self.upsample = nn.ModuleList(
            DecoderBlock(width_in, 0, width_out) for width_in, width_out in pairwise(widths)
        )
        self.project = nn.Conv2d(decoder_channels[-1], 1, kernel_size=3, padding=1)
        self.depth_range = depth_range
        initialize_decoder(self.decoder)
        initialize_decoder(self.upsample)
        # A tenth of the usual gain, so that the first predictions are the initial depth and not noise around it.
        nn.init.xavier_uniform_(self.project.weight, gain=0.1)
        nn.init.constant_(self.project.bias, depth_range.initial_logit)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at the size of the images."""
        x = self.decoder([features[0], *features])  # it drops the first, which stands for the image
        for block in self.upsample:
            x = block(x)
        return DepthOutput(depth=self.depth_range(self.project(x)))
