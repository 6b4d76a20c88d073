"""Scores of relations between points: does the model order the pairs of Depth in the Wild as people did?

A prediction is resized to the photo, bilinearly, and read at the annotated pixels. Let d be the predicted distance of A
minus that of B: in metres, or for a head without metres minus the difference of inverse depths. The relation read off
it is "farther" where d > threshold, "closer" where d < -threshold, and else "as far".

| name | share of wrong ones | among |
|---|---|---|
| whdr | d has the wrong sign, or is 0 | pairs of which one point is farther |
| accuracy | 1 - whdr | the same |
| wkdr | the relation read off d is not the annotated one | all pairs, those that are as far included |
| wkdr_unequal | the same | pairs of which one point is farther |
| wkdr_equal | the same | pairs that are as far |

So whdr (Chen et al. 2016, arXiv 1604.03901) has no threshold and passes over equal pairs, of which Depth in the Wild
has none; wkdr has the threshold of the protocol, in the unit of d, for data that has them. Ties are wrong. Pairs of all
photos are pooled, or scores of photos averaged, by the protocol. A pair at which the prediction is NaN is wrong.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.depth_data.sample import DepthSample
from finetune.protocols import Protocol
from finetune.protocols.metrics import PAIR_METRICS
from finetune.scoring.depth import resize
from finetune.scoring.evaluator import Evaluator, NoValidPixels
from finetune.scoring.metrics import Columns, Row, mean_of_images
from finetune.scoring.pair_sampling import sample_pairs
from spark.errors import UserError

SCORES = ("wkdr", "whdr", "accuracy", "wkdr_unequal", "wkdr_equal")
COUNTS = ("unequal", "equal", "misordered", "wrong_unequal", "wrong_equal")
"""What is counted of pairs: of which one point is farther; that are as far; of the first those whose predicted
difference has the wrong sign or none, and those whose relation under the threshold is wrong; of the second likewise."""


def pair_scores(counts: Mapping[str, int]) -> dict[str, float]:
    """Scores of the `COUNTS` of a set of pairs; those of unequal (equal) pairs are left out where there are none."""
    columns = {name: np.array([value], np.float64) for name, value in counts.items()}
    scores = pooled_pairs(columns, np.ones((1, 1)))
    return {name: float(values[0]) for name, values in scores.items() if not np.isnan(values[0])}


def pooled_pairs(columns: Columns, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Scores over the pairs of N images, each counted `counts` `[R, N]` times: name -> `[R]`, NaN where undefined.

    Args:
        columns: the `COUNTS`, `[N]` each.
        counts: how often each image counts.
    """
    total = {name: counts @ columns[name] for name in COUNTS}
    with np.errstate(invalid="ignore"):
        whdr = total["misordered"] / total["unequal"]
        return {
            "wkdr": (total["wrong_unequal"] + total["wrong_equal"]) / (total["unequal"] + total["equal"]),
            "whdr": whdr,
            "accuracy": 1 - whdr,
            "wkdr_unequal": total["wrong_unequal"] / total["unequal"],
            "wkdr_equal": total["wrong_equal"] / total["equal"],
        }


def count_pairs(difference: np.ndarray, relation: np.ndarray, threshold: float) -> dict[str, int]:
    """The `COUNTS` of pairs, from predicted differences and relations.

    Args:
        difference: how much farther A is than B, `[N]`; NaN is always wrong.
        relation: +1: A is farther, -1: A is closer, 0: as far, `[N]`.
        threshold: largest absolute difference at which two points count as equally far, for wkdr.
    """
    difference, relation = np.asarray(difference, np.float64), np.asarray(relation)
    if difference.shape != relation.shape or relation.ndim != 1 or not relation.size:
        raise UserError(
            f"expected as many differences as relations, at least one: got {list(difference.shape)} and"
            f" {list(relation.shape)}"
        )
    if not np.isin(relation, (-1, 0, 1)).all():
        raise UserError("a relation of a pair must be -1, 0 or 1")
    ordered = relation != 0
    predicted = np.where(difference > threshold, 1, np.where(difference < -threshold, -1, 0))
    wrong = (predicted != relation) | np.isnan(difference)
    return {
        "unequal": int(ordered.sum()),
        "equal": int((~ordered).sum()),
        "misordered": int((np.sign(difference) != relation)[ordered].sum()),  # the sign of NaN is NaN
        "wrong_unequal": int(wrong[ordered].sum()),
        "wrong_equal": int(wrong[~ordered].sum()),
    }


