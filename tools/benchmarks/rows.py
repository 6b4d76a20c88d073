"""What all benchmarks share: how a subcommand is described, and rows of a table of results as a CSV file."""

import csv
import io
import platform
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch

Row = dict[str, str]


class Command(NamedTuple):
    """A subcommand of `python -m tools.benchmark`.

    Attributes:
        about: a sentence.
        add_options: adds its own options to a parser, which has those that all commands share.
        measure: from the options to rows, as they are measured.
        check: finds in seconds what is wrong with the options, before anything is measured; raises UserError.
        table: from the options and the rows of one `measure` to the whole CSV file; None: all rows so far.
        finish: is given all rows at the end.
        times: whether it takes times, which are worth something only on an idle machine.
    """

    about: str
    add_options: Callable[[ArgumentParser], None]
    measure: Callable[[Namespace], Iterator[list[Row]]]
    check: Callable[[Namespace], None] = lambda options: None
    table: Callable[[Namespace, list[Row]], list[Row]] | None = None
    finish: Callable[[Namespace, list[Row]], None] = lambda options, rows: None
    times: bool = True


def rows_as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a CSV file, all rows with the columns of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def versions() -> Row:
    """Last columns of a row."""
    return {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
