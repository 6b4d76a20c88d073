"""Calibration: fits against made-up truth, points that contradict, and a model that carries one."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import DepthModel, load_depth_model
from finetune.heads.output import DepthOutput
from finetune.model.calibration import Calibration, Readings, contradictions, fit_calibration, for_intrinsics
from finetune.model.depth_model import write_calibration

RNG = np.random.default_rng(0)
PREDICTED = np.linspace(1.0, 8.0, 12)


def readings(predicted: np.ndarray, metres: np.ndarray, relative: bool = False) -> Readings:
    names = [f"point {index}" for index in range(len(metres))]
    return Readings(predicted, metres, np.arange(len(metres)), names, relative)


# The truth is written down here, not taken from Calibration.metres.
TRUTHS = {
    ("depth", "scale"): (lambda d: 1.3 * d, (1.3, 0.0)),
    ("depth", "scale_shift"): (lambda d: 1.3 * d + 0.4, (1.3, 0.4)),
    ("log_depth", "scale"): (lambda d: 1.3 * d, (1.0, math.log(1.3))),
    ("log_depth", "scale_shift"): (lambda d: 1.3 * d**1.1, (1.1, math.log(1.3))),
    ("disparity", "scale"): (lambda d: 1.3 * d, (1 / 1.3, 0.0)),
    ("disparity", "scale_shift"): (lambda d: 1 / (0.7 / d + 0.05), (0.7, 0.05)),
}


@pytest.mark.parametrize(("space", "fit"), TRUTHS)
def test_what_was_made_is_found_despite_one_wrong_point(space, fit) -> None:
    make, (scale, shift) = TRUTHS[space, fit]
    metres = make(PREDICTED)
    found = fit_calibration(readings(PREDICTED, metres), space, fit, 1e-3, 10.0)
    assert found.scale == pytest.approx(scale, rel=1e-5)
    assert found.shift == pytest.approx(shift, abs=1e-5)
    assert found.errors["before"] == pytest.approx(np.mean(np.abs(PREDICTED - metres) / metres))
    assert found.errors["after"] < 1e-5
    assert found.errors["left_out"] < 1e-4
    np.testing.assert_allclose(found.metres(PREDICTED), metres, rtol=1e-5)

    wrong = metres.copy()
    wrong[4] *= 3
    with pytest.raises(ValueError, match=r"1 of 12 points contradict .*\(point 4: measured"):
        fit_calibration(readings(PREDICTED, wrong), space, fit, 1e-3, 10.0)
    weighted = fit_calibration(readings(PREDICTED, wrong), space, fit, 1e-3, 10.0, tolerance=None)
    np.testing.assert_allclose(weighted.metres(PREDICTED), metres, rtol=0.03)


@pytest.mark.parametrize("space", ["depth", "log_depth", "disparity"])
def test_tensors_and_numbers_agree_and_stay_in_range(space) -> None:
    calibration = Calibration(space, 1.2, -0.1, 0.5, 7.0)
    depth = torch.tensor([0.01, 0.5, 1.0, 3.0, 50.0]).reshape(1, 1, 1, 5)
    applied = calibration.apply(DepthOutput(depth=depth)).depth
    assert applied is not None
    assert applied.dtype == torch.float32
    np.testing.assert_allclose(applied.numpy(), calibration.metres(depth.numpy()), rtol=1e-5)
    d = 3.0
    by_hand = {
        "depth": 1.2 * d - 0.1,
        "log_depth": math.exp(1.2 * math.log(d) - 0.1),
        "disparity": 1 / (1.2 / d - 0.1),
    }
    assert applied[0, 0, 0, 3].item() == pytest.approx(by_hand[space], rel=1e-5)
    assert applied.min() == 0.5
    assert applied.max().item() == pytest.approx(7.0)


def test_relative_depth_becomes_metres() -> None:
    inverse = np.linspace(0.0, 20.0, 9)
    metres = 1 / (0.05 * inverse + 0.1)
    found = fit_calibration(readings(inverse, metres, True), "disparity", "scale_shift", 1e-3, 8.0)
    assert (found.scale, found.shift) == pytest.approx((0.05, 0.1), rel=1e-5)
    assert found.max_depth == pytest.approx(10.0)  # the farthest known distance, beyond the model's
    assert "before" not in found.errors
    output = DepthOutput(disparity_affine=torch.tensor([0.0, 20.0, -5.0]).reshape(1, 1, 1, 3))
    depth = found.apply(output).depth
    assert depth is not None
    np.testing.assert_allclose(depth.flatten().numpy(), [10.0, 1 / 1.1, 10.0], rtol=1e-5)


@pytest.mark.parametrize(
    ("predicted", "metres", "fit", "message"),
    [
        ([2.0], [3.0], "scale_shift", "need two known distances at least"),
        ([2.0, 2.01, 2.02], [1.0, 2.0, 3.0], "scale_shift", "about the same place"),
        ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], "scale_shift", "no scale above 0 fits"),
        ([2.0, 2.0], [1.0, 4.0], "scale", "2 of 2 points contradict"),
        ([2.0], [0.0], "scale", "distances are above 0"),
        ([], [], "scale", "no known distance"),
        ([2.0], [3e6], "scale", "give metres"),
    ],
)
def test_points_that_fix_nothing_are_refused(predicted, metres, fit, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(readings(np.array(predicted), np.array(metres)), "depth", fit, 1e-3, 10.0)


def test_a_fit_beyond_all_depths_is_a_sentence() -> None:
    steep = readings(np.array([1.0, 1.06, 1.12]), np.array([0.01, 10.0, 9000.0]))  # exp(120 ln 10) m at 10 m
    for predicted in (steep, replace(steep, predicted=1 + (steep.predicted - 1) / 2 + 0.001 * np.arange(3))):
        with pytest.raises(ValueError, match=r"farthest depth, 1000 m, beyond 1e\+06 m: check that"):
            fit_calibration(predicted, "log_depth", "scale_shift", 1e-3, 1000.0)
    with pytest.raises(ValueError, match=r"beyond 1e\+06 m"):
        fit_calibration(readings(np.array([1e-3]), np.array([900.0])), "depth", "scale", 1e-3, 10.0)
    kept = fit_calibration(steep, "log_depth", "scale_shift", 1e-3, 1000.0, limit=20.0, tolerance=None)
    assert kept.max_depth == 20.0


def test_a_limit_nearer_than_a_known_distance_contradicts_nobody() -> None:
    near = readings(np.array([1.0]), np.array([2.5]))
    with pytest.raises(ValueError, match=r"max_depth 1 m is nearer than a known distance, 2\.5 m: raise it"):
        fit_calibration(near, "depth", "scale", 1e-3, 10.0, limit=1.0)


def test_relative_depth_below_zero_is_no_lack_of_spread() -> None:
    inverse = np.linspace(-9.0, -1.0, 9)
    metres = 1 / (0.05 * inverse + 0.6)
    found = fit_calibration(readings(inverse, metres, True), "disparity", "scale_shift", 1e-3, 8.0)
    assert (found.scale, found.shift) == pytest.approx((0.05, 0.6), rel=1e-5)
    for alike in (np.zeros(3), np.array([-2.0, -2.01, -2.02])):
        with pytest.raises(ValueError, match="about the same place"):
            fit_calibration(
                readings(alike, np.array([1.0, 2.0, 3.0]), True), "disparity", "scale_shift", 1e-3, 8.0
            )


def test_one_point_gives_a_scale_and_two_are_not_checked_by_a_third() -> None:
    one = fit_calibration(readings(np.array([2.0]), np.array([3.0])), "log_depth", "scale", 1e-3, 10.0)
    assert one.metres(np.array([4.0]))[0] == pytest.approx(6.0)
    assert one.max_depth == pytest.approx(15.0)
    assert "left_out" not in one.errors


def test_an_honest_spread_is_no_contradiction() -> None:
    fitted = np.exp(RNG.normal(0, 0.15, 20))
    assert contradictions(fitted, np.ones(20), 0.5) == []
    fitted[3] = 1.7
    assert contradictions(fitted, np.ones(20), 0.5) == [3]


@pytest.mark.parametrize(
    "changed",
    [{"space": "metres"}, {"scale": 0.0}, {"scale": math.nan}, {"max_depth": 1e-4}, {"shift": "0"}],
)
def test_impossible_calibrations_are_refused(changed) -> None:
    with pytest.raises(ValueError, match="calibration"):
        Calibration(
            **{"space": "depth", "scale": 1.0, "shift": 0.0, "min_depth": 1e-3, "max_depth": 10.0} | changed
        )


def test_a_pure_scale_has_no_shift_to_print() -> None:
    for space, shift, formula in (
        ("depth", 0.0, "1.5 d"),
        ("depth", -0.25, "1.5 d - 0.25 m"),
        ("log_depth", 0.0, "exp(1.5 ln d)"),
        ("log_depth", 0.1, "exp(1.5 ln d + 0.1)"),
        ("disparity", 0.0, "1 / (1.5 / d)"),
        ("disparity", 0.1, "1 / (1.5 / d + 0.1)"),
    ):
        told = str(Calibration(space, 1.5, shift, 0.001, 10.0, "two points"))
        assert told == f"calibrated, {formula}: two points"


def test_a_model_keeps_its_calibration(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DepthModel("test_resnet", head="linear", image_size=(32, 32)).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        plain = model(images).depth
        model.calibrate(for_intrinsics(1.5, 1e-3, 10.0, "twice the lens"))
        assert model.max_depth == 15.0
        calibrated = model(images).depth
        torch.testing.assert_close(calibrated, 1.5 * plain)
        loaded = load_depth_model(model.save(tmp_path / "model"))
        assert loaded.calibration == model.calibration
        torch.testing.assert_close(loaded(images).depth, calibrated)
        other = Calibration("depth", 1.0, 1.0, 0.5, 20.0, "one metre more", {"after": 0.1})
        write_calibration(tmp_path / "model", other)
        assert load_depth_model(tmp_path / "model").calibration == other

    config = tmp_path / "model" / "config.json"
    content = json.loads(config.read_text())
    content["calibration"]["scale"] = -1
    config.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the calibration in .*config\.json cannot be used .*above 0"):
        load_depth_model(tmp_path / "model")


def test_a_relative_head_gives_metres_once_calibrated() -> None:
    model = DepthModel("test_resnet", head="fusion", width=8, image_size=(32, 32)).eval()
    assert model.outputs == ("disparity_affine",)
    with pytest.raises(ValueError, match="head fusion gives no metres"):
        model.calibrate(Calibration("depth", 1.0, 0.0, 1e-3, 10.0))
    model.calibrate(Calibration("disparity", 0.1, 0.2, 1e-3, 10.0))
    assert model.outputs == ("disparity_affine", "depth")
    with torch.no_grad():
        output = model(torch.randn(1, 3, 40, 50))
    torch.testing.assert_close(output.depth, 1 / (0.1 * output.disparity_affine + 0.2))
    assert model.train()(torch.randn(2, 3, 32, 32)).depth is None
