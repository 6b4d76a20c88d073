"""Tables of results in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from finetune.protocols.metrics import METRIC
from finetune.scoring.caveats import caveats
from finetune.scoring.evaluators import evaluator_class
from finetune.scoring.intervals import LEVEL
from finetune.scoring.metrics import count, own_metrics

LONGEST_ROW = 9
"""Metrics in a row of 80 columns."""


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print one line of text as it is, if there is any."""
    if text:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def print_results(console: Console, every: Sequence[Mapping[str, Any]], left_out: Mapping[str, str]) -> None:
    """Print the metrics as tables, below them what a reader must know, and why protocols were left out.

    Args:
        console: where to.
        every: results, each of one protocol.
        left_out: protocol -> reason.
    """
    if len(every) == 1:
        print_one(console, every[0])
    else:
        print_side_by_side(console, every)
    for sentence, names in _grouped(
        (each["protocol"], text) for each in every for text in caveats(each)
    ).items():
        of = f"{', '.join(names)}: " if len(names) < len(every) else ""
        say(console, f"{of}{sentence}")
    for reason, names in _grouped(left_out.items()).items():
        say(console, f"left out, {reason}: {', '.join(names)}", "dim")


def _grouped(pairs: Any) -> dict[str, list[str]]:
    """(name, text) pairs -> the names of each text."""
    groups: dict[str, list[str]] = {}
    for name, text in pairs:
        groups.setdefault(text, []).append(name)
    return groups


def metric_table(names: Sequence[str], first: str | None = None) -> Table:
    """An empty table with a column for each metric, after the column `first` if there is one."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    if first is not None:
        table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(METRIC[name].column, justify="right", no_wrap=True)
    return table


def print_one(console: Console, results: Mapping[str, Any]) -> None:
    """Print the table of one protocol, with the ends of the intervals below the metrics."""
    flips = ", flip average" if results["settings"]["flip_average"] else ""
    below = f"; below: {LEVEL:.0%} bootstrap interval" if results["images"] > 1 else ""
    names = list(own_metrics(results))
    title = f"{results['protocol']}{flips}: {count(results['images'], 'image')}{below}"
    say(console, title, "italic")
    for some in (names[:LONGEST_ROW], names[LONGEST_ROW:]):
        if not some:
            continue
        table = metric_table(some)
        table.add_row(*(f"{results['metrics'][name]:.3f}" for name in some))
        ends = [results["intervals"][name] for name in some]
        for end in (0, 1) if any(ends) else ():
            table.add_row(*(f"{one[end]:.3f}" if one else "" for one in ends), style="dim")
        console.print(table)


def print_side_by_side(console: Console, every: Sequence[Mapping[str, Any]]) -> None:
    """Print a row for each protocol, and a table for each set of metrics."""
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for results in every:
        groups.setdefault(evaluator_class(results["settings"]).columns, []).append(results)
    for columns, group in groups.items():
        names = [name for name in columns if any(name in own_metrics(results) for results in group)]
        table = metric_table(names, "protocol")
        for results in group:
            values = [own_metrics(results).get(name) for name in names]
            table.add_row(results["protocol"], *("" if value is None else f"{value:.3f}" for value in values))
        console.print(table)
