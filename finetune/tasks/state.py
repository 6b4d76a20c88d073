"""The state of a depth run: what a checkpoint holds, how a run goes back to it, and what has changed since."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune.config import DepthConfig
from finetune.depth_data import TrainingMix
from finetune.model.depth_model import DepthModel
from finetune.tasks.trained import TrainedDepth
from spark.errors import UserError
from spark.training.checkpoint import load_run, save_run
from spark.training.cli import config_changes
from spark.training.skipped import UnreadableImages


@dataclass
class RunState:
    """Everything that training changes.

    Attributes:
        trained: The model and its losses.
        optimizer: Its optimizer, as `spark.training.accelerator.prepare` returns it.
        scaler: Gradient scaler of fp16, or None.
        average: Both with averaged weights, or None.
        unreadable: Pairs that could not be read.
        facts: What a checkpoint says about the run that wrote it, see `changes`.
        step: Optimizer steps done.
        empty: Micro-batches without a ground truth so far, of all processes.
    """

    trained: TrainedDepth
    optimizer: Any
    scaler: Any
    average: TrainedDepth | None
    unreadable: UnreadableImages
    facts: dict[str, Any]
    step: int = 0
    empty: int = 0
    _buffers: list[Tensor] = field(init=False)
    _before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        # Batch norm's running statistics change in the forward pass already. To be able to go back to the state before
        # a step whose loss is not finite, they are copied first.
        self._buffers = list(self.trained.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    @property
    def shown(self) -> DepthModel:
        """What is validated and exported: the averaged weights where there are any."""
        return (self.average or self.trained).model

    def begin_step(self) -> None:
        """Remember what the forward pass is going to change."""
        torch._foreach_copy_(self._before, self._buffers)  # pyright: ignore[reportPrivateImportUsage]

    def save(self, output_dir: str | Path, keep: int) -> Path:
        """Write a checkpoint; main process only.

        Raises:
            OSError: Disk full, or not writable.
        """
        return save_run(
            output_dir,
            self.step,
            model=self.trained,
            optimizer=self.optimizer,
            scaler=self.scaler,
            ema=self.average,
            extra={**self.facts, "unreadable": self.unreadable.state_dict(), "empty": self.empty},
            keep=keep,
        )

    def rescue(self, output_dir: str | Path, keep: int) -> Path | None:
        """Write the state before the step under way, unless it is spoilt already; main process only."""
        torch._foreach_copy_(self._buffers, self._before)  # pyright: ignore[reportPrivateImportUsage]
        sound = all(torch.isfinite(parameter).all() for parameter in self.trained.parameters())
        return self.save(output_dir, keep + 1) if sound else None

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        """Take over all of a checkpoint.

        Returns:
            The facts of the run that wrote it, for `changes`.

        Raises:
            ValueError: It does not belong to this model or optimizer.
        """
        before = load_run(
            checkpoint, model=self.trained, optimizer=self.optimizer, scaler=self.scaler, ema=self.average
        )
        self.step, self.empty = before["step"], before["empty"]
        self.unreadable.load_state_dict(before["unreadable"])
        return before


def fingerprint(pairs: TrainingMix) -> dict[str, Any]:
    """How many pairs, and a digest of their names in order: what a stream of pairs depends on beside the seed."""
    digest = hashlib.sha256("\n".join(pairs.names()).encode("utf-8", "surrogateescape")).hexdigest()
    return {"count": len(pairs), "sha256": digest}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the run that wrote a checkpoint and the one that goes on from it, in sentences.

    Args:
        before: From `RunState.resume`; older checkpoints lack "pairs".
        now: The facts of the run: "config" and "pairs" (`fingerprint`).
    """
    lines = []
    if before.get("pairs", now["pairs"]) != now["pairs"]:
        lines.append(
            f"the pairs to train on, {before['pairs']['count']} then and {now['pairs']['count']} now, or their names or"
            " order; the run goes on with those of now, no longer the run it was"
        )
    return lines + config_changes(before["config"], now["config"])


def refuse_empty(config: DepthConfig, empty: int, planned: int) -> None:
    """Raise ValueError once more micro-batches had no ground truth than the accepted share of those planned."""
    if empty > config.data.max_empty * planned:
        raise UserError(
            f"{empty} micro-batches had no pixel with a ground truth between {config.model.min_depth:g} and"
            f" {config.model.max_depth:g} m, more than the accepted share of {config.data.max_empty:g} of the {planned}"
            " of the run: check the depth files and model.max_depth, enlarge batch or crop, or raise data.max_empty"
        )
