"""Protocols: which pixels count, what happens to a prediction, what is averaged, and what is refused."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest

from finetune.depth_data import DepthSample, NYUSync
from finetune.evaluator import NoValidPixels
from finetune.metrics import METRICS, columns_of, depth_errors, mean_of_images, write_results
from finetune.protocols import PROTOCOLS, Protocol, get_protocol
from finetune.scoring import (
    DepthEvaluator,
    merge_flipped,
    metric_prediction,
    prepare_prediction,
    score_pair,
    valid_pixels,
)

BTS = PROTOCOLS["nyu-bts"]
SMALL = Protocol(name="small", description="a test", min_depth=1e-3, max_depth=10.0)  # any size, no crop


def sample(name: str, depth: np.ndarray) -> DepthSample:
    return DepthSample(np.zeros((*depth.shape, 3), np.uint8), depth, name)


def full_frame(value: float = 2.0) -> np.ndarray:
    return np.full((480, 640), value, np.float32)


# --- which pixels count
# ----------------------------------------------------------------------------------------


def test_eigen_crop_to_the_pixel():
    counts = valid_pixels(BTS, full_frame())
    rows, columns = np.flatnonzero(counts.any(1)), np.flatnonzero(counts.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (45, 470, 41, 600)
    assert counts.sum() == (471 - 45) * (601 - 41)


def test_caps_are_strict():
    ground_truth = full_frame()
    ground_truth[100, 100:107] = [
        0,
        0.001,
        0.0011,
        9.9999,
        10.0,
        11,
        np.nan,
    ]  # 0.001: 1 mm, read from 16 bits
    counts = valid_pixels(BTS, ground_truth)[100, 100:107]
    assert counts.tolist() == [False, False, True, True, False, False, False]
    assert valid_pixels(BTS, ground_truth.astype(np.float64) * 0 + 1e-3).sum() == 0


def test_outside_the_crop_and_in_holes_nothing_matters():
    ground_truth = full_frame()
    ground_truth[200:300, 200:300] = 0
    prediction = full_frame()
    before = score_pair(BTS, prediction, ground_truth)
    prediction[:45] = 7
    prediction[471:] = 7
    prediction[:, :41] = 7
    prediction[:, 601:] = 7
    prediction[200:300, 200:300] = 7
    assert score_pair(BTS, prediction, ground_truth) == before
    assert before["pixels"] == 426 * 560 - 100 * 100
    assert before["rmse"] == 0
    prediction[45, 41] = 7
    assert score_pair(BTS, prediction, ground_truth)["rmse"] > 0


def test_another_size_is_an_error_unless_the_protocol_scales():
    with pytest.raises(
        ValueError, match=r"nyu-bts is defined on ground truth of 480x640, this is 120x160.*scaled"
    ):
        score_pair(BTS, np.ones((120, 160)), np.ones((120, 160), np.float32))
    scaled = PROTOCOLS["nyu-bts-scaled"]
    assert scaled.crop_at((120, 160)) == (11, 118, 10, 150)
    assert scaled.crop_at((480, 640)) == BTS.crop_at((480, 640)) == (45, 471, 41, 601)
    assert score_pair(scaled, np.ones((120, 160)), np.ones((120, 160), np.float32))["pixels"] == 107 * 140


def test_no_valid_pixel_has_a_name():
    with pytest.raises(NoValidPixels, match="nyu-bts crop"):
        score_pair(BTS, full_frame(), full_frame(0.0))
    only_outside = full_frame(0.0)
    only_outside[:45] = 2.0
    with pytest.raises(NoValidPixels):
        score_pair(BTS, full_frame(), only_outside)


@pytest.mark.parametrize("wrong", [np.ones((480, 640), np.uint16), np.ones((480, 640, 1), np.float32)])
def test_ground_truth_that_is_not_metres(wrong):
    with pytest.raises(ValueError, match="ground truth is depth in metres"):
        score_pair(BTS, full_frame(), wrong)


# --- what happens to a prediction
# ------------------------------------------------------------------------------


def test_prediction_is_clipped():
    ground_truth = np.full((2, 2), 5.0, np.float32)
    metrics = score_pair(SMALL, np.array([[-3.0, 0.0], [5.0, 99.0]]), ground_truth)
    expected = depth_errors(np.array([1e-3, 1e-3, 5.0, 10.0]), ground_truth.ravel())
    assert {name: metrics[name] for name in METRICS} == {name: expected[name] for name in METRICS}


def test_prediction_is_clipped_after_the_resize():
    """Clipping 2 and 30 m first gives 2 + 8/2 = 6 in the middle; resizing first gives 16, clipped to 10."""
    prediction = metric_prediction(SMALL, np.array([[2.0, 30.0]]), np.ones((1, 3), np.float32))
    np.testing.assert_allclose(prediction, [[2.0, 10.0, 10.0]])


def test_resize_is_bilinear_by_the_stated_corners():
    ramp = np.array([[1.0, 2.0]])
    half_pixel, *_ = prepare_prediction(SMALL, ramp, (1, 4))
    np.testing.assert_allclose(half_pixel, [[1.0, 1.25, 1.75, 2.0]])
    corners, *_ = prepare_prediction(dataclasses.replace(SMALL, align_corners=True), ramp, (1, 4))
    np.testing.assert_allclose(corners, [[1, 4 / 3, 5 / 3, 2]])
    assert BTS.align_corners is False


def test_prediction_of_the_right_size_is_not_touched():
    prediction = np.random.default_rng(0).uniform(0.5, 9, (480, 640)).astype(np.float32)
    prepared, *_ = prepare_prediction(BTS, prediction, (480, 640))
    np.testing.assert_array_equal(prepared, prediction.astype(np.float64))


def test_nan_and_infinity_are_counted_and_punished():
    ground_truth = np.full((2, 4), 5.0, np.float32)
    prediction = np.array([[np.nan, np.inf, -np.inf, 5.0], [5.0, 5.0, 5.0, 5.0]])
    row = score_pair(SMALL, prediction, ground_truth)
    assert row["nonfinite"] == 3
    expected = depth_errors(np.array([1e-3, 10.0, 1e-3, 5, 5, 5, 5, 5]), ground_truth.ravel())
    assert {name: row[name] for name in METRICS} == {name: expected[name] for name in METRICS}
    assert row["delta1"] == 5 / 8


@pytest.mark.parametrize("size", [(480, 640), (120, 160)])
def test_an_all_nan_prediction_is_terrible_not_perfect(size):
    row = score_pair(BTS, np.full(size, np.nan), full_frame())
    assert row["nonfinite"] == size[0] * size[1]
    assert row["delta3"] == 0
    assert row["abs_rel"] > 0.99
    assert all(math.isfinite(row[name]) for name in METRICS)


def test_one_nan_does_not_spread_over_the_resize():
    prediction = np.full((12, 16), 2.0)
    prediction[6, 8] = np.nan
    prepared, nonfinite, _ = prepare_prediction(BTS, prediction, (480, 640))
    assert nonfinite == 1
    assert np.isfinite(prepared).all()
    assert (prepared == 2.0).mean() > 0.9


def test_a_prediction_must_be_a_map():
    with pytest.raises(ValueError, match=r"\[1, 480, 640\]"):
        score_pair(BTS, np.ones((1, 480, 640)), full_frame())


def test_flip_average():
    first, of_mirrored = np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 4.0, 30.0]])
    assert merge_flipped(SMALL, first, of_mirrored).tolist() == [[15.5, 3.0, 4.0]]
    clipping = dataclasses.replace(SMALL, clip_before_average=True)
    assert merge_flipped(clipping, first, of_mirrored).tolist() == [[5.5, 3.0, 4.0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = merge_flipped(clipping, np.array([[np.nan, np.inf]]), np.array([[-np.inf, 1.0]]))
    assert prepare_prediction(SMALL, merged, (1, 2))[1] == 2  # both are still seen and counted


# --- what is averaged
# ------------------------------------------------------------------------------------------


def test_mean_over_images_is_not_pooling():
    """Three exact pixels, one 3 m off, one 8 m off: the mean of RMSEs and the RMSE of all pixels are two numbers."""
    far = (np.array([[8.0, 8.0, 8.0]]), np.array([[5.0, 0.0, 0.0]], np.float32))
    near = (np.array([[2.0, 2.0, 2.0]]), np.array([[2.0, 2.0, 2.0]], np.float32))
    further = (np.array([[9.0, 9.0, 9.0]]), np.array([[1.0, 0.0, 0.0]], np.float32))

    def rmse(aggregation, *pairs):
        evaluator = DepthEvaluator(dataclasses.replace(SMALL, aggregation=aggregation))
        for number, pair in enumerate(pairs):
            evaluator.add(sample(str(number), pair[1]), pair[0])
        return evaluator.results()["metrics"]["rmse"]

    assert rmse("per_image", near, further) == pytest.approx(8 / 2)
    assert rmse("pooled", near, further) == pytest.approx(math.sqrt(64 / 4))
    assert rmse("per_image", far, further) == pytest.approx((3 + 8) / 2)
    assert rmse("pooled", far, further) == pytest.approx(math.sqrt((9 + 64) / 2))
    assert rmse("pooled", far, near, further) == pytest.approx(math.sqrt((9 + 64) / 5))


def test_pooling_equals_one_long_image():
    generator = np.random.default_rng(3)
    ground_truth = generator.uniform(0.5, 9.5, (4, 6, 8)).astype(np.float32)
    ground_truth[generator.random(ground_truth.shape) < 0.3] = 0
    prediction = generator.uniform(0.5, 9.5, (4, 6, 8))
    evaluator = DepthEvaluator(dataclasses.replace(SMALL, aggregation="pooled"))
    for number in range(4):
        evaluator.add(sample(str(number), ground_truth[number]), prediction[number])
    counts = ground_truth > 0
    expected = depth_errors(prediction[counts], ground_truth[counts])
    assert evaluator.results()["metrics"] == {
        name: pytest.approx(expected[name], rel=1e-12) for name in METRICS
    }


def test_results(tmp_path):
    evaluator = DepthEvaluator(BTS)
    rows = [
        evaluator.add(sample(name, full_frame(2.0)), full_frame(value))
        for name, value in (("a", 2.5), ("b", np.nan))
    ]
    assert rows[0]
    assert rows[0]["rmse"] == pytest.approx(0.5)
    results = evaluator.results()
    assert list(results)[:3] == ["protocol", "images", "metrics"]
    assert (results["protocol"], results["images"]) == ("nyu-bts", 2)
    assert tuple(results["metrics"]) == METRICS
    assert [row["name"] for row in results["per_image"]] == ["a", "b"]
    for name in METRICS:
        assert results["metrics"][name] == pytest.approx(np.mean([row[name] for row in results["per_image"]]))
    assert results["nonfinite_images"] == 1
    assert results["nonfinite_pixels"] == 480 * 640
    assert results["skipped"] == []
    assert results["crop_scaled"] is False
    assert results["settings"]["expected_images"] == 654
    assert results["settings"]["flip_average"] is False
    write_results(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == results["metrics"]


def test_a_scaled_crop_is_told():
    evaluator = DepthEvaluator(PROTOCOLS["nyu-bts-scaled"])
    evaluator.add(sample("room", np.ones((120, 160), np.float32)), np.ones((120, 160)))
    results = evaluator.results()
    assert results["crop_scaled"] is True
    assert results["protocol"] == "nyu-bts-scaled"


def test_empty_images_stop_or_are_listed():
    with pytest.raises(NoValidPixels, match=r"^dark/rgb\.png: .*skip_empty"):
        DepthEvaluator(BTS).add(sample("dark/rgb.png", full_frame(0.0)), full_frame())
    evaluator = DepthEvaluator(BTS, skip_empty=True)
    assert evaluator.add(sample("dark/rgb.png", full_frame(0.0)), full_frame()) is None
    with pytest.raises(ValueError, match="no image was scored"):
        evaluator.results()
    evaluator.add(sample("lit/rgb.png", full_frame()), full_frame())
    results = evaluator.results()
    assert (results["images"], results["skipped"], len(results["per_image"])) == (1, ["dark/rgb.png"], 1)


def test_errors_carry_the_image():
    evaluator = DepthEvaluator(BTS)
    with pytest.raises(ValueError, match=r"^a/rgb\.png: protocol nyu-bts is defined on"):
        evaluator.add(sample("a/rgb.png", np.ones((4, 5), np.float32)), np.ones((4, 5)))
    evaluator.add(sample("b", full_frame()), full_frame())
    with pytest.raises(ValueError, match="b was scored already"):
        evaluator.add(sample("b", full_frame()), full_frame())


# --- the registry
# ----------------------------------------------------------------------------------------------


def test_registry():
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    assert get_protocol("nyu-bts") is BTS
    assert get_protocol("nyu-bts", flip_average=True) == dataclasses.replace(BTS, flip_average=True)
    assert (
        Protocol(
            name="nyu-bts",
            description=BTS.description,
            tables=BTS.tables,
            data="nyu",
            min_depth=1e-3,
            max_depth=10.0,
            crop=(45, 471, 41, 601),
            frame=(480, 640),
            expected_images=654,
        )
        == BTS
    )
    with pytest.raises(ValueError, match=r"no evaluation protocol 'nyu_bts': did you mean nyu-bts\?"):
        get_protocol("nyu_bts")
    with pytest.raises(TypeError):
        PROTOCOLS["mine"] = BTS  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        BTS.max_depth = 80.0  # type: ignore[misc]


def test_protocols_check_themselves():
    with pytest.raises(ValueError, match="0 < min_depth < max_depth"):
        dataclasses.replace(BTS, min_depth=0.0)
    with pytest.raises(ValueError, match="needs the frame"):
        dataclasses.replace(BTS, frame=None)
    with pytest.raises(ValueError, match="'per_image' or 'pooled'"):
        dataclasses.replace(BTS, aggregation="median")  # type: ignore[arg-type]


# --- an anchor outside this project
# ----------------------------------------------------------------------------


@pytest.mark.real_data
def test_mean_depth_scores_like_the_mean_column_of_eigen(real_data):
    """Predict the per-pixel mean of the training depths, pixels pooled: Eigen et al. 2014 print for this, on
    the official test images, delta1 .418, delta2 .711, delta3 .874, AbsRel .408, SqRel .581, RMSE 1.244, RMSE
    log .430 and scale-invariant .304 (= silog / 100). Here: every fourth training image and the validation
    scenes, filled depth; the bands are wide enough for other scenes, and far too narrow for a wrong unit,
    formula or logarithm.
    """
    train, val = (NYUSync(real_data / "nyu", name) for name in ("nyu_train.txt", "nyu_val.txt"))
    total, count = np.zeros((480, 640)), np.zeros((480, 640))
    for index in range(0, len(train), 4):
        depth = train[index].metres
        total += depth
        count += depth > 0
    mean = total / np.maximum(count, 1)
    pooled = DepthEvaluator(dataclasses.replace(BTS, aggregation="pooled"))
    for index in range(len(val)):
        pair = val[index]
        pooled.add(pair, mean)
    results = pooled.results()
    metrics = results["metrics"]
    bands = {
        "delta1": (0.28, 0.55),
        "delta2": (0.58, 0.82),
        "delta3": (0.78, 0.94),
        "abs_rel": (0.28, 0.55),
        "sq_rel": (0.3, 0.95),
        "rmse": (0.9, 1.6),
        "rmse_log": (0.3, 0.55),
    }
    assert {
        name: metrics[name] for name, (low, high) in bands.items() if not low < metrics[name] < high
    } == {}
    columns = columns_of(results["per_image"])
    per_image = mean_of_images(columns, np.ones((1, len(val))), METRICS)
    assert 22.0 < per_image["silog"][0] < 38.0
    assert (
        per_image["rmse"][0] < 0.95 * metrics["rmse"]
    )  # what makes pooled and per-image numbers incomparable
