"""What the training loops of pretraining and depth share: the stream of samples, logs, stopping and refusing.

One principle makes a run exact to resume and independent of the number of processes: every random number is a
function of the run's seed and of a position. The stream is an endless chain of shuffled passes over the samples;
position n is the n-th sample of it. A batch takes the next positions, the processes divide them among themselves, and
augmentation and mask of a sample are seeded by its position. So a checkpoint needs no state of any generator.
"""

import errno
import json
import math
import os
import re
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Sampler

from spark.folders import write_whole
from spark.seeding import derive_seed
from spark.sharding import fsdp_plugin, prepare_sharded, use_fsdp
from spark.sparse import MissingRuleError


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one process: the part of an endless stream of shuffled passes that this process trains on.

    Micro-batch m of W processes with b samples each covers the positions from m * W * b to (m + 1) * W * b; the process
    of rank r takes the r-th slice of b. A pass ends in the middle of a micro-batch where the numbers do not divide: no
    sample is left out and none is repeated within a pass.

    Args:
        num_samples: size of the data set.
        batch_size: samples of one micro-batch of one process.
        rank: number of this process.
        world_size: number of processes.
        seed: seed of the shuffling.
        start: first micro-batch.
        stop: one past the last micro-batch.
        shuffle: a new order in every pass; otherwise every pass has the order of the data set.

    Yields:
        Lists of (position in the stream, index in the data set).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        stop: int,
        shuffle: bool = True,
    ):
        if num_samples < 1:
            raise ValueError("the data set is empty, there is nothing to draw batches from")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Micro-batches from `start` to `stop`."""
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, order = -1, torch.empty(0, dtype=torch.long)
        for micro_batch in range(self.start, self.stop):
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.num_samples)
                if epoch != current:
                    current, order = epoch, self.order(epoch)
                batch.append((position, int(order[place])))
            yield batch

    def order(self, epoch: int) -> Tensor:
        """Order of the data set in one pass: [num_samples] int64."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, 2))
        return torch.randperm(self.num_samples, generator=generator)


def start_accelerator(output_dir: str | Path, precision: str, shards: bool = False) -> Accelerator:
    """Start Accelerate for a run: device, processes, precision, TensorBoard in ``output_dir/tensorboard``.

    Several processes on a machine without GPU talk through gloo. Buffers are not broadcast between processes: running
    statistics are equal everywhere because every process computes them from the same synchronised statistics.

    Args:
        output_dir: folder of the run.
        precision: fp32, bf16 or fp16.
        shards: whether the script can train sharded weights, see `spark.sharding`.

    Raises:
        ValueError: fp16 without a GPU, or FSDP that the script cannot do.
    """
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"true", "1", "yes"}
    on_cpu = wants_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and precision == "fp16":
        raise ValueError("precision fp16 needs a GPU; use bf16 or fp32 on this machine")
    plugin = fsdp_plugin()
    if plugin is not None and not shards:
        raise ValueError(
            "FSDP is for pretraining only: use configs/accelerate/gpu_8.yaml, whole weights on each GPU, and a smaller "
            "batch where memory is short"
        )
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
        fsdp_plugin=plugin,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )
    if plugin is not None:
        use_fsdp(accelerator, plugin)
    # With --cpu, `accelerate launch --num_processes N` only prepares for mpirun and starts a single process itself.
    if wants_cpu and accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ:
        print(
            "warning: several processes were asked for, but `accelerate launch --cpu` starts only one (it leaves the "
            "others to mpirun), and the run goes on with it. For N processes on a machine without GPU use "
            "`accelerate launch --multi_gpu --num_processes N`, without --cpu.",
            flush=True,
        )
    return accelerator


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """Hand model and optimizer to Accelerate: several processes get DistributedDataParallel or FSDP, fp16 a loss scale.

    Returns:
        The model to train with (the one given stays the one to save), and the wrapped optimizer.
    """
    if accelerator.is_fsdp2:
        return prepare_sharded(accelerator, model, optimizer)
    if accelerator.num_processes > 1:
        match_gradient_strides(model)
    with warnings.catch_warnings():
        # The new name of this option does not exist in all versions of torch that this project runs on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return accelerator.prepare(model, optimizer)


