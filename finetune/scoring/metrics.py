"""Metrics of pixels, and how those of images become one; `finetune.protocols.metrics` has their names and sources."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from finetune.protocols.metrics import METRIC, METRICS, WKDR_METRICS
from spark.errors import UserError
from spark.files import write_whole

Row: TypeAlias = dict[str, Any]
"""Of one image: `name`, numbers, and None for a metric that is not defined for it."""
Columns: TypeAlias = dict[str, np.ndarray]
"""Name of a number -> its values over N images, float64 [N]; NaN where an image has none."""


def depth_errors(prediction: np.ndarray, ground_truth: np.ndarray) -> dict[str, float]:
    """Compare the pixels that count, in float64.

    Args:
        prediction: metres, any shape, finite and above 0.
        ground_truth: metres, the same shape, finite and above 0.

    Values that are 0, negative or not finite have no logarithm and are refused: clip or mask them first.

    Returns:
        the metrics of `METRICS`, `log_bias` = mean(d), from which those of many images can be pooled, and `pixels`.
    """
    p, g = (np.asarray(values, np.float64).ravel() for values in (prediction, ground_truth))
    if np.shape(prediction) != np.shape(ground_truth) or p.size == 0:
        raise UserError(
            "metrics need equally many pixels on both sides, at least one: got"
            f" {np.shape(prediction)} and {np.shape(ground_truth)}"
        )
    for what, values in (("prediction", p), ("ground truth", g)):
        if not (values.min() > 0 and values.max() < np.inf):  # NaN is neither
            raise UserError(
                f"the {what} holds depths that are not finite or not above 0: clip or mask them first"
            )
    n, ratio = p.size, p / g
    difference, d = p - g, np.log(ratio)
    squared, worst = difference**2, np.maximum(ratio, g / p)
    # About the mean, because the difference mean(d^2) - mean(d)^2 of two nearly equal numbers loses its digits, can
    # turn negative, and then makes silog NaN.
    bias = float(d.mean())
    spread = float(((d - bias) ** 2).mean())
    return {
        "delta1": int((worst < 1.25).sum()) / n,
        "delta2": int((worst < 1.25**2).sum()) / n,
        "delta3": int((worst < 1.25**3).sum()) / n,
        "abs_rel": float((np.abs(difference) / g).mean()),
        "sq_rel": float((squared / g).mean()),
        "rmse": math.sqrt(squared.mean()),
        "rmse_log": math.sqrt(spread + bias**2),
        "log10": float(np.abs(d).mean()) / math.log(10),
        "silog": 100.0 * math.sqrt(spread),
        "log_bias": bias,
        "pixels": n,
    }


def columns_of(rows: Sequence[Mapping[str, Any]]) -> Columns:
    """Rows of images as columns; ValueError without rows."""
    if not rows:
        raise UserError("no image was scored, so there is no mean")
    names = [name for name in rows[0] if name != "name"]
    return {name: np.array([row[name] for row in rows], np.float64) for name in names}


def mean_of_images(columns: Columns, counts: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Means over images, for several ways of counting them.

    Args:
        columns: of N images; an image at which a metric is NaN does not count for it.
        counts: how often each image counts, `[R, N]`.
        names: the metrics.

    Returns:
        each metric, `[R]`.
    """
    means = {}
    for name in names:
        defined = np.isfinite(columns[name])
        with np.errstate(invalid="ignore"):  # no image at all: NaN
            means[name] = counts[:, defined] @ columns[name][defined] / counts[:, defined].sum(1)
    return means


def pooled_depth(columns: Columns, counts: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of `METRICS` over the pixels of all images, as `mean_of_images` counts them, each `[R]`."""
    weights = counts * columns["pixels"]
    total = weights.sum(1)

    def mean(values: np.ndarray) -> np.ndarray:
        return weights @ values / total

    bias = mean(columns["log_bias"])
    # Spreads about the images' means -> about the common mean (Chan, Golub, LeVeque 1983, equation 1.5).
    between = (weights * (columns["log_bias"] - bias[:, None]) ** 2).sum(1) / total
    spread = mean((columns["silog"] / 100.0) ** 2) + between
    pooled = {
        name: mean(columns[name]) for name in ("delta1", "delta2", "delta3", "abs_rel", "sq_rel", "log10")
    }
    pooled |= {"rmse": np.sqrt(mean(columns["rmse"] ** 2))}
    pooled |= {"rmse_log": np.sqrt(spread + bias**2), "silog": 100.0 * np.sqrt(spread)}
    return {name: pooled[name] for name in METRICS}


def own_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of results that their protocol is about, in the order of `METRIC`: what people are shown.

    WKDR is among them only where a threshold was given or chosen. Results without settings show all their metrics.
    """
    settings, metrics = results.get("settings") or {}, results["metrics"]
    names = settings.get("metrics", metrics)
    if settings and not (settings.get("threshold") or "wkdr_threshold" in results):
        names = [name for name in names if name not in WKDR_METRICS]
    order = [name for name in METRIC if name in metrics and name in names]
    return {name: metrics[name] for name in [*order, *(name for name in metrics if name not in METRIC)]}


def summary(metrics: Mapping[str, float]) -> str:
    """The numbers that the field quotes, in one line; of pairs of points those that need no threshold."""
    if "whdr" in metrics:
        return f"WHDR {metrics['whdr']:.3f}   accuracy {metrics['accuracy']:.3f}"
    return f"delta1 {metrics['delta1']:.3f}   AbsRel {metrics['abs_rel']:.3f}   RMSE {metrics['rmse']:.3f} m"


def count(number: int, noun: str) -> str:
    """Such as 1 image, 2 images."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def write_results(path: str | Path, results: Mapping) -> None:
    """Write results as JSON, whole or not at all; NaN and infinity are refused, JSON has no such numbers."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise UserError(f"results for {path} hold a number that is not finite: {error}") from error
    write_whole(path, text.encode())


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The results in a file that spark-evaluate or a run wrote, one of each protocol."""
    path = Path(path).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        several = content.get("protocols")
        every = several if isinstance(several, list) else [content]
        if not every or not all(isinstance(one["metrics"], dict) and "protocol" in one for one in every):
            raise KeyError("metrics")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no results ({error!r}): name what spark-evaluate wrote") from error
    return every
