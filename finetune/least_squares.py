"""Scale and shift that bring a map closest to another: the one least-squares fit of losses, scores and tiles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def scale_and_shift(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Scale and shift with which numbers [N] come closest to others, in fp64."""
    p, t = (np.asarray(values, np.float64).ravel() for values in (prediction, target))
    scale, shift = _solve(p, t, lambda values: (values.mean(), values - values.mean()), np.dot)
    return float(scale), float(shift)


def scale_and_shift_of_images(prediction: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift of each image of a batch, in fp64 where the device has it; gradients pass.

    Args:
        prediction: [B, 1, H, W].
        target: Likewise.
        valid: Where there is a target, bool.

    Returns:
        Scale and shift, both [B, 1, 1, 1] in the precision of the solution: `scale * prediction + shift`.
    """
    wide = prediction.dtype if prediction.device.type == "mps" else torch.float64
    zero = torch.zeros((), dtype=wide, device=prediction.device)
    count = valid.sum((1, 2, 3), keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = values.sum((1, 2, 3), keepdim=True) / count
        return mean, torch.where(valid, values - mean, zero)

    def dot(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum((1, 2, 3), keepdim=True)

    p, t = (torch.where(valid, values.to(wide), zero) for values in (prediction, target))
    return _solve(p, t, centred, dot)


def _solve(p: Any, t: Any, centred: Callable[[Any], tuple[Any, Any]], dot: Callable[[Any, Any], Any]) -> Any:
    """The fit, about the means of both, so that a large offset costs no digits.

    A constant has scale 0 and the mean of the target as shift, which is the solution with the smallest norm.

    Args:
        p: what is fitted.
        t: what to.
        centred: the mean of values, and the values minus it.
        dot: the sum of products.
    """
    (mean_p, off_p), (mean_t, off_t) = centred(p), centred(t)
    power = dot(off_p, off_p)
    varies = power > 1e-20 * dot(p, p)  # below that is what rounding leaves of a constant
    scale = dot(off_p, off_t) / (power + ~varies) * varies  # NaN stays NaN
    return scale, mean_t - scale * mean_p
