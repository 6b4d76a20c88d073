"""One self-contained HTML page about a run, or about several side by side.

    python spark/commands/report.py RUN                               writes RUN/report.html anew
    python spark/commands/report.py RUN RUN2 RUN3 --output page.html
    python spark/commands/report.py pretraining=RUN scratch=RUN1 scratch=RUN2 SparK=RUN3 --output page.html

Every run writes such a page about itself when it ends; this makes it anew, for a run that is under way, that crashed,
or that was scored since, and compares runs. A run is the output_dir of spark/pretrain.py or finetune/depth.py;
LABEL=RUN says what to call it, and a label given several times means seeds of one thing. The first label is what others
are compared with. Curves come from metrics.jsonl, pictures from figures/, settings from config.yaml, scores from
results.json or else evaluation.json, machines from environment.json. What is missing or damaged is said in the page.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.report import depth_sections
from spark.errors import UserError
from spark.report import (
    REPORT,
    Run,
    environments,
    events,
    pretraining_sections,
    read_run,
    render,
    settings,
    write_page,
    written_by,
)
from spark.report.page import Cell, Section, Table, Text
from spark.report.sections import named, plain_path
from spark.training.log import format_duration


def read_arms(entries: Sequence[str]) -> dict[str, list[Run]]:
    """Runs by label, from `folder` and `label=folder` entries.

    Raises:
        ValueError: a folder is not that of a run, or two runs without a label have one name, or a label stands for runs
            of both kinds.
    """
    arms: dict[str, list[Run]] = {}
    unlabelled = []
    for entry in entries:
        label, equals, folder = entry.partition("=")
        if equals and label and folder and not Path(entry).is_dir():
            run = read_run(folder, label)
        else:
            run = read_run(entry)
            unlabelled.append(run.label)
        arms.setdefault(run.label, []).append(run)
    for label, runs in arms.items():
        if len(runs) > 1 and label in unlabelled:
            raise UserError(f"several runs are called {label}: say what to call each with LABEL=RUN")
        if len({run.is_depth for run in runs}) > 1:
            raise UserError(f"{label} stands for pretraining and depth: give them two labels")
    return arms


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """Read the commands that led to the runs.

    JSON, a list of {"name", "command", "seconds"}; further keys that are shown are "cpu_seconds" and, equal in steps
    that ran side by side, "group".

    Raises:
        ValueError: there is no such file, or it holds something else.
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


def build_page(title: str, lead: str, arms: dict[str, list[Run]], steps: list[dict[str, Any]] | None) -> str:
    """The whole page.

    Args:
        title: its heading; made of the labels if empty.
        lead: a sentence below it; empty for none.
        arms: runs of either kind by label.
        steps: the commands that were run, if they were recorded.
    """
    depth = {label: runs for label, runs in arms.items() if runs[0].is_depth}
    pretraining = {label: runs for label, runs in arms.items() if label not in depth}
    runs = named(arms)
    sections = [
        *(depth_sections(depth) if depth else []),
        *(pretraining_sections(pretraining) if pretraining else []),
        events(runs),
        *([commands(steps)] if steps else []),
        settings(runs),
        environments(runs),
    ]
    return render(title or " · ".join(arms), sections, lead, written_by())


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for a user error."""
    args = parse_arguments(argv)
    try:
        arms = read_arms(args.runs)
        steps = read_steps(args.steps) if args.steps else None
        runs = [run for same in arms.values() for run in same]
        if not args.output and len(runs) > 1:
            raise UserError(
                "a page about several runs belongs to none of their folders: say where with --output"
            )
        output = Path(args.output) if args.output else runs[0].folder / REPORT
        if output.is_dir():
            raise UserError(f"--output {output} is a folder: name the file, such as {output / REPORT}")
        page = build_page(args.title, args.lead, arms, steps)
        write_page(output, page)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {output} ({len(page) / 1e6:.1f} MB)")
    for run in runs:
        for said in run.problems:
            print(f"{run.label}: {said}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
