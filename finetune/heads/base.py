"""What every head declares, and what heads ask of an encoder's pyramid."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import Tensor, nn

from finetune.heads.output import DepthOutput
from spark.errors import UserError
from spark.model.encoder import PyramidLevel


class Head(nn.Module):
    """Base of all heads, made as `Head(levels, depth_range, **options)` from the encoder's pyramid.

    Maps may have any stride: the model brings `depth` and `disparity_affine` to the size of the images.
    """

    levels: list[PyramidLevel]
    """The levels whose maps it wants to be given, in this order."""

    outputs: tuple[str, ...] = ("depth",)
    """Which of `depth` and `disparity_affine` it gives."""

    extras: Mapping[str, int] = MappingProxyType({})
    """Name -> channels of the further maps that it gives, at least in training."""

    counted: tuple[str, ...] = ()
    """Outputs that no gradient passes, so that no loss can train them."""

    frozen_encoder: bool = False
    """Whether it probes an encoder that never learns."""

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return the maps of images of `size`.

        Args:
            features: One map [B, C_i, H / s_i, W / s_i] for each of `self.levels`.
            size: (H, W) of the images, multiples of the deepest stride.
        """
        raise NotImplementedError


def levels_at(head: str, levels: Sequence[PyramidLevel], strides: Sequence[int]) -> list[PyramidLevel]:
    """The levels at these strides, in their order."""
    by_stride = {level.stride: level for level in levels}
    if any(stride not in by_stride for stride in strides):
        raise UserError(
            f"head {head!r} needs feature maps at strides {', '.join(map(str, strides))}, and this encoder has them at"
            f" {', '.join(map(str, by_stride))}: use another encoder (ResNet, ConvNeXt, SwinV2, ...), or head 'unetpp',"
            " which takes any pyramid"
        )
    return [by_stride[stride] for stride in strides]
