"""Measure SparK on this machine: time and memory of a training step, packed against masked against the original code.

    python tools/benchmark.py step --model resnet50 convnext_tiny --csv step.csv
    python tools/benchmark.py step --official ~/SparK          # a clone of github.com/keyu-tian/SparK takes part
    python tools/benchmark.py encoder                          # the encoder alone: forward, backward of all features
    python tools/benchmark.py step --compile packed            # and through torch.compile, which takes minutes
    python tools/benchmark.py memory                           # bytes saved for the backward, and the peak of a step
    python tools/benchmark.py scaling --mask_ratio 0.3 0.6 0.9 --csv scaling.csv --plot scaling.png
    python tools/benchmark.py scaling --mask_ratio 0.6 --processes 1 2 4 --csv processes.csv
    python tools/benchmark.py loader --data ~/photos                       # images/s per core of reading and augmenting
    python tools/benchmark.py distillation                     # depth: what the segmentation decoder costs in training
    python tools/benchmark.py scoring                          # depth: scoring predictions, protocol by protocol
    python tools/benchmark.py layouts --csv spark/sparse/measured.csv      # the table behind `layout="auto"`

Every ratio is taken in one process: contenders take turns, step by step, and the number is the median of the ratios of
neighbouring steps. Ratios are over the original where it takes part, else over the masked layout; of the loader, over
Pillow with torchvision's transforms. Nothing is measured unless all contenders first give the same loss (or features)
and gradients on the same weights and mask; of the loader, the same pictures.
Timings are worth something only on an idle machine, so a busy one is refused.
"""

import argparse
import gc
import itertools
import logging
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from benchmarks.contenders import Bench, Case, Contender, set_up_torch
from benchmarks.decoders import ORIGINAL_DECODER, Decoder
from benchmarks.flops import flops_per_image, plot_scaling
from benchmarks.layouts import layouts_of, replace_cases, table_rows
from benchmarks.loader import PATCH, loader_rows
from benchmarks.memory import peak_alone, saved_bytes
from benchmarks.original import commit_of, has_model, import_original
from benchmarks.parity import checked
from benchmarks.processes import check_counts, efficiencies, passes_of_groups, shared_case
from benchmarks.rows import rows_as_csv
from benchmarks.timing import interleaved, refuse_busy_machine, summary
from rich.console import Console
from rich.table import Table

from spark import SparK
from spark.errors import UserError
from spark.files import write_whole
from spark.sparse import LAYOUTS, MissingRuleError
from spark.sparse.choice import device_name
from spark.training.accelerator import usable_cores

APART = ("loader", "distillation", "scoring")
"""Commands with options of their own, in which SparK takes no part or trains nothing."""

CASE = {
    "config": "config",
    "encoder": "encoder",
    "model": "model",
    "data": "data",
    "decoder": "decoder",
    "precision": "precision",
    "threads": "threads",
    "processes": "processes",
    "workers": "workers",
    "contender": "contender",
    "batch": "batch",
    "size": "size",
    "mask": "mask_ratio",
}
"""Heading in the printed table -> what a row is of; what all rows share stands below the table."""

