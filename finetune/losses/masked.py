"""What every depth loss does first: keep the pixels with a ground truth, in fp32, and refuse a batch without any."""

import torch
from torch import Tensor, nn


class NoGroundTruth(ValueError):
    """A batch has too few pixels with a ground truth for its loss to be defined.

    A loss of zero would look like a perfect prediction, so losses raise this instead; the caller decides what a batch
    without ground truth means to it (`finetune/depth.py` skips the micro-batch, counts it, and gives up
    beyond a share).
    """


class MaskedLoss(nn.Module):
    """Base of the losses between two depth maps: selects the valid pixels, leaves the formula to `formula`.

    The valid pixels of the whole batch are pooled (an image with few readings weighs little), in fp32 also inside
    autocast, fp64 where the prediction is fp64. Pixels outside `valid` get a gradient of exactly zero whatever they
    hold, NaN included; a NaN at a valid pixel comes out as NaN, never as 0.
    """

    minimum_pixels: int = 1
    """The fewest valid pixels for which the formula is defined."""

    def forward(self, prediction: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            prediction: Predicted depth [B, 1, H, W] [m].
            target: Ground truth [B, 1, H, W] [m].
            valid: Where there is a ground truth, bool [B, 1, H, W].

        Raises:
            NoGroundTruth: Fewer than `minimum_pixels` pixels are valid.
            ValueError: The shapes differ, or `valid` is not boolean.
        """
        if not prediction.shape == target.shape == valid.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)}, target {tuple(target.shape)} and valid {tuple(valid.shape)} "
                "must have one shape, [B, 1, H, W]: resize the prediction to the ground truth before the loss."
            )
        if valid.dtype != torch.bool:
            raise ValueError(f"valid must be a bool mask, got {valid.dtype}: pass `target > 0` or similar.")
        with torch.autocast(prediction.device.type, enabled=False):
            predicted = _at_least_fp32(prediction[valid])
            if predicted.numel() < self.minimum_pixels:
                raise NoGroundTruth(
                    f"{type(self).__name__} needs at least {self.minimum_pixels} pixel(s) with a ground truth, and this"
                    f" batch of {valid.shape[0]} has {predicted.numel()}: check the depth files and the depth limits"
                )
            return self.formula(predicted, target[valid].to(predicted.dtype))

    def formula(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the valid pixels, both [N] in metres, as a scalar."""
        raise NotImplementedError


def _at_least_fp32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
