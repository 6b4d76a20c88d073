"""What spark-report does, once its options are read."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark.errors import UserError
from spark.options import ReportConfig
from spark.report import (
    REPORT,
    Run,
    RunKind,
    environments,
    events,
    read_run,
    render,
    settings,
    write_page,
    written_by,
)
from spark.report.page import Cell, Section, Table, Text
from spark.report.sections import named, plain_path
from spark.training.log import format_duration


def read_arms(
    entries: Sequence[str], kinds: Sequence[RunKind]
) -> tuple[dict[str, list[Run]], dict[str, RunKind]]:
    """Runs and their kind, each by label, from `folder` and `label=folder` entries.

    A label for runs of two kinds, or for several runs that were not given it, is refused.
    """
    arms: dict[str, list[Run]] = {}
    kind_of: dict[str, RunKind] = {}
    unlabelled = []
    for entry in entries:
        label, equals, folder = entry.partition("=")
        labelled = bool(equals and label and folder and not Path(entry).is_dir())
        run = read_run(folder, label) if labelled else read_run(entry)
        kind = next((kind for kind in kinds if kind.matches(run)), None)
        if kind is None:
            names = " or ".join(kind.name for kind in kinds)
            raise UserError(
                f"{run.folder} is not a run of {names}, as its config.yaml shows: spark-report knows more"
                " kinds than python -m spark.commands.report"
            )
        if kind_of.setdefault(run.label, kind) is not kind:
            names = f"{kind_of[run.label].name} and {kind.name}"
            raise UserError(f"{run.label} stands for runs of {names}: give them two labels")
        arms.setdefault(run.label, []).append(kind.read(run))
        if not labelled:
            unlabelled.append(run.label)
    for label, runs in arms.items():
        if len(runs) > 1 and label in unlabelled:
            raise UserError(f"several runs are called {label}: say what to call each with LABEL=RUN")
    return arms, kind_of


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """Read the commands that led to the runs: a JSON list of {"name", "command", "seconds"}.

    Further keys that are shown are "cpu_seconds" and, equal in steps that ran side by side, "group".
    """
    try:
        steps = json.loads(Path(path).read_text(encoding="utf-8"))
        if any(not isinstance(step["seconds"], int | float) or "command" not in step for step in steps):
            raise TypeError("seconds is not a number")
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: --steps takes a JSON list of commands") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f'{path} is not a JSON list of {{"name", "command", "seconds"}}: {error!r}'
        ) from error
    return steps


def commands(steps: list[dict[str, Any]]) -> Section:
    """The commands that were run, with their durations."""
    groups: dict[Any, float] = {}
    for number, step in enumerate(steps):
        group = step.get("group", f"alone {number}")
        groups[group] = max(groups.get(group, 0.0), step["seconds"])
    beside = " Steps of the same kind ran side by side." if len(groups) < len(steps) else ""
    rows = [
        [
            Cell(str(step.get("name", "")), head=True),
            Cell(plain_path(str(step["command"]))),
            Cell(f"{step['seconds']:.0f} s"),
            Cell(f"{step['cpu_seconds']:.0f} s" if "cpu_seconds" in step else ""),
        ]
        for step in steps
    ]
    total = Text(f"All that was run, in {format_duration(sum(groups.values()))}.{beside}")
    return Section("Commands", [total, Table(["step", "command", "time", "processor"], rows, textual=True)])


def report(config: ReportConfig, kinds: Sequence[RunKind]) -> None:
    """Read the runs and write the page."""
    arms, kind_of = read_arms(config.runs, kinds)
    steps = read_steps(config.steps) if config.steps else None
    runs = named(arms)
    if not config.output and len(runs) > 1:
        raise UserError("a page about several runs belongs to none of their folders: say where with --output")
    output = Path(config.output) if config.output else runs[0].folder / REPORT
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name the file, such as {output / REPORT}")
    sections: list[Section] = []
    for kind in kinds:
        of_kind = {label: same for label, same in arms.items() if kind_of[label] is kind}
        sections += kind.sections(of_kind) if of_kind else []
    sections += [events(runs), *([commands(steps)] if steps else []), settings(runs), environments(runs)]
    page = render(config.title or " · ".join(arms), sections, config.lead, written_by())
    write_page(output, page)
    print(f"written to {output} ({len(page) / 1e6:.1f} MB)")
    for run in runs:
        for problem in run.problems:
            print(f"{run.label}: {problem}", file=sys.stderr)
