"""Time and memory of a training step or of the encoder alone: packed against masked against the original code."""

import argparse
import csv
import gc
import itertools
import logging
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from spark import SparK
from spark.errors import UserError
from spark.model.encoder import build_encoder
from spark.sparse import LAYOUTS
from spark.sparse.choice import convolution_kind, device_name, is_available
from tools.benchmarks.contenders import ORIGINAL_DECODER, Bench, Case, Contender, Decoder, set_up_torch
from tools.benchmarks.flops import flops_per_image, plot_scaling
from tools.benchmarks.memory import peak_alone, saved_bytes
from tools.benchmarks.original import commit_of, has_model, import_original
from tools.benchmarks.parity import checked
from tools.benchmarks.processes import check_counts, efficiencies, passes_of_groups, shared_case
from tools.benchmarks.rows import Command, Row, versions
from tools.benchmarks.timing import interleaved, summary

MEASURED = (
    *("device", "device_type", "threads", "model", "convolutions", "precision", "batch", "height", "width"),
    *("mask_ratio", "layout", "seconds_median", "seconds_quartile_low", "seconds_quartile_high"),
    *("speedup_median", "speedup_quartile_low", "speedup_quartile_high", "rounds", "torch", "timm", "python"),
)
"""Columns of spark/sparse/measured.csv, the table behind `layout="auto"`."""


def add_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Options of one of the commands below."""
    add, many, layouts = parser.add_argument, name == "scaling", name == "layouts"
    models = ["resnet18", "convnext_atto"] * layouts + ["resnet50", "convnext_tiny"]
    add("--model", nargs="+", default=models, help="timm names (%(default)s)")
    add("--batch", type=int, nargs="+", default=[16], help="images of a step (%(default)s)")
    sizes = "image sizes [px], of squares" if many else "image size [px]: one number, or H W"
    add("--size", type=int, nargs="+", default=[224], help=f"{sizes} (%(default)s)")
    ratios = [0.3, 0.6, 0.9] if layouts else [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] if many else [0.6]
    add("--mask_ratio", type=float, nargs="+", default=ratios, help="share of masked patches (%(default)s)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:N (%(default)s)",
    )
    precisions = ["fp32", "bf16"] if layouts else ["fp32"]
    add("--precision", choices=["fp32", "bf16"], nargs="+", default=precisions, help="(%(default)s)")
    parser.set_defaults(
        decoder=ORIGINAL_DECODER, official=None, original_precision=None, compile=[], processes=[1], plot=None
    )
    if layouts:
        parser.set_defaults(layouts=None, channels_last=False)
        return
    if name != "encoder":
        about = (
            f"of ours: decoder_width, decoder_stages, densify_kernel; the original keeps {ORIGINAL_DECODER}"
        )
        metavar = "WIDTH[/STAGES/KERNEL]"
        add("--decoder", type=Decoder.parse, metavar=metavar, default=ORIGINAL_DECODER, help=about)
    add("--official", type=Path, metavar="CLONE", help="folder of the original code, which then takes part")
    add("--original_precision", choices=["fp32", "bf16"], help="of the original (default: as ours)")
    add("--channels_last", action="store_true", help="memory format of the original; ours always has it")
    others = [layout for layout in LAYOUTS if layout != "masked"]
    add(
        "--layouts",
        nargs="+",
        choices=others,
        default=["packed"],
        help="of ours, beside masked (%(default)s)",
    )
    if name != "memory":
        add(
            "--compile",
            nargs="+",
            choices=["masked", "packed"],
            default=[],
            help="also through torch.compile",
        )
    if many:
        add("--plot", type=Path, help="PNG of images/s of one process against the mask ratio")
        about = "numbers of processes that train together, each on a batch of its own: on a CPU they share the threads "
        about += "out, on cuda each has a GPU; 1 is always measured too"
        add("--processes", type=int, nargs="+", default=[1], help=about)


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything that a command line asks for."""
    sizes = [(options.size[0], options.size[-1])]
    if options.command == "scaling":
        sizes = [(side, side) for side in options.size]
    layouts = ("masked", *dict.fromkeys(options.layouts or available_layouts(options.device)))
    return [
        Case(
            model=model,
            batch=batch,
            size=size,
            mask_ratio=ratio,
            decoder=options.decoder,
            precision=precision,
            device=options.device,
            channels_last=options.channels_last,
            threads=options.threads,
            official=options.official,
            original_precision=options.original_precision,
            layouts=tuple(
                x for x in layouts if (x, precision) != ("spconv", "bf16")
            ),  # it has none: packed twice
            compiled=tuple(dict.fromkeys(options.compile)),
        )
        for model, batch, size, precision, ratio in itertools.product(
            options.model, options.batch, sizes, options.precision, options.mask_ratio
        )
    ]


