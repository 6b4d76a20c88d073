"""Segmentation that depth is trained together with: a decoder on the head's core, Dice and focal loss.

The decoder belongs to the loss: the exported model has nothing of it. Decoder and losses are those of
segmentation_models_pytorch.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch import Tensor, nn

from finetune.depth_data.base import DepthSet
from finetune.depth_data.entries import VOID
from finetune.heads.fusion import SCALES
from finetune.heads.output import DepthOutput
from finetune.losses.base import DepthLoss, NoGroundTruth
from spark.errors import UserError

if TYPE_CHECKING:
    from finetune.model.depth_model import DepthModel


class Segmentation(DepthLoss):
    """`dice * Dice + (1 - dice) * focal` of the logits of a UNet decoder and a 3x3 convolution to classes.

    On a core of 256 channels and with the usual widths, the decoder has about 3 million parameters.

    Args:
        classes: How many classes there are; labels are 0 to `classes - 1`, and 255, void, counts nowhere. Where the
            data makes void a class of its own (its policy "class"), this is one more: 14 instead of NYU's 13.
        dice: Share of the Dice loss, from 0 to 1.
        gamma: Exponent of the focal loss.
        decoder_channels: Width of the decoder at strides 16, 8, 4, 2 and 1.
    """

    predicts = "segmentation"
    needs = (("labels",),)

    def __init__(
        self,
        classes: int = 13,
        dice: float = 0.5,
        gamma: float = 2.0,
        decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16),
    ) -> None:
        super().__init__()
        if classes < 1:
            raise UserError(f"classes must be at least 1, got {classes}.")
        if not 0 <= dice <= 1:
            raise UserError(f"dice must lie in [0, 1], got {dice}.")
        if gamma < 0:
            raise UserError(f"gamma must be 0 or more, got {gamma}.")
        self.classes, self.dice = classes, dice
        self.decoder_channels = tuple(decoder_channels)
        self.dice_loss = DiceLoss("multiclass", ignore_index=VOID)
        self.focal_loss = FocalLoss("multiclass", gamma=gamma, ignore_index=VOID)

    def attach(self, model: "DepthModel") -> None:
        """Make the decoder for the scales of the head's core."""
        extras = model.head.extras
        if any(name not in extras for name in SCALES):
            raise UserError(
                f"loss {self.name!r} needs a head with a core at strides 32 to 2, and {model.head_name} has none: use"
                " head metric_bins or fusion, or leave the loss out"
            )
        channels = self.decoder_channels
        if len(channels) != len(SCALES) or min(channels) < 1:
            raise UserError(
                f"decoder_channels of segmentation must hold {len(SCALES)} positive numbers, for strides 16 to 1, got"
                f" {list(channels)}."
            )
        # The decoder drops its first entry, which stands for the image itself.
        shallow_first = [extras[name] for name in reversed(SCALES)]
        self.decoder = UnetDecoder([0, *shallow_first], list(channels), len(SCALES))
        self.classify = nn.Conv2d(channels[-1], self.classes, kernel_size=3, padding=1)
        initialize_decoder(self.decoder)

    def check(self, entries: Collection[str], sets: Sequence[DepthSet]) -> None:
        """Refuse data without labels, or with another number of classes."""
        super().check(entries, sets)
        for one in sets:
            labels = one.options.labels
            if labels is not None and self.classes != (has := labels.classes + (labels.void == "class")):
                raise UserError(
                    f"the segmentation has {self.classes} classes and the data has {has} (data.labels {labels.classes},"
                    f" data.void {labels.void}; {one}): set loss_options.segmentation.classes to {has}, of all sets"
                    " alike"
                )

    def other_data(self) -> str:
        """Classes are read on demand."""
        return " (classes are read with data.labels 13 or 40)"

    def prediction(self, output: DepthOutput, batch: Mapping[str, Tensor], model: "DepthModel") -> Tensor:
        """Logits [B, K, H, W] from the core's scales; of the padded images also as `extras["segmentation"]`."""
        size = (batch["labels"].shape[-2], batch["labels"].shape[-1])
        scales = [output.extras[name] for name in reversed(SCALES)]
        # The decoder reads the size of the image from its first entry, and nothing else.
        image = scales[0].new_empty((len(scales[0]), 0, *model.padded_size(size)))
        output.extras[self.predicts] = self.classify(self.decoder([image, *scales]))
        return model.to_frame(output.extras[self.predicts], size)

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Compare logits with labels.

        Args:
            prediction: Logits [B, `classes`, H, W].
            targets: Labels, integers [B, H, W].
        """
        (labels,) = targets
        if prediction.shape[1] != self.classes or prediction.shape[:1] + prediction.shape[2:] != labels.shape:
            raise UserError(
                f"logits {list(prediction.shape)} do not go with labels {list(labels.shape)}: expected"
                f" [B, {self.classes}, H, W] and [B, H, W]."
            )
        labels = labels.long()
        known = (labels != VOID)[:, None]
        if not known.any():
            raise NoGroundTruth(f"{type(self).__name__} needs labelled pixels, and all of this batch is void")
        low, high = int(labels.min()), int(labels[known[:, 0]].max())
        if low < 0 or high >= self.classes:
            raise UserError(
                f"labels run from {low} to {high}, and there are {self.classes} classes, 0 to {self.classes - 1},"
                f" beside void, {VOID}: set loss_options.segmentation.classes to what the data has"
            )
        # smp multiplies ignored pixels by 0, which leaves NaN there; taken out they can do nothing.
        prediction = torch.where(known, prediction, torch.zeros_like(prediction))
        return self.dice * self.dice_loss(prediction, labels) + (1 - self.dice) * self.focal_loss(
            prediction, labels
        )
