"""What the training loops of pretraining and depth share: the stream of samples, logs, stopping and refusing.

One principle makes a run exact to resume and independent of the number of processes: every random number is a
function of the run's seed and of a position. The stream is an endless chain of shuffled passes over the samples;
position n is the n-th sample of it. A batch takes the next positions, the processes divide them among themselves, and
augmentation and mask of a sample are seeded by its position. So a checkpoint needs no state of any generator.
"""

import math
import os
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor, nn
from torch.optim import Optimizer

from spark.errors import UserError
from spark.training.sharding import fsdp_plugin, prepare_sharded, use_fsdp

LONGEST_WAIT = timedelta(hours=6)
"""How long processes wait for one another: the main one validates, measures and writes while the others do nothing."""


def start_accelerator(output_dir: str | Path, precision: str, tracker: str = "none") -> Accelerator:
    """Start Accelerate for a run: device, processes, precision, tracker.

    Several processes on a machine without GPU talk through gloo. Buffers are not broadcast between processes: running
    statistics are equal everywhere because every process computes them from the same synchronised statistics.

    Args:
        output_dir: folder of the run.
        precision: fp32, bf16 or fp16.
        tracker: tensorboard, wandb, trackio, mlflow or none; `RunLog` starts it.

    Raises:
        UserError: fp16 without a GPU, FSDP that the engine cannot do, or a tracker that is not installed.
    """
    if tracker not in ("none", *(kind.value for kind in get_available_trackers())):
        raise UserError(f"log_with {tracker} needs a package: pip install {tracker}, or use --log_with none")
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"true", "1", "yes"}
    on_cpu = wants_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if on_cpu and precision == "fp16":
        raise UserError("precision fp16 needs a GPU; use bf16 or fp32 on this machine")
    plugin = fsdp_plugin()
    AcceleratorState._reset_state()  # an earlier run of this process, in a notebook, may have had another precision
    accelerator = Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if tracker == "none" else tracker,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir)),
        fsdp_plugin=plugin,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(timeout=LONGEST_WAIT),
        ],
    )
    if plugin is not None:
        use_fsdp(accelerator, plugin)
    # With --cpu, `accelerate launch --num_processes N` only prepares for mpirun and starts a single process itself.
    if wants_cpu and accelerator.num_processes == 1 and "MASTER_ADDR" in os.environ:
        print(
            "warning: several processes were asked for, but `accelerate launch --cpu` starts only one (it leaves the "
            "others to mpirun), and the run goes on with it. For N processes on a machine without GPU use "
            "`accelerate launch --multi_gpu --num_processes N`, without --cpu.",
            flush=True,
        )
    return accelerator


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
    """Hand model and optimizer to Accelerate: several processes get DistributedDataParallel or FSDP, fp16 a loss scale.

    Returns:
        The model to train with (the one given stays the one to save), and the wrapped optimizer.
    """
    if accelerator.is_fsdp2:
        return prepare_sharded(accelerator, model, optimizer)
    if accelerator.num_processes > 1:
        match_gradient_strides(model)
    with warnings.catch_warnings():
        # The new name of this option does not exist in all versions of torch that this project runs on.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
        return accelerator.prepare(model, optimizer)


def match_gradient_strides(model: nn.Module) -> None:
    """Have every gradient lie in memory with the very strides of its parameter.

    Along an axis of length 1 (depthwise and 1x1 kernels) any stride is right, and the backward passes of convolutions
    choose others than channels_last weights have. DistributedDataParallel compares all strides, and warns of a slow
    copy where only these differ. Along the longer axes autograd itself lays the gradient out as the parameter. The hook
    runs before DistributedDataParallel's and changes no value.
    """

    def match(parameter: Tensor) -> None:
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
            parameter.grad = parameter.grad.as_strided(parameter.shape, parameter.stride())

    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_post_accumulate_grad_hook(match)


def chosen_device(name: str) -> torch.device:
    """The device of an option auto, cpu or cuda. UserError: there is no GPU to choose."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here: use auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(workers: int | None, accelerator: Accelerator) -> int:
    """Loader processes of each training process; None is one for each core that it may use, at most 8."""
    if workers is not None:
        return workers
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(accelerator.num_processes)))
    return min(8, max(1, usable_cores() // local))


def micro_batch_size(batch_size: int, world_size: int, accumulation: int) -> int:
    """Samples that one process puts through the network at once: batch_size / (world_size * accumulation).

    Raises:
        ValueError: the global batch does not divide; names the nearest batch sizes that do.
    """
    parts = world_size * accumulation
    if batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        nearest = f"{below} or {above}" if below else str(above)
        raise UserError(
            f"optim.batch_size {batch_size} cannot be divided over {world_size} processes with accumulation "
            f"{accumulation}; use {nearest}, or change accumulation or the number of processes"
        )
    return batch_size // parts


def check_memory(images: int, shape: Sequence[int], device: torch.device) -> None:
    """Refuse a batch whose images alone, as float32, are larger than the whole memory of the device.

    Args:
        images: that one process puts through the network at once.
        shape: of one, [C, H, W].
        device: that computes.
    """
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = (
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
        )
    needed = 4 * images * math.prod(shape)
    if needed > memory:
        channels, height, width = shape
        raise UserError(
            f"{images} images at once of {height}x{width} px, {channels} channels, are {needed / 1e9:.0f} GB before "
            f"the network has done anything, and there are {memory / 1e9:.0f} GB: take smaller images, a smaller "
            "optim.batch_size or a larger accumulation"
        )


def reduce_sum(accelerator: Accelerator, values: Sequence[float]) -> list[float]:
    """Sums over all processes, which all call it together."""
    if accelerator.num_processes == 1:
        return list(values)
    total = accelerator.reduce(torch.tensor(values, dtype=torch.float32, device=accelerator.device), "sum")
    assert isinstance(total, Tensor)
    return total.tolist()
