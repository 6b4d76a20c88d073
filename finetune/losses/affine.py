"""Losses on inverse depth that ignore its scale and shift: what data without metric depth can teach (MiDaS)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.least_squares import scale_and_shift_of_images
from finetune.losses.base import DepthLoss, NoGroundTruth, check_maps
from spark.errors import UserError

if TYPE_CHECKING:
    from finetune.model.depth_model import DepthModel


class _Aligned(DepthLoss):
    """What both losses do first: align each image, leave out those with too few readings."""

    predicts = "disparity"
    needs = (("affine", "affine_valid"), ("depth", "valid"))

    def targets(self, batch: Mapping[str, Tensor], model: "DepthModel") -> tuple[Tensor, ...]:
        """Affine-invariant ground truth if the batch has it, else the inverse of metric depth; where it is valid."""
        values, valid = super().targets(batch, model)
        if "affine" in batch:
            return values, valid
        return torch.where(valid, values, torch.ones_like(values)).reciprocal(), valid

    def score(self, prediction: Tensor, *targets: Tensor) -> Tensor:
        """Align and score.

        Args:
            prediction: Inverse depth [B, 1, H, W].
            targets: Inverse depth, each image in a scale and shift of its own, and where there is any.
        """
        target, valid = targets
        check_maps(prediction, target, valid)
        # Two unknowns pass through any two points: an image teaches from its third reading on.
        valid = valid & (valid.sum((1, 2, 3), keepdim=True) > 2)
        if not valid.any():
            raise NoGroundTruth(
                f"{type(self).__name__} needs an image with at least 3 pixels of ground truth, and none of this batch"
                f" of {valid.shape[0]} has: check the depth files and the depth limits"
            )
        # NaN outside goes before the product with the scale, whose gradient it would spoil.
        prediction, target = (torch.where(valid, m, torch.zeros_like(m)) for m in (prediction, target))
        scale, shift = scale_and_shift_of_images(prediction, target, valid)
        residual = (scale * prediction + shift - target) * valid
        return self.penalty(residual, valid).to(prediction.dtype)

    def penalty(self, residual: Tensor, valid: Tensor) -> Tensor:
        """The loss of the residuals [B, 1, H, W], which are 0 outside `valid`."""
        raise NotImplementedError


class ScaleShiftInvariant(_Aligned):
    """`sum of squared residuals / (2 M)` after alignment, M the valid pixels of the batch.

    Source: MiDaS (Ranftl et al., arXiv 1907.01341, equations 3 and 4), batch-based reduction. The unit is that of the
    squared target: bring affine-invariant targets of a data set to one range, such as [0, 1].
    """

    def penalty(self, residual: Tensor, valid: Tensor) -> Tensor:
        """The loss of the residuals [B, 1, H, W], which are 0 outside `valid`."""
        return residual.square().sum() / (2 * valid.sum())


class GradientMatching(_Aligned):
    """Absolute gradients of the residual after alignment, summed over scales of every 1st, 2nd, 4th, 8th pixel.

    A difference counts where both its pixels are valid; each scale is divided by its number of valid pixels. Source:
    MiDaS (arXiv 1907.01341, equation 11), which adds it to the loss above with a weight of 0.5.

    Args:
        scales: How many scales.
    """

    def __init__(self, scales: int = 4) -> None:
        super().__init__()
        if scales < 1:
            raise UserError(f"scales must be at least 1, got {scales}.")
        self.scales = scales

    def penalty(self, residual: Tensor, valid: Tensor) -> Tensor:
        """The loss of the residuals [B, 1, H, W], which are 0 outside `valid`."""
        total = residual.new_zeros(())
        for exponent in range(self.scales):
            step = 2**exponent
            coarse, known = residual[..., ::step, ::step], valid[..., ::step, ::step]
            for axis in (-1, -2):
                size = coarse.shape[axis] - 1
                both = known.narrow(axis, 1, size) & known.narrow(axis, 0, size)
                difference = (coarse.narrow(axis, 1, size) - coarse.narrow(axis, 0, size)).abs()
                total = total + (difference * both).sum() / known.sum().clamp(min=1)
        return total