SHOWN = {
    "seconds": "seconds_median",
    "images/s": "images_per_second",
    "images/s per core": "images_per_second_per_core",
    "speedup": "speedup_median",
    "cost": "cost_median",
    "GMACs of training": "gmacs_training",
    "cost in GMACs": "gmacs_cost",
    "cores to keep up": "cores_to_keep_up",
    "efficiency": "efficiency",
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
        "layouts": "`encoder` in every layout that runs on the device, for layout auto; in the file named by --csv the "
        "rows take the place of those of the same cases",
    }.items():
        command = commands.add_parser(name, help=about)
        many = "+" if name == "scaling" else None
        layouts = name == "layouts"
        models = ["resnet18", "convnext_atto"] if layouts else []
        models += ["resnet50", "convnext_tiny"]
        command.add_argument("--model", nargs="+", default=models, help="timm names (%(default)s)")
        command.add_argument(
            "--batch",
            type=whole_number(1),
            nargs=many,
            default=[16] if many else 16,
            help="images of a step (default: 16)",
        )
        command.add_argument(
            "--size",
            type=whole_number(1),
            nargs="+",
            default=[224],
            help="image sizes in pixels, of squares (default: 224)"
            if many
            else "image size in pixels: one number, or H W (default: 224)",
        )
        command.add_argument(
            "--mask_ratio",
            type=float,
            nargs="+" if layouts else many,
            default=[0.3, 0.6, 0.9] if layouts else [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] if many else 0.6,
            help="share of the patches that are hidden (%(default)s)",
        )
        if name not in ("encoder", "layouts"):
            command.add_argument(
                "--decoder",
                type=Decoder.parse,
                default=ORIGINAL_DECODER,
                metavar="WIDTH[/STAGES/KERNEL]",
                help=f"of ours: decoder_width, decoder_stages, densify_kernel; the original keeps {ORIGINAL_DECODER}, "
                "with which it is compared with ours first (%(default)s)",
            )
        command.add_argument(
            "--precision",
            choices=["fp32", "bf16"],
            nargs="+" if layouts else None,
            default=["fp32", "bf16"] if layouts else "fp32",
            help="of the computation (%(default)s)",
        )
        command.set_defaults(channels_last=False, official=None, original_precision=None, compile=[])
        if not layouts:
            command.add_argument(
                "--channels_last",
                action="store_true",
                help="memory format of the original (ours is always channels_last)",
            )
            command.add_argument("--official", type=Path, metavar="CLONE", help="folder of the original code")
            command.add_argument(
                "--original_precision",
                choices=["fp32", "bf16"],
                help="of the original, such as fp32, in which it is shipped, beside ours in bf16 (default: as ours)",
            )
            command.add_argument(
                "--layouts",
                nargs="+",
                choices=[layout for layout in LAYOUTS if layout != "masked"],
                default=["packed"],
                help="of ours, compared beside masked, which always takes part (default: packed)",
            )
        if name in ("step", "encoder", "scaling"):
            command.add_argument(
                "--compile",
                nargs="+",
                choices=["masked", "packed"],
                help="layouts that take part through torch.compile, too, which takes minutes for each case "
                "(default: none)",
            )
        command.add_argument(
            "--threads",
            type=whole_number(1),
            default=usable_cores(),
            help="CPU threads (default: one for each core that this process may use)",
        )
        if name != "memory":
            command.add_argument(
                "--rounds", type=int, default=7, help="timed steps of each contender (default: 7)"
            )
        command.add_argument(
            "--device",
            type=usable_device,
            default="cuda" if torch.cuda.is_available() else "cpu",
            help="cpu, cuda or cuda:N (default: a GPU if there is one)",
        )
        command.add_argument("--csv", type=Path, help="write the rows to this file")
        if many:
            command.add_argument(
                "--plot", type=png_file, help="draw images/s of one process against the mask ratio, as PNG"
            )
            command.add_argument(
                "--processes",
                type=whole_number(1),
                nargs="+",
                default=[1],
                help="numbers of processes that train together, each on a batch of its own: on a CPU they share the "
                "threads out, on cuda each has a GPU; 1 is always measured too, as efficiency is over it (default: 1)",
            )
        command.add_argument("--busy", action="store_true", help="measure even though other programs run")
    add_loader_command(commands)
    add_depth_commands(commands)
    options = parser.parse_args(arguments)
    if options.command not in APART and not many_sizes(options) and len(options.size) > 2:
        parser.error("--size takes one number, or H W")
    if options.command != "memory" and options.rounds < 2:
        parser.error("--rounds must be 2 or more: one time has no spread")
    if getattr(options, "original_precision", None) and not options.official:
        parser.error("--original_precision is of the original: name its folder by --official, too")
    if "spconv" in getattr(options, "layouts", []) and options.precision == "bf16":
        parser.error(
            "--layouts spconv computes nothing in bf16, it would be packed: leave it out, or use fp32"
        )
    if not set(getattr(options, "compile", [])) <= {"masked", *getattr(options, "layouts", ["packed"])}:
        parser.error("--compile packed: name packed among --layouts, too")
    if many_sizes(options):
        options.processes = sorted({1, *options.processes})
        if options.compile and options.processes != [1]:
            parser.error("--compile takes part in a single process only: leave it out, or --processes")
        if options.official and options.processes != [1]:
            parser.error("--official takes part in a single process only: leave it out, or --processes")
    return options


