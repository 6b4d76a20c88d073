"""Alignments against NumPy's and SciPy's least squares."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from finetune.scoring.alignment import fit

GENERATOR = np.random.default_rng(4)
TRUTH = GENERATOR.uniform(1, 9, 400)
PREDICTION = TRUTH * GENERATOR.uniform(0.5, 0.9, 400) + 0.3


def fitted(kind: str, prediction: np.ndarray, truth: np.ndarray = TRUTH) -> np.ndarray:
    return fit(kind, prediction, truth, 1e-3, 1e3).apply(prediction)


def test_median_and_none():
    assert np.array_equal(fitted("none", PREDICTION), PREDICTION)
    assert np.median(fitted("median", PREDICTION)) == pytest.approx(np.median(TRUTH))
    assert fitted("median", PREDICTION)[0] / PREDICTION[0] == pytest.approx(
        fitted("median", PREDICTION)[9] / PREDICTION[9]
    )


@pytest.mark.parametrize(
    ("kind", "to", "back"),
    [
        ("depth", lambda x: x, lambda x: x),
        ("log_depth", np.log, np.exp),
        ("disparity", lambda x: 1 / x, lambda x: 1 / x),
    ],
)
def test_least_squares(kind, to, back):
    given = 1 / PREDICTION if kind == "disparity" else PREDICTION
    space = given if kind == "disparity" else to(PREDICTION)
    best = least_squares(lambda x: x[0] * space + x[1] - to(TRUTH), [1.0, 0.0], xtol=1e-14, ftol=1e-14).x
    np.testing.assert_allclose(fitted(kind, given), back(best[0] * space + best[1]), rtol=1e-6)
    exact = 1 / (3 * TRUTH) - 0.01 if kind == "disparity" else back(2 * to(TRUTH) + 0.1)
    np.testing.assert_allclose(fitted(kind, exact), TRUTH, rtol=1e-6)


@pytest.mark.parametrize("kind", ["depth", "log_depth", "disparity"])
@pytest.mark.parametrize("value", [0.3, 0.0])
def test_a_constant_has_no_scale_and_becomes_the_mean(kind, value):
    to = {"depth": lambda x: x, "log_depth": np.log, "disparity": lambda x: 1 / x}[kind]
    back = {"depth": lambda x: x, "log_depth": np.exp, "disparity": lambda x: 1 / x}[kind]
    np.testing.assert_allclose(fitted(kind, np.full(400, value)), back(to(TRUTH).mean()))


def test_nothing_positive_has_no_median():
    assert np.array_equal(fitted("median", -PREDICTION), -PREDICTION)


def test_no_fit_overflows():
    assert np.isfinite(
        fit("log_depth", np.array([1.0, 1.0 + 1e-6]), np.array([1.0, 9.0]), 1e-3, 10).apply(np.array([9.0]))
    ).all()