def available_layouts(device: str) -> list[str]:
    """The layouts beside masked that are worth measuring on a device.

    On a CPU spconv has only its slow algorithm and Triton only its interpreter, both for tests.
    """
    if torch.device(device).type == "cpu":
        return ["packed"]
    missing = [layout for layout in LAYOUTS if not is_available(layout)]
    if missing:
        print(f"note: left out, as their packages are missing: {', '.join(missing)}", file=sys.stderr)
    return [layout for layout in LAYOUTS if layout != "masked" and layout not in missing]


def check(options: argparse.Namespace) -> None:
    """Find what is wrong with a command line in seconds.

    Raises:
        UserError: no such device, a clone that is none, a table of another kind, numbers of processes that this machine
            lacks, a model, size or ratio that does not fit.
    """
    kind, _, index = options.device.partition(":")
    if kind not in ("cpu", "cuda") or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise UserError(f"--device is cpu, cuda or cuda:N, with {torch.cuda.device_count()} GPUs here")
    if options.command != "scaling" and len(options.size) > 2:
        raise UserError("--size takes one number, or H W")
    if options.original_precision and not options.official:
        raise UserError("--original_precision is of the original: name its folder by --official, too")
    if not set(options.compile) <= {"masked", *(options.layouts or ())}:
        raise UserError("--compile packed: name packed among --layouts, too")
    options.processes = sorted({1, *options.processes})
    if options.processes != [1] and (options.compile or options.official):
        raise UserError(
            "--official and --compile take part in a single process only: leave them or --processes out"
        )
    check_counts(options.processes, options.threads, options.device)
    if options.official is not None:
        import_original(options.official)  # a wrong folder is an error, for any model
        for name in options.model:
            if not has_model(name):
                print(f"note: the original has no {name}, so only ours are compared", file=sys.stderr)
    if options.command == "layouts" and options.csv:
        replace_cases(options.csv, [])  # refuses another kind of file
    for case in cases(options):
        with torch.device("meta"):  # shapes without numbers
            SparK(case.model, case.size, case.mask_ratio, **case.decoder.options)


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """A logger that writes nothing but errors meanwhile."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of one case after the other."""
    # Its notes on keys are for users' files; a weight that went astray fails the check of parity here.
    with errors_alone("spark.weights.official"):
        for case in cases(options):
            set_up_torch(case)
            if options.command == "memory":
                yield memory_rows(case)
            elif options.processes != [1]:
                yield process_rows(case, options.processes, options.rounds)
            else:
                kind = "encoder" if options.command in ("encoder", "layouts") else "step"
                yield timing_rows(case, kind, options.rounds)


def timing_rows(case: Case, kind: str, rounds: int) -> list[Row]:
    """A row for each contender: seconds of a "step" or of the "encoder" alone, in turns.

    Raises:
        UserError: the contenders' results differ.
    """
    bench = checked(case, kind)
    computed, limit = flops_per_image(bench, kind)
    steps = {name: partial(bench.step, c, kind) for name, c in bench.contenders.items()}
    seconds = interleaved(steps, rounds, case.device)
    return [
        {
            **description(bench, contender, kind),
            **summary(seconds[name], seconds[case.names[0]], case.batch),
            "rounds": str(rounds),
            "gflops": f"{computed[name] / 1e9:.4f}" if name in computed else "",
            "gflops_limit": f"{limit / 1e9:.4f}",
            **versions(),
        }
        for name, contender in bench.contenders.items()
    ]


def process_rows(case: Case, counts: Sequence[int], rounds: int) -> list[Row]:
    """A row for each contender with each number of processes: seconds of a "step", images/s of all, efficiency.

    Args:
        case: what one process does.
        counts: numbers of processes, 1 among them.
        rounds: timed steps of each contender in a pass (see `tools.benchmarks.processes`).

    Raises:
        UserError: the contenders' results differ, or a process failed.
    """
    bench = checked(case, "step")
    computed, limit = flops_per_image(bench, "step")
    described = {name: description(bench, c, "step") for name, c in bench.contenders.items()}
    del bench
    free_memory(case.device)
    passes = passes_of_groups(case, counts, rounds)
    rows = []
    for count, name in itertools.product(counts, described):
        times, base = ([s for turn in passes for s in turn[count][who]] for who in (name, case.names[0]))
        each = efficiencies(case, passes, count, name)
        rows.append(
            {
                **described[name],
                "threads": str(shared_case(case, count).threads),
                "processes": str(count),
                **summary(times, base, count * case.batch),
                "efficiency": f"{statistics.median(each):.3f}",
                "efficiency_low": f"{min(each):.3f}",
                "efficiency_high": f"{max(each):.3f}",
                "rounds": str(len(times)),
                "gflops": f"{computed[name] / 1e9:.4f}" if name in computed else "",
                "gflops_limit": f"{limit / 1e9:.4f}",
                **versions(),
            }
        )
    return rows