def match_gradient_strides(model: nn.Module) -> None:
    """Have every gradient lie in memory with the very strides of its parameter.

    Along an axis of length 1 (depthwise and 1x1 kernels) any stride is right, and the backward passes of convolutions
    choose others than channels_last weights have. DistributedDataParallel compares all strides, and warns of a slow
    copy where only these differ. Along the longer axes autograd itself lays the gradient out as the parameter. The hook
    runs before DistributedDataParallel's and changes no value.
    """

    def match(parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
            parameter.grad = parameter.grad.as_strided(parameter.shape, parameter.stride())

    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_post_accumulate_grad_hook(match)


def run_length(
    steps_per_epoch: float,
    epochs: float,
    max_steps: int | None,
    warmup_epochs: float,
    warmup_steps: int | None,
) -> tuple[int, int]:
    """Optimizer steps of a run, and of its warm-up; numbers of steps take the place of numbers of epochs.

    Raises:
        ValueError: warmup_steps are more than the steps of the run.
    """
    total = max_steps or math.ceil(epochs * steps_per_epoch)
    if warmup_steps is None:
        # A trial run by max_steps may well be shorter than the warm-up of the recipe: it is then all warm-up.
        return total, min(round(warmup_epochs * steps_per_epoch), total)
    if warmup_steps > total:
        raise ValueError(
            f"optim.warmup_steps {warmup_steps} are more than the {total} steps of the whole run; "
            "lower them, or raise epochs or max_steps"
        )
    return total, warmup_steps


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(workers: int | None, accelerator: Accelerator) -> int:
    """Loader processes of each training process; None is one for each core that it may use, at most 8."""
    if workers is not None:
        return workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
    return min(8, max(1, usable_cores() // local))


def ignore_stop_signals(worker_id: int) -> None:
    """Let a loader process live through signals to the whole process group (``worker_init_fn`` of a DataLoader).

    Cluster schedulers and Ctrl-C signal every process of a job. The training process still needs its loaders to finish
    the step and save; they end when it does.
    """
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


def stop_signals() -> list[signal.Signals]:
    """Signals that `StopRequest` handles: SIGTERM, SIGINT, and SIGUSR1 where the system has it."""
    return [
        signal.Signals[name]
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
        if name in signal.Signals.__members__
    ]


def micro_batch_size(batch_size: int, world_size: int, accumulation: int) -> int:
    """Samples that one process puts through the network at once: batch_size / (world_size * accumulation).

    Raises:
        ValueError: the global batch does not divide; names the nearest batch sizes that do.
    """
    parts = world_size * accumulation
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        nearest = f"{below} or {above}" if below else str(above)
        raise ValueError(
            f"optim.batch_size {batch_size} cannot be divided over {world_size} processes with accumulation "
            f"{accumulation}; use {nearest}, or change accumulation or the number of processes"
        )
    return batch_size // parts


def check_output_dir(output_dir: str | Path, resume: bool | str) -> None:
    """Refuse a folder in which another run would be overwritten; nothing is made yet.

    Every process calls it before any of them writes.

    Args:
        output_dir: the folder.
        resume: the option of the run; true, or a checkpoint inside the folder, allows a folder that holds a run.

    Raises:
        ValueError: the folder holds a run that this one does not continue, or the path is a file.
        OSError: no permission to write there.
    """
    folder = Path(output_dir)
    present = next(place for place in (folder, *folder.parents) if place.exists())
    if not present.is_dir():
        raise ValueError(f"output_dir {folder} cannot be made: {present} is a file; choose a folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise OSError(f"output_dir {folder} cannot be written: {present} is read-only; choose another folder")
    found = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints") if (folder / name).exists()]
    continues = resume is True or (
        isinstance(resume, str) and Path(resume).resolve().is_relative_to(folder.resolve())
    )
    if found and not continues:
        raise ValueError(
            f"output_dir {folder} already holds a run ({', '.join(found)}); "
            "continue it with --resume true, or choose another --output_dir"
        )


def make_output_dir(output_dir: str | Path) -> None:
    """Make the folder of a run where it is missing, once nothing stands against the run.

    Raises:
        OSError: it cannot be made.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"output_dir {output_dir} cannot be made ({error.strerror}): choose a folder that you may write to"
        ) from error


class RunLog:
    """The numbers of a run: a row of ``metrics.jsonl`` and of TensorBoard for each logged step.

    A resumed run drops the rows of steps after its checkpoint, which it is going to compute again.

    Args:
        output_dir: folder of the run.
        accelerator: from `start_accelerator`; only its main process writes.
        resume_step: step of the checkpoint the run continues from, None for a new run.
    """

    def __init__(self, output_dir: str | Path, accelerator: Accelerator, resume_step: int | None):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.accelerator = accelerator
        self.mirrored = True
        self.rewind(-1 if resume_step is None else resume_step)
        options = {} if resume_step is None else {"purge_step": resume_step + 1}
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": options})

    def rewind(self, step: int, keep_events: bool = False) -> None:
        """Drop the rows of later steps, which are going to be computed again.

        Args:
            step: last step whose rows stay; -1 drops all.
            keep_events: rows with an `event` stay too, as rows of this step that name, in `at_step`, the step
                that they happened at.
        """
        if not self.accelerator.is_main_process:
            return
        rows = []
        for row in read_rows(self.path) if step >= 0 else []:
            if row["step"] <= step:
                rows.append(row)
            elif keep_events and "event" in row:
                rows.append({"at_step": row["step"], **row, "step": step})
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def row(self, step: int, **values: float | str) -> None:
        """Write one row; numbers that are not finite become null, for JSON has no other word for them.

        Raises:
            OSError: the disk is full.
        """
        if not self.accelerator.is_main_process:
            return
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        except OSError as error:
            with suppress(OSError):  # half a row would make the file unreadable
                os.truncate(self.path, before)
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"the disk is full, {self.path} could not be written; free some space and continue with --resume true"
            ) from error
        self._mirror(
            lambda: self.accelerator.log(
                {k: v for k, v in values.items() if isinstance(v, int | float)}, step=step
            )
        )

    def _mirror(self, write: Callable[[], None]) -> None:
        """Write to TensorBoard, which repeats ``metrics.jsonl``: a run can do without what its disk refuses.

        TensorBoard's thread ends with its first failure, so there is nothing to try again.
        """
        if self.mirrored:
            try:
                write()
            except OSError as error:
                self.mirrored = False
                reason = error.strerror or error
                print(
                    f"TensorBoard's log could not be written and ends here, metrics.jsonl goes on: {reason}",
                    flush=True,
                )

    def close(self) -> None:
        """Flush and close TensorBoard."""
        self._mirror(self.accelerator.end_training)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line that was cut off by a crash is left out, no file is no rows."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not JSON: repair or remove that line") from error
    return rows


class ProgressReport:
    """What `progress_bar` yields: `update` after every step, `say` for a line of text."""

    def __init__(self, total: int, start: int, every: int, console: Console, bar: Progress | None):
        self._total, self._start, self._every = total, start, every
        self._console, self._bar = console, bar
        self._task = None if bar is None else bar.add_task("", total=total, completed=start, values="")
        self._began = time.monotonic()

    def update(self, step: int, **values: float) -> None:
        """Show that `step` steps are done, with the latest values, such as loss, lr and images_per_second."""
        text = "  ".join(_format_value(name, value) for name, value in values.items())
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, values=text)
        elif step % self._every == 0 or step == self._total or step == self._start + 1:
            left = (time.monotonic() - self._began) / max(step - self._start, 1) * (self._total - step)
            self.say(f"step {step}/{self._total}  {text}  {format_duration(left)} left")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_bar(
    total: int, start: int = 0, *, every: int = 1, enabled: bool = True
) -> Iterator[ProgressReport]:
    """Show the progress of a run: a live bar on a terminal, a line every `every` steps elsewhere (files, pipes).

    Args:
        total: steps of the whole run.
        start: steps that were done before.
        every: steps between lines where there is no terminal.
        enabled: False shows nothing, for processes other than the main one.

    Yields:
        A `ProgressReport`.
    """
    console = Console(quiet=not enabled)
    if not (enabled and console.is_terminal):
        yield ProgressReport(total, start, every, console, None)
        return
    columns = (
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[values]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, expand=True, speed_estimate_period=300) as bar:
        yield ProgressReport(total, start, every, console, bar)


def _format_value(name: str, value: float) -> str:
    if name == "images_per_second":
        return f"{value:.1f} images/s"
    return f"{name} {value:.2e}" if name == "lr" else f"{name} {value:.4f}"


def format_duration(seconds: float) -> str:
    """Write seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def reduce_sum(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sums over all processes, which all call it together."""
    if accelerator.num_processes == 1:
        return list(values)
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float32, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.tolist()


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


def check_finite(
    accelerator: Accelerator,
    step: int,
    values: dict[str, float],
    *,
    files: Sequence[str],
    output_dir: str | Path,
    save: Callable[[], Path | None],
) -> None:
    """Stop a run whose loss or gradient is not finite, see `stop_run`; `values` are what must be, by name.

    Raises:
        ValueError: a value is not finite.
    """
    bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if bad:
        stop_run(accelerator, step, " and ".join(bad), files=files, output_dir=output_dir, save=save)


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
        step: the step under way, counted from 1.
        reason: what is wrong, such as "the loss is nan".
        files: the files of this process in the step's batch.
        output_dir: folder of the run; the files of all processes are listed in ``KIND_step_NNNNNNN.txt``.
        save: writes a checkpoint of the state before the step, called in the main process, under FSDP in all; returns
            its folder, or None when that state is not finite either.
        kind: the reason in one word, for the name of that list.

    Raises:
        ValueError: always.
    """
    everyone = gather_object(list(files))
    listing = Path(output_dir) / f"{kind}_step_{step:07d}.txt"
    kept = "the weights were no longer finite either, so no checkpoint was written: go back to an older one"
    if accelerator.is_main_process:
        write_whole(listing, "".join(f"{name}\n" for name in everyone).encode(errors="surrogateescape"))
    if accelerator.is_main_process or accelerator.is_fsdp2:
        checkpoint = save()
        if checkpoint is not None:
            kept = f"the state before this step is saved in {checkpoint}"
    said = [kept]
    broadcast_object_list(
        said
    )  # the main process knows; one whose main process ended first speaks for itself
    accelerator.wait_for_everyone()
    raise ValueError(
        f"{reason} at step {step}, the run has stopped; {said[0]}. The images of this batch are listed in "
        f"{listing}. Look at these images, lower the learning rate or use precision fp32, then use --resume true"
    )


def resume_command(output_dir: str | Path, world_size: int, sharded: bool = False) -> str:
    """The command that continues this script's run, to be given in the same folder; `sharded` weights stay so."""
    launcher = f"accelerate launch --multi_gpu --num_processes {world_size}" if world_size > 1 else "python"
    if sharded:
        options = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy NO_WRAP"
        launcher = f"accelerate launch {options} --num_processes {world_size}"
    saved = Path(output_dir) / "config.yaml"
    return shlex.join([*launcher.split(), sys.argv[0], "--config", str(saved), "--resume", "true"])


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End an entry script with one line ``error: ...`` and exit code 2 for a user's error; bugs keep their traceback.

    A user's error is a ValueError or OSError that this project raises itself, in this process or in a loader's, an
    OSError about a file or a full disk, or a model with an operator that has no sparse rule. The main
    process speaks. The others wait for the launcher to end them, and speak only if it does not, which means that the
    error was theirs alone.
    """
    try:
        yield
    except (ValueError, OSError, MissingRuleError) as error:
        sentence = _user_sentence(error)
        if sentence is None:
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(3)
        print(f"error{f' in process {rank}' if rank else ''}: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def _user_sentence(error: ValueError | OSError | MissingRuleError) -> str | None:
    """One line for a user's error, None for what may be a bug."""
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker" in text:
        places = re.findall(r'^  File "(.*?)", line', text, flags=re.MULTILINE)
        last = text.strip().splitlines()[-1]
        return last.partition(": ")[2] if places and _is_ours(places[-1]) else None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    ours = trace is not None and _is_ours(trace.tb_frame.f_code.co_filename)
    bare = isinstance(error, OSError) and error.errno and error.strerror == os.strerror(error.errno)
    if bare and isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        text = (
            f"the disk is full{where}: free space, then run the same command again; a training run goes on where it "
            "was with --resume true"
        )
    elif isinstance(error, OSError) and error.strerror and (ours or error.filename):
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif not ours:
        return None
    return " ".join(text.split())


def _is_ours(filename: str) -> bool:
    """Whether a source file belongs to this project."""
    packages = Path(__file__).resolve().parents[1]
    return any(
        Path(filename).resolve().is_relative_to(packages / name) for name in ("spark", "finetune", "tools")
    )
