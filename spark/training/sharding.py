"""Weights sharded over processes by torch's FSDP2, gathered for files and sharded again from them.

Accelerate shards (`fully_shard`), if the launcher's configuration asks for it. The whole model is one unit: its weights
are gathered for a step and given back after it, while between steps every process keeps its part of weights, gradients,
moments and averages only. Smaller units would free a block's weights while the backward pass of the next block still
needs them, for packed layouts compute norms and activations again there (`spark.sparse.packed_ops`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from spark.errors import UserError
from spark.weights.keys import is_sharded


def fsdp_plugin() -> FullyShardedDataParallelPlugin | None:
    """What the launcher's configuration says about FSDP; None where it wants none.

    Raises:
        ValueError: it asks for what the training scripts cannot do; says what to write instead.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP is supported in its version 2: write fsdp_version: 2 in the launcher's configuration"
        )
    plugin = FullyShardedDataParallelPlugin()
    for unfit, advice in (
        (plugin.auto_wrap_policy is not None, "fsdp_auto_wrap_policy: NO_WRAP, the model is one unit"),
        (
            plugin.activation_checkpointing,
            "fsdp_activation_checkpointing: false, and use --model.grad_checkpointing",
        ),
        (type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy", "fsdp_offload_params: false"),
    ):
        if unfit:
            raise UserError(
                f"this configuration of FSDP is not supported: write {advice}, as in configs/accelerate/gpu_8_fsdp.yaml"
            )
    plugin.cpu_ram_efficient_loading = False  # every process makes, or reads, all weights
    return plugin


def use_fsdp(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin) -> None:
    """Have this accelerator shard as the plugin says, on CPUs too, and compute in mixed precision as without FSDP.

    Accelerate passes FSDP over on CPUs although torch has it everywhere; it then takes the same way as on GPUs. And it
    would hand every weight and image to the network in bf16, batch norm's and the target's too; autocast, which
    `prepare_sharded` uses, keeps those in fp32.
    """
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        for state in (PartialState(), accelerator.state):  # Accelerate writes it to both, too
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if accelerator.is_fsdp2:
        plugin.mixed_precision_policy = None


def prepare_sharded(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Shard a model in place, its optimizer with it; the weights become contiguous, as FSDP2 wants them."""
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    model, optimizer = accelerator.prepare(model, optimizer)
    if accelerator.mixed_precision != "no":
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float16
        model.forward = torch.autocast(accelerator.device.type, dtype)(model.forward)
    return model, optimizer


def shard_average(average: nn.Module) -> None:
    """Shard averaged weights as the model that they average."""
    from torch.distributed.fsdp import fully_shard

    average.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    fully_shard(average)


def gathered(tree: Any, keep: bool) -> Any:
    """Dicts and lists with every sharded tensor whole and on the CPU; every process calls it.

    Args:
        tree: such as a state dict.
        keep: False puts None in the place of gathered tensors, for processes that have no use for them.
    """
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, keep) for value in tree)
    if not is_sharded(tree):
        return tree
    whole = tree.full_tensor()
    return whole.cpu() if keep else None


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A model on this device for a while, such as a whole copy of sharded weights that is kept on the CPU."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)
