"""What heads ask of an encoder's pyramid."""

from collections.abc import Sequence

from spark.errors import UserError
from spark.model.encoder import PyramidLevel


def levels_at(head: str, levels: Sequence[PyramidLevel], strides: Sequence[int]) -> list[PyramidLevel]:
    """The levels at these strides, in their order.

    Raises:
        ValueError: The encoder lacks one; the sentence says what the head needs.
    """
    by_stride = {level.stride: level for level in levels}
    if any(stride not in by_stride for stride in strides):
        raise UserError(
            f"head {head!r} needs feature maps at strides {', '.join(map(str, strides))}, and this encoder has them at"
            f" {', '.join(map(str, by_stride))}: use another encoder (ResNet, ConvNeXt, SwinV2, ...), or head 'unetpp',"
            " which takes any pyramid"
        )
    return [by_stride[stride] for stride in strides]
