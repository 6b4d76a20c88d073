"""What a run does about a step that went wrong: a loss or gradient that is not finite, or a loss that jumps up.

Every process sees the same reduced numbers and keeps the same history, so all of them judge alike without talking.
"""

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

from spark.training.options import GuardConfig

_LEAST_DEVIATION = 1e-3  # of the median: losses that barely move make no spike of rounding


class Verdict(NamedTuple):
    """What to do about a step, "skip", "rollback" or "stop"; why, in words; and its kind, "nonfinite" or "spike"."""

    action: str
    reason: str
    kind: str


class Guard:
    """Judges each step by its loss and its gradient norm.

    A spike is a loss above the running median by more than `spike_factor` times the median absolute deviation (MAD),
    both over the last `spike_window` accepted losses, from the time on when half of that window is filled. The MAD
    counts as at least a thousandth of the median.

    Args:
        config: the policy.

    Attributes:
        losses: the last accepted ones.
        rollbacks: of this run so far.
        went_back_to: step that the last rollback went back to, None before the first one.
        skipped_in_a_row: steps.
    """

    def __init__(self, config: GuardConfig):
        self.config = config
        self.losses: deque[float] = deque(maxlen=config.spike_window)
        self.rollbacks = 0
        self.went_back_to: int | None = None
        self.skipped_in_a_row = 0

    def threshold(self) -> float:
        """The loss above which a step is a spike; infinite while too few losses are known."""
        if self.config.on_spike == "ignore" or len(self.losses) < max(2, self.config.spike_window // 2):
            return math.inf
        median = statistics.median(self.losses)
        deviation = statistics.median(abs(loss - median) for loss in self.losses)
        return median + self.config.spike_factor * max(deviation, _LEAST_DEVIATION * abs(median))

    def judge(self, numbers: dict[str, float]) -> Verdict | None:
        """Judge a step, before its update.

        Args:
            numbers: what must be finite, by name; "the loss" is among them.

        Returns:
            What to do, or None if the step is sound, and its loss is one of those to compare with from now on.
        """
        bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
        loss, most = numbers["the loss"], self.threshold()
        if bad:
            return self._bounded(self.config.on_nonfinite, " and ".join(bad), "nonfinite")
        if loss > most:
            reason = f"the loss {loss:.4g} is a spike, above {most:.4g}"
            return self._bounded(self.config.on_spike, reason, "spike")
        self.losses.append(loss)
        self.skipped_in_a_row = 0
        return None

    def _bounded(self, action: str, reason: str, kind: str) -> Verdict:
        if action == "rollback" and self.rollbacks >= self.config.max_rollbacks:
            return Verdict("stop", f"{reason}, after {self.rollbacks} rollbacks (guard.max_rollbacks)", kind)
        if action == "skip":
            return self.skip(reason, kind)
        return Verdict(action, reason, kind)

    def skip(self, reason: str, kind: str) -> Verdict:
        """Skip the step, or stop after too many skips in a row."""
        if self.skipped_in_a_row >= self.config.max_skips:
            reason = f"{reason}, after {self.skipped_in_a_row} skipped steps (guard.max_skips)"
            return Verdict("stop", reason, kind)
        self.skipped_in_a_row += 1
        return Verdict("skip", reason, kind)

    @property
    def doubtful(self) -> bool:
        """Whether a rollback to the present state could come to the same again: its newest steps were skipped."""
        can_roll_back = "rollback" in (self.config.on_nonfinite, self.config.on_spike)
        return can_roll_back and self.skipped_in_a_row > 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as the uninterrupted one."""
        return {
            "losses": list(self.losses),
            "rollbacks": self.rollbacks,
            "went_back_to": self.went_back_to,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state; of a longer window the newest losses count."""
        self.losses = deque(state["losses"], maxlen=self.config.spike_window)
        self.rollbacks = state["rollbacks"]
        self.went_back_to = state.get("went_back_to")  # older checkpoints lack it
        self.skipped_in_a_row = state["skipped_in_a_row"]
