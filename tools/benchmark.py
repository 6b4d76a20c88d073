"""Measure SparK on this machine: time and memory of a training step, packed against masked against the original code.

    python tools/benchmark.py step --model resnet50 convnext_tiny --csv step.csv
    python tools/benchmark.py step --official ~/SparK          # a clone of github.com/keyu-tian/SparK takes part
    python tools/benchmark.py encoder                          # the encoder alone: forward, backward of all features
    python tools/benchmark.py memory                           # bytes saved for the backward, and the peak of a step
    python tools/benchmark.py scaling --mask_ratio 0.3 0.6 0.9 --csv scaling.csv --plot scaling.png

Every ratio is taken in one process: contenders take turns, step by step, and the number is the median of the ratios of
neighbouring steps. Ratios are over the original where it takes part, else over the masked layout. Nothing is measured
unless all contenders first give the same loss (or features) and gradients on the same weights and mask.
Timings are worth something only on an idle machine, so a busy one is refused.
"""

import argparse
import csv
import gc
import io
import itertools
import logging
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import timm
import torch
from benchmarks.contenders import Bench, Case, Contender, set_up_torch
from benchmarks.flops import flops_per_image, plot_scaling
from benchmarks.memory import peak_alone, saved_bytes
from benchmarks.original import DECODER_WIDTH, has_model, import_original
from benchmarks.parity import checked
from benchmarks.timing import device_name, interleaved, refuse_busy_machine, summary
from rich.console import Console
from rich.table import Table

from spark.folders import write_whole
from spark.sparse import MissingRuleError

