"""What a run left in its folder, read for a page about it, in any state of the run.

A run may be under way, have crashed in the middle of a line, or lack files: what cannot be read is left out and noted
in `Run.problems`. ``metrics.jsonl`` is read line by line into arrays of numbers, so one of millions of rows
fits in memory.
"""

import json
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spark.errors import UserError

ENVIRONMENT = "environment.json"
PICTURES = (".png", ".jpg", ".jpeg")
MOST_EVENTS = 200  # a run that rolls back all the time is not to make a page of megabytes


@dataclass(frozen=True)
class Series:
    """The values of one name in ``metrics.jsonl``.

    Args:
        steps: optimizer steps, ascending, each once: float64 [n].
        values: finite: float64 [n].
    """

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Args:
        label: what the page calls it.
        folder: where it is.
        config: config.yaml, empty where there is none.
        series: numbers of metrics.jsonl by name; a name without a finite number is not there.
        not_finite: steps at which a number of metrics.jsonl was NaN or infinite, ascending, by name.
        texts: the last text of metrics.jsonl by name, such as `layout`.
        events: rows of metrics.jsonl that have an `event`, the last `MOST_EVENTS` of them.
        steps: optimizer steps that the log reaches to.
        pictures: images in figures/, in the order of their names.
        sessions: environment.json: what each start of the run ran on.
        problems: sentences about what could not be read.
        results: scores that `RunKind.read` found, if runs of this kind have some.
    """

    label: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    not_finite: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    pictures: list[Path] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def option(self, path: str, default: Any = None) -> Any:
        """An option of the configuration by its dotted name."""
        return option_of(self.config, path, default)

    def last(self, name: str) -> float | None:
        """The last value of a name, NaN where that was not finite; None where it has none."""
        at = float(self.series[name].steps[-1]) if name in self.series else -1.0
        if name in self.not_finite and self.not_finite[name][-1] > at:
            return math.nan
        return float(self.series[name].values[-1]) if name in self.series else None


def option_of(config: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """A value of nested options by its dotted name; the default where it is absent or null."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return default if value is None else value


@dataclass(frozen=True)
class RunKind:
    """A kind of runs that a page can show; every task brings its own.

    Args:
        name: for messages.
        matches: whether a run is of this kind.
        sections: of the page, of runs by label; several under one label are seeds of one thing.
        read: adds to a run what only this kind has.
    """

    name: str
    matches: Callable[[Run], bool]
    sections: Callable[[dict[str, list[Run]]], list[Any]]
    read: Callable[[Run], Run] = lambda run: run


def read_run(folder: str | Path, label: str = "") -> Run:
    """Read the output_dir of a run, called `label` or else by its name; UserError if it is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the output_dir of a run")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise UserError(
            f"{folder} is not the folder of a run: it holds neither config.yaml nor metrics.jsonl"
        )
    problems: list[str] = []
    series, not_finite, texts, events, steps = read_metrics(folder / "metrics.jsonl", problems)
    sessions = read_json(folder / ENVIRONMENT, problems)
    return Run(
        label or folder.resolve().name,
        folder,
        _read_config(folder / "config.yaml", problems),
        series,
        not_finite,
        texts,
        events,
        steps,
        sorted(p for p in (folder / "figures").glob("*") if p.suffix in PICTURES and p.is_file()),
        [entry for entry in sessions if isinstance(entry, dict)] if isinstance(sessions, list) else [],
        problems,
    )


def read_metrics(
    path: Path, problems: list[str]
) -> tuple[dict[str, Series], dict[str, list[int]], dict[str, str], list[dict[str, Any]], int]:
    """Read a ``metrics.jsonl`` of any length: series, not_finite steps, texts, events, last step, as `Run` has them."""
    not_finite: dict[str, set[int]] = {}
    columns: dict[str, tuple[array, array]] = {}
    texts: dict[str, str] = {}
    events: list[dict[str, Any]] = []
    last = broken = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    step = int(row["step"])
                except (ValueError, TypeError, KeyError, RecursionError):
                    broken += bool(line.strip())
                    continue
                last = max(last, step)
                if "event" in row:
                    events = [*events[1 - MOST_EVENTS :], row]
                for name, value in row.items():
                    if isinstance(value, str):
                        texts[name] = value
                    elif isinstance(value, int | float) and name != "step":
                        if not math.isfinite(value):
                            not_finite.setdefault(name, set()).add(step)
                            continue
                        not_finite.get(name, set()).discard(step)  # a run that went back did better
                        steps, values = columns.setdefault(name, (array("d"), array("d")))
                        steps.append(step)
                        values.append(value)
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    if broken:
        problems.append(f"{path.name}: {broken} lines that are not rows of a run were left out")
    bad = {name: sorted(steps) for name, steps in not_finite.items() if steps}
    for name, steps in bad.items():
        problems.append(
            f"{name} was NaN or infinite in {len(steps)} logged steps, from {steps[0]} to {steps[-1]}: its curve leaves"
            " them out"
        )
    return {name: _in_order(*column) for name, column in columns.items()}, bad, texts, events, last


def _in_order(steps: array, values: array) -> Series:
    """Ascending steps; of several values of a step, as a run that went back leaves them, the last."""
    backwards = np.asarray(steps)[::-1]
    unique, first = np.unique(backwards, return_index=True)
    return Series(unique, np.asarray(values)[::-1][first])


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(config, dict):
        problems.append(f"{path.name} holds no options")
        return {}
    return config


def read_json(path: Path, problems: list[str]) -> Any:
    """Content of a JSON file; None, and a sentence in `problems`, if it is damaged; None if it is missing."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (ValueError, OSError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None
