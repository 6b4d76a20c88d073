"""Batch normalisation over the sites that count, of one process or of all.

PyTorch's SyncBatchNorm runs on GPUs only and knows no masks; this one runs wherever the process group runs
(gloo on CPU, NCCL on GPU) and merges (count, mean, M2) of each process, so that uneven counts are right.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark.errors import UserError
from spark.sparse.sites import as_image, as_rows


def world_size() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def in_recomputation() -> bool:
    """True while gradient checkpointing runs a forward again, inside the backward pass; unknown to `torch.compile`."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class BatchNormed(NamedTuple):
    """Result of `batch_norm`: the normalised values, and what they were normalised with ([C] each)."""

    values: Tensor
    mean: Tensor
    invstd: Tensor


class BatchNormCall(NamedTuple):
    """What `F.batch_norm` is called with beside its input."""

    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


def require_statistics(count: int) -> None:
    """Refuse batch statistics of a single site, whose variance is undefined."""
    if count < 2:
        raise UserError("batch norm needs more than one visible site: use more images or a lower mask ratio")


@torch.no_grad()
def move_running_statistics(call: BatchNormCall, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
    """Move running statistics towards mean and variance (divided by `count`; [C] each) of a batch of `count` sites."""
    if call.running_mean is not None and call.running_var is not None:
        unbiased = var * (count / (count - 1))
        call.running_mean.lerp_(mean.to(call.running_mean.dtype), call.momentum)
        call.running_var.lerp_(unbiased.to(call.running_var.dtype), call.momentum)


def batch_norm(x: Tensor, call: BatchNormCall, *, sync: bool) -> BatchNormed:
    """`F.batch_norm` of rows [N, C] or [B, C, h, w], in training with statistics of all processes if `sync`.

    Running statistics move once a step: a forward that checkpointing repeats leaves them alone. UserError for training
    on a single value per channel.
    """
    if call.training and in_recomputation():
        call = call._replace(running_mean=None, running_var=None)
    running_mean, running_var, weight, bias, training, momentum, eps = call
    synced = training and sync and world_size() > 1
    if training and not synced:
        require_statistics(x.numel() // x.shape[1])
    if training and not synced and x.ndim == 2 and not torch.compiler.is_compiling():
        return BatchNormed(*_RowsBatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps))
    if not synced:
        return BatchNormed(
            *torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
        )
    out, mean, var, count = _SyncBatchNorm.apply(x, weight, bias, eps)  # type: ignore[misc]
    move_running_statistics(call, mean, var, count)
    return BatchNormed(out, mean, (var + eps).rsqrt())


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose batch statistics cover all processes, on any device; without `sync`, those of this one.

    On sparse values the rules of their layout apply.
    """

    def __init__(self, num_features: int, *, sync: bool = True):
        super().__init__(num_features)
        self.sync = sync

    def forward(self, input: Any) -> Any:
        """[B, C, h, w] -> [B, C, h, w], plain or sparse."""
        if not isinstance(input, Tensor) or not (self.training and self.sync and world_size() > 1):
            return super().forward(input)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        call = BatchNormCall(
            self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
        )
        return batch_norm(input, call, sync=True).values


class _RowsBatchNorm(torch.autograd.Function):
    """`F.batch_norm` of rows as an image of one line: on the CPU, the kernel for channels_last images is faster.

    A function of its own, so that its result is no view: ReLU works in place on it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Any:
        out = torch.empty_like(rows)
        mean = rows.new_empty(0, dtype=torch.promote_types(rows.dtype, torch.float32))
        invstd = torch.empty_like(mean)
        torch.native_batch_norm(
            *(as_image(rows), weight, bias, running_mean, running_var, True, momentum, eps),
            out=(as_image(out), mean, invstd),
        )
        ctx.eps = eps
        ctx.save_for_backward(rows, weight, mean, invstd)
        ctx.mark_non_differentiable(mean, invstd)
        return out, mean, invstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        rows, weight, mean, invstd = ctx.saved_tensors
        grad_rows, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            *(as_image(grad.contiguous()), as_image(rows), weight, None, None, mean, invstd, True, ctx.eps),
            ctx.needs_input_grad[:3],
        )
        grad_rows = None if grad_rows is None else as_rows(grad_rows)
        return grad_rows, grad_weight, grad_bias, None, None, None, None


class _SyncBatchNorm(torch.autograd.Function):
    """Normalise by the statistics of all processes; the sums of the backward cover all processes too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        dims, shape = _channel_layout(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() // x.shape[1]
        # A process without any site contributes nothing, so its mean must not be 0 / 0.
        mean = wide.mean(dims) if count else wide.new_zeros(x.shape[1])
        m2 = (wide - mean.view(shape)).square().sum(dims)
        mine = torch.cat([mean, m2, mean.new_full((1,), count)])
        everyone = mine.new_empty(world_size() * mine.numel())
        dist.all_gather_into_tensor(everyone, mine)
        means, m2s, counts = everyone.view(world_size(), -1).split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = (m2s + counts * (means - mean).square()).sum(0) / total
        invstd = (var + eps).rsqrt()
        out = (wide - mean.view(shape)) * invstd.view(shape)
        if weight is not None:
            out = out * weight.view(shape)
        if bias is not None:
            out = out + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, invstd, total)
        ctx.mark_non_differentiable(mean, var, total)
        return out.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, weight, mean, invstd, total = ctx.saved_tensors
        dims, shape = _channel_layout(x)
        wide = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
        grad_bias = wide.sum(dims)
        grad_weight = (wide * normalised).sum(dims)
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        mean_grad, mean_grad_x = (sums / total).chunk(2)
        scale = invstd if weight is None else invstd * weight
        grad_x = (wide - mean_grad.view(shape) - normalised * mean_grad_x.view(shape)) * scale.view(shape)
        has_weight = weight is not None
        return (
            grad_x.to(x.dtype),
            grad_weight if has_weight else None,
            grad_bias if has_weight else None,
            None,
        )


def _channel_layout(x: Tensor) -> tuple[list[int], list[int]]:
    """Dimensions to reduce, and the shape in which a [C] vector meets x."""
    return [d for d in range(x.ndim) if d != 1], [1, -1] + [1] * (x.ndim - 2)