SHOWN = {
    "seconds": "seconds_median",
    "images/s": "images_per_second",
    "speedup": "speedup_median",
    "GFLOPs": "gflops",
    "saved, encoder [B]": "saved_encoder_bytes",
    "saved, step [B]": "saved_step_bytes",
    "peak, step [B]": "peak_step_bytes",
    "ratio saved": "saved_step_ratio",
    "ratio peak": "peak_step_ratio",
}
"""Heading in the printed table -> column of the CSV; a command shows those that it has."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; `batch`, `size` and `mask_ratio` become lists, a size being (H, W)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in {
        "step": "time the forward and backward of the whole of SparK",
        "encoder": "time the forward and backward of the encoder alone",
        "memory": "count the bytes saved for the backward, and the peak of a step",
        "scaling": "`step` at every batch, size and mask ratio that is named",
    }.items():
        command = commands.add_parser(name, help=about)
        many = "+" if name == "scaling" else None
        command.add_argument("--model", nargs="+", default=["resnet50", "convnext_tiny"], help="timm names")
        command.add_argument("--batch", type=int, nargs=many, default=[16] if many else 16)
        command.add_argument(
            "--size",
            type=int,
            nargs="+",
            default=[224],
            help="image sizes in pixels, of squares" if many else "image size in pixels: one number, or H W",
        )
        command.add_argument(
            "--mask_ratio",
            type=float,
            nargs=many,
            default=[0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] if many else 0.6,
        )
        if name != "encoder":
            command.add_argument(
                "--decoder_width",
                type=int,
                default=DECODER_WIDTH,
                help=f"of ours; the original stays at {DECODER_WIDTH}, where it is compared with ours first",
            )
        command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
        command.add_argument(
            "--channels_last",
            action="store_true",
            help="memory format of the original (ours is always channels_last)",
        )
        command.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
        if name != "memory":
            command.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--official", type=Path, metavar="CLONE", help="folder of the original code")
        command.add_argument("--csv", type=Path, help="write the rows to this file")
        if many:
            command.add_argument("--plot", type=Path, help="draw images/s against the mask ratio, as PNG")
        command.add_argument("--busy", action="store_true", help="measure even though other programs run")
    options = parser.parse_args(arguments)
    if not many_sizes(options) and len(options.size) > 2:
        parser.error("--size takes one number, or H W")
    if options.command != "memory" and options.rounds < 2:
        parser.error("--rounds must be 2 or more: one time has no spread")
    return options


def many_sizes(options: argparse.Namespace) -> bool:
    """Whether the numbers after --size are squares of their own, not H W."""
    return options.command == "scaling"


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything that this command line asks for."""
    if many_sizes(options):
        batches, sizes, ratios = options.batch, [(side, side) for side in options.size], options.mask_ratio
    else:
        batches, ratios = [options.batch], [options.mask_ratio]
        sizes = [(options.size[0], options.size[-1])]
    return [
        Case(
            model=model,
            batch=batch,
            size=size,
            mask_ratio=ratio,
            decoder_width=getattr(options, "decoder_width", DECODER_WIDTH),
            precision=options.precision,
            device=options.device,
            channels_last=options.channels_last,
            threads=options.threads,
            official=options.official,
        )
        for model, batch, size, ratio in itertools.product(options.model, batches, sizes, ratios)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write CSV rows as they come, print a table."""
    options = parse_arguments(arguments)
    rows: list[dict[str, str]] = []
    # What it says of keys is for users' files; a weight that went astray fails the check of parity here.
    logging.getLogger("spark.official").setLevel(logging.ERROR)
    try:
        refuse_busy_machine(options.busy)
        if options.official is not None:
            import_original(options.official)  # a wrong folder is an error, whatever the models
            for name in options.model:
                if not has_model(name):
                    print(f"note: the original has no {name}, so only ours are compared", file=sys.stderr)
        for case in cases(options):
            set_up_torch(case)
            if options.command == "memory":
                rows += memory_rows(case)
            else:
                kind = "encoder" if options.command == "encoder" else "step"
                rows += timing_rows(case, kind, options.rounds)
            if options.csv:
                write_csv(rows, options.csv)
        if many_sizes(options) and options.plot:
            plot_scaling(rows, options.plot)
    except (ValueError, OSError, MissingRuleError) as error:
        if rows:  # what was measured before is measured
            show(rows, options.command)
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    show(rows, options.command)


def timing_rows(case: Case, kind: str, rounds: int) -> list[dict[str, str]]:
    """A row for each contender: seconds of a "step" or of the "encoder" alone, in turns.

    Raises:
        ValueError: the contenders' results differ.
    """
    bench = checked(case, kind)
    computed, limit = flops_per_image(bench, kind)
    seconds = interleaved(
        {name: partial(bench.step, c, kind) for name, c in bench.contenders.items()}, rounds, case.device
    )
    base = case.names[0]
    return [
        {
            **description(bench, contender, kind),
            **summary(seconds[name], seconds[base], case.batch),
            "rounds": str(rounds),
            "gflops": f"{computed[name] / 1e9:.4f}",
            "gflops_limit": f"{limit / 1e9:.4f}",
            **versions(),
        }
        for name, contender in bench.contenders.items()
    ]


def memory_rows(case: Case) -> list[dict[str, str]]:
    """A row for each contender: bytes saved by a forward, the peak of a step, and their ratios to the base's.

    Raises:
        ValueError: the contenders' losses differ.
    """
    bench = checked(case, "step")
    saved: dict[str, dict[str, int]] = {"encoder": {}, "step": {}}
    for kind, name in itertools.product(saved, bench.contenders):
        contender = bench.contenders[name]
        saved[kind][name] = saved_bytes(
            partial(bench.forward, contender, kind, case.precision), contender.model
        )
    described = {name: description(bench, c, "step") for name, c in bench.contenders.items()}
    del bench, contender
    gc.collect()
    if case.device.startswith("cuda"):
        torch.cuda.empty_cache()  # the processes below need the memory
    peak = {name: peak_alone(case, name) for name in described}
    base = case.names[0]
    return [
        {
            **described[name],
            "saved_encoder_bytes": str(saved["encoder"][name]),
            "saved_step_bytes": str(saved["step"][name]),
            "peak_step_bytes": _text(peak[name]),
            "saved_encoder_ratio": f"{saved['encoder'][name] / saved['encoder'][base]:.3f}",
            "saved_step_ratio": f"{saved['step'][name] / saved['step'][base]:.3f}",
            "peak_step_ratio": _ratio(peak[name], peak[base]),
            **versions(),
        }
        for name in described
    ]


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _ratio(number: int | None, base: int | None) -> str:
    return f"{number / base:.3f}" if number and base else ""


def description(bench: Bench, contender: Contender, kind: str) -> dict[str, str]:
    """First columns of a row: what was measured, on what; `base` is the contender that ratios are over."""
    case = bench.case
    return {
        "kind": kind,
        "model": case.model,
        "contender": contender.name,
        "base": case.names[0],
        "batch": str(case.batch),
        "height": str(case.size[0]),
        "width": str(case.size[1]),
        "mask_ratio": str(case.mask_ratio),
        "visible_share": f"{bench.visible_share:.4f}",
        "decoder_width": str(contender.decoder_width),
        "precision": case.precision,
        "channels_last": str(case.channels_last).lower(),
        "threads": str(case.threads),
        "device": device_name(case.device),
    }


def versions() -> dict[str, str]:
    """Last columns of a row."""
    return {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}


def write_csv(rows: Sequence[dict[str, str]], path: Path) -> None:
    """Write rows, all with the columns of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def show(rows: Sequence[dict[str, str]], command: str) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{command}: ratios are over the first contender of each model")
    columns = {heading: column for heading, column in SHOWN.items() if column in rows[0]}
    for heading in ("model", "contender", "batch", "size", "mask"):
        table.add_column(heading)
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            row["contender"],
            row["batch"],
            f"{row['height']}x{row['width']}",
            row["mask_ratio"],
            *(row[column] for column in columns.values()),
        )
    Console().print(table)


if __name__ == "__main__":
    main()
