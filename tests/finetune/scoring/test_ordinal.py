"""Scores of relations between points, by hand."""

import numpy as np
import pytest

from finetune import DepthModel
from finetune.depth_data import DepthSample
from finetune.protocols import get_protocol
from finetune.scoring.pairwise import OrdinalEvaluator, count_pairs, pair_scores
from finetune.scoring.sources import check_protocol

DIW = get_protocol("diw")


def test_wrong_orders_and_ties_are_counted_by_hand():
    # farther and right, farther and wrong, closer and right, a tie, NaN; as far: within 0.2, and not
    difference = np.array([2.0, -0.1, -3.0, 0.0, np.nan, 0.2, -0.3])
    relation = np.array([1, 1, -1, -1, 1, 0, 0])
    counts = count_pairs(difference, relation, threshold=0.2)
    assert (counts["unequal"], counts["equal"]) == (5, 2)
    metrics = pair_scores(counts)
    assert metrics["whdr"] == 3 / 5  # the wrong one, the tie, NaN; the threshold does not matter
    assert metrics["accuracy"] == pytest.approx(2 / 5)
    assert metrics["wkdr_unequal"] == 3 / 5
    assert metrics["wkdr_equal"] == 1 / 2
    assert metrics["wkdr"] == 4 / 7
    # without a threshold only an exact tie is as far
    assert pair_scores(count_pairs(difference, relation, threshold=0.0))["wkdr_equal"] == 1
    # a threshold that is larger than a right difference makes it wrong for wkdr, not for whdr
    strict = pair_scores(count_pairs(difference[:1], relation[:1], threshold=2.0))
    assert (strict["whdr"], strict["wkdr"]) == (0, 1)
    assert "wkdr_equal" not in strict


def test_nan_is_never_as_far():
    assert pair_scores(count_pairs(np.array([np.nan]), np.array([0]), 1.0)) == {"wkdr": 1, "wkdr_equal": 1}


def photo(pairs: list[list[float]], relation: list[int], name: str = "a") -> DepthSample:
    image = np.zeros((4, 6, 3), np.uint8)
    return DepthSample(image, None, name, pairs=np.array(pairs, np.float64), relation=np.array(relation))


def score_of(sample: DepthSample, prediction: np.ndarray, inverse: bool = False) -> dict:
    return OrdinalEvaluator(DIW).score(sample, prediction, inverse)


def test_points_are_row_first_and_read_at_the_size_of_the_photo():
    depth = np.arange(24, dtype=np.float32).reshape(4, 6)  # row 1, column 0 is farther than row 0, column 5
    sample = photo([[1, 0, 0, 5], [0, 1, 1, 0]], [1, -1])
    evaluator = OrdinalEvaluator(DIW)
    assert score_of(sample, depth, inverse=True)["whdr"] == 1
    assert score_of(sample, depth.T.copy())["whdr"] == 1  # transposed: resized first
    # A map of a sixth of the columns is read through the same bilinear resize as depth is scored.
    halves = np.array([[0.0, 10.0]], np.float32)
    assert score_of(photo([[3, 5, 0, 0]], [1]), halves)["accuracy"] == 1
    row = evaluator.add(sample, depth)
    assert row is not None
    assert row["whdr"] == 0
    evaluator.add(photo([[1, 0, 0, 5], [0, 1, 1, 0]], [1, -1], "b"), np.full((2, 3), 7.0), inverse=False)
    results = evaluator.results()
    assert results["metrics"]["whdr"] == 0.5  # pooled: 0 of 2, and two ties
    assert results["pairs"]["misordered"] == 2
    assert results["settings"] == DIW.record()
    assert results["per_image"][0]["wkdr_equal"] is None
    assert results["undefined"] == {}


def test_what_has_no_score_is_refused():
    evaluator = OrdinalEvaluator(DIW)
    evaluator.add(photo([[0, 0, 1, 1]], [0]), np.ones((4, 6)), inverse=False)
    with pytest.raises(ValueError, match="no pair of which one point is farther"):
        evaluator.results()
    with pytest.raises(ValueError, match="need annotated pairs"):
        evaluator.add(DepthSample(np.zeros((4, 6, 3), np.uint8), None, "b"), np.ones((4, 6)), inverse=False)
    for difference, relation in (([], []), ([1.0], [1, 1]), ([1.0], [2])):
        with pytest.raises(ValueError, match=r"expected as many|must be -1, 0 or 1"):
            count_pairs(np.array(difference), np.array(relation), 0.0)
    with pytest.raises(ValueError, match="threshold is for relations"):
        get_protocol("nyu-bts", threshold=0.1)
    with pytest.raises(ValueError, match="threshold must be 0 or more"):
        get_protocol("diw", threshold=-1)


def test_heads_without_metres_can_be_scored_by_order():
    check_protocol(DepthModel("test_resnet", head="fusion", width=16), DIW)
