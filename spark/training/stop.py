"""How a run stops: on a signal, at a deadline, or because a step would spoil the weights."""

import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
)

from spark.errors import UserError
from spark.files import write_whole
from spark.training.accelerator import reduce_sum


def ignore_stop_signals(worker_id: int) -> None:
    """Let a loader process live through signals to the whole process group (``worker_init_fn`` of a DataLoader).

    Cluster schedulers and Ctrl-C signal every process of a job. The training process still needs its loaders to finish
    the step and save; they end when it does.
    """
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def end_loaders() -> None:
    """Kill the loader processes that are left when this one ends (a function for `atexit`).

    Python ends them by SIGTERM, which they ignore, and then waits for them: a program that failed while one was alive
    would never end.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def stop_signals() -> list[signal.Signals]:
    """Signals that `StopRequest` handles: SIGTERM, SIGINT, and SIGUSR1 where the system has it."""
    return [
        signal.Signals[name]
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        if name in signal.Signals.__members__
    ]


class StopRequest:
    """Turns SIGTERM and SIGINT into a wish that the loop grants at the end of its step, so that it can save first.

    A second Ctrl-C interrupts at once (one that follows within two seconds does not count, launchers pass the first one
    on). SIGUSR1 sets `export`, for loops that write their result on demand. Where a launcher of Accelerate was killed
    without passing the signal on, its end counts as SIGTERM.

    Used as a context manager; the previous handlers come back at its end.

    Args:
        deadline: time on the monotonic clock [s] that counts as a request when it is reached.

    Attributes:
        requested: this process was asked to stop.
        export: some process was asked for its result, as of the last `agreed`; the loop sets it back to False.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.requested = False
        self.export = False
        self._asked = False
        self._first = math.inf
        self._previous: dict[int, Any] = {}
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # which alone can handle signals: a call from a thread is stopped by its time limit
        for number in stop_signals():
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name == "SIGUSR1":
            self._asked = True
            return
        if number == signal.SIGINT and time.monotonic() - self._first > 2:
            raise KeyboardInterrupt
        self.requested = True
        self._first = min(self._first, time.monotonic())

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: the same answer in all of them, which all call it together.

        `export` becomes what they agree on, too.
        """
        orphaned = self._launcher is not None and os.getppid() != self._launcher
        self.requested |= orphaned or time.monotonic() >= self.deadline
        asked, self._asked = self._asked, False
        stops, exports = reduce_sum(accelerator, [float(self.requested), float(asked)])
        self.export |= exports > 0
        return stops > 0


def stop_run(
    accelerator: Accelerator,
    step: int,
    reason: str,
    *,
    files: Sequence[str],
    output_dir: str | Path,
    save: Callable[[], Path | None],
    kind: str = "nonfinite",
) -> NoReturn:
    """Stop a run at a step that would spoil the weights: keep the state, name the batch, say what to do.

    Every process calls it with the same reason, before the optimizer's step, so that the weights are still good.

    Args:
        accelerator: of the run.
        step: under way, counted from 1.
        reason: such as "the loss is nan".
        files: the files of this process in the batch.
        output_dir: gets a list of the files of all processes, ``KIND_step_NNNNNNN.txt``.
        save: writes a checkpoint of the state before the step, called in the main process, under FSDP in all; returns
            its folder, or None when that state is not finite either.
        kind: the reason in one word.

    Raises:
        UserError: always.
    """
    everyone = gather_object(list(files))
    listing = Path(output_dir) / f"{kind}_step_{step:07d}.txt"
    said = [
        "the weights were no longer finite either, so no checkpoint was written: go back to an older one",
        f"The images of this batch are listed in {listing}",
    ]
    # The main process knows; one whose main process ended first speaks for itself. A full disk hides no reason.
    if accelerator.is_main_process or accelerator.is_fsdp2:
        try:
            if (checkpoint := save()) is not None:
                said[0] = f"the state before this step is saved in {checkpoint}"
        except OSError as error:
            said[0] = f"the state before this step could not be saved ({error})"
    if accelerator.is_main_process:
        try:
            write_whole(listing, "".join(f"{name}\n" for name in everyone).encode(errors="surrogateescape"))
        except OSError as error:
            said[1] = (
                f"The images of this batch, {', '.join(everyone[:3])} first, could not be listed ({error})"
            )
    broadcast_object_list(said)
    accelerator.wait_for_everyone()
    raise UserError(
        f"{reason} at step {step}, the run has stopped; {said[0]}. {said[1]}. Look at these images, lower the "
        "learning rate or use precision fp32, then use --resume true"
    )


def resume_command(entry: str, output_dir: str | Path, world_size: int, sharded: bool = False) -> str:
    """The command that continues a run, from any folder, started the way that this process was.

    Args:
        entry: module that starts such runs, such as "spark.pretrain"; its console command is spark-pretrain.
        output_dir: folder of the run.
        world_size: number of processes.
        sharded: the weights are sharded, and stay so.
    """
    started, console = Path(sys.argv[0]).absolute(), f"spark-{entry.rpartition('.')[2]}"
    is_file = started.match(entry.replace(".", "/") + ".py") and sys.modules["__main__"].__spec__ is None
    program = [str(started)] if is_file else ["-m", entry]
    if world_size > 1 or sharded:
        fsdp = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy NO_WRAP"
        kind = fsdp if sharded else "--multi_gpu"
        accelerate = _as_typed("accelerate", Path(sys.executable).with_name("accelerate"))
        command = [accelerate, "launch", *kind.split(), "--num_processes", str(world_size), *program]
    elif started.stem == console:
        command = [_as_typed(console, started)]
    else:
        command = [_as_typed("python", sys.executable), *program]
    saved = (Path(output_dir) / "config.yaml").absolute()
    return shlex.join([*command, "--config", str(saved), "--resume", "true"])


def _as_typed(name: str, path: str | Path) -> str:
    """The name of a program, if the shell finds this one by it; its path otherwise."""
    return name if shutil.which(name) == str(path) else str(path)
