"""One self-contained HTML page about a run, or about several side by side.

    spark-report RUN                               writes RUN/report.html anew
    spark-report RUN RUN2 RUN3 --output page.html
    spark-report pretraining=RUN scratch=RUN1 scratch=RUN2 SparK=RUN3 --output page.html

Every run writes such a page when it ends. This writes it again, for a run that is under way, that crashed, or that was
scored since, and compares runs. RUN is the output_dir of a run. LABEL=RUN names it on the page; a label given several
times means seeds of one experiment, and the others are compared with the first label. Curves come from metrics.jsonl,
pictures from figures/, settings from config.yaml, scores from results.json or else evaluation.json, machines from
environment.json. The page says what is missing or damaged.

`python spark/commands/report.py` knows pretraining runs, `python finetune/commands/report.py` depth runs too.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark.errors import UserError, one_line_errors
from spark.report import (
    PRETRAINING,
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
from spark.training.cli import start
from spark.training.log import format_duration


def read_arms(
    entries: Sequence[str], kinds: Sequence[RunKind]
) -> tuple[dict[str, list[Run]], dict[str, RunKind]]:
    """Runs and their kind, each by label, from `folder` and `label=folder` entries.

    Raises:
        UserError: a folder is not that of a run of these kinds, two runs without a label have one name, or a label
            stands for runs of two kinds.
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
                f"{run.folder} is not a run of {names}, as its config.yaml shows: use spark-report, or "
                "finetune/commands/report.py in a clone"
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
    """Read the commands that led to the runs.

    JSON, a list of {"name", "command", "seconds"}; further keys that are shown are "cpu_seconds" and, equal in steps
    that ran side by side, "group".

    Raises:
        UserError: there is no such file, or it holds something else.
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN", help="output_dir of a run, and what to call it"
    )
    parser.add_argument(
        "--output", metavar="FILE.html", help="the page to write; of one run by default RUN/report.html"
    )
    parser.add_argument("--title", default="", help="heading of the page")
    parser.add_argument("--lead", default="", help="a sentence below the heading")
    parser.add_argument("--steps", metavar="FILE.json", help="commands and durations to list, see read_steps")
    return parser.parse_args(argv)


def report(args: argparse.Namespace, kinds: Sequence[RunKind]) -> None:
    """Read the runs and write the page."""
    arms, kind_of = read_arms(args.runs, kinds)
    steps = read_steps(args.steps) if args.steps else None
    runs = named(arms)
    if not args.output and len(runs) > 1:
        raise UserError("a page about several runs belongs to none of their folders: say where with --output")
    output = Path(args.output) if args.output else runs[0].folder / REPORT
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name the file, such as {output / REPORT}")
    sections: list[Section] = []
    for kind in kinds:
        of_kind = {label: same for label, same in arms.items() if kind_of[label] is kind}
        sections += kind.sections(of_kind) if of_kind else []
    sections += [events(runs), *([commands(steps)] if steps else []), settings(runs), environments(runs)]
    page = render(args.title or " · ".join(arms), sections, args.lead, written_by())
    write_page(output, page)
    print(f"written to {output} ({len(page) / 1e6:.1f} MB)")
    for run in runs:
        for problem in run.problems:
            print(f"{run.label}: {problem}", file=sys.stderr)


def main(argv: Sequence[str] | None = None, kinds: Sequence[RunKind] = (PRETRAINING,)) -> None:
    """Run the command; a user's error is one sentence and exit code 2.

    Args:
        argv: the command line.
        kinds: of runs that it knows, in the order of their sections.
    """
    args = parse_arguments(argv)
    with one_line_errors():
        report(args, kinds)


if __name__ == "__main__":
    start(main)
