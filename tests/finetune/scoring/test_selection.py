"""The best validation of a run, and when to end it: cases worked out by hand."""

import math

import pytest

from finetune.scoring.best import Selection


def test_the_best_and_when_patience_ends():
    selection = Selection("abs_rel", patience=2)
    assert selection.best is None
    assert not selection.exhausted
    better = [selection.add(step, {"abs_rel": value}) for step, value in ((10, 0.4), (20, 0.3), (30, 0.3))]
    assert better == [True, True, False]  # equal is no better
    assert selection.best == (20, 0.3)
    assert not selection.exhausted
    assert not selection.add(40, {"abs_rel": 0.31})
    assert selection.exhausted
    assert selection.add(50, {"abs_rel": 0.2})
    assert not selection.exhausted


def test_shares_of_good_pixels_are_better_when_larger():
    selection = Selection("delta1")
    assert [selection.add(i, {"delta1": v}) for i, v in enumerate((0.4, 0.5, 0.45))] == [True, True, False]
    assert selection.best == (1, 0.5)
    assert not selection.exhausted  # no patience was asked for


def test_a_score_that_is_no_number_is_never_the_best():
    selection = Selection("rmse", patience=2)
    assert not selection.add(1, {"rmse": math.nan})
    assert selection.best is None
    assert not selection.add(2, {"rmse": math.nan})
    assert selection.exhausted
    assert selection.add(3, {"rmse": 9.0})
    assert not selection.exhausted


def test_rows_of_a_log_are_taken_over():
    selection = Selection("rmse", patience=2)
    selection.add(99, {"rmse": 0.0})
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "val_rmse": 1.5},
        {"step": 3, "val_rmse": None},
        {"step": 4, "val_rmse": 1.6},
    ]
    selection.read(rows)
    assert selection.scores == [(2, 1.5), (4, 1.6)]
    assert not selection.add(6, {"rmse": 1.7})
    assert selection.exhausted


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="select 'mae' is no metric: use one of delta1, delta2"):
        Selection("mae")
