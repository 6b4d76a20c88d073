"""spark.training.guard: what counts as a spike, and how often a run may skip and roll back."""

import math

import numpy as np
import pytest

from spark.training.guard import Guard
from spark.training.options import GuardConfig


def guard(**options):
    return Guard(GuardConfig(**options))


def judged(watch, losses):
    return [watch.judge({"the loss": loss}) for loss in losses]


def test_threshold_is_median_plus_deviations():
    random = np.random.default_rng(0)
    losses = random.uniform(0.9, 1.1, 50).tolist()
    watch = guard(on_spike="skip", spike_window=20, spike_factor=5.0)
    assert judged(watch, losses) == [None] * 50
    last = np.array(losses[-20:])
    expected = np.median(last) + 5 * np.median(np.abs(last - np.median(last)))
    assert watch.threshold() == pytest.approx(expected)
    assert watch.judge({"the loss": expected - 1e-6}) is None
    verdict = watch.judge({"the loss": 3.0})
    assert verdict.action == "skip"
    assert verdict.reason.startswith("the loss 3 is a spike, above 1.")
    assert verdict.kind == "spike"
    assert len(watch.losses) == 20
    assert 3.0 not in watch.losses, "a spike is not compared with"


def test_no_spike_before_half_the_window_and_none_where_they_are_ignored():
    assert judged(guard(on_spike="stop", spike_window=20), [1.0] * 9 + [50.0]) == [None] * 10
    assert judged(guard(on_spike="stop", spike_window=20), [1.0] * 10 + [50.0])[-1].action == "stop"
    assert judged(guard(spike_window=20), [1.0] * 30 + [50.0])[-1] is None


def test_equal_losses_make_no_spike_of_rounding():
    assert judged(guard(on_spike="stop", spike_window=4), [1.0] * 4 + [1.0 + 1e-6])[-1] is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite(value):
    verdict = guard(on_nonfinite="rollback").judge({"the loss": value, "the gradient norm": 1.0})
    assert verdict == ("rollback", f"the loss is {value}", "nonfinite")
    assert guard().judge({"the loss": 1.0, "the gradient norm": value}).action == "stop"


def test_skips_in_a_row_and_rollbacks_are_bounded():
    watch = guard(on_nonfinite="skip", max_skips=2)
    actions = [v and v.action for v in judged(watch, [math.nan, math.nan, 1.0, *[math.nan] * 3])]
    assert actions == ["skip", "skip", None, "skip", "skip", "stop"]
    watch = guard(on_nonfinite="rollback", max_rollbacks=1)
    assert judged(watch, [math.nan])[0].action == "rollback"
    watch.rollbacks = 1
    assert judged(watch, [math.nan])[0] == (
        "stop",
        "the loss is nan, after 1 rollbacks (guard.max_rollbacks)",
        "nonfinite",
    )


def test_a_restored_guard_judges_alike():
    one, two = (guard(on_spike="skip", spike_window=6) for _ in range(2))
    judged(one, [1.0, 1.1, 0.9, 1.0, 9.0])
    two.load_state_dict(one.state_dict())
    assert two.threshold() == one.threshold() < math.inf
    assert two.skipped_in_a_row == 1
