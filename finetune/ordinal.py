"""Scores of relations between points: does the model order the pairs of Depth in the Wild as people did?

A prediction is resized to the photo, bilinearly, and read at the annotated pixels. Let d be how much farther it says A
is than B: in metres, or for a head without metres minus the difference of inverse depths. The relation read off it is
"farther" where d > threshold, "closer" where d < -threshold, and else "as far".

| name | share of wrong ones | among |
|---|---|---|
| whdr | d has the wrong sign, or is 0 | pairs of which one point is farther |
| accuracy | 1 - whdr | the same |
| wkdr | the relation read off d is not the annotated one | all pairs, those that are as far included |
| wkdr_unequal | the same | pairs of which one point is farther |
| wkdr_equal | the same | pairs that are as far |

So whdr (Chen et al. 2016, arXiv 1604.03901) has no threshold and passes over equal pairs, of which Depth in the Wild
has none; wkdr has the threshold of the protocol, in the unit of d, for data that has them. Ties are wrong. All pairs
are pooled. A pair at which the prediction is NaN is wrong.
"""

from dataclasses import asdict, dataclass, fields

import numpy as np

from finetune.depth_data.sample import DepthSample
from finetune.protocols import Protocol, resize

SETTINGS = ("name", "description", "supervision", "threshold", "flip_average", "align_corners")
"""Of a protocol, what bears on relations."""


@dataclass(frozen=True)
class PairCounts:
    """What a set of pairs contributes; the counts of two sets add up (`+`).

    Args:
        unequal: pairs of which one point is farther.
        equal: pairs that are as far.
        misordered: unequal pairs whose predicted difference has the wrong sign, or none.
        wrong_unequal: unequal pairs whose relation under the threshold is wrong.
        wrong_equal: equal pairs likewise.
    """

    unequal: int
    equal: int
    misordered: int
    wrong_unequal: int
    wrong_equal: int

    def __add__(self, other: "PairCounts") -> "PairCounts":
        return PairCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def metrics(self) -> dict[str, float]:
        """Those that are defined: without unequal (equal) pairs, the scores of such pairs are left out."""
        rows = {"wkdr": (self.wrong_unequal + self.wrong_equal) / (self.unequal + self.equal)}
        if self.unequal:
            whdr = self.misordered / self.unequal
            rows |= {
                "whdr": whdr,
                "accuracy": 1 - whdr,
                "wkdr_unequal": self.wrong_unequal / self.unequal,
            }
        if self.equal:
            rows["wkdr_equal"] = self.wrong_equal / self.equal
        return rows


def count_pairs(difference: np.ndarray, relation: np.ndarray, threshold: float) -> PairCounts:
    """Compare predicted differences with relations.

    Args:
        difference: how much farther A is than B, `[N]`; NaN is wrong whatever the relation.
        relation: +1: A is farther, -1: A is closer, 0: as far, `[N]`.
        threshold: largest absolute difference at which two points count as equally far, for wkdr.

    Raises:
        ValueError: no pairs, two lengths, or another relation.
    """
    difference, relation = np.asarray(difference, np.float64), np.asarray(relation)
    if difference.shape != relation.shape or relation.ndim != 1 or not relation.size:
        raise ValueError(
            f"expected as many differences as relations, at least one: got {list(difference.shape)} and"
            f" {list(relation.shape)}"
        )
    if not np.isin(relation, (-1, 0, 1)).all():
        raise ValueError("a relation of a pair must be -1, 0 or 1")
    ordered = relation != 0
    said = np.where(difference > threshold, 1, np.where(difference < -threshold, -1, 0))
    wrong = (said != relation) | np.isnan(difference)
    return PairCounts(
        unequal=int(ordered.sum()),
        equal=int((~ordered).sum()),
        misordered=int((np.sign(difference) != relation)[ordered].sum()),  # the sign of NaN is NaN
        wrong_unequal=int(wrong[ordered].sum()),
        wrong_equal=int(wrong[~ordered].sum()),
    )


class OrdinalEvaluator:
    """Scores photos with annotated pairs one by one.

    Args:
        protocol: one of relations (`supervision` is "ordinal").
    """

    def __init__(self, protocol: Protocol):
        self.protocol = protocol
        self._rows: list[tuple[str, PairCounts, int]] = []

    def add(self, sample: DepthSample, prediction: np.ndarray, *, inverse: bool) -> dict[str, float]:
        """Score a photo.

        Args:
            sample: its pairs and relations.
            prediction: depth `[h, w]` [m], any size.
            inverse: the prediction is inverse depth instead.

        Returns:
            its metrics.

        Raises:
            ValueError: no prediction `[h, w]`, or a sample without pairs.
        """
        if prediction.ndim != 2 or sample.pairs is None or sample.relation is None:
            raise ValueError(
                f"{sample.name}: relations need a prediction [h, w] and annotated pairs, got {list(prediction.shape)}"
            )
        farness = resize(
            np.asarray(prediction, np.float64), sample.image.shape[:2], self.protocol.align_corners
        )
        rows, columns = np.floor(sample.pairs.reshape(-1, 2, 2) + 0.5).astype(np.int64).transpose(2, 0, 1)
        read = farness[rows, columns]
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is wrong
            difference = (read[:, 0] - read[:, 1]) * (-1 if inverse else 1)
        counts = count_pairs(difference, sample.relation, self.protocol.threshold)
        self._rows.append((sample.name, counts, int((~np.isfinite(prediction)).sum())))
        return counts.metrics()

    def results(self) -> dict:
        """What results.json holds: as `ProtocolEvaluator.results`, with the numbers of pairs instead of crops.

        Raises:
            ValueError: no pair of which one point is farther was scored.
        """
        total = sum((counts for _, counts, _ in self._rows), start=PairCounts(0, 0, 0, 0, 0))
        if not total.unequal:
            raise ValueError(
                "no pair of which one point is farther was scored: name a file of annotations that has some"
            )
        return {
            "protocol": self.protocol.name,
            "images": len(self._rows),
            "metrics": total.metrics(),
            "pairs": asdict(total),
            "nonfinite_pixels": sum(bad for *_, bad in self._rows),
            "nonfinite_images": sum(bad > 0 for *_, bad in self._rows),
            "skipped": [],
            "settings": {key: value for key, value in asdict(self.protocol).items() if key in SETTINGS},
            "per_image": [
                {"name": name, **asdict(counts), "nonfinite": bad} for name, counts, bad in self._rows
            ],
        }
