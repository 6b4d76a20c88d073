"""Relations of points: pairs drawn from maps, and the threshold of WKDR."""

from dataclasses import replace

import numpy as np
import pytest

from finetune.depth_data import DepthSample
from finetune.protocols import get_protocol
from finetune.scoring.evaluator import NoValidPixels
from finetune.scoring.evaluators import evaluator_of
from finetune.scoring.pair_sampling import sample_pairs
from finetune.scoring.pairwise import choose_threshold, count_pairs, pair_scores

IMAGE = np.zeros((30, 40, 3), np.uint8)


def ramp(name: str = "a") -> DepthSample:
    """Depth grows from left to right by 1 % a column; the upper left quarter is a hole."""
    depth = (2 * 1.01 ** np.arange(40) * np.ones((30, 1))).astype(np.float32)
    depth[:15, :20] = 0
    return DepthSample(IMAGE, depth, name)


def test_drawn_pairs_have_the_relation_of_their_depths() -> None:
    pairs, relation = sample_pairs(ramp(), 2000, 1.02, 0)
    assert pairs.shape == (2000, 4)
    metres = ramp().metres
    a, b = metres[pairs[:, 0], pairs[:, 1]], metres[pairs[:, 2], pairs[:, 3]]
    assert (a > 0).all()
    assert (b > 0).all()
    columns = pairs[:, 1] - pairs[:, 3]
    np.testing.assert_array_equal(relation, np.where(np.abs(columns) <= 1, 0, np.sign(columns)))
    assert not (pairs[:, :2] == pairs[:, 2:]).all(1).any()
    # every pixel as likely: the columns of the hole have half of the pixels of the others
    assert (pairs[:, 1] < 20).mean() == pytest.approx(1 / 3, abs=0.04)


def test_the_draw_is_a_function_of_seed_and_name() -> None:
    one = sample_pairs(ramp(), 50, 1.02, 0)[0]
    np.testing.assert_array_equal(one, sample_pairs(ramp(), 50, 1.02, 0)[0])
    assert (one != sample_pairs(ramp("b"), 50, 1.02, 0)[0]).any()
    assert (one != sample_pairs(ramp(), 50, 1.02, 1)[0]).any()
    # results of years apart stand beside each other: the generator must not change
    assert one[:3].tolist() == GOLDEN


GOLDEN = [[0, 36, 27, 29], [19, 6, 22, 0], [25, 0, 1, 34]]


def test_relative_depth_is_compared_by_its_disparity() -> None:
    affine = np.tile(np.array([0.0, 0.5, 0.505, 1.0], np.float32), (30, 10))
    affine[:, 20:] = np.nan
    pairs, relation = sample_pairs(DepthSample(IMAGE, None, "a", affine=affine), 500, 1.02, 0)
    nearness = np.tile([0, 1, 1, 2], 10)  # 0.5 and 0.505 are within 2 %
    np.testing.assert_array_equal(relation, np.sign(nearness[pairs[:, 3]] - nearness[pairs[:, 1]]))
    assert pairs[:, [1, 3]].max() < 20
    one_pixel = np.full((30, 40), np.nan, np.float32)
    one_pixel[3, 4] = 1
    assert len(sample_pairs(DepthSample(IMAGE, None, "a", affine=one_pixel), 5, 1.02, 0)[0]) == 0
    with pytest.raises(ValueError, match="drawn from a map of depth"):
        sample_pairs(DepthSample(IMAGE, None, "a"), 5, 1.02, 0)


def test_whdr_of_drawn_pairs() -> None:
    evaluator = evaluator_of(get_protocol("redweb"))
    affine = np.tile(np.linspace(1, 0.1, 40, dtype=np.float32), (30, 1))
    for name, prediction in (("right", affine), ("wrong", -affine)):
        evaluator.add(DepthSample(IMAGE, None, name, affine=affine), prediction, inverse=True)
    results = evaluator.results()
    assert [row["whdr"] for row in results["per_image"]] == [0, 1]
    counts = results["pairs"]
    assert counts["unequal"] + counts["equal"] == 20_000
    assert results["metrics"]["whdr"] == pytest.approx(0.5, abs=0.01)  # pooled over unequal pairs
    assert results["settings"]["options"] == [["pairs", 10_000], ["ratio", 1.02], ["seed", 0]]
    empty = DepthSample(IMAGE, None, "empty", affine=np.full((30, 40), np.nan, np.float32))
    with pytest.raises(NoValidPixels, match="fewer than two pixels"):
        evaluator.add(empty, affine, inverse=True)


