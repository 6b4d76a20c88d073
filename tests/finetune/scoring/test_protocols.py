"""Protocols: which pixels count, what happens to a prediction, what is averaged, and what is refused."""

import dataclasses
import hashlib
import json
import math
import warnings
from contextlib import suppress

import numpy as np
import pytest

from finetune.depth_data import DepthSample, NYUSync
from finetune.protocols import PROTOCOLS, Protocol, get_protocol
from finetune.protocols.metrics import METRICS
from finetune.scoring.depth import (
    DepthEvaluator,
    Prepared,
    count_pixels,
    merge_flipped,
    metric_prediction,
    prepare_prediction,
    score_pair,
)
from finetune.scoring.evaluator import NoValidPixels
from finetune.scoring.metrics import columns_of, depth_errors, mean_of_images, write_results
from finetune.scoring.sources import mean_depth
from tools.tables import PAGE, page

BTS = PROTOCOLS["nyu-bts"]
SMALL = Protocol(name="small", description="a test", min_depth=1e-3, max_depth=10.0)  # any size, no crop


def sample(name: str, depth: np.ndarray) -> DepthSample:
    return DepthSample(np.zeros((*depth.shape, 3), np.uint8), depth, name)


def valid_pixels(protocol: Protocol, truth: np.ndarray) -> np.ndarray:
    """Which pixels count: those whose numbers come back."""
    counts = np.zeros(truth.shape, bool)
    numbers = np.arange(truth.size, dtype=np.float64).reshape(truth.shape)
    with suppress(NoValidPixels):
        counted = count_pixels(protocol, Prepared(numbers, 0, 0, True), truth)
        counts.flat[counted.prediction.astype(int)] = True
    return counts


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
    prepared, nonfinite, *_ = prepare_prediction(BTS, prediction, (480, 640))
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
            source=BTS.source,
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
def test_mean_depth_scores_like_the_mean_column_of_eigen(real_data, tmp_path):
    """Predict the per-pixel mean of the training depths, pixels pooled: Eigen et al. 2014 print for this, on
    the official test images, delta1 .418, delta2 .711, delta3 .874, AbsRel .408, SqRel .581, RMSE 1.244, RMSE
    log .430 and scale-invariant .304 (= silog / 100).

    Here it is every fourth of the 692 training pairs and the 103 validation pairs of other scenes, filled depth. The
    numbers are those of a script of its own (PNG by Pillow, sums and means by NumPy, nothing of this project); with
    all training pairs it gives .429, .717, .889, .356, .518, 1.335, .417, log10 .142, silog 41.69.
    """
    root = real_data / "nyu"
    listed = (root / "nyu_train.txt").read_text().splitlines()
    (tmp_path / "fourth.txt").write_text("\n".join(listed[::4]))
    mean = mean_depth(NYUSync(root, tmp_path / "fourth.txt"))
    pooled = DepthEvaluator(dataclasses.replace(BTS, aggregation="pooled"))
    val = NYUSync(root, "nyu_val.txt")
    for index in range(len(val)):
        pooled.add(val[index], mean)
    results = pooled.results()
    expected = [0.429319, 0.716327, 0.887674, 0.356487, 0.519128, 1.337491, 0.417716, 0.142672, 41.764807]
    assert [results["metrics"][name] for name in METRICS] == pytest.approx(expected, rel=2e-6)
    assert sum(row["pixels"] for row in results["per_image"]) == 24_571_550
    columns = columns_of(results["per_image"])
    per_image = mean_of_images(columns, np.ones((1, len(val))), ("rmse", "silog"))
    # What makes pooled and per-image numbers incomparable.
    assert [per_image["rmse"][0], per_image["silog"][0]] == pytest.approx([1.15910772, 28.4226095], rel=2e-6)


# --- every protocol, restated in plain NumPy
# ---------------------------------------------------------------------------


