"""The state of a run: what a checkpoint holds, how a run goes back to it, and what has changed since."""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from spark.training.checkpoint import find_run, load_run, save_run, step_of
from spark.training.cli import config_changes
from spark.training.guard import Guard
from spark.training.sharding import gathered
from spark.training.skipped import UnreadableImages
from spark.weights.keys import is_sharded


@dataclass
class RunState:
    """Everything that training changes.

    Where the weights are sharded over processes (`spark.training.sharding`), each process has a part of them; whoever
    needs whole ones takes `whole_model` and `whole_average`, and so does all that writes.

    Attributes:
        model: what is trained.
        optimizer: its optimizer, as `spark.training.accelerator.prepare` returns it.
        scaler: gradient scaler of fp16, or None.
        average: averaged weights, or None.
        guard: what judges the steps.
        unreadable: samples that could not be read.
        facts: what a checkpoint says about the run that wrote it, see `changes`.
        unsharded: where the weights are sharded, in the main process, a copy of the model from before that.
        step: optimizer steps done.
        offset: step n, counted from 0, trains on batch n + offset of the stream. Rollbacks pass over batches, and
            another size of the batches numbers them anew.
        idle: micro-batches so far, of all processes, that taught nothing.
    """

    model: nn.Module
    optimizer: Any
    scaler: Any
    average: nn.Module | None
    guard: Guard
    unreadable: UnreadableImages
    facts: dict[str, Any]
    unsharded: nn.Module | None = None
    step: int = 0
    offset: int = 0
    idle: int = 0
    _buffers: list[Tensor] = field(init=False)
    _before: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        # Batch norm's running statistics change in the forward pass already. To be able to go back to the state before
        # a step whose loss is not finite, they are copied first.
        self._buffers = list(self.model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self.sharded = any(is_sharded(parameter) for parameter in self.model.parameters())
        self._unsharded_average = copy.deepcopy(self.unsharded) if self.average is not None else None

    def begin_step(self) -> None:
        """Remember what the forward pass is going to change."""
        _copy(self._before, self._buffers)

    def undo_forward(self) -> None:
        """Take back what forward passes since `begin_step` have changed."""
        _copy(self._buffers, self._before)

    def whole_model(self) -> Any:
        """The model with whole weights, on the CPU if they are sharded; None in processes that have no whole one.

        Every process calls it where weights are sharded.
        """
        return _whole(self.model, self.unsharded) if self.sharded else self.model

    def whole_average(self) -> Any:
        """The averaged weights, likewise; None too where there are none."""
        sharded = self.sharded and self.average is not None
        return _whole(self.average, self._unsharded_average) if sharded else self.average

    def save(self, output_dir: str | Path, keep: int) -> Path | None:
        """Write a checkpoint, the same with sharded and whole weights.

        The main process calls it and writes; where weights are sharded every process calls it.

        Returns:
            The checkpoint's folder, None in other processes than the main one.

        Raises:
            OSError: disk full, or not writable.
        """
        model, average = self.whole_model(), self.whole_average()
        moments = None
        if self.sharded:
            moments = gathered(self.optimizer.state_dict(), keep=self.unsharded is not None)
        if model is None:
            return None
        extra = {
            **self.facts,
            "unreadable": self.unreadable.state_dict(),
            "offset": self.offset,
            "empty": self.idle,
            "guard": self.guard.state_dict(),
        }
        return save_run(
            output_dir,
            self.step,
            model=model,
            optimizer=self.optimizer,
            scaler=self.scaler,
            ema=average,
            extra=extra,
            keep=keep,
            moments=moments,
        )

    def rescue(self, output_dir: str | Path, keep: int) -> Path | None:
        """Write the state before the step under way, unless it is spoilt already; called as `save` is."""
        self.undo_forward()
        model = self.whole_model()
        sound = model is None or all(torch.isfinite(parameter).all() for parameter in model.parameters())
        if self.sharded:
            flags: list[bool | None] = gather_object([sound])
            sound = all(flags)
        return self.save(output_dir, keep + 1) if sound else None

    def resume(self, checkpoint: Path) -> None:
        """Take over all of a checkpoint.

        Batches of another size than before go on behind the samples that were seen, at the next whole batch.

        Raises:
            UserError: it does not belong to this model or optimizer.
        """
        state = self._load(checkpoint)
        self.step = state["step"]
        self.offset = next_batch(state, self.facts["config"]) - self.step
        self.idle = state.get("empty", 0)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        self.unreadable.load_state_dict(state["unreadable"])

    def rollback_target(self, output_dir: str | Path) -> Path | None:
        """The checkpoint to roll back to, None where there is none.

        It is the newest one. Where the run has gone back to that one already, it may itself be what fails: then the
        next older one, as far as there are any.
        """
        newest, last = find_checkpoint(output_dir, True), self.guard.went_back_to
        if newest is None or last is None or step_of(newest) > last:
            return newest
        return find_checkpoint(output_dir, True, before=step_of(newest)) or newest

    def roll_back(self, checkpoint: Path) -> None:
        """Take over weights and moments of a checkpoint of this run; the stream goes on behind the batch that failed.

        With the same samples the same would happen again.
        """
        rollbacks = self.guard.rollbacks + 1
        state = self._load(checkpoint)
        self.guard.load_state_dict(
            {
                **state.get("guard", Guard(self.guard.config).state_dict()),
                "rollbacks": rollbacks,
                "went_back_to": state["step"],
            }
        )
        position = self.step + self.offset + 1
        self.step = state["step"]
        self.offset = position - self.step

    def _load(self, checkpoint: Path) -> dict[str, Any]:
        return load_run(
            checkpoint, model=self.model, optimizer=self.optimizer, scaler=self.scaler, ema=self.average
        )


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors into tensors; no list may be empty for torch, as that of a network without batch norm is."""
    if targets:
        torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]


def _whole(sharded: nn.Module | None, whole: nn.Module | None) -> nn.Module | None:
    """Fill a whole copy with weights that are sharded; without a copy, as in other processes, only take part in it."""
    assert sharded is not None
    tensors = gathered(sharded.state_dict(), keep=whole is not None)
    if whole is not None:
        whole.load_state_dict(tensors)
    return whole


def find_checkpoint(output_dir: str | Path, resume: bool | str, before: float = math.inf) -> Path | None:
    """What `spark.training.checkpoint.find_run` finds in the main process, in all processes, which call it together.

    Network file systems may show other machines the folder as it was a minute ago, and a checkpoint that only some
    processes find would tear the run apart.
    """
    if resume is not True:  # every process reports a wrong path
        return find_run(output_dir, resume, before)
    found = [find_run(output_dir, True, before) if PartialState().is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def read_extra(checkpoint: Path) -> dict[str, Any]:
    """What the engine keeps in a checkpoint beside weights and optimizer, read without the rest."""
    return torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True, mmap=True)["extra"]


def next_batch(state: dict[str, Any], config: dict[str, Any]) -> int:
    """The first batch of the stream, in the sizes of `config`, that begins behind all that a checkpoint has seen.

    Args:
        state: with "step", "offset" and "config" of the checkpoint.
        config: of the run that goes on, as `config_dict` makes it.
    """
    batches = state["step"] + state.get("offset", 0)
    samples = batches * state["config"]["optim"]["batch_size"]
    return math.ceil(samples / config["optim"]["batch_size"])


def changes(before: dict[str, Any], now: dict[str, Any], unit: str) -> list[str]:
    """What differs between the run that wrote a checkpoint and the one that goes on from it, in sentences.

    Args:
        before: from `read_extra`; older checkpoints lack all but "config".
        now: the facts of the run: "config", "device_type", "processes", "sharded", perhaps "stream".
        unit: what a sample is, in the plural.
    """
    lines = config_changes(before["config"], now["config"])
    old, new = (facts["config"]["optim"]["batch_size"] for facts in (before, now))
    if old != new:
        lines.append(
            f"batches were {old} {unit}, are {new}: the stream goes on with the first whole batch behind the {unit} "
            "seen so far; learning rate and length follow the new batch size, at the same step"
        )
    if (old := before.get("sharded", now["sharded"])) != now["sharded"]:
        words = {True: "sharded (FSDP)", False: "whole"}
        lines.append(
            f"weights were {words[old]} in each process, are {words[now['sharded']]}: the run agrees with the earlier "
            "one to rounding"
        )
    if (old := before.get("processes", now["processes"])) != now["processes"]:
        same = (
            f"the same batches of {unit}, divided anew; the run agrees with the earlier one to rounding, except for "
            "what stochastic depth draws"
        )
        lines.append(
            f"processes were {old}, are {now['processes']}: "
            + (f"other batches of {unit}" if now.get("stream") else same)
        )
    return lines
