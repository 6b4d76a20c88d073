"""How sure a mean over images is: bootstrap intervals over images, from the rows of results alone.

The bootstrap (Efron 1979) draws as many images as there are, with replacement, and measures again; the middle 95 % of
such measurements are the percentile interval. Pooled protocols are measured again from what each image contributes to
the pool. Images are taken for independent, which frames of one scene are not: the true interval is wider.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.scoring.evaluators import AGGREGATES
from finetune.scoring.metrics import columns_of

LEVEL, RESAMPLES, SEED = 0.95, 2000, 0


def resampled(results: Mapping[str, Any], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of results whose images are counted `counts` `[R, N]` times: name -> `[R]`, of those that results have.

    Args:
        results: protocol settings and rows, as `Evaluator.results` gives them and results.json holds them.
        counts: how often each row counts.
    """
    settings = results["settings"]
    aggregate = AGGREGATES[settings.get("family", "depth")]
    values = aggregate(columns_of(results["per_image"]), counts, settings["aggregation"])
    return {name: values[name] for name in results["metrics"] if name in values}


def draws(images: int, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """How often each image is drawn, in each of the resamples: `[resamples, images]`."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), resamples)


def interval(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """The middle of the values, [low, high]; None where they are none."""
    finite = np.asarray(values)[np.isfinite(values)]
    half = (1 - LEVEL) / 2
    return [float(end) for end in np.quantile(finite, (half, 1 - half))] if finite.size else None


def with_intervals(results: dict[str, Any]) -> dict[str, Any]:
    """Results with `intervals`, metric -> [low, high], and `bootstrap`, how they were made; null with one image."""
    images = len(results["per_image"])
    drawn = resampled(results, draws(images)) if images > 1 else {}
    return {
        **results,
        "intervals": {name: interval(drawn[name]) if name in drawn else None for name in results["metrics"]},
        "bootstrap": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "seed": SEED,
            "over": "images",
            "method": "percentile",
        },
    }