def memory_rows(case: Case) -> list[Row]:
    """A row for each contender: bytes saved by a forward, the peak of a step, and their ratios to the base's.

    Raises:
        UserError: the contenders' losses differ.
    """
    bench = checked(case, "step")
    saved: dict[str, dict[str, int]] = {"encoder": {}, "step": {}}
    for kind, name in itertools.product(saved, bench.contenders):
        contender = bench.contenders[name]
        saved[kind][name] = saved_bytes(partial(bench.forward, contender, kind), contender.model)
    described = {name: description(bench, c, "step") for name, c in bench.contenders.items()}
    del bench, contender
    free_memory(case.device)
    peak = {name: peak_alone(case, name) for name in described}
    base = case.names[0]

    def ratio(number: int | None, other: int | None) -> str:
        return f"{number / other:.3f}" if number and other else ""

    return [
        {
            **described[name],
            "saved_encoder_bytes": str(saved["encoder"][name]),
            "saved_step_bytes": str(saved["step"][name]),
            "peak_step_bytes": "" if peak[name] is None else str(peak[name]),
            "saved_encoder_ratio": ratio(saved["encoder"][name], saved["encoder"][base]),
            "saved_step_ratio": ratio(saved["step"][name], saved["step"][base]),
            "peak_step_ratio": ratio(peak[name], peak[base]),
            **versions(),
        }
        for name in described
    ]


def free_memory(device: str) -> None:
    """Hand back what was dropped: the processes that are started next need it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def description(bench: Bench, contender: Contender, kind: str) -> Row:
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
        "decoder": str(contender.decoder),
        "precision": contender.precision,
        "channels_last": str(contender.channels_last).lower(),
        "threads": str(case.threads),
        "processes": str(case.processes),
        "device": device_name(case.device),
        "original_commit": commit_of(case.official) if case.official else "",
    }


def measured_table(options: argparse.Namespace, timings: list[Row]) -> list[Row]:
    """The table of layouts with these timings in place of those of the same cases."""
    kinds = {name: convolution_kind(build_encoder(name)) for name in {row["model"] for row in timings}}
    device_type = torch.device(options.device).type
    rows = [
        {**row, "device_type": device_type, "convolutions": kinds[row["model"]], "layout": row["contender"]}
        for row in timings
    ]
    return replace_cases(options.csv, [{column: row[column] for column in MEASURED} for row in rows])


def replace_cases(path: Path, rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """The table in a file with these rows in place of those of the same cases, after all others.

    A case goes as a whole, with all its layouts: their speed-ups are over the same masked one.

    Raises:
        UserError: the file has other columns.
    """

    def case(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[column] for column in MEASURED[: MEASURED.index("layout")])

    kept: list[Row] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != MEASURED:
                raise UserError(f"{path} is no table of layouts: its first line must be {','.join(MEASURED)}")
            kept = list(reader)
    measured = {case(row) for row in rows}
    return [*(row for row in kept if case(row) not in measured), *map(dict, rows)]


def finish(options: argparse.Namespace, rows: list[Row]) -> None:
    """Draw what was measured of one process."""
    if options.plot:
        plot_scaling([row for row in rows if row["processes"] == "1"], options.plot)


ABOUT = {
    "step": "time the forward and backward of the whole of SparK",
    "encoder": "time the forward and backward of the encoder alone",
    "memory": "count the bytes saved for the backward, and the peak of a step",
    "scaling": "`step` at every batch, size and mask ratio that is named",
    "layouts": "`encoder` in every layout that runs on the device, for layout auto; in the file named by --csv the "
    "rows take the place of those of the same cases",
}
COMMANDS = {
    name: Command(
        about,
        partial(add_options, name=name),
        measure,
        check,
        measured_table if name == "layouts" else None,
        finish,
    )
    for name, about in ABOUT.items()
}
