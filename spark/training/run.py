"""Everything around the steps of a run: start, resume, update, save, log, stop. The loop calls it by name."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import nn

from spark.errors import UserError
from spark.training.accelerator import micro_batch_size, prepare, start_accelerator
from spark.training.checkpoint import refuse_new_beginning
from spark.training.cli import config_dict, flat_config, save_config, with_defaults
from spark.training.environment import record_environment
from spark.training.guard import Guard, Verdict
from spark.training.log import Pace, RunLog, progress_bar
from spark.training.optim import set_hyperparameters, update_average
from spark.training.run_folder import check_output_dir, make_output_dir
from spark.training.sharding import shard_average
from spark.training.skipped import UnreadableImages
from spark.training.state import RunState, changes, find_checkpoint, read_extra
from spark.training.stop import StopRequest, resume_command, stop_run
from spark.training.task import Rates, Task


@dataclass
class Outcome:
    """What one step has found, the same in all processes but for `names` and `batch`.

    Attributes:
        losses: mean of "loss" and of each term over the micro-batches that define it; NaN where none does.
        grad_norm: before clipping; NaN where nothing was learnt.
        learns: some micro-batch had something to learn from.
        idle: micro-batches that had not, of all processes.
        names: samples of this process.
        batch: the last micro-batch of this process.
    """

    losses: dict[str, float] = field(default_factory=dict)
    grad_norm: float = math.nan
    learns: bool = True
    idle: int = 0
    names: list[str] = field(default_factory=list)
    batch: dict[str, Any] = field(default_factory=dict)


class Run:
    """One run, from its first step or from a checkpoint, to its end or to a request to stop.

    Made in two parts: the constructor starts the processes and finds the checkpoint, which a task may need for its
    objects; `begin` takes the task. Nothing is written before `begin` has all that has to fit together.

    Args:
        config: options of the run, those of `spark.training.options` among them.

    Attributes:
        accelerator: of Accelerate.
        device: that this process computes on.
        rank: of this process.
        world: number of processes.
        main: this is the main process.
        micro_batch: samples that this process puts through the network at once.
        checkpoint: that the run goes on from, or None.
        before: what it says about the run that wrote it, or None.
        folder: of the run.
        state: from `begin` on.
        rates: of the step under way.

    Raises:
        UserError: the folder, the batch size or the checkpoint does not fit; the sentence says what to do.
        OSError: a file cannot be read or written; likewise.
    """

    task: Task
    state: RunState
    log: RunLog
    rates: Rates

    def __init__(self, config: Any):
        self.config = config
        self.deadline = time.monotonic() + config.time_limit_seconds()
        check_output_dir(config.output_dir, config.resume)
        self.folder = Path(config.output_dir)
        self.accelerator = start_accelerator(config.output_dir, config.precision, config.log_with)
        self.device = cast(torch.device, self.accelerator.device)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process
        self.micro_batch = micro_batch_size(config.optim.batch_size, self.world, config.accumulation)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        torch.backends.cudnn.benchmark = True
        self.checkpoint = find_checkpoint(config.output_dir, config.resume)
        if self.checkpoint is None and config.resume:
            refuse_new_beginning(config.output_dir)
        self.before = None if self.checkpoint is None else read_extra(self.checkpoint)
        if self.before is not None:
            self.before["config"] = with_defaults(type(config), self.before["config"])
        self.over = False
        self._save_due = False
        self._saved_step = -1
        self._event: dict[str, float | str] = {}

    # --- the beginning

    def begin(self, task: Task) -> None:
        """Take a task: optimizer, averages, processes; then the checkpoint; then the folder, and the first words."""
        self.task, self.config = task, task.config
        sharded = self.accelerator.is_fsdp2
        average = None
        if self.config.optim.ema_decay is not None:
            average = copy.deepcopy(task.modules).requires_grad_(False)
        unsharded = copy.deepcopy(task.modules).cpu() if sharded and self.main else None
        self.wrapped, self.optimizer = prepare(self.accelerator, task.modules, task.optimizer())
        if sharded and average is not None:
            shard_average(average)
        self.model: nn.Module = (
            cast(nn.Module, torch.compile(self.wrapped)) if task.compiled else self.wrapped
        )
        facts = {
            "config": config_dict(self.config),
            "processes": self.world,
            "device_type": self.device.type,
            "sharded": bool(sharded),
            **task.facts,
        }
        guard = Guard(self.config.guard)
        unreadable = UnreadableImages(task.num_samples, self.config.data.max_unreadable, task.num_shards)
        self.state = RunState(
            task.modules,
            self.optimizer,
            self.accelerator.scaler,
            average,
            guard,
            unreadable,
            facts,
            unsharded,
        )
        self._resume()
        make_output_dir(self.folder)
        resume_step = None if self.checkpoint is None else self.step
        self.log = RunLog(self.folder, self.accelerator, resume_step, flat_config(self.config))
        task.started(self)
        if self.main:
            save_config(self.config, self.folder / "config.yaml")
            record_environment(self.folder, self.step, self.world)
            print(task.summary(self), flush=True)

    def _resume(self) -> None:
        tell: Callable[[str], None] = self.accelerator.print
        if self.checkpoint is not None and self.before is not None:
            tell(f"continuing from {self.checkpoint}")
            differences = changes(self.before, self.state.facts, self.task.unit) + self.task.changes(
                self.before
            )
            for line in differences:
                tell(f"changed since that checkpoint: {line}")
            self.state.resume(self.checkpoint)
            self._saved_step = self.step
            if self.step >= self.task.total_steps:
                tell(
                    f"the checkpoint is at step {self.step}, this run has {self.task.total_steps} steps: nothing is "
                    "left to train"
                )
        elif self.config.resume:
            tell(f"no checkpoint in {self.folder} yet: starting from the beginning")

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Listen to signals and show the progress; whatever an interruption left out is made up first."""
        total, every = self.task.total_steps, self.config.log_every
        self.task.modules.train()
        self.pace = Pace(self.config.optim.batch_size)
        with (
            StopRequest(self.deadline) as self.stop,
            progress_bar(total, self.step, every=every, enabled=self.main) as self.bar,
        ):
            if self.checkpoint is not None:
                self.task.make_up(self)
            self.over = self.task.ended(self)
            yield

    def batches(self) -> Iterator[dict[str, Any]]:
        """Micro-batches of this process from where the run is to its end; `accumulation` of them are a step's."""
        first, last = self.step + self.state.offset, self.task.total_steps + self.state.offset
        return self.task.batches(first * self.config.accumulation, last * self.config.accumulation)

    # --- where the run is

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def writers(self) -> bool:
        """Whether this process takes part in writing: the main one, and all of them where weights are sharded."""
        return self.main or self.state.sharded

    @property
    def say(self) -> Callable[[str], None]:
        """Prints a line, in the main process."""
        return self.bar.say

    def goes_on(self) -> bool:
        """Whether there is another step; the same answer in all processes, which call it together."""
        return self.step < self.task.total_steps and not self.over and not self.stop.agreed(self.accelerator)

    def whole(self, averaged: bool) -> Any:
        """The trained modules with whole weights, or their average where the run keeps one and `averaged` asks for it.

        None in processes that have none; every one of `writers` calls it.
        """
        if averaged and self.state.average is not None:
            return self.state.whole_average()
        return self.state.whole_model()

    # --- the parts of a step

    def begin_step(self) -> None:
        """Set the optimizer to its rates, and remember what the forward pass is going to change."""
        self.rates = self.task.rates(self.step)
        set_hyperparameters(self.optimizer, self.rates.lr, self.rates.weight_decay, self.rates.momentum)
        self.task.before_step(self.step)
        self.state.begin_step()

    def count_failures(self, failed: list[str], failed_shards: list[str]) -> None:
        """Tell of samples and shards that could not be read; all processes call it together."""
        for line in self.state.unreadable.add(gather_object(failed)):
            self.say(f"skipped {line}")
        for line in self.state.unreadable.add_shards(gather_object(failed_shards)):
            self.say(f"skipped the rest of the shard {line}")

    @contextmanager
    def rescue(self) -> Iterator[None]:
        """Whatever goes wrong in a step, a bug or a killed loader too: the state before it is kept."""
        try:
            yield
        except Exception as error:
            if self.main:
                try:
                    self._report_skipped()
                    if self.state.sharded:  # the other processes may not be there to gather them
                        self.say("sharded weights cannot be saved in the middle of a step")
                    elif folder := self._rescue_state():
                        self.say(f"the state before this step is saved in {folder}")
                except Exception as failure:  # a broken GPU, a full disk: the first error is the one to show
                    self.say(f"the state before this step could not be saved: {failure}")
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise UserError(
                    f"the GPU has too little memory for {self.micro_batch} images at once: divide the batch further "
                    f"with accumulation (it is {self.config.accumulation}), or use precision bf16"
                ) from error
            raise

    def judge(self, found: Outcome) -> Verdict | None:
        """What is to be done about this step instead of its update; None where it is sound, or taught nothing.

        Raises:
            UserError: the run has to stop here.
        """
        if not found.learns:
            return None
        numbers = {"the loss": found.losses["loss"]}
        scaler = self.accelerator.scaler
        if (
            scaler is None or scaler.get_scale() < 1
        ):  # fp16 skips steps by itself while it seeks its loss scale
            numbers["the gradient norm"] = found.grad_norm
        verdict = self.state.guard.judge(numbers)
        if verdict is not None and verdict.action == "rollback":
            self._target = self.state.rollback_target(self.folder)
            if self._target is None:  # before the first checkpoint
                reason = f"{verdict.reason}, and there is no checkpoint to roll back to"
                verdict = self.state.guard.skip(reason, verdict.kind)
        if verdict is not None and verdict.action == "stop":
            stop_run(
                self.accelerator,
                self.step + 1,
                verdict.reason,
                files=found.names,
                output_dir=self.folder,
                save=self._rescue_state,
                kind=verdict.kind,
            )
        return verdict

    def update(self, found: Outcome, verdict: Verdict | None) -> None:
        """Update the weights and count the step, or leave it out as the verdict says."""
        self._event = {}
        if verdict is not None:
            self._leave_out(verdict)
        elif found.learns:
            self.optimizer.step()
            decay = self.config.optim.ema_decay
            if self.state.average is not None and decay is not None:
                update_average(self.state.average, self.task.modules, decay if self.step else 0.0)
        self.optimizer.zero_grad()
        self.state.step += 1
        self.state.idle += found.idle
        self.task.advance()
        self.pace.steps += 1

    def roll_back(self, found: Outcome, verdict: Verdict) -> None:
        """Go back to the checkpoint that `judge` has chosen; the stream goes on behind the batch that failed."""
        self._event = {}
        assert self._target is not None
        self._leave_out(verdict, f" to {self._target.name}")
        self.optimizer.zero_grad()
        self._event["at_step"] = self.step + 1
        self.state.roll_back(self._target)
        self.accelerator.wait_for_everyone()  # nobody writes checkpoints while others read them
        self.task.advance()
        # Interrupted from here on, the run is not to meet the same batches, nor to count anew.
        self._save_due, self._saved_step = False, -1  # these steps come anew, with other weights
        if self.writers:
            self.keep_on("the checkpoint", self._save)
        self.keep_on("the rows", partial(self.log.rewind, self.step, keep_events=True))
        self.task.started(self)  # with the rows that are left
        row = {"loss": found.losses["loss"], "lr": self.rates.lr, "images_per_second": 0.0}
        self.keep_on("a row", partial(self.log.row, self.step, **row, **self._event))
        self.pace.reset()

    def _leave_out(self, verdict: Verdict, to: str = "") -> None:
        self.state.undo_forward()
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self._event = {"event": verdict.action, "reason": verdict.reason}
        self.say(f"step {self.step + 1}: {verdict.reason}: {verdict.action}{to}")

    # --- after a step

    def write_row(self, found: Outcome) -> None:
        """Show the step, and write its row where one is due."""
        step, rate = self.step, self.pace.rate
        self.bar.update(step, loss=found.losses["loss"], lr=self.rates.lr, images_per_second=rate)
        measured: dict[str, float | str] = {}
        if not self._event:
            with self.pace.paused():
                measured = self.task.measure(self)
        self._row_due = step % self.config.log_every == 0 or step in (1, self.task.total_steps)
        self._row_due |= self.task.saves_after(step)
        if self._row_due or measured or self._event:
            terms = {f"loss_{n}": found.losses[n] for n in self.task.terms if len(self.task.terms) > 1}
            row: dict[str, float | str] = {
                "loss": found.losses["loss"],
                **{name: value for name, value in terms.items() if not math.isnan(value)},
                "lr": self.rates.lr,
                "weight_decay": self.rates.weight_decay,
                "grad_norm": found.grad_norm,
                "images_per_second": rate,
                "data_wait": self.pace.waiting_share,
                **self.task.columns(self, found.batch),
            }
            if self.device.type == "cuda":
                row["peak_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            self.keep_on("a row", partial(self.log.row, step, **{**row, **measured, **self._event}))

    def save_if_due(self) -> None:
        """Write a checkpoint where one is due, unless a rollback to this state could come to the same again."""
        step, every = self.step, self.config.checkpoint_every
        self._save_due |= bool(every) and step % every == 0
        self._save_due |= self.task.saves_after(step)
        if not self.writers or not self._save_due or self.state.guard.doubtful:
            return
        self._save_due = False
        with self.pace.paused():
            if self.keep_on("the checkpoint", self._save):
                self._saved_step = step
            else:
                event = {"event": "not_saved", "reason": f"no checkpoint of step {step} could be written"}
                self.keep_on("a row", partial(self.log.amend, step, **event))

    def after_step(self) -> None:
        """Let the task validate or draw, once the state is saved, and note whether the run is over."""
        with self.pace.paused(), self._state_is_safe():
            self.task.after_step(self)
        self.over = self.task.ended(self)
        if self._row_due:
            self.pace.reset()

    def export_if_asked(self) -> None:
        """Write the result of the run as it is now, if a signal has asked for it."""
        if self.stop.export and self.writers:
            self.stop.export = False
            if folder := self.attempt(f"the {self.task.product}", partial(self.task.export, self)):
                self.say(f"{self.task.product} after step {self.step} written to {folder}")

    # --- the end

    def end(self) -> None:
        """Save, and either finish or say how to go on."""
        total = self.task.total_steps
        if self.writers:
            # Of sharded weights all processes take part, and only the main one knows if the last save was written.
            if self.state.sharded or self.step != self._saved_step:
                self._save()
            if self.step >= total or self.over:
                with self._state_is_safe():
                    words = self.task.finish(self)
            else:
                words = [
                    f"stopped and saved after step {self.step} of {total}; to continue:",
                    f"  {resume_command(self.task.entry, self.folder, self.world, self.state.sharded)}",
                ]
            for line in words:
                self.say(line)
        if self.main:
            self._report_skipped()
            unreadable = self.state.unreadable
            if unreadable or unreadable.shards:
                shards = f" and the rest of {len(unreadable.shards)} shards" if unreadable.shards else ""
                self.say(
                    f"{len(unreadable)} unreadable {self.task.unit}{shards} were skipped, see skipped_images.txt in the"
                    " same folder"
                )
            if self.state.idle:
                self.say(f"{self.state.idle} micro-batches taught nothing: {self.task.idle_reason}")
            self.attempt("report.html", partial(self.task.report, self))
        self.accelerator.wait_for_everyone()
        self.log.close()

    # --- writing

    def attempt(self, what: str, write: Callable[[], Path | None]) -> Path | None:
        """Write what the run can do without: a failure is told, and the run goes on."""
        try:
            return write()
        except (UserError, OSError) as error:
            self.say(
                f"{what} after step {self.step} could not be written: {_reason(error)}. The run goes on without; "
                f"free space or correct the permissions of {self.folder} before the next checkpoint"
            )
            return None

    def keep_on(self, what: str, write: Callable[[], Any]) -> bool:
        """Write what the run needs, and say whether it was written; guard.on_save_error tells if a failure ends it.

        Raises:
            OSError: it was not written, and the run is to stop then.
        """
        try:
            write()
        except OSError as error:
            if self.config.guard.on_save_error == "stop":
                raise
            self.say(
                f"{what} after step {self.step} could not be written, training goes on (guard.on_save_error): "
                f"{_reason(error)}"
            )
            return False
        return True

    def _save(self) -> Path | None:
        return self.state.save(self.folder, self.config.keep_checkpoints)

    def _rescue_state(self) -> Path | None:
        return self.state.rescue(self.folder, self.config.keep_checkpoints)

    def _report_skipped(self) -> None:
        self.state.unreadable.report(self.folder / "skipped_images.txt")

    @contextmanager
    def _state_is_safe(self) -> Iterator[None]:
        """Say where the state is when something after the checkpoint fails."""
        try:
            yield
        except Exception:
            if self.main and self._saved_step == self.step:
                self.say(
                    f"the state after step {self.step} is saved in {self.folder / 'checkpoints'}, --resume true goes on"
                )
            raise


def _reason(error: Exception) -> str:
    """What the system says of a file, without its number; other errors as they are."""
    strerror, filename = getattr(error, "strerror", None), getattr(error, "filename", None)
    return (strerror or str(error)) + (f" ({filename})" if filename else "")