def enlarged(values: np.ndarray, size: tuple[int, int], corners: bool) -> np.ndarray:
    """Bilinear interpolation by its definition: rows, then columns."""
    for axis, new in enumerate(size):
        old = values.shape[axis]
        at = np.linspace(0, old - 1, new) if corners else (np.arange(new) + 0.5) * old / new - 0.5
        at = at.clip(0, old - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = np.expand_dims(at - low, 1 - axis)
        values = values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight
    return values


def bts_errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
    worst, d = np.maximum(p / g, g / p), np.log(p) - np.log(g)
    return {
        "delta1": (worst < 1.25).mean(),
        "delta2": (worst < 1.25**2).mean(),
        "delta3": (worst < 1.25**3).mean(),
        "abs_rel": (abs(p - g) / g).mean(),
        "sq_rel": ((p - g) ** 2 / g).mean(),
        "rmse": np.sqrt(((p - g) ** 2).mean()),
        "rmse_log": np.sqrt((d**2).mean()),
        "log10": abs(np.log10(p) - np.log10(g)).mean(),
        "silog": 100 * np.sqrt((d**2).mean() - d.mean() ** 2),
    }


def metric_pixels(name: str, first: np.ndarray, mirrored: np.ndarray, g: np.ndarray):
    """Prediction and ground truth of the pixels that count, each protocol in words of its own."""
    nyu = name.startswith("nyu")
    cap = 10 if nyu else 80
    if name in ("nyu-adabins", "nyu-zoedepth", "nyu-dinov3-linear", "nyu-densedepth", "kitti-garg-kb"):
        back = mirrored[:, ::-1]
        if name in ("nyu-adabins", "nyu-densedepth"):
            first, back = (x.clip(0.1 if "dense" in name else 1e-3, 10) for x in (first, back))
        first = (first + back) / 2
    if name == "kitti-monodepth2":
        p = 1 / enlarged(1 / first, g.shape, False)
    else:
        p = enlarged(first, g.shape, name in ("nyu-adabins", "nyu-zoedepth", "kitti-garg-kb"))
    if name == "nyu-fastdepth":
        from PIL import Image

        def seen(x):
            image = Image.fromarray(x.astype(np.float32)).resize((333, 250), Image.Resampling.NEAREST)
            box = image.crop((14, 11, 14 + 304, 11 + 228))
            return np.asarray(box.resize((224, 224), Image.Resampling.NEAREST)).astype(np.float64)

        p, g = seen(p), seen(g)
    if name == "kitti-garg-kb":
        top, left = g.shape[0] - 352, (g.shape[1] - 1216) // 2
        p, g = (x[top : top + 352, left : left + 1216] for x in (p, g))
    inside = np.zeros(g.shape, bool)
    rows, columns = {
        "nyu-bts": ((45, 471), (41, 601)),
        "nyu-adabins": ((45, 471), (41, 601)),
        "nyu-zoedepth": ((45, 471), (41, 601)),
        "nyu-dinov3-linear": ((45, 471), (41, 601)),
        "nyu-marigold": ((45, 471), (41, 601)),
        "nyu-dorn": ((20, 460), (24, 616)),
        "nyu-densedepth": ((20, 460), (24, 616)),
        "nyu-laina": ((0, 480), (0, 640)),
        "nyu-fastdepth": ((0, 224), (0, 224)),
        "kitti-eigen": ((124, 342), (44, 1197)),
        "kitti-garg-full": ((153, 371), (44, 1197)),
        "kitti-garg-kb": ((143, 349), (43, 1172)),
        "kitti-monodepth2": ((153, 371), (44, 1197)),
    }[name]
    inside[slice(*rows), slice(*columns)] = True
    filled = name in ("nyu-densedepth", "nyu-laina", "nyu-fastdepth")
    inside &= (g > 0) if filled else (g > 1e-3) & (g < cap)
    p, g = p[inside], g[inside].astype(np.float64)
    if name == "nyu-marigold":
        p = np.polyval(np.polyfit(p, g, 1), p)
    if name == "kitti-monodepth2":
        p = p * np.median(g) / np.median(p)
    return p if filled else p.clip(1e-3, cap), g


RESTATED = [
    name
    for name, protocol in PROTOCOLS.items()
    if protocol.family == "depth" and protocol.data in ("nyu", "kitti") and protocol.supervision == "metric"
]


@pytest.mark.parametrize("name", RESTATED)
def test_every_protocol_against_a_plain_restatement(name):
    generator = np.random.default_rng(7)
    protocol = PROTOCOLS[name]
    nyu = protocol.data == "nyu"
    size, small, far = ((480, 640), (30, 40), 12.0) if nyu else ((375, 1242), (24, 80), 90.0)
    evaluator, pixels, rows = DepthEvaluator(protocol), [], []
    for number in range(2):
        truth = generator.uniform(0.4, far, size).astype(np.float32)
        truth[generator.random(size) < 0.4] = 0.0
        first, mirrored = generator.uniform(-0.5 if protocol.clip else 0.4, far, (2, *small))
        if protocol.space == "disparity" or protocol.alignment != "none":
            first = np.abs(first) + 0.2
        merged = merge_flipped(protocol, first, mirrored) if protocol.flip_average else first
        evaluator.add(sample(str(number), truth), merged)
        pixels.append(metric_pixels(name, first, mirrored, truth))
        rows.append(bts_errors(*pixels[-1]))
    metrics = evaluator.results()["metrics"]
    if protocol.aggregation == "pooled":
        expected = bts_errors(*(np.concatenate(part) for part in zip(*pixels, strict=True)))
    else:
        expected = {key: (rows[0][key] + rows[1][key]) / 2 for key in METRICS}
    assert metrics == {key: pytest.approx(expected[key], rel=1e-5) for key in METRICS}


def test_non_positive_predictions_are_counted_not_dropped():
    truth = np.full((2, 2), 2.0, np.float32)
    row = score_pair(SMALL, np.array([[-1.0, 0.0], [2.0, np.nan]]), truth)
    assert (row["nonpositive"], row["nonfinite"], row["pixels"]) == (2, 1, 4)
    assert row["delta1"] == 1 / 4
    unclipped = dataclasses.replace(SMALL, clip=False)
    assert score_pair(unclipped, np.array([[-1.0, 99.0]]), truth[:1])["rmse"] == pytest.approx(
        math.sqrt((1.999**2 + 97**2) / 2)
    )


def test_depths_without_an_inverse_are_counted_and_are_the_farthest():
    truth = np.array([[1.0, 2.0], [4.0, 8.0]], np.float32)
    for bad, counts in ((-3.0, (1, 0)), (0.0, (1, 0)), (np.nan, (0, 1)), (np.inf, (0, 1))):
        prediction = np.array([[1.0, 2.0], [bad, 8.0]])
        for name in ("nyu-affine", "kitti-monodepth2"):
            values, nonfinite, nonpositive, _ = prepare_prediction(PROTOCOLS[name], prediction, truth.shape)
            assert (nonpositive, nonfinite) == counts, (name, bad)
            np.testing.assert_array_equal(values, [[1, 0.5], [0.125, 0.125]])
    of_disparity = prepare_prediction(
        PROTOCOLS["nyu-affine"], np.array([[-1.0, np.nan]]), (1, 2), inverse=True
    )
    assert of_disparity[1:] == (1, 0, True)  # a shift is fitted, so its sign says nothing
    np.testing.assert_array_equal(of_disparity.values, [[-1, -1]])


def test_valid_depths_strict_closed_and_positive():
    truth = np.array([[0.0, 1.0, 5.0, 10.0, 11.0]], np.float32)
    small = dataclasses.replace(SMALL, min_depth=1.0)
    for valid, expected in (("strict", [2]), ("closed", [1, 2, 3]), ("positive", [1, 2, 3, 4])):
        counts = valid_pixels(dataclasses.replace(small, valid=valid), truth)
        assert np.flatnonzero(counts).tolist() == expected


def test_a_frame_too_small_for_its_view():
    with pytest.raises(ValueError, match=r"kitti-garg-kb takes 352x1216 of the frame, and this is 300x1242"):
        score_pair(PROTOCOLS["kitti-garg-kb"], np.ones((300, 1242)), np.ones((300, 1242), np.float32))


# --- the hash of a record
# ----------------------------------------------------------------------------------------------


def test_the_hash_is_of_what_bears_on_numbers():
    assert (
        BTS.hash()
        == dataclasses.replace(BTS, description="in other words", tables="", expected_images=1).hash()
    )
    others = [
        dataclasses.replace(BTS, **{field: value})
        for field, value in {"flip_average": True, "crop": (45, 471, 41, 600), "max_depth": 80.0}.items()
    ]
    assert len({BTS.hash(), *(other.hash() for other in others)}) == 4
    assert len({protocol.hash() for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)
    # Canonical JSON by hand: results written today must stay comparable.
    text = '{"crop":[45,471,41,601],"data":"nyu","frame":[480,640],"max_depth":10.0,"min_depth":0.001,"name":"nyu-bts"}'
    assert BTS.hash() == hashlib.sha256(text.encode()).hexdigest()


def test_the_table_in_the_documents_is_that_of_the_records():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run python -m tools.tables protocols"
    assert all(f"`{name}`" in text for name in PROTOCOLS)