def test_the_threshold_balances_equal_and_unequal_pairs_by_hand() -> None:
    # equal pairs differ by 0.1 and 0.3 in the prediction, unequal ones by 0.2 and 0.5
    difference, relation = [np.array([0.1, -0.3, 0.2, -0.5])], [np.array([0, 0, 1, -1])]
    thresholds = np.array([0.05, 0.15, 0.25, 0.35, 0.6])
    value, rows = choose_threshold(difference, relation, thresholds)
    # (equal, unequal) wrong: (1, 0), (.5, 0), (.5, .5), (0, .5), (0, 1)
    assert [row[2:] for row in rows] == [[1, 0], [0.5, 0], [0.5, 0.5], [0, 0.5], [0, 1]]
    assert value == 0.15
    for row in rows:
        counted = pair_scores(count_pairs(difference[0], relation[0], row[0]))
        assert row[1:] == [counted["wkdr"], counted["wkdr_equal"], counted["wkdr_unequal"]]
    # means are over images, and an image without equal pairs has no share in theirs
    more = choose_threshold([*difference, np.array([0.01])], [*relation, np.array([1])], thresholds)[1]
    assert more[1][1:] == [pytest.approx((0.25 + 1) / 2), 0.5, 0.5]
    with pytest.raises(ValueError, match="some are equally far"):
        choose_threshold(difference, [np.array([1, 1, 1, 1])], thresholds)


def pairs_of(name: str, relation: list[int]) -> DepthSample:
    """Pairs of one column each, from row 0 to row 1."""
    pairs = np.array([[0, column, 1, column] for column in range(len(relation))], np.float64)
    return DepthSample(IMAGE, None, name, pairs=pairs, relation=np.array(relation))


def test_wkdr_chooses_among_140_unless_told() -> None:
    prediction = np.zeros((30, 40))
    prediction[0, :4] = 0.1, -0.3, 0.2, -0.5
    for threshold, expected in ((None, 0.11), (0.35, 0.35)):
        evaluator = evaluator_of(get_protocol("nyu-wkdr", threshold=threshold))
        evaluator.add(pairs_of("a", [0, 0, 1, -1]), prediction)
        evaluator.add(pairs_of("b", [0, -1]), np.where(prediction < 0, 2, 0))  # right, and wrong
        results = evaluator.results()
        by_hand = [
            pair_scores(count_pairs(np.array([0.1, -0.3, 0.2, -0.5]), np.array([0, 0, 1, -1]), expected))
        ]
        by_hand.append({"wkdr": 0.5, "wkdr_equal": 0.0, "wkdr_unequal": 1.0})
        for name in ("wkdr", "wkdr_equal", "wkdr_unequal"):
            assert results["metrics"][name] == pytest.approx(np.mean([scores[name] for scores in by_hand]))
        assert ("wkdr_threshold" in results) == (threshold is None)
        if threshold is None:
            assert results["wkdr_threshold"]["value"] == expected
            grid = [row[0] for row in results["wkdr_threshold"]["rows"]]
            assert (len(grid), grid[0], grid[-1]) == (140, 0.11, 1.5)
            assert results == evaluator.results()  # asked twice
        else:
            assert results["settings"]["threshold"] == 0.35


def test_what_a_model_is_shown() -> None:
    assert get_protocol("nyu-wkdr").seen_at((480, 640)) == (9, 470, 9, 630)
    assert get_protocol("diw").seen_at((300, 200)) == (0, 300, 0, 200)
    kb = replace(get_protocol("nyu-bts"), sees="kb_crop")
    assert kb.seen_at((375, 1242)) == (23, 375, 13, 1229)
    with pytest.raises(ValueError, match="370x1200 is too small"):
        kb.seen_at((370, 1200))
