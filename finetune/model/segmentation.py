"""A segmentation decoder that only training has: depth learns from classes, and the saved model knows nothing of it."""

from collections.abc import Sequence

from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn

from finetune.model.depth_model import DepthModel
from spark.errors import UserError

STRIDES = (32, 16, 8, 4, 2)


class SegmentationDecoder(nn.Module):
    """UNet decoder on the five scales of a head's core, and a 3x3 convolution to classes.

    With the usual widths and a core of 256 channels it has about 3 million parameters.

    Args:
        scale_channels: Channels of the core's scales at strides 32, 16, 8, 4, 2.
        classes: Number of classes.
        decoder_channels: Width at strides 16, 8, 4, 2, 1.
    """

    def __init__(
        self,
        scale_channels: Sequence[int],
        classes: int,
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        if len(decoder_channels) != len(STRIDES) or min(decoder_channels) < 1:
            raise UserError(
                f"decoder_channels of segmentation must hold {len(STRIDES)} positive numbers, for strides 16 to 1, got"
                f" {list(decoder_channels)}."
            )
        # The decoder drops its first entry, which stands for the image itself.
        self.decoder = UnetDecoder([0, *reversed(scale_channels)], list(decoder_channels), len(STRIDES))
        self.classify = nn.Conv2d(decoder_channels[-1], classes, kernel_size=3, padding=1)
        initialize_decoder(self.decoder)

    def forward(self, images: Tensor, scales: Sequence[Tensor]) -> Tensor:
        """Return logits [B, K, H, W].

        Args:
            images: [B, C, H, W]; H and W multiples of 32. Only their size is used.
            scales: The core's maps, deepest first.
        """
        return self.classify(self.decoder([images, *reversed(scales)]))


def attach_segmentation(model: DepthModel, classes: int, decoder_channels: Sequence[int]) -> None:
    """Give a model the decoder, which runs in training mode only and is not saved with it.

    Raises:
        ValueError: The model's head has no core whose scales could be decoded, or `decoder_channels` do not fit.
    """
    channels = getattr(model.head, "scale_channels", None)
    if channels is None:
        raise UserError(
            f"loss 'segmentation' needs a head with a core at strides 32 to 2, and {model.head_name} has none: use head"
            " metric_bins or fusion, or leave the loss out"
        )
    model.segmentation = SegmentationDecoder(channels, classes, decoder_channels)