def choose_threshold(
    differences: Sequence[np.ndarray], relations: Sequence[np.ndarray], thresholds: np.ndarray
) -> tuple[float, list[list[float]]]:
    """The threshold of WKDR, as Chen et al. 2016 choose it on a validation set: at which the larger of wkdr_equal and
    wkdr_unequal, means over images, is smallest; of several the smallest one.

    Args:
        differences: how much farther A is than B, `[N]` for each image.
        relations: of the same pairs.
        thresholds: to choose among, `[T]`.

    Returns:
        the threshold, and rows (threshold, wkdr, wkdr_equal, wkdr_unequal).

    Raises:
        ValueError: no pair is equally far, or all are: nothing is to be weighed.
    """
    scores = np.full((len(differences), 3, len(thresholds)), np.nan)
    for image, (difference, relation) in enumerate(zip(differences, relations, strict=True)):
        d, r = difference[:, None], relation[:, None]
        predicted = np.where(d > thresholds, 1, np.where(d < -thresholds, -1, 0))
        wrong = (predicted != r) | np.isnan(d)
        for row, chosen in enumerate((slice(None), relation == 0, relation != 0)):
            if len(wrong[chosen]):
                scores[image, row] = wrong[chosen].mean(0)
    defined = ~np.isnan(scores[:, :, 0])
    if not defined.any(0).all():
        raise UserError(
            "a threshold of WKDR is chosen on pairs of which some are equally far and some are not; give"
            " one (threshold)"
        )
    means = np.nansum(scores, 0) / defined.sum(0)[:, None]
    best = int(np.argmin(means[1:].max(0)))
    curve = [[float(value) for value in row] for row in np.vstack([thresholds, means]).T]
    return float(thresholds[best]), curve


class OrdinalEvaluator(Evaluator):
    """Scores photos by pairs of points: annotated ones, or under a protocol with `pairs` among its options drawn from
    the map of depth (`finetune.scoring.pair_sampling`).

    Under a protocol with `thresholds` among its options (how many, from 0.11 in steps of 0.01) and no threshold given,
    the one of these that suits the scored images best is chosen, and results say so: right for a validation set, whose
    threshold is then to be given for the test set.
    """

    columns = PAIR_METRICS

    @classmethod
    def needs_metres(cls, protocol: Protocol) -> bool:
        """The order of two points is the same in inverse depth."""
        return False

    @classmethod
    def unusable_text(cls, settings: Mapping[str, Any]) -> str:
        """Nothing can be ordered."""
        return "all their pairs count as wrong"

    @classmethod
    def nonfinite_text(cls, settings: Mapping[str, Any]) -> str:
        """NaN orders nothing."""
        return "pairs that need a NaN count as wrong"

    def __init__(self, protocol: Protocol, *, skip_empty: bool = False):
        super().__init__(protocol, skip_empty=skip_empty)
        self._read: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        steps = int(protocol.option("thresholds"))
        self._thresholds = np.round(0.1 + 0.01 * np.arange(1, steps + 1), 2)
        self._chosen: dict[str, Any] = {}

    def score(self, sample: DepthSample, prediction: np.ndarray, inverse: bool) -> Row:
        """Counts of pairs and the scores of them that are defined. ValueError: a sample without pairs."""
        pairs, relation = sample.pairs, sample.relation
        if count := int(self.protocol.option("pairs")):
            ratio, seed = self.protocol.option("ratio"), int(self.protocol.option("seed"))
            pairs, relation = sample_pairs(sample, count, ratio, seed)
            if not len(pairs):
                raise NoValidPixels("fewer than two pixels have a reading, so there are no pairs")
        if pairs is None or relation is None:
            raise UserError("relations need annotated pairs, and the sample has none")
        size = sample.image.shape[:2]
        farness = resize(np.asarray(prediction, np.float64), size, self.protocol.align_corners)
        rows, columns = np.floor(pairs.reshape(-1, 2, 2) + 0.5).astype(np.int64).transpose(2, 0, 1)
        read = farness[rows, columns]
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is wrong
            difference = (read[:, 0] - read[:, 1]) * (-1 if inverse else 1)
        if len(self._thresholds):
            self._read[sample.name] = difference, relation
        nonfinite = int((~np.isfinite(prediction)).sum())
        return {
            **self._row(difference, relation, self.protocol.threshold),
            "nonfinite": nonfinite,
            "nonpositive": 0,
        }

    @staticmethod
    def _row(difference: np.ndarray, relation: np.ndarray, threshold: float) -> Row:
        counts = count_pairs(difference, relation, threshold)
        scores = pair_scores(counts)
        return {**counts, **{name: scores.get(name) for name in SCORES}}

    @classmethod
    def aggregate(cls, columns: Columns, counts: np.ndarray, aggregation: str) -> dict[str, np.ndarray]:
        """Scores of all pairs, or means over images of those that are defined."""
        if aggregation == "pooled":
            return pooled_pairs(columns, counts)
        return mean_of_images(columns, counts, SCORES)

    def extras(self) -> dict[str, Any]:
        """pairs: how many, by kind; wkdr_threshold, where it was chosen: its value and what was weighed."""
        total = {name: sum(row[name] for row in self.rows.values()) for name in COUNTS}
        return {"pairs": total, **self._chosen}

    def results(self) -> dict[str, Any]:
        """See `Evaluator.results`; ValueError: no pair of which one point is farther was scored."""
        if not any(row["unequal"] for row in self.rows.values()):
            raise UserError(
                "no pair of which one point is farther was scored: name a file of annotations that has some"
            )
        if len(self._thresholds) and not self.protocol.threshold:
            differences, relations = zip(*self._read.values(), strict=True)
            value, curve = choose_threshold(differences, relations, self._thresholds)
            for name, (difference, relation) in self._read.items():
                self.rows[name] = {**self.rows[name], **self._row(difference, relation, value)}
            about = "chosen on the scored images: give it as threshold to score others"
            columns = ["threshold", "wkdr", "wkdr_equal", "wkdr_unequal"]
            self._chosen = {
                "wkdr_threshold": {"value": value, "about": about, "columns": columns, "rows": curve}
            }
        return super().results()
