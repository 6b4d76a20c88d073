"""Time of a training step with N processes on this machine: gradients averaged, batch statistics over all of them.

CPU processes talk through gloo and share the threads out; CUDA processes have a GPU each and talk through NCCL. Every
process takes the same batch as one alone (weak scaling), and its step ends when the slowest process has ended it.
One process runs as training does with one: without a group, without synchronised statistics.

Groups of different size cannot take turns step by step: they would have to lie in memory together. They take turns in
passes instead (1, 2, 1, 2, 1, 2), started anew for each, so that what slows the machine down for a while slows all of
them; inside a group contenders take turns step by step. An efficiency is over the one process of the same pass.
"""

import json
import statistics
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn
from torch.nn.parallel import DistributedDataParallel

from spark import SparK
from spark.errors import UserError
from spark.training.accelerator import match_gradient_strides
from tools.benchmarks.contenders import Bench, Case, Contender, our_own, set_up_torch
from tools.benchmarks.parity import check_parity
from tools.benchmarks.timing import interleaved

PASSES = 3
"""Turns of every number of processes."""

Seconds = dict[str, list[float]]
"""Contender -> times of its steps [s]."""


def check_counts(counts: Sequence[int], threads: int, device: str) -> None:
    """Refuse what this machine cannot run, before anything is measured.

    Raises:
        ValueError: more GPUs than there are, threads that cannot be shared out evenly, several processes on a device
            that is neither "cpu" nor "cuda".
    """
    most = max(counts)
    if most == 1:
        return
    kind = torch.device(device)
    if kind.type not in ("cpu", "cuda") or kind.index is not None:
        raise UserError(
            f"several processes run on --device cpu, or on --device cuda, where process i takes GPU i; not on {device}"
        )
    if kind.type == "cuda":
        if most > (there := torch.cuda.device_count()):
            raise UserError(
                f"--processes {most} needs {most} GPUs, one each, and this machine has {there}: ask for at most "
                f"{there}, or pass --device cpu"
            )
        return
    for count in counts:
        if threads % count:
            raise UserError(
                f"--threads {threads} cannot be shared out evenly to {count} processes: pass a multiple of {count}, "
                "or another number of --processes"
            )


def shared_case(case: Case, count: int) -> Case:
    """The case as each of `count` processes gets it: the same batch, its share of the threads."""
    return replace(case, processes=count, threads=max(1, case.threads // count))


def passes_of_groups(case: Case, counts: Sequence[int], rounds: int) -> list[dict[int, Seconds]]:
    """Times of `rounds` steps of every contender in a group of each of these sizes, pass by pass.

    In the first pass every group of several checks that its contenders agree, with statistics over all its processes;
    for one process the caller has checked it.

    Raises:
        ValueError: contenders differ, or a process failed; all its group is then ended.
    """
    return [
        {count: run_group(shared_case(case, count), rounds, check=turn == 0) for count in counts}
        for turn in range(PASSES)
    ]


def efficiencies(case: Case, passes: Sequence[Mapping[int, Seconds]], count: int, name: str) -> list[float]:
    """Images/s of `count` processes over those of one, for equal hardware, in each pass (medians of its steps).

    `count` GPUs should give `count` times the images of one; `count` processes on the cores of one give the same
    number at best. So 1 is perfect for either.
    """
    hardware = count if case.device.startswith("cuda") else 1
    return [
        count / statistics.median(times[count][name]) * statistics.median(times[1][name]) / hardware
        for times in passes
    ]


def run_group(case: Case, rounds: int, check: bool) -> Seconds:
    """Times of the first process of a group of `case.processes` new ones.

    None of them outlives this call: when one fails, or on Ctrl-C, the others are killed.

    Raises:
        ValueError: a process failed; it says which and why.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = spawn(
            _member, (case, rounds, check, folder), nprocs=case.processes, join=False, daemon=True
        )
        assert context is not None
        processes: list[Any] = context.processes
        try:
            while not context.join():
                pass
        except ProcessRaisedException as error:
            reason = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
            raise UserError(f"process {error.error_index} of {case.processes} failed: {reason}") from error
        except ProcessExitedException as error:
            raise UserError(
                f"process {error.error_index} of {case.processes} was ended from outside ({error}): if the memory "
                "was full, lower --batch or --processes"
            ) from error
        finally:
            for process in processes:
                process.kill()
                process.join()
        return json.loads((Path(folder) / "seconds.json").read_text())


def _member(rank: int, case: Case, rounds: int, check: bool, folder: str) -> None:
    """One process of a group; the first one writes its times into `folder`."""
    cuda = case.device.startswith("cuda")
    if cuda and case.processes > 1:
        case = replace(case, device=f"cuda:{rank}")
        torch.cuda.set_device(rank)
    set_up_torch(case)
    if case.processes > 1:
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=case.processes,
        )
        if check:  # of few images, and each process has its own
            check_parity(Bench(replace(case, batch=min(case.batch, 2)), seed=rank), "step")
    bench = Bench(case, seed=rank)
    steps = {name: partial(_step, bench, _in_group(c, case)) for name, c in bench.contenders.items()}
    seconds = interleaved(steps, rounds, case.device)
    if rank == 0:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    if case.processes > 1:
        dist.destroy_process_group()


def _in_group(contender: Contender, case: Case) -> Contender:
    """The contender with gradients averaged over the processes, set up as training does it."""
    if case.processes == 1:
        return contender
    match_gradient_strides(contender.model)
    with warnings.catch_warnings():
        # The new name of this option does not exist in all versions of torch that this project runs on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        wrapped = DistributedDataParallel(
            contender.model, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    return our_own(cast(SparK, contender.model), case, wrapped)


def _step(bench: Bench, contender: Contender) -> None:
    bench.step(contender, "step")
    if bench.case.processes > 1:
        dist.barrier()
