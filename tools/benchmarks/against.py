"""Steps of this tree beside those of another checkout of this project: time in turns, and peak memory.

Two commits cannot be imported into one process. Each runs in a worker process of its own, which takes a step when it is
told to on its standard input and waits otherwise, so contenders take turns step by step here, too. The worker
(`WORKER`) uses nothing of either tree but names that all commits have.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from spark.errors import UserError
from spark.sparse.choice import device_name
from tools.benchmarks.original import commit_of
from tools.benchmarks.rows import Command, Row, versions
from tools.benchmarks.timing import interleaved, summary

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("against_worker.py")


class Worker:
    """A checkout in a process of its own.

    Args:
        checkout: its folder.
        case: what is measured, see `against_worker.py`.

    Raises:
        UserError: the checkout cannot run the case.
    """

    def __init__(self, checkout: Path, case: dict[str, Any]):
        self.checkout = checkout
        # Threads of the one that waits must not spin.
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_WAIT_POLICY": "passive"}
        environment |= {
            "MALLOC_MMAP_THRESHOLD_": str(2**16)
        }  # freed memory goes back at once: peaks are true
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(case)],
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.value = float(self.answer())

    def ask(self, what: str) -> str:
        """Have it do something; its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        """The next line that it writes.

        Raises:
            UserError: it ended.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise UserError(
                f"the worker of {self.checkout} ended with status {self.process.wait()}; see above"
            )
        return line.strip()

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("checkout", type=Path, help="the other checkout, such as a git worktree of another commit")
    kinds = ["step", "encoder", "depth"]
    about = "step of SparK, its encoder alone, step of UNet++ on depth (%(default)s)"
    add("--kind", nargs="+", choices=kinds, default=kinds, help=about)
    add("--model", nargs="+", default=["resnet50", "convnext_tiny"], help="timm names (%(default)s)")
    add("--batch", type=int, default=16, help="images of a step (%(default)s)")
    add("--size", type=int, default=224, help="side of the square images [px] (%(default)s)")
    add("--mask_ratio", type=float, default=0.6, help="share of masked patches (%(default)s)")
    add("--layout", nargs="+", default=["packed"], help="of SparK (%(default)s)")
    add("--width", type=int, default=768, help="decoder_width of SparK (%(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")


def check(options: argparse.Namespace) -> None:
    """Raise UserError where the folder is no checkout of this project."""
    if not (options.checkout / "spark" / "__init__.py").is_file():
        raise UserError(f"{options.checkout} is no checkout of this project: it has no spark/__init__.py")


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Two rows a case: the other checkout and this one.

    Raises:
        UserError: the two compute different losses.
    """
    for kind, model in itertools.product(options.kind, options.model):
        for layout in options.layout if kind != "depth" else [""]:
            named = ("batch", "size", "mask_ratio", "width", "precision", "threads", "device")
            case = {"kind": kind, "model": model, "layout": layout, **{n: getattr(options, n) for n in named}}
            yield rows_of(case, options.checkout.resolve(), options.rounds)


def rows_of(case: dict[str, Any], checkout: Path, rounds: int) -> list[Row]:
    """Rows of a case."""
    workers: dict[str, Worker] = {}
    try:
        for name, folder in (("other", checkout), ("this", ROOT)):
            workers[name] = Worker(folder, case)
        values = [worker.value for worker in workers.values()]
        if abs(values[1] - values[0]) > 1e-3 * abs(values[0]):
            raise UserError(
                f"{case['kind']} of {case['model']}: the two compute {values}: nothing is measured"
            )
        peaks = {name: worker.ask("memory") for name, worker in workers.items()}
        seconds = interleaved({n: lambda w=w: w.ask("step") for n, w in workers.items()}, rounds, "cpu")
    finally:
        for worker in workers.values():
            worker.close()
    return [
        {
            "kind": f"against {case['kind']}",
            "model": case["model"],
            "contender": name,
            "base": "other",
            "layout": case["layout"],
            **{
                key: str(case[key])
                for key in ("batch", "size", "mask_ratio", "width", "precision", "threads")
            },
            "device": device_name(case["device"]),
            "commit": commit_of(worker.checkout),
            **summary(seconds[name], seconds["other"], case["batch"]),
            "peak_step_bytes": peaks[name],
            "peak_step_ratio": f"{int(peaks[name]) / max(1, int(peaks['other'])):.3f}",
            "rounds": str(rounds),
            **versions(),
        }
        for name, worker in workers.items()
    ]


COMMANDS = {
    "against": Command(
        "steps of this tree beside those of another checkout of this project: time in turns, peak memory",
        add_options,
        measure,
        check,
    )
}
