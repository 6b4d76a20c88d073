"""Which validation of a run was the best, and whether to go on: read off the rows of its metrics.jsonl.

Nothing else is kept, so a resumed run, which drops the rows behind its checkpoint, decides as it would have without the
interruption.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.protocols.metrics import METRIC
from spark.errors import UserError


@dataclass
class Selection:
    """The validations of a run so far, judged by one metric.

    Args:
        metric: A name of `finetune.protocols.metrics.METRIC`.
        patience: Validations in a row without a better one after which a run ends; None: it never does.
        scores: (step, value) of each validation, in order.
    """

    metric: str
    patience: int | None = None
    scores: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.metric not in METRIC:
            raise UserError(f"select {self.metric!r} is no metric: use one of {', '.join(METRIC)}.")

    def read(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take over the validations of these rows of metrics.jsonl."""
        name = f"val_{self.metric}"
        self.scores = [(row["step"], row[name]) for row in rows if row.get(name) is not None]

    def add(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Note a validation; returns whether it is better than all before it (equal is not, NaN never is)."""
        self.scores.append((step, metrics[self.metric]))
        return self.best == self.scores[-1]

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, value) of the best validation, the first of equals; None before there is one."""
        numbers = [score for score in self.scores if score[1] == score[1]]
        sign = -1 if METRIC[self.metric].better == "higher" else 1
        return min(numbers, key=lambda score: sign * score[1], default=None)

    @property
    def exhausted(self) -> bool:
        """Whether the last `patience` validations were no better than one before them."""
        if self.patience is None:
            return False
        best = self.best
        worse = [step for step, _ in self.scores if best is None or step > best[0]]
        return len(worse) >= self.patience
