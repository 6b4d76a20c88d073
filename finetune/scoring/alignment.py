"""Bringing a prediction to the scale of the ground truth of its image, over the pixels that count.

| alignment | fitted to the ground truth g of an image |
|---|---|
| none | nothing: predictions are metres |
| median | one factor, median(g) / median(p) (Zhou et al. 2017, as in Monodepth2) |
| depth | s p + t, least squares of s p + t - g (Marigold) |
| disparity | s q + t of inverse depth q, least squares of s q + t - 1 / g (MiDaS) |
| log_depth | exp(s ln p + t), least squares of s ln p + t - ln g |
"""

from dataclasses import dataclass

import numpy as np

from finetune.least_squares import scale_and_shift


@dataclass(frozen=True)
class Alignment:
    """A fitted scale and shift.

    Args:
        kind: one of the table.
        scale: s; of "median" the factor.
        shift: t.
        min_depth: nearest depth that comes out where the fit has no depth above 0 [m].
        max_depth: farthest depth that comes out where inverse depth is fitted [m].
    """

    kind: str
    scale: float
    shift: float
    min_depth: float
    max_depth: float

    def apply(self, prediction: np.ndarray) -> np.ndarray:
        """Metres of predicted depths, of "disparity" inverse depths, of any shape; not clipped unless it must be."""
        if self.kind == "disparity":
            fitted = self.scale * prediction + self.shift
            return 1 / fitted.clip(1 / self.max_depth, 1 / self.min_depth)
        if self.kind == "log_depth":
            # Beyond e^50 m there is no depth, and exp() must not overflow.
            exponent = self.scale * np.log(np.maximum(prediction, self.min_depth)) + self.shift
            return np.exp(exponent.clip(-50.0, 50.0))
        return prediction * self.scale + self.shift


def fit(
    kind: str, prediction: np.ndarray, ground_truth: np.ndarray, min_depth: float, max_depth: float
) -> Alignment:
    """Fit `kind` of the table above.

    A prediction that has no scale (constant, or with a median that is not above 0) is given the one of least squares
    with the smallest norm, or of "median" the factor 1: it scores badly, and no image is lost.

    Args:
        kind: one of the table.
        prediction: depths [m], of "disparity" inverse depths, finite, `[N]`.
        ground_truth: depths above 0 [m], `[N]`.
        min_depth: see `Alignment`.
        max_depth: see `Alignment`.
    """
    p, g = np.asarray(prediction, np.float64), np.asarray(ground_truth, np.float64)
    if kind == "none":
        return Alignment(kind, 1.0, 0.0, min_depth, max_depth)
    if kind == "median":
        median = float(np.median(p))
        return Alignment(kind, float(np.median(g)) / median if median > 0 else 1.0, 0.0, min_depth, max_depth)
    if kind == "disparity":
        g = 1 / g
    elif kind == "log_depth":
        p, g = np.log(np.maximum(p, min_depth)), np.log(g)
    return Alignment(kind, *scale_and_shift(p, g), min_depth, max_depth)
