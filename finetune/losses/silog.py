"""Scale-invariant logarithmic loss (Eigen et al. 2014, in the forms of BTS and ZoeDepth)."""

import torch
from torch import Tensor

from finetune.losses.masked import MaskedLoss
from spark.errors import UserError

NEAREST = 1e-7
"""Depth that the logarithm is held at [m]."""


class SILog(MaskedLoss):
    """`scale * sqrt(var(g) + (1 - variance_focus) * mean(g)^2)` with `g = log(prediction + eps) - log(target + eps)`.

    `variance_focus` is the lambda of BTS (0.85): 1 ignores a common scale factor altogether, 0 is the RMSE of the log
    depth. The defaults are ZoeDepth's loss (beta = 0.15 = 1 - lambda, unbiased variance, eps 1e-7); `unbiased=False,
    eps=0` is `10 * sqrt(mean(g^2) - 0.85 mean(g)^2)`, BTS to the letter. The two agree within a factor sqrt(1 + 1/N).
    All valid pixels of the (micro-)batch on this process are pooled, as both do: splitting a batch over accumulation
    steps or processes changes the value slightly.

    At a perfect prediction the square root has no derivative; the radicand is held at 1e-12, so that the loss there
    is `scale * 1e-6` with a gradient of zero rather than NaN. Predictions below 1e-7 m, zero and negative ones
    included, count as that depth and have no gradient: the loss is finite for every finite prediction.

    Source: BTS (arXiv 1907.10326, eq. 4-5), ZoeDepth (arXiv 2302.12288).
    """

    minimum_pixels = 2  # a variance of one value is undefined

    def __init__(
        self, variance_focus: float = 0.85, scale: float = 10.0, unbiased: bool = True, eps: float = 1e-7
    ) -> None:
        super().__init__()
        if not 0 <= variance_focus <= 1:
            raise UserError(f"variance_focus must lie in [0, 1], got {variance_focus}.")
        if scale <= 0 or eps < 0:
            raise UserError(f"scale must be positive and eps not negative, got scale={scale}, eps={eps}.")
        self.variance_focus = variance_focus
        self.scale = scale
        self.unbiased = unbiased
        self.eps = eps

    def formula(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """Return the loss of the valid pixels, both [N] in metres, as a scalar."""
        floor = max(0.0, NEAREST - self.eps)
        log_ratio = torch.log(predicted.clamp(min=floor) + self.eps) - torch.log(truth + self.eps)
        variance = log_ratio.var(correction=int(self.unbiased))
        radicand = variance + (1 - self.variance_focus) * log_ratio.mean().square()
        return self.scale * radicand.clamp(min=1e-12).sqrt()  # clamp passes NaN on
