"""Seconds of steps that take turns, and their summary."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from spark.errors import UserError

_WARM_UP = 2  # turns that are not counted: libraries choose their kernels in them


def refuse_busy_machine(allowed: bool) -> None:
    """A second busy process makes OpenMP code several times slower, unevenly: such timings say nothing.

    The load is a mean over the last minute or so; while it falls, as after an earlier benchmark, this waits.

    Raises:
        ValueError: others compute on this machine, and that is not allowed.
    """
    before = math.inf
    while not allowed and (load := os.getloadavg()[0]) > 0.5:
        if load >= before:
            raise UserError(
                f"this machine is busy (load {load:.1f}): wait until other programs have ended, or pass --busy"
            )
        before = load
        time.sleep(10)


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every step [s], contenders in turn, so that what slows the machine down slows all of them.

    Every turn begins with another contender: who comes after whom (caches, freed memory, clock rates) evens out.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + _WARM_UP):
        first = turn % len(steps)
        for name, step in [*steps.items()][first:] + [*steps.items()][:first]:
            _synchronise(device)
            begin = time.perf_counter()
            step()
            _synchronise(device)
            if turn >= _WARM_UP:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def summary(times: Sequence[float], base: Sequence[float], batch: int) -> dict[str, str]:
    """Median and quartiles of these times [s] and of their paired speedups over `base`, and images/s at the median."""
    speedups = [b / t for b, t in zip(base, times, strict=True)]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    slow, speedup, fast = statistics.quantiles(speedups, n=4, method="inclusive")
    return {
        "seconds_median": f"{median:.6f}",
        "seconds_quartile_low": f"{low:.6f}",
        "seconds_quartile_high": f"{high:.6f}",
        "images_per_second": f"{batch / median:.3f}",
        "speedup_median": f"{speedup:.3f}",
        "speedup_quartile_low": f"{slow:.3f}",
        "speedup_quartile_high": f"{fast:.3f}",
    }


def _synchronise(device: str) -> None:
    """Wait for the work that was handed to the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