def add_loader_command(commands: Any) -> None:
    """The command that reads images and trains nothing, so that most options of the others mean nothing to it."""
    about = "images/s per core of the pretraining loader, beside Pillow with torchvision's transforms"
    command = commands.add_parser("loader", help=about, description=about)
    command.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER_OR_LIST",
        help="images to read: a folder, searched recursively, or a text file with one path a line (default: synthetic "
        "JPEGs of 500x375 px, about 125 kB each, in a temporary folder)",
    )
    command.add_argument(
        "--size",
        type=whole_number(2 * PATCH),
        default=224,
        help=f"side of the square pictures [px], {2 * PATCH} or more, for their masks (default: 224)",
    )
    command.add_argument(
        "--batch", type=whole_number(1), default=64, help="images of a batch; four are a turn (default: 64)"
    )
    command.add_argument(
        "--workers",
        type=whole_number(0),
        default=0,
        help="loader processes of each contender; 0 reads in the process itself, on one core (default: 0)",
    )
    command.add_argument("--rounds", type=int, default=7, help="timed turns of each contender (default: 7)")
    command.add_argument("--csv", type=Path, help="write the rows to this file")
    command.add_argument("--busy", action="store_true", help="measure even though other programs run")
    command.set_defaults(official=None)


def add_depth_commands(commands: Any) -> None:
    """The commands on depth training, in which SparK takes no part."""
    about = "time and GMACs of a training step with the segmentation loss of a run card over those without"
    command = commands.add_parser("distillation", help=about, description=about)
    command.add_argument(
        "--config", default="zoedepth_distil", help="name of a run card in configs/depth (%(default)s)"
    )
    command.add_argument(
        "--encoder", default="resnet18", help="timm name, where the card names none (%(default)s)"
    )
    command.add_argument(
        "--size",
        type=height_by_width,
        nargs="+",
        default=[(96, 128), (192, 256)],
        metavar="HxW",
        help="image sizes [px], each measured (default: 96x128 192x256)",
    )
    command.add_argument("--batch", type=whole_number(1), default=4, help="images of a step (default: 4)")
    command.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of training (default: fp32)"
    )

    about = "seconds that scoring predictions takes under a protocol, without making them or reading files"
    command = commands.add_parser("scoring", help=about, description=about)
    command.add_argument(
        "--protocol",
        nargs="+",
        default=["nyu-bts"],
        help="names of protocols of NYU (default: nyu-bts); ratios are over the first",
    )
    command.add_argument(
        "--images", type=whole_number(2), default=654, help="images of a turn (default: 654)"
    )
    command.add_argument(
        "--size",
        type=height_by_width,
        default=(480, 640),
        metavar="HxW",
        help="size of the predictions [px]; ground truth has 480x640 (default: 480x640)",
    )
    for name in ("distillation", "scoring"):
        command = commands.choices[name]
        command.add_argument(
            "--threads",
            type=whole_number(1),
            default=usable_cores(),
            help="of PyTorch (default: one for each core that this process may use)",
        )
        command.add_argument(
            "--rounds", type=int, default=7, help="timed turns of each contender (default: 7)"
        )
        command.add_argument("--csv", type=Path, help="write the rows to this file")
        command.add_argument("--busy", action="store_true", help="measure even though other programs run")
        command.set_defaults(official=None)


