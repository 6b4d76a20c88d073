"""Pairs of points of a map of depth with their relation, drawn so that every run draws the same ones."""

import zlib

import numpy as np

from finetune.depth_data.sample import DepthSample
from spark.errors import UserError


def sample_pairs(sample: DepthSample, count: int, ratio: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw pairs of different pixels with a reading, each pixel as likely as any other.

    The draw is a function of `seed` and the name of the sample, by NumPy's PCG64: neither the order of the images nor
    which others there are matters. Two points are as far where the larger of their values is at most `ratio` times the
    smaller (Xian et al. 2018 have 1.02), of metres and of relative disparity alike.

    Args:
        sample: with `depth` or `affine`.
        count: how many.
        ratio: above 1.
        seed: any whole number.

    Returns:
        points (yA, xA, yB, xB) [px] int64 `[count, 4]`, and relations int64 `[count]`, +1: A is farther, -1: A is
        closer, 0: as far; none where fewer than two pixels have a reading.
    """
    if sample.depth is not None:
        values, known = sample.depth, sample.depth > 0
    elif sample.affine is not None:
        values, known = -sample.affine, np.isfinite(sample.affine)  # larger is farther
    else:
        raise UserError("pairs are drawn from a map of depth, and the sample has none")
    places = np.argwhere(known)
    if len(places) < 2:
        return np.empty((0, 4), np.int64), np.empty(0, np.int64)
    rng = np.random.default_rng([seed, zlib.crc32(sample.name.encode())])
    first = rng.integers(len(places), size=count)
    second = (first + rng.integers(1, len(places), size=count)) % len(places)
    pairs = np.concatenate([places[first], places[second]], 1)
    a, b = (values[tuple(places[chosen].T)].astype(np.float64) for chosen in (first, second))
    sizes = np.abs(np.stack([a, b]))
    same = sizes.max(0) <= ratio * sizes.min(0)
    return pairs, np.where(same, 0, np.sign(a - b)).astype(np.int64)
