"""Losses over pooled pixels: keep those with a ground truth, refuse a batch without any, apply a formula."""

from torch import Tensor

from finetune.losses.base import DepthLoss, NoGroundTruth, check_maps


class MaskedLoss(DepthLoss):
    """Base of the losses between two depth maps: selects the valid pixels, leaves the formula to `formula`.

    The valid pixels of the whole batch are pooled: an image with few readings weighs little.
    """

    minimum_pixels: int = 1
    """The fewest valid pixels for which the formula is defined."""

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Select and apply the formula.

        Args:
            prediction: Predicted depth [B, 1, H, W] [m].
            targets: Ground truth [B, 1, H, W] [m], and where there is any, bool [B, 1, H, W].
        """
        target, valid = targets
        check_maps(prediction, target, valid)
        predicted = prediction[valid]
        if predicted.numel() < self.minimum_pixels:
            raise NoGroundTruth(
                f"{type(self).__name__} needs at least {self.minimum_pixels} pixel(s) with a ground truth, and this"
                f" batch of {valid.shape[0]} has {predicted.numel()}: check the depth files and the depth limits"
            )
        return self.formula(predicted, target[valid].to(predicted.dtype))

    def formula(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the valid pixels, both [N] in metres, as a scalar."""
        raise NotImplementedError
