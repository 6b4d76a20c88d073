"""What the engine asks of whatever it trains. SparK pretraining and depth training are tasks; a new one is one file."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from spark.training.run import Run


@dataclass
class StepLoss:
    """What a task says of one micro-batch.

    Attributes:
        loss: scalar to minimise.
        terms: parts of it by name, scalars without gradient; those that this batch does not define are left out.
        learns: False where the batch has nothing to learn from; its backward pass still runs, for other processes wait
            in it, but it counts in no average.
    """

    loss: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    learns: bool = True


@dataclass(frozen=True)
class Rates:
    """What the optimizer is set to at a step; `momentum` None leaves it as it is."""

    lr: float
    weight_decay: float
    momentum: float | None = None


class Task(ABC):
    """Modules, a stream of batches, a loss, and what it leaves behind.

    The hooks without a body do nothing unless a task needs them. All processes call all of them, unless stated
    otherwise.

    Attributes:
        modules: all that is trained, saved, averaged and sharded.
        total_steps: optimizer steps of the whole run.
        terms: names that `StepLoss.terms` may have.
        num_samples: samples of an epoch, or at least of the run: the share of unreadable ones is one of these.
        num_shards: shards that may break off.
        config: options of the run, with what was left to rules filled in.
        facts: what a checkpoint says about the run that wrote it, for `changes`; the engine adds its own.
        compiled: forward and backward pass go through torch.compile.
        idle_reason: why a micro-batch may have nothing to learn from.
        unit: what a sample is, in the plural.
        entry: module of the command that starts it, such as "spark.pretrain".
        product: what `export` writes, in one word.
    """

    modules: nn.Module
    total_steps: int
    terms: tuple[str, ...] = ()
    num_samples: int
    num_shards: int = 0
    facts: dict[str, Any]
    config: Any
    compiled = False
    idle_reason = ""
    unit = "samples"
    entry: str
    product = "model"

    @abstractmethod
    def optimizer(self) -> Optimizer:
        """The optimizer over `modules`."""

    @abstractmethod
    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of this process from number `start` to `stop`: functions of seed and position alone.

        Each has "name" (of its samples) and "failed" ("NAME: reason" of samples that others took the place of), a
        streamed one also "failed_shards" (shards that broke off, likewise).
        """

    @abstractmethod
    def rates(self, step: int) -> Rates:
        """What the optimizer is set to at a step, counted from 0."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> StepLoss:
        """The loss of a micro-batch.

        Args:
            model: `modules`, wrapped for several processes or compiled; its forward pass must go through it.
            batch: from `batches`.
        """

    @abstractmethod
    def summary(self, run: "Run") -> str:
        """What is going to run, in a few lines; main process only."""

    @abstractmethod
    def export(self, run: "Run") -> Path | None:
        """Write what the run leaves behind, as it is now. `Run.writers` call it; only the main one gets the path."""

    @abstractmethod
    def finish(self, run: "Run") -> list[str]:
        """What is left to do after the last step; returns closing words. `Run.writers` call it."""

    def changes(self, before: dict[str, Any]) -> list[str]:
        """What differs from the run whose facts are `before`, in sentences, beside what the engine knows."""
        return []

    def started(self, run: "Run") -> None:
        """Take what the log of the run knows, at the start and after a rollback: the state is that of a checkpoint."""

    def before_step(self, step: int) -> None:
        """Prepare a step, counted from 0."""

    def check(self, run: "Run", idle: int) -> None:
        """Refuse to go on; `idle` is the number of micro-batches so far, of all processes, that taught nothing."""

    def advance(self) -> None:
        """Count the batches that were taken as done: a checkpoint made from now on goes on behind them."""

    def columns(self, run: "Run", batch: dict[str, Any]) -> dict[str, float | str]:
        """The task's own columns of a row; `batch` is the last one of the step."""
        return {}

    def measure(self, run: "Run") -> dict[str, float | str]:
        """Measurements that belong into the row of this step; not called where the step was skipped."""
        return {}

    def saves_after(self, step: int) -> bool:
        """Whether the task needs a row and a checkpoint of this step, counted from 1, before `after_step`."""
        return False

    def after_step(self, run: "Run") -> None:
        """Validate, draw: after the row and the checkpoint of the step, so that neither can be lost."""

    def make_up(self, run: "Run") -> None:
        """Do what an interruption may have left out after the checkpoint that the run goes on from."""

    def ended(self, run: "Run") -> bool:
        """Whether the run is over before its last step; the same answer in all processes."""
        return False

    def report(self, run: "Run") -> Path | None:
        """Write report.html; main process only."""
        return None
