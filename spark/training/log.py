"""The rows of a run, its tracker and its progress on the terminal."""

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from spark.errors import FileError, UserError
from spark.files import write_whole

EVENT_COLUMNS = ("event", "reason", "at_step", "loss", "lr", "images_per_second")
"""What is kept of a step that a run has left: what happened, and what every row has."""


class RunLog:
    """The numbers of a run: a row of ``metrics.jsonl`` for each logged step, which the run's tracker gets, too.

    A resumed run drops the rows of steps after its checkpoint, which it is going to compute again. TensorBoard writes
    to ``output_dir/tensorboard``; other trackers get a project with the name of the run's folder. A tracker that fails
    is left out from then on.

    Args:
        output_dir: folder of the run.
        accelerator: from `start_accelerator`, with the tracker; only its main process writes.
        resume_step: step of the checkpoint the run continues from, None for a new run.
        config: options of the run by dotted name, for trackers that show them.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        resume_step: int | None,
        config: Mapping[str, Any] | None = None,
    ):
        self.path = Path(output_dir) / "metrics.jsonl"
        self.accelerator = accelerator
        self.rewind(-1 if resume_step is None else resume_step)
        if "tensorboard" in (str(tracker) for tracker in accelerator.log_with):
            purge = {} if resume_step is None else {"purge_step": resume_step + 1}
            self._track(lambda: accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": purge}))
        else:
            name = self.path.parent.resolve().name
            self._track(lambda: accelerator.init_trackers(name, config=dict(config or {})))

    def rewind(self, step: int, keep_events: bool = False) -> None:
        """Drop the rows of later steps than this one, which are going to be computed again; -1 drops all.

        With `keep_events`, events of later rows stay as rows of this step; `at_step` names the step they happened at.
        What was measured with weights that the run has left goes.
        """
        if not self.accelerator.is_main_process:
            return
        rows = []
        for row in read_rows(self.path) if step >= 0 else []:
            if row["step"] <= step:
                rows.append(row)
            elif keep_events and "event" in row:
                kept = {name: row[name] for name in EVENT_COLUMNS if name in row}
                rows.append({"at_step": row["step"], **kept, "step": step})
        write_whole(self.path, _lines(rows))

    def row(self, step: int, **values: float | str) -> None:
        """Write one row; numbers that are not finite become null, for JSON has no other word for them.

        Raises:
            OSError: the disk is full.
        """
        if not self.accelerator.is_main_process:
            return
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **_finite(values)}) + "\n")
        except OSError as error:
            with suppress(OSError):  # half a row would make the file unreadable
                os.truncate(self.path, before)
            if error.errno != errno.ENOSPC:
                raise
            raise FileError(
                f"the disk is full, {self.path} could not be written; free some space and continue with --resume true"
            ) from error
        self._track_numbers(step, values)

    def amend(self, step: int, **values: float | str) -> None:
        """Add values to the row of the step, if that is the last one, or write a row; errors as `row`."""
        rows = read_rows(self.path) if self.accelerator.is_main_process else []
        if not rows or rows[-1]["step"] != step:
            return self.row(step, **values)
        rows[-1] |= _finite(values)
        write_whole(self.path, _lines(rows))
        self._track_numbers(step, values)

    def _track_numbers(self, step: int, values: Mapping[str, float | str]) -> None:
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        self._track(lambda: self.accelerator.log(numbers, step=step))

    def _track(self, write: Callable[[], Any]) -> None:
        """Hand something to the tracker, which repeats ``metrics.jsonl``: no failure of it may stop a run.

        It may raise anything: no network, no login, a full disk. It is not tried again, for TensorBoard's thread ends
        with its first failure.
        """
        try:
            write()
        except Exception as error:
            self.accelerator.trackers = []
            reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
            name = ", ".join(str(tracker) for tracker in self.accelerator.log_with)
            print(
                f"the tracker {name} failed and gets no more rows, metrics.jsonl goes on: {reason}",
                flush=True,
            )

    def close(self) -> None:
        """Finish the tracker, and let go of the other processes."""
        self._track(lambda: [tracker.finish() for tracker in self.accelerator.trackers])
        self.accelerator.trackers = []
        self.accelerator.end_training()


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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
                raise UserError(f"{path} line {number} is not JSON: repair or remove that line") from error
    return rows


class Pace:
    """Speed of training since the last row, without what is not training: measuring, saving, validating.

    Args:
        batch_size: samples of a step.

    Attributes:
        steps: done since then.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.steps, self._since, self._waited = 0, time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in which training waits for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not one of training."""
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    @property
    def rate(self) -> float:
        """Samples per second."""
        return self.steps * self.batch_size / (time.perf_counter() - self._since)

    @property
    def waiting_share(self) -> float:
        """Share of the time in which training waited for data."""
        return self._waited / (time.perf_counter() - self._since)


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
