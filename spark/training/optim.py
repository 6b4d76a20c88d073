"""Parameter groups, optimizers and schedules: who is decayed, how fast each layer learns, and what a step's rates are.

The schedules are pure functions of the step, so a resumed run needs no scheduler state: a loop computes `lr_at` and
`weight_decay_at` and hands both to `set_hyperparameters` before every optimizer step.

Source of the rules: SparK's official pretraining code (Tian et al., ICLR 2023), `utils/lr_control.py` and
`utils/lamb.py`; layer decay as in its ImageNet fine-tuning code.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim.lamb import Lamb
from torch import nn
from torch.optim import Optimizer

from spark.errors import UserError

BLOCKS_PER_LAYER = 3
"""Residual blocks that share one learning rate under layer decay (see `layer_scales`)."""

NEVER_DECAYED = {"token", "gamma"}
"""Parts of dotted parameter names."""


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    layer_decay: float | None = None,
    encoder_lr_factor: float = 1.0,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of `model` by weight decay and learning-rate scale.

    Not decayed (SparK's rule): parameters of one dimension or none, biases, and parameters one of whose dotted name
    parts is in `NEVER_DECAYED` (`densify.0.token`, not `token_mixer.weight`). Frozen parameters are left out.

    Args:
        model: Not wrapped for several processes; with `layer_decay` or `encoder_lr_factor` it has an `encoder`.
        weight_decay: Of the decayed parameters.
        layer_decay: In (0, 1]: each layer of the encoder learns this much slower than the one above it; the head
            has scale 1 and the deepest layer `layer_decay`. None: no layer decay.
        encoder_lr_factor: Scale on the learning rate of the whole encoder.

    Returns:
        Groups in the order in which their first parameter appears, each with `params`, `weight_decay`, `lr_scale`,
        `weight_decay_scale` (0 or 1) and `name`.

    Raises:
        UserError: Nothing is trainable, or the encoder cannot be split into layers.
    """
    scales: dict[int, tuple[str, float]] = {}
    if layer_decay is not None or encoder_lr_factor != 1.0:
        by_name = layer_scales(model.encoder, layer_decay) if layer_decay is not None else {}  # type: ignore[arg-type]
        for name, parameter in model.encoder.named_parameters():  # type: ignore[union-attr]
            label, scale = by_name.get(name, ("encoder", 1.0))
            scales[id(parameter)] = label, scale * encoder_lr_factor

    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        decayed = parameter.ndim > 1 and parts[-1] != "bias" and NEVER_DECAYED.isdisjoint(parts)
        label, lr_scale = scales.get(id(parameter), ("head" if scales else "model", 1.0))
        group_name = f"{label}/{'decay' if decayed else 'no_decay'}"
        group = groups.setdefault(
            group_name,
            {
                "params": [],
                "weight_decay": weight_decay if decayed else 0.0,
                "lr_scale": lr_scale,
                "weight_decay_scale": float(decayed),
                "name": group_name,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise UserError("nothing to train: every parameter of the model is frozen (requires_grad is False)")
    return list(groups.values())


def layer_scales(encoder: nn.Module, layer_decay: float) -> dict[str, tuple[str, float]]:
    """Learning-rate scale of every encoder parameter under layer decay, by depth.

    Depth is timm's own (`group_matcher`: the stem, then block by block), with three blocks to a layer: SparK's
    fine-tuning code groups ConvNeXt's blocks in threes and ResNet's in twos to fours, and its published decays (0.7,
    0.8) belong to that granularity. One layer a block, as timm does, would slow the stem of a ResNet-50 to 0.7^17
    where SparK has 0.7^7.

    Args:
        encoder: A stock timm model (not a `features_only` wrapper).
        layer_decay: In (0, 1].

    Returns:
        Parameter name -> (label of the layer, scale). With N layers above the stem, layer i has
        `layer_decay ** (N + 1 - i)`; what comes after the deepest feature (a final norm, a classifier) has 1.

    Raises:
        UserError: timm has no layer grouping for this encoder.
    """
    matcher = getattr(encoder, "group_matcher", None)
    features = getattr(encoder, "feature_info", None)
    if matcher is None or features is None:
        raise UserError(
            f"layer_decay needs a timm model that knows the order of its layers (group_matcher), and"
            f" {type(encoder).__name__} does not: build the encoder without features_only, or use encoder_lr_factor"
        )
    depth: Any = group_parameters(encoder, matcher(coarse=False), reverse=True)
    deepest = features[-1]["module"] + "."
    last = max((d for name, d in depth.items() if name.startswith(deepest)), default=max(depth.values()))
    layers = -(-last // BLOCKS_PER_LAYER)
    scales = {}
    for name, block in depth.items():
        layer = -(-block // BLOCKS_PER_LAYER)  # the stem is block 0 and layer 0
        label = f"encoder.layer{layer}" if block <= last else "encoder.head"
        scales[name] = label, layer_decay ** (layers + 1 - layer) if block <= last else 1.0
    return scales


def build_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    lr: float,
    betas: Sequence[float] = (0.9, 0.95),
    eps: float = 1e-6,
) -> Optimizer:
    """Build the optimizer over groups from `parameter_groups`.

    - `lamb`: `timm.optim.Lamb` as SparK's pretraining sets it: bias correction, averaged gradients, the trust ratio on
      decayed parameters only and unclipped. The training loop clips gradients, not the optimizer.
    - `adamw`: `torch.optim.AdamW`.
    - `sgd`: `torch.optim.SGD` with Nesterov momentum `betas[0]`; `betas[1]` and `eps` have no meaning for it.

    `lr` is that of a group whose `lr_scale` is 1.
    """
    beta1, beta2 = betas
    if name == "lamb":
        optimizer: Optimizer = Lamb(
            groups,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            weight_decay=0.0,
            bias_correction=True,
            grad_averaging=True,
            max_grad_norm=None,
            trust_clip=False,
            always_adapt=False,
        )
    elif name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=beta1, nesterov=beta1 > 0, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return optimizer


def lr_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    cooldown_steps: int | None = None,
    start_factor: float = 0.005,
    end_factor: float = 0.001,
) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear warm-up, then half a cosine, or a cooldown at the end.

    Warm-up from `start_factor * peak` at step 0 towards `peak` at step `warmup_steps`; then down to `end_factor * peak`
    at the last step, `total_steps - 1`, and constant beyond it. With `cooldown_steps` it stays at the peak until so
    many steps before the end, see `cooldown`.
    """
    if step < warmup_steps:
        return peak * (start_factor + (1 - start_factor) * step / warmup_steps)
    if cooldown_steps is None:
        left = _half_cosine(step - warmup_steps, total_steps - warmup_steps)
    else:
        left = cooldown(step, total_steps, cooldown_steps)
    return peak * (end_factor + (1 - end_factor) * left)


def cooldown(step: int, total_steps: int, cooldown_steps: int) -> float:
    """1 until `cooldown_steps` before the last step, then one minus a square root, down to 0 at the last step.

    Source: Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations" (NeurIPS 2024),
    section 3: as good as a cosine of the same length, and a run can be left at any step.
    """
    done = step - (total_steps - 1 - cooldown_steps)
    return 1.0 if done <= 0 or not cooldown_steps else 1 - math.sqrt(min(done / cooldown_steps, 1.0))


def one_cycle_at(
    step: int,
    *,
    peak: float,
    total_steps: int,
    rise: float,
    start_factor: float,
    end_factor: float,
) -> float:
    """Value of optimizer step `step` (from 0) of one cycle: half a cosine up to `peak`, another down.

    From `start_factor * peak` at step 0 to `peak` at step `rise * total_steps - 1`; then to `end_factor * peak` at the
    last step, `total_steps - 1`, and constant beyond it. As torch's `OneCycleLR`, whose `div_factor` is
    1 / `start_factor` and `final_div_factor` is `start_factor / end_factor`; with factors above 1 it is its momentum.
    """
    top = max(rise * total_steps - 1, 0.0)
    if step <= top and top > 0:
        before, after, progress = start_factor, 1.0, step / top
    else:
        before, after, progress = 1.0, end_factor, min((step - top) / max(total_steps - 1 - top, 1e-9), 1.0)
    return peak * (after + (before - after) * (0.5 + 0.5 * math.cos(math.pi * progress)))


def weight_decay_at(
    step: int, *, start: float, end: float, total_steps: int, cooldown_steps: int | None = None
) -> float:
    """Weight decay of step `step`: half a cosine from `start` at 0 to `end` at the last step, then constant.

    With `cooldown_steps` it changes in the cooldown only.
    """
    if cooldown_steps is None:
        left = _half_cosine(step, total_steps)
    else:
        left = cooldown(step, total_steps, cooldown_steps)
    return end + (start - end) * left


def _half_cosine(step: int, steps: int) -> float:
    """1 at step 0, 0 at step `steps - 1` and beyond. A phase of one step stays at 1."""
    if steps <= 1:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * min(step / (steps - 1), 1.0))


def set_hyperparameters(
    optimizer: Optimizer, lr: float, weight_decay: float, momentum: float | None = None
) -> None:
    """Set the rates of the coming step: each group takes `lr * lr_scale` and `weight_decay * weight_decay_scale`.

    `momentum`, where it is given, is the first of `betas`, or SGD's momentum.
    """
    for group in optimizer.param_groups:
        if momentum is not None:
            key = "betas" if "betas" in group else "momentum"
            group[key] = (momentum, group["betas"][1]) if key == "betas" else momentum
            group["momentum_scheduled"] = True
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = weight_decay * group.get("weight_decay_scale", 1.0)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move an exponential moving average of weights: average <- decay * average + (1 - decay) * model.

    Buffers (batch norm's running statistics, averages themselves) are copied. As `torch.optim.swa_utils.AveragedModel`.
    """
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
    for mine, theirs in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)