def height_by_width(text: str) -> tuple[int, int]:
    """Reader of an option: a size in pixels, such as 96x128."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH in pixels, such as 96x128, not {text}")
    return int(height), int(width)


def whole_number(least: int) -> Callable[[str], int]:
    """Reader of an option: a whole number that is not below `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be a whole number, {least} or more, not {text}")
        return number

    return read


def png_file(text: str) -> Path:
    """Reader of an option: a file to draw."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"must end in .png, not {text}")
    return Path(text)


def usable_device(text: str) -> str:
    """Reader of an option: a CPU or a GPU that is there."""
    kind, _, index = text.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {text}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"PyTorch sees {torch.cuda.device_count()} GPUs here, so not {text}")
    return text


def many_sizes(options: argparse.Namespace) -> bool:
    """Whether the numbers after --size are squares of their own, not H W."""
    return options.command == "scaling"


def cases(options: argparse.Namespace) -> list[Case]:
    """Everything that this command line asks for."""
    if many_sizes(options):
        sizes = [(side, side) for side in options.size]
    else:
        sizes = [(options.size[0], options.size[-1])]
    if options.command == "layouts":
        layouts = layouts_of(options.device)
    else:
        layouts = ("masked", *dict.fromkeys(options.layouts))
    return [
        Case(
            model=model,
            batch=batch,
            size=size,
            mask_ratio=ratio,
            decoder=getattr(options, "decoder", ORIGINAL_DECODER),
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
            options.model,
            _each(options.batch),
            sizes,
            _each(options.precision),
            _each(options.mask_ratio),
        )
    ]


def _each(value: Any) -> list[Any]:
    """The values of an option that some commands take one of and others several."""
    return value if isinstance(value, list) else [value]


@contextmanager
def errors_alone(name: str) -> Iterator[None]:
    """A logger that says nothing but errors meanwhile."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# What it says of keys is for users' files; a weight that went astray fails the check of parity here.
@errors_alone("spark.weights.official")
def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, write CSV rows as they come, print a table."""
    options = parse_arguments(arguments)
    rows: list[dict[str, str]] = []
    try:
        check(options)
        refuse_busy_machine(options.busy)
        for measured in measurements(options):
            rows += measured
            if options.csv:
                whole = (
                    replace_cases(options.csv, table_rows(measured, options.device))
                    if options.command == "layouts"
                    else rows
                )
                write_whole(options.csv, rows_as_csv(whole).encode())
        if many_sizes(options) and options.plot:
            plot_scaling([row for row in rows if row["processes"] == "1"], options.plot)
    except (ValueError, OSError, MissingRuleError, torch.cuda.OutOfMemoryError, BrokenProcessPool) as error:
        if rows:  # what was measured before is measured
            show(rows, options.command)
        print(f"error: {_sentence(error)}", file=sys.stderr)
        sys.exit(2)
    show(rows, options.command)


def _sentence(error: Exception) -> str:
    if isinstance(error, BrokenProcessPool):
        return "the process whose memory was measured was ended from outside: if the memory was full, lower --batch"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"the GPU's memory is full, lower --batch ({str(error).splitlines()[0]})"
    return str(error)


def check(options: argparse.Namespace) -> None:
    """Find what is wrong with a command line in seconds, before anything is waited for or measured.

    Raises:
        ValueError: a clone that is none, a table of another kind, a file that cannot be written, numbers of processes
            that this machine lacks, a model, size or ratio that does not fit; each says what does.
    """
    for file in filter(None, (options.csv, getattr(options, "plot", None))):
        folder = next(parent for parent in file.absolute().parents if parent.exists())
        if file.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"{file} cannot be written: name a file in a folder that you may write to")
    if options.command == "distillation":
        from benchmarks.depth import read_card  # depth's packages take seconds to import

        read_card(options.config, "resnet18", data_root=".")
    if options.command in APART:
        return
    if options.official is not None:
        import_original(options.official)  # a wrong folder is an error, whatever the models
        for name in options.model:
            if not has_model(name):
                print(f"note: the original has no {name}, so only ours are compared", file=sys.stderr)
    if options.command == "layouts" and options.csv:
        replace_cases(options.csv, [])  # refuses another kind of file
    if many_sizes(options):
        check_counts(options.processes, options.threads, options.device)
    for case in cases(options):
        with torch.device("meta"):  # shapes without numbers
            SparK(case.model, case.size, case.mask_ratio, **case.decoder.options)


def measurements(options: argparse.Namespace) -> Iterator[list[dict[str, str]]]:
    """Rows as they are measured: those of the loader, or of one case after the other."""
    if options.command == "loader":
        yield loader_rows(options.data, options.size, options.batch, options.workers, options.rounds)
        return
    if options.command == "scoring":
        from benchmarks.scoring import scoring_rows

        torch.set_num_threads(options.threads)
        yield scoring_rows(options.protocol, options.images, options.size, options.rounds)
        return
    if options.command == "distillation":
        from benchmarks.depth import distillation_rows

        torch.set_num_threads(options.threads)
        given = (options.config, options.encoder, options.size, options.batch, options.precision)
        yield distillation_rows(*given, options.rounds)
        return
    for case in cases(options):
        set_up_torch(case)
        if options.command == "memory":
            yield memory_rows(case)
        elif many_sizes(options) and options.processes != [1]:
            yield process_rows(case, options.processes, options.rounds)
        else:
            kind = "encoder" if options.command in ("encoder", "layouts") else "step"
            yield timing_rows(case, kind, options.rounds)


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
            "gflops": f"{computed[name] / 1e9:.4f}" if name in computed else "",
            "gflops_limit": f"{limit / 1e9:.4f}",
            **versions(),
        }
        for name, contender in bench.contenders.items()
    ]


def process_rows(case: Case, counts: Sequence[int], rounds: int) -> list[dict[str, str]]:
    """A row for each contender with each number of processes: seconds of a "step", images/s of all, efficiency.

    Args:
        case: what one process does.
        counts: numbers of processes, 1 among them.
        rounds: timed steps of each contender in a pass (see `benchmarks.processes`).

    Raises:
        ValueError: the contenders' results differ, or a process failed.
    """
    bench = checked(case, "step")
    computed, limit = flops_per_image(bench, "step")
    described = {name: description(bench, c, "step") for name, c in bench.contenders.items()}
    del bench
    _free_memory(case.device)
    passes = passes_of_groups(case, counts, rounds)
    rows = []
    for count, name in itertools.product(counts, described):
        shared = shared_case(case, count)
        times, base = (
            [seconds for turn in passes for seconds in turn[count][who]] for who in (name, case.names[0])
        )
        each = efficiencies(case, passes, count, name)
        rows.append(
            {
                **described[name],
                "threads": str(shared.threads),
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


def memory_rows(case: Case) -> list[dict[str, str]]:
    """A row for each contender: bytes saved by a forward, the peak of a step, and their ratios to the base's.

    Raises:
        ValueError: the contenders' losses differ.
    """
    bench = checked(case, "step")
    saved: dict[str, dict[str, int]] = {"encoder": {}, "step": {}}
    for kind, name in itertools.product(saved, bench.contenders):
        contender = bench.contenders[name]
        saved[kind][name] = saved_bytes(partial(bench.forward, contender, kind), contender.model)
    described = {name: description(bench, c, "step") for name, c in bench.contenders.items()}
    del bench, contender
    _free_memory(case.device)
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


def _free_memory(device: str) -> None:
    """Hand back what was dropped: the processes that are started next need it."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


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
        "decoder": str(contender.decoder),
        "precision": contender.precision,
        "channels_last": str(contender.channels_last).lower(),
        "threads": str(case.threads),
        "processes": str(case.processes),
        "device": device_name(case.device),
        "original_commit": commit_of(case.official) if case.official else "",
    }


def versions() -> dict[str, str]:
    """Last columns of a row."""
    return {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}


def show(rows: Sequence[dict[str, str]], command: str) -> None:
    """Print the rows as a table."""
    cells = [{**row, "size": f"{row['height']}x{row['width']}"} for row in rows]
    case = {heading: column for heading, column in CASE.items() if column in cells[0]}
    shared = {
        heading: column
        for heading, column in case.items()
        if heading != "contender" and len({row[column] for row in cells}) == 1
    }
    columns = {heading: column for heading, column in (case | SHOWN).items() if column in cells[0]}
    table = Table(
        title=f"{command}: ratios are over the first contender" + " of each model" * ("model" in case),
        caption=", ".join(f"{heading} {cells[0][column]}" for heading, column in shared.items()),
    )
    for heading in shared:
        del columns[heading]
    for heading in columns:
        table.add_column(heading, justify="left" if heading in case else "right")
    for row in cells:
        table.add_row(*(row[column] for column in columns.values()))
    console = Console()
    if not console.is_terminal:  # a file has no width: as wide as the table is
        console.width = 1000
        console.width = console.measure(table).maximum
    console.print(table)


if __name__ == "__main__":
    main()
