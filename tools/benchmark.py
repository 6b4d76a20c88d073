"""Time training steps of this project on this machine.

    python tools/benchmark.py step --model resnet50 convnext_tiny --batch 16 --size 224 --csv step.csv

Every ratio is taken in one process: contenders take turns, step by step, and the number is the median of the ratios of
neighbouring steps. No ratio is printed unless all contenders first give the same loss on the same weights and mask.
Timings are worth something only on an idle machine, so a busy one is refused.
"""

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

from spark import SparK
from spark.masking import random_visible

COLUMNS = [
    *(
        "model",
        "contender",
        "batch",
        "height",
        "width",
        "mask_ratio",
        "decoder_width",
        "precision",
        "threads",
    ),
    *(
        "device",
        "seconds_median",
        "seconds_quartile_low",
        "seconds_quartile_high",
        "speedup_median",
        "rounds",
    ),
    *("torch", "timm", "python"),
]


def main() -> None:
    """Read the command line, time, print a table, write CSV rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="forward and backward of SparK: packed against masked layout")
    step.add_argument("--model", nargs="+", default=["resnet50", "convnext_tiny"], help="timm names")
    step.add_argument("--batch", type=int, default=16)
    step.add_argument(
        "--size", type=int, nargs="+", default=[224], help="image size in pixels: one number, or H W"
    )
    step.add_argument("--mask_ratio", type=float, default=0.6)
    step.add_argument("--decoder_width", type=int, default=768)
    step.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    step.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    step.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    step.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    step.add_argument("--csv", type=Path, help="write the rows to this file")
    step.add_argument("--busy", action="store_true", help="time even though other programs run")
    options = parser.parse_args()
    try:
        refuse_busy_machine(options.busy)
        torch.set_num_threads(options.threads)
        rows = [row for name in options.model for row in time_steps(name, options)]
    except ValueError as error:
        sys.exit(f"error: {error}")
    show(rows)
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


def refuse_busy_machine(allowed: bool) -> None:
    """A second busy process makes OpenMP code several times slower, unevenly: such timings say nothing."""
    load = os.getloadavg()[0]
    if load > 0.5 and not allowed:
        raise ValueError(
            f"this machine is busy (load {load:.1f}): wait until other programs have ended, or pass --busy"
        )


def time_steps(name: str, options: argparse.Namespace) -> list[dict]:
    """Rows of one encoder: the masked layout, then the packed layout relative to it."""
    size = (options.size[0], options.size[-1])
    models: dict[str, SparK] = {}
    for layout in ("masked", "packed"):
        torch.manual_seed(0)
        models[layout] = SparK(
            name, size, options.mask_ratio, decoder_width=options.decoder_width, layout=layout, sync_bn=False
        ).to(options.device)
    images = torch.randn(options.batch, 3, *size, device=options.device)
    visible = random_visible(
        options.batch,
        models["packed"].grid,
        options.mask_ratio,
        generator=torch.Generator().manual_seed(0),
        device=options.device,
    )

    def step(model: SparK) -> torch.Tensor:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model(images, visible).loss
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    refuse_unequal({layout: step(model).item() for layout, model in models.items()}, options.precision)
    seconds = interleaved({layout: lambda m=m: step(m) for layout, m in models.items()}, options)
    return [
        {
            "model": name,
            "contender": layout,
            "batch": options.batch,
            "height": size[0],
            "width": size[1],
            "mask_ratio": options.mask_ratio,
            "decoder_width": options.decoder_width,
            "precision": options.precision,
            "threads": options.threads,
            "device": device_name(options.device),
            "seconds_median": f"{statistics.median(times):.4f}",
            "seconds_quartile_low": f"{statistics.quantiles(times, n=4)[0]:.4f}",
            "seconds_quartile_high": f"{statistics.quantiles(times, n=4)[2]:.4f}",
            "speedup_median": f"{statistics.median(a / b for a, b in zip(seconds['masked'], times, strict=True)):.3f}",
            "rounds": options.rounds,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        }
        for layout, times in seconds.items()
    ]


def refuse_unequal(losses: dict[str, float], precision: str) -> None:
    """Speed of a wrong result is no speed."""
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= tolerance * abs(high):
        raise ValueError(
            f"the contenders' losses differ on the same weights and mask, so none is timed: {losses}"
        )


def interleaved(
    steps: dict[str, Callable[[], object]], options: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of every step, contenders in turn; two rounds of warming up are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 2):
        for name, step in steps.items():
            synchronise(options.device)
            begin = time.perf_counter()
            step()
            synchronise(options.device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def synchronise(device: str) -> None:
    """Wait for the work that was handed to the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """Kind of machine, without anything that identifies it."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu ({platform.machine()})"


def show(rows: list[dict]) -> None:
    """Print the rows as a table."""
    table = Table(title="forward + backward; speedup over the masked layout, median of paired ratios")
    for column in ("model", "contender", "seconds", "images/s", "speedup"):
        table.add_column(column, justify="left" if column in ("model", "contender") else "right")
    for row in rows:
        rate = row["batch"] / float(row["seconds_median"])
        table.add_row(
            row["model"],
            row["contender"],
            row["seconds_median"],
            f"{rate:.1f}",
            f"{float(row['speedup_median']):.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
