"""Sections that runs of either kind have: curves, what their options differ in, events, settings, environment."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from spark.report.charts import Line, number
from spark.report.page import Cell, Chart, Charts, Folded, Section, Table, Text, Tiles
from spark.report.runs import Run

Fact = tuple[str, Any, str]
COLORS = 8  # of lines, in the page's style
INSIGNIFICANT = ("output_dir", "seed", "resume")  # options in which seeds of one experiment differ
UNDRAWN = ("epoch", "at_step")  # numbers of metrics.jsonl that follow from the step


def named(arms: dict[str, list[Run]]) -> list[Run]:
    """All runs, each called by its label; those of a label that several have, by their seeds too."""
    return [
        replace(run, label=f"{label}, seed {run.option('seed', '?')}" if len(same) > 1 else label)
        for label, same in arms.items()
        for run in same
    ]


def problems(runs: Sequence[Run]) -> list[Text]:
    """Notes about what could not be read."""
    prefix = "{}: " if len(runs) > 1 else ""
    return [
        Text(prefix.format(run.label) + plain_path(problem), note=True)
        for run in runs
        for problem in run.problems
    ]


def fact_blocks(runs: Sequence[Run], facts: Sequence[Sequence[Fact]]) -> list[Any]:
    """Notes about what could not be read, and the facts of every run: (name, value, remark); None is left out."""
    blocks: list[Any] = problems(runs)
    known = [
        [(name, str(value), remark) for name, value, remark in of_run if value is not None]
        for of_run in facts
    ]
    if len(runs) == 1:
        return [*blocks, Tiles(known[0])]
    names = dict.fromkeys(name for of_run in known for name, _, _ in of_run)
    rows = []
    for run, of_run in zip(runs, known, strict=True):
        values = {name: value for name, value, _ in of_run}
        rows.append([Cell(run.label, head=True), *(Cell(values.get(name, "")) for name in names)])
    return [*blocks, Table(["run", *names], rows, textual=True)]


def curves(runs: Sequence[Run], known: Sequence[tuple[str, str]], terms: str = "") -> Charts | None:
    """Charts of the logged numbers, one line a run.

    Args:
        runs: whose numbers.
        known: (name in metrics.jsonl, title) of those to show at once; all others are folded below, but for those that
            never change.
        terms: beginning of the names of what the loss is the sum of; for one run they stand in its chart.

    Returns:
        None where there is nothing to draw.
    """
    within = (
        [n for run in runs for n in run.series if terms and n.startswith(terms)] if len(runs) == 1 else []
    )
    shown = [
        chart
        for name, title in known
        if (chart := _chart(runs, name, title, within if name == "loss" else []))
    ]
    names = dict.fromkeys(name for run in runs for name in run.series)
    others = [
        n
        for n in names
        if n not in dict(known) and n not in within and n not in UNDRAWN and _changes(runs, n)
    ]
    more = [chart for name in others if (chart := _chart(runs, name, name.replace("_", " "), []))]
    return Charts(shown, more) if shown or more else None


def _chart(runs: Sequence[Run], name: str, title: str, within: Sequence[str]) -> Chart | None:
    steps = max(run.steps for run in runs)
    if len(runs) == 1:
        (run,) = runs
        lines = [Line(n, run.series[n], i % COLORS) for i, n in enumerate((name, *within)) if n in run.series]
        last = run.last(name)
        return (
            Chart.of(title, lines, steps, f"last {number(last)}" if last is not None else "")
            if lines
            else None
        )
    lines = [
        Line(run.label, run.series[name], i % COLORS) for i, run in enumerate(runs) if name in run.series
    ]
    return Chart.of(title, lines, steps) if lines else None


def _changes(runs: Sequence[Run], name: str) -> bool:
    values = [run.series[name].values for run in runs if name in run.series]
    return min(v.min() for v in values) < max(v.max() for v in values)


def differences(arms: dict[str, list[Run]]) -> list[Any]:
    """How long the labels were trained, and a table of all options that differ between their first runs."""
    if len(arms) < 2:
        return []
    lengths = {label: sorted({run.steps for run in runs}) for label, runs in arms.items()}
    length = "; ".join(
        f"{label}: {' and '.join(map(str, steps))} optimizer steps" for label, steps in lengths.items()
    )
    if len({tuple(steps) for steps in lengths.values()}) == 1:
        length = f"Equal length, {' and '.join(map(str, next(iter(lengths.values()))))} optimizer steps"
    first = {label: flat(runs[0].config) for label, runs in arms.items()}
    names = dict.fromkeys(name for options in first.values() for name in options)
    differ = [
        n for n in names if n not in INSIGNIFICANT and len({repr(o.get(n)) for o in first.values()}) > 1
    ]
    if not differ:
        return [Text(f"{length}; the configurations do not differ.")]
    rows = [
        [Cell(name, head=True), *(Cell(_value(options.get(name))) for options in first.values())]
        for name in differ
    ]
    return [
        Text(f"{length}. All that differs in the configurations:"),
        Table(["option", *arms], rows, textual=True),
    ]


def events(runs: Sequence[Run]) -> Section:
    """What was out of the ordinary: skipped steps, rollbacks, failed saves."""
    rows = [
        [
            Cell(run.label, head=True),
            Cell(str(e.get("at_step", e["step"]))),
            Cell(str(e["event"])),
            Cell(str(e.get("reason", ""))),
        ]
        for run in runs
        for e in run.events
    ]
    head = ["run", "step", "event", "reason"]
    return Section("Events", [Table(head, rows, textual=True)] if rows else [])


def settings(runs: Sequence[Run]) -> Section:
    """The whole configuration of every run, folded."""
    return Section(
        "Settings",
        [
            Folded(
                f"config.yaml of {run.label}",
                text=plain_path(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)),
            )
            for run in runs
            if run.config
        ],
    )


def environments(runs: Sequence[Run]) -> Section:
    """What every run ran on, a column for each of its starts."""
    starts = [(run, entry) for run in runs for entry in run.sessions]
    names = dict.fromkeys(name for _, entry in starts for name in entry)
    head = [
        "",
        *(run.label if len(runs) > 1 else f"from step {entry.get('step', '?')}" for run, entry in starts),
    ]
    rows = [
        [Cell(name, head=True), *(Cell(str(entry.get(name, ""))) for _, entry in starts)] for name in names
    ]
    return Section("Environment", [Table(head, rows, textual=True)] if rows else [])


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    out = {}
    for name, value in options.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def plain_path(text: str) -> str:
    """Text without what names this machine: paths relative to the current folder, the home folder as ~."""
    for known, short in ((f"{Path.cwd()}{os.sep}", ""), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(known) > 2:
            text = text.replace(known, short)
    return text


def speed(run: Run) -> str:
    """The median of the images per second; "" where none was logged."""
    series = run.series.get("images_per_second")
    return "" if series is None else f"{number(statistics.median(series.values.tolist()))} images/s"


def _value(value: Any) -> str:
    return "" if value is None else plain_path(str(value))
