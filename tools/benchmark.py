"""Measure on this machine: time and memory of training steps, loading, scoring. Rows go into CSV files.

    python -m tools.benchmark step --model resnet50 convnext_tiny --csv step.csv
    python -m tools.benchmark step --official ~/SparK          # a clone of github.com/keyu-tian/SparK takes part
    python -m tools.benchmark encoder                          # the encoder alone: forward, backward of all features
    python -m tools.benchmark step --compile packed            # and through torch.compile, which takes minutes
    python -m tools.benchmark memory                           # bytes saved for the backward, and the peak of a step
    python -m tools.benchmark scaling --mask_ratio 0.3 0.6 0.9 --csv scaling.csv --plot scaling.png
    python -m tools.benchmark scaling --mask_ratio 0.6 --processes 1 2 4 --csv processes.csv
    python -m tools.benchmark loader --data ~/photos           # images/s per core of reading and augmenting
    python -m tools.benchmark distillation                     # depth: what the segmentation decoder costs in training
    python -m tools.benchmark scoring                          # depth: scoring predictions, protocol by protocol
    python -m tools.benchmark layouts --csv spark/sparse/measured.csv      # the table behind `layout="auto"`
    python -m tools.benchmark kernels                          # what Triton's kernels take on a GPU, without one
    python -m tools.benchmark against ../other-checkout        # steps of this tree beside those of another commit

Every ratio is of neighbouring steps: contenders take turns, step by step, and the number is the median of the ratios.
Ratios are over the original where it takes part, else over the masked layout; of the loader, over Pillow with
torchvision's transforms. Nothing is measured unless all contenders first give the same loss (or features) and gradients
on the same weights and mask; of the loader, the same pictures. Timings are worth something only on an idle machine, so
a busy one is refused.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from spark.errors import UserError
from spark.files import write_whole
from spark.sparse.tensor import MissingRuleError
from spark.training.accelerator import usable_cores
from tools.benchmarks import against, depth, kernels, loader, scoring, steps
from tools.benchmarks.rows import Command, Row, rows_as_csv
from tools.benchmarks.timing import refuse_busy_machine

COMMANDS: dict[str, Command] = {
    **steps.COMMANDS,
    **loader.COMMANDS,
    **depth.COMMANDS,
    **scoring.COMMANDS,
    **against.COMMANDS,
    **kernels.COMMANDS,
}
SHOWN = (
    *("seconds_median", "images_per_second", "images_per_second_per_core", "speedup_median", "cost_median"),
    *("gmacs_training", "gmacs_cost", "efficiency", "gflops", "saved_encoder_bytes", "saved_step_bytes"),
    *("peak_step_bytes", "saved_step_ratio", "peak_step_ratio"),
    *("programs", "launches", "registers", "spilled_bytes", "shared_bytes", "resident_warps", "tensor_cores"),
    "loads_ahead",
)
"""Columns of results that are printed, beside those that say what a row is of."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.about, description=command.about)
        sub.add_argument("--rounds", type=int, default=7, help="timed steps of each contender (default: 7)")
        sub.add_argument(
            "--threads", type=int, default=usable_cores(), help="CPU threads (default: one a core)"
        )
        sub.add_argument("--csv", type=Path, help="write the rows to this file")
        sub.add_argument("--busy", action="store_true", help="measure even though other programs run")
        command.add_options(sub)
    options = parser.parse_args(argv)
    if options.rounds < 2 or options.threads < 1:
        parser.error("--rounds must be 2 or more, one time has no spread; --threads 1 or more")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write CSV rows as they come, print a table."""
    options = parse_arguments(argv)
    command = COMMANDS[options.command]
    rows: list[Row] = []
    try:
        for file in filter(None, (options.csv, getattr(options, "plot", None))):
            folder = next(parent for parent in file.absolute().parents if parent.exists())
            if file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
                raise UserError(f"{file} cannot be written: name a file in a folder that you may write to")
        command.check(options)
        refuse_busy_machine(options.busy or not command.times)
        for measured in command.measure(options):
            rows += measured
            if options.csv:
                whole = command.table(options, measured) if command.table else rows
                write_whole(options.csv, rows_as_csv(whole).encode())
        command.finish(options, rows)
    except (ValueError, OSError, MissingRuleError, torch.cuda.OutOfMemoryError, BrokenProcessPool) as error:
        if rows:  # what was measured before is measured
            show(rows, options.command)
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    show(rows, options.command)


def sentence(error: Exception) -> str:
    """What to do about an error."""
    if isinstance(error, BrokenProcessPool):
        return "the process whose memory was measured was ended from outside: if the memory was full, lower --batch"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"the GPU's memory is full, lower --batch ({str(error).splitlines()[0]})"
    return str(error)


def show(rows: Sequence[Row], command: str) -> None:
    """Print the rows as a table: columns of results, and of the others those that differ; the rest stands below."""
    first = rows[0]
    cut = next((list(first).index(name) for name in SHOWN if name in first), len(first))
    about = list(first)[:cut]
    varying = [name for name in about if name == "contender" or len({row[name] for row in rows}) > 1]
    shared = [f"{name} {first[name]}" for name in about if name not in varying and first[name]]
    table = Table(
        title=f"{command}: ratios are over {first['base']}" if "base" in first else command,
        caption=", ".join(shared),
    )
    columns = [*varying, *(name for name in SHOWN if name in first)]
    for name in columns:
        table.add_column(name.removesuffix("_median"), justify="left" if name in varying else "right")
    for row in rows:
        table.add_row(*(row[name] for name in columns))
    console = Console()
    if not console.is_terminal:  # a file has no width: as wide as the table is
        console.width = 1000
        console.width = console.measure(table).maximum
    console.print(table)


if __name__ == "__main__":
    main()
