"""Dice and focal loss of a segmentation that depth is trained together with (segmentation_models_pytorch)."""

import torch
from segmentation_models_pytorch.losses import DiceLoss, FocalLoss
from torch import Tensor

from finetune.losses.base import DepthLoss, NoGroundTruth
from spark.errors import UserError

VOID = 255
"""The label that counts nowhere, as in `finetune.depth_data.sample`."""


class Segmentation(DepthLoss):
    """`dice * Dice + (1 - dice) * focal`. Naming this loss switches the training-only decoder on.

    Args:
        classes: How many classes there are; labels are 0 to `classes - 1`, and 255, void, counts nowhere. Where the
            data makes void a class of its own (its policy "class"), this is one more: 14 instead of NYU's 13.
        dice: Share of the Dice loss, from 0 to 1.
        gamma: Exponent of the focal loss.
        decoder_channels: Width of the training-only decoder at strides 16, 8, 4, 2 and 1.
    """

    predicts = "segmentation"
    needs = "labels"

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
