"""Bytes that a step needs: what its forward keeps for the backward, and the peak of the whole step.

The first is exact and the same on every machine; the second contains what the libraries allocate besides.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tools.benchmarks.contenders import Bench, Case, set_up_torch


def saved_bytes(forward: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the storages that this forward keeps for the backward, each once; parameters and buffers not counted.

    A view keeps its whole storage alive, so the whole of it counts.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()  # while its graph lives, no address is given out twice
    del kept
    return sum(sizes.values())


def peak_bytes(step: Callable[[], object], device: str) -> int | None:
    """Most bytes held during a step over what is held before it; the step is taken twice, the second one counts.

    CUDA: of PyTorch's allocator. CPU: of the process's resident memory, whose peak Linux lets a process reset; None on
    other systems. The latter means something only in a process that hands freed memory back, see `peak_alone`.
    """
    step()  # libraries make their caches in the first
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # proc(5): the peak becomes what is resident now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(entry: str) -> int:
    """An entry of /proc/self/status [bytes]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


def peak_alone(case: Case, name: str) -> int | None:
    """`peak_bytes` of one contender's step in a process of its own.

    There nothing else is in memory, and glibc maps every allocation from 64 KiB on for itself, so that freed memory
    goes back to the system at once and is not found resident before the step.
    """
    with (
        mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_=str(2**16)),
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        return pool.submit(_peak, case, name).result()


def _peak(case: Case, name: str) -> int | None:
    set_up_torch(case)
    bench = Bench(case, [name])
    return peak_bytes(lambda: bench.step(bench.contenders[name], "step"), case.device)
