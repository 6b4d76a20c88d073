"""Losses that are a mean over pixels of a function of the error: L1, MSE, berHu."""

import torch
from torch import Tensor

from finetune.losses.masked import MaskedLoss
from spark.errors import UserError


class L1(MaskedLoss):
    """Mean absolute error over the valid pixels of the batch [m]."""

    def formula(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the valid pixels, both [N] in metres, as a scalar."""
        return (predicted - truth).abs().mean()


class MSE(MaskedLoss):
    """Mean squared error over the valid pixels of the batch, in units of `unit_depth` squared.

    Args:
        unit_depth: Depth that counts as 1 [m]: 1 gives m^2; 10 is the error of depths that were divided by 10 m, as in
            training on NYU depth brought to [0, 1].
    """

    def __init__(self, unit_depth: float = 1.0) -> None:
        super().__init__()
        if unit_depth <= 0:
            raise UserError(f"unit_depth must be positive, got {unit_depth}.")
        self.unit_depth = unit_depth

    def formula(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the valid pixels, both [N] in metres, as a scalar."""
        return ((predicted - truth) / self.unit_depth).square().mean()


class BerHu(MaskedLoss):
    """Reverse Huber [m]: mean over the valid pixels of `abs(e)` where that is at most c, else of `(e^2 + c^2) / (2 c)`.

    `c = fraction * max abs(e)` of the batch follows the errors but is a constant to the gradient. Source: Laina et al.
    2016 (arXiv 1606.00373, equation 1), with a fraction of 0.2.
    """

    def __init__(self, fraction: float = 0.2) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise UserError(f"fraction must lie in (0, 1], got {fraction}.")
        self.fraction = fraction

    def formula(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the valid pixels, both [N] in metres, as a scalar."""
        error = (predicted - truth).abs()
        threshold = self.fraction * error.detach().max()
        # A perfect batch has threshold 0 and takes the linear branch everywhere; the floor only keeps the branch not
        # taken finite, because `where` multiplies its gradient by zero and zero times infinity is NaN.
        quadratic = (error.square() + threshold.square()) / (2 * threshold.clamp(min=1e-12))
        return torch.where(error <= threshold, error, quadratic).mean()
