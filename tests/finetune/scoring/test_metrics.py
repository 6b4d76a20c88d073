"""Metrics against numbers worked out by hand, and what they refuse."""

import errno
import json
import math
from pathlib import Path

import numpy as np
import pytest

from finetune.protocols.metrics import METRIC, METRICS
from finetune.scoring.metrics import columns_of, depth_errors, mean_of_images, pooled_depth, write_results


def test_worked_example():
    """Three pixels: 1 m seen as 1 m, 2 m as 1 m, 4 m as 8 m; so d = 0, -ln 2, ln 2."""
    metrics = depth_errors(np.array([1.0, 1.0, 8.0]), np.array([1.0, 2.0, 4.0]))
    ln2 = math.log(2)
    assert metrics == {
        "delta1": pytest.approx(1 / 3),
        "delta2": pytest.approx(1 / 3),
        "delta3": pytest.approx(1 / 3),  # the other two ratios are 2 > 1.25^3 = 1.953
        "abs_rel": pytest.approx((0 + 1 / 2 + 4 / 4) / 3),
        "sq_rel": pytest.approx((0 + 1 / 2 + 16 / 4) / 3),
        "rmse": pytest.approx(math.sqrt((0 + 1 + 16) / 3)),
        "rmse_log": pytest.approx(ln2 * math.sqrt(2 / 3)),
        "log10": pytest.approx(2 * math.log10(2) / 3),
        "silog": pytest.approx(100 * ln2 * math.sqrt(2 / 3)),  # mean d is 0
        "log_bias": pytest.approx(0, abs=1e-15),
        "pixels": 3,
    }
    assert tuple(metrics)[:9] == METRICS


def test_delta_is_strict_and_symmetric():
    ground_truth = np.array([4.0, 5.0, 4.0, 4.0, 4.0])
    prediction = np.array([5.0, 4.0, 4.99, 6.0, 7.0])  # ratios 1.25, 1.25, 1.2475, 1.5, 1.75
    metrics = depth_errors(prediction, ground_truth)
    assert (metrics["delta1"], metrics["delta2"], metrics["delta3"]) == (1 / 5, 4 / 5, 1.0)


def test_perfect_and_scaled():
    ground_truth = np.linspace(0.5, 9.5, 1000)
    perfect = depth_errors(ground_truth, ground_truth)
    assert [perfect[f"delta{k}"] for k in (1, 2, 3)] == [1, 1, 1]
    assert all(perfect[name] == 0 for name in METRICS[3:])
    doubled = depth_errors(2 * ground_truth, ground_truth)
    assert doubled["silog"] == pytest.approx(0, abs=1e-10)  # scale-invariant, and not NaN
    assert doubled["rmse_log"] == pytest.approx(math.log(2))
    assert doubled["abs_rel"] == pytest.approx(1.0)


def test_silog_is_the_formula_of_bts():
    generator = np.random.default_rng(0)
    ground_truth = generator.uniform(0.5, 9, 5000)
    prediction = ground_truth * generator.uniform(0.7, 1.6, 5000)
    d = np.log(prediction) - np.log(ground_truth)
    metrics = depth_errors(prediction, ground_truth)
    assert metrics["silog"] == pytest.approx(math.sqrt((d**2).mean() - d.mean() ** 2) * 100, rel=1e-12)
    assert metrics["rmse_log"] == pytest.approx(math.sqrt((d**2).mean()), rel=1e-12)


def test_float32_input_is_compared_in_float64():
    ground_truth = np.full(1_000_000, 3.3, np.float32)
    prediction = ground_truth + np.float32(1e-3)
    metrics = depth_errors(prediction, ground_truth)
    assert metrics["rmse"] == pytest.approx(float(prediction[0]) - float(ground_truth[0]), rel=1e-12)


def test_metrics_of_parts_pool_to_those_of_the_whole():
    generator = np.random.default_rng(1)
    ground_truth = generator.uniform(0.5, 9, 900)
    prediction = ground_truth * generator.uniform(0.5, 2, 900)
    cuts = (slice(7), slice(7, 500), slice(500, 900))
    rows = [{"name": "x", **depth_errors(prediction[part], ground_truth[part])} for part in cuts]
    twice = np.concatenate([np.arange(900), np.arange(7)])  # the first part counted twice
    pooled = pooled_depth(columns_of(rows), np.array([[1, 1, 1], [2, 1, 1]]))
    for number, which in enumerate((slice(900), twice)):
        whole = depth_errors(prediction[which], ground_truth[which])
        for name in METRICS:
            assert pooled[name][number] == pytest.approx(whole[name], rel=1e-12), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("side", ["prediction", "ground truth"])
def test_values_without_a_score_are_refused(bad, side):
    good, broken = np.array([1.0, 2.0]), np.array([1.0, bad])
    with pytest.raises(ValueError, match=f"the {side} holds depths that are not finite or not above 0"):
        depth_errors(*((broken, good) if side == "prediction" else (good, broken)))


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        depth_errors(np.empty(0), np.empty(0))
    with pytest.raises(ValueError, match="equally many"):
        depth_errors(np.ones(3), np.ones(1))
    with pytest.raises(ValueError, match="no image was scored"):
        columns_of([])


def test_an_image_without_a_metric_does_not_count_for_it():
    columns = columns_of([{"name": "a", "x": 1.0, "y": 3.0}, {"name": "b", "x": 2.0, "y": None}])
    means = mean_of_images(columns, np.array([[1, 1], [2, 1], [0, 1]]), ("x", "y"))
    assert means["x"].tolist() == [1.5, 4 / 3, 2]
    np.testing.assert_array_equal(means["y"], [3, 3, np.nan])


def test_every_metric_has_a_direction_and_a_heading_of_its_own():
    assert len({metric.heading for metric in METRIC.values()}) == len(METRIC)
    assert {name for name, metric in METRIC.items() if metric.better == "higher"} >= {"delta1", "accuracy"}
    assert (METRIC["rmse"].column, METRIC["delta1"].column) == ("RMSE m↓", "δ1↑")
    assert set(METRICS) <= set(METRIC)


def test_results_file(tmp_path):
    path = tmp_path / "made" / "results.json"
    write_results(path, {"protocol": "p", "metrics": {"rmse": 0.1}})
    assert json.loads(path.read_text()) == {"protocol": "p", "metrics": {"rmse": 0.1}}
    with pytest.raises(ValueError, match="not finite"):
        write_results(path, {"metrics": {"rmse": float("nan")}})
    assert json.loads(path.read_text())["protocol"] == "p"
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_results_file_leaves_nothing_half_written(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(OSError, match=r"results\.json"):
        write_results(tmp_path / "results.json", {})
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"the disk is full, .*results\.json was not written: free some space"):
        write_results(tmp_path / "results.json", {})
    assert list(tmp_path.iterdir()) == []
