"""Depth metrics: one name, one formula, and the sums that they are made of.

With p the prediction and g the ground truth of the n pixels that count, both in metres, and d = ln p - ln g:

| name | formula | unit |
|---|---|---|
| delta1, delta2, delta3 | share of pixels with max(p / g, g / p) < 1.25, 1.25^2, 1.25^3 | |
| abs_rel | mean(abs(p - g) / g) | |
| sq_rel | mean((p - g)^2 / g) | m |
| rmse | sqrt(mean((p - g)^2)) | m |
| rmse_log | sqrt(mean(d^2)) | natural logarithm |
| log10 | mean(abs(log10 p - log10 g)) | |
| silog | 100 sqrt(mean(d^2) - mean(d)^2) | |

Sources: delta, abs_rel, sq_rel (its denominator is g, not g^2), rmse and rmse_log: Eigen et al. 2014, section
    4.3; log10: Saxena
et al. 2009 as in Laina et al. 2016; silog: BTS (Lee et al. 2019, `compute_errors` of its evaluation), which
ZoeDepth and the KITTI benchmark share. Eigen's scale-invariant error is silog / 100.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from spark.folders import write_whole

METRICS = ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
ORDINAL_METRICS = ("whdr", "accuracy", "wkdr")
"""Of pairs of points, `finetune.ordinal` has their formulas."""


@dataclass(frozen=True)
class ErrorSums:
    """What a set of pixels contributes to every metric; the sums of two sets add up (`+`), so pixels can be
    pooled.

    Args:
        pixels: n, how many pixels.
        within1: how many have max(p / g, g / p) < 1.25.
        within2: the same below 1.25^2.
        within3: the same below 1.25^3.
        relative: sum of abs(p - g) / g.
        squared_relative: sum of (p - g)^2 / g [m].
        squared: sum of (p - g)^2 [m^2].
        log: sum of d = ln p - ln g.
        log_spread: sum of (d - mean(d))^2. Kept about the mean, because the difference mean(d^2) - mean(d)^2
            of two nearly equal numbers loses its digits, can turn negative, and then makes silog NaN.
        absolute_log10: sum of abs(log10 p - log10 g).
    """

    pixels: int
    within1: int
    within2: int
    within3: int
    relative: float
    squared_relative: float
    squared: float
    log: float
    log_spread: float
    absolute_log10: float

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        total = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        # Spreads about two means -> spread about the common mean (Chan, Golub, LeVeque 1983, equation 1.5).
        shift = other.log / other.pixels - self.log / self.pixels
        total["log_spread"] += shift**2 * self.pixels * other.pixels / total["pixels"]
        return ErrorSums(**total)

    def metrics(self) -> dict[str, float]:
        """The metrics over these pixels, named as in `METRICS`."""
        n = self.pixels
        return {
            "delta1": self.within1 / n,
            "delta2": self.within2 / n,
            "delta3": self.within3 / n,
            "abs_rel": self.relative / n,
            "sq_rel": self.squared_relative / n,
            "rmse": math.sqrt(self.squared / n),
            "rmse_log": math.sqrt((self.log_spread + self.log**2 / n) / n),
            "log10": self.absolute_log10 / n,
            "silog": 100.0 * math.sqrt(self.log_spread / n),
        }


def error_sums(prediction: np.ndarray, ground_truth: np.ndarray) -> ErrorSums:
    """Compare the pixels that count, in float64.

    Args:
        prediction: metres, any shape, finite and above 0.
        ground_truth: metres, the same shape, finite and above 0.

    Raises:
        ValueError: no pixels, two shapes, or values that have no logarithm: such pixels must be dealt with
            before (see `finetune.protocols`); scored here they would turn into NaN, or vanish.
    """
    p, g = np.asarray(prediction, np.float64), np.asarray(ground_truth, np.float64)
    if p.shape != g.shape or p.size == 0:
        raise ValueError(
            f"metrics need equally many pixels on both sides, at least one: got {p.shape} and {g.shape}"
        )
    for what, values in (("prediction", p), ("ground truth", g)):
        if not (np.isfinite(values).all() and values.min() > 0):
            raise ValueError(
                f"the {what} holds depths that are not finite or not above 0: clip or mask them first"
            )
    difference, ratio, d = p - g, np.maximum(p / g, g / p), np.log(p) - np.log(g)
    return ErrorSums(
        pixels=p.size,
        within1=int((ratio < 1.25).sum()),
        within2=int((ratio < 1.25**2).sum()),
        within3=int((ratio < 1.25**3).sum()),
        relative=float((np.abs(difference) / g).sum()),
        squared_relative=float((difference**2 / g).sum()),
        squared=float((difference**2).sum()),
        log=float(d.sum()),
        log_spread=float(((d - d.mean()) ** 2).sum()),
        absolute_log10=float(np.abs(np.log10(p) - np.log10(g)).sum()),
    )


def mean_metrics(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean over images of each metric; ValueError without images, or when a number is not finite."""
    if not rows:
        raise ValueError("no image was scored, so there is no mean")
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in METRICS}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(
            f"the mean of {', '.join(broken)} is not a finite number: an image was scored wrongly"
        )
    return means


def write_results(path: str | Path, results: Mapping) -> None:
    """Write results as JSON, whole or not at all; NaN and infinity are refused, JSON has no such numbers."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise ValueError(f"results for {path} hold a number that is not finite: {error}") from error
    write_whole(path, text.encode())
