"""The objects of a run from its options: the model, its layout and sizes, and what the options leave to rules."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from spark.config import ModelConfig, PretrainConfig
from spark.errors import UserError
from spark.images.transform import PretrainTransform
from spark.model.masking import check_masks, mean_ratio, visible_at
from spark.model.spark import SparK, norm_kind
from spark.sparse.batch_norm import in_recomputation
from spark.sparse.choice import AUTO, Choice, is_available


def build_model(config: ModelConfig) -> SparK:
    """The model of a run, its weights random.

    Raises:
        ValueError: unknown or unsupported encoder, or options that do not fit together.
    """
    spark = SparK(
        config.name,
        input_size=config.input_size,
        mask_ratio=config.mask_ratio,
        mask_block_size=config.mask_block_size,
        in_chans=config.in_chans,
        patch_size=config.patch_size,
        decoder_width=config.decoder_width,
        layout=config.layout,
        drop_path=config.drop_path,
        sync_bn=config.sync_bn,
        densify_norm=config.densify_norm,
        decoder_stages=config.decoder_stages,
        densify_kernel=config.densify_kernel,
        decoder_maps=config.decoder_maps,
        masked_pixels=config.masked_pixels,
        target=config.target,
        loss_on=config.loss_on,
        stride=config.stride,
        **({} if config.output_stride is None else {"output_stride": config.output_stride}),
    )
    if config.grad_checkpointing:
        checkpoint_activations(spark, config.name)
    return spark


def training_sizes(config: PretrainConfig, spark: SparK) -> tuple[tuple[int, int], ...]:
    """The sizes (H, W) between which training switches.

    Raises:
        ValueError: a size that patches or masks do not fit.
    """
    if config.model.train_sizes is None:
        return (spark.input_size,)
    sizes = tuple((size, size) if isinstance(size, int) else size for size in config.model.train_sizes)
    for size in sizes:
        check_masks(spark.grid_of(*size), spark.mask_ratio, spark.mask_block_size)
    return sizes


def checkpoint_activations(spark: SparK, name: str) -> None:
    """Let the encoder compute activations again in the backward pass instead of keeping them, which saves memory.

    Raises:
        ValueError: the timm model cannot do so, or it runs dense: its batch norms would move their statistics twice.
    """
    if spark.masked_pixels != "absent":
        raise UserError(
            f"model.grad_checkpointing needs model.masked_pixels absent, not {spark.masked_pixels}: a dense encoder "
            "would count every batch twice in its batch statistics. Raise accumulation to save memory"
        )
    switch = getattr(spark.encoder, "set_grad_checkpointing", None)
    advice = "leave model.grad_checkpointing false; a larger accumulation saves memory too"
    if switch is None:
        raise UserError(f"timm model {name} cannot checkpoint its activations: {advice}")
    try:
        switch(True)
    except (AssertionError, NotImplementedError, TypeError) as error:  # what timm's models refuse with
        raise UserError(
            f"timm model {name} refuses to checkpoint its activations ({error}): {advice}"
        ) from error

    def uncount(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        # batch norm counts its batches as it is called; the second call of a step is no second batch
        if norm.training and in_recomputation():
            cast(Tensor, norm.num_batches_tracked).sub_(1)

    for module in spark.encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.num_batches_tracked is not None:
            module.register_forward_pre_hook(uncount)


def choose_layout(spark: SparK, device_type: str, precision: str, before: Mapping[str, Any] | None) -> Choice:
    """The layout of a run, and why; layouts agree to rounding, so a run keeps to one as long as it can.

    A layout that is named is taken as it is. For "auto", a run that continues on the same type of device takes what was
    chosen before, even if the measurements say otherwise by now; any other run asks the measurements.

    Args:
        spark: the model, its `layout` as asked for.
        device_type: torch's name of it, "cpu" or "cuda".
        precision: fp32, bf16 or fp16.
        before: from `read_extra`, if the run continues.
    """
    if (
        before is not None
        and spark.layout == before["config"]["model"]["layout"] == AUTO
        and before["device_type"] == device_type
        and is_available(before["layout"])
    ):
        return Choice(before["layout"], "auto: as before in this run")
    return spark.layout_on(device_type, precision)


@torch.no_grad()
def try_forward(spark: SparK, device: torch.device, sizes: Sequence[tuple[int, int]]) -> None:
    """Send black images of these sizes (H, W) through the model, to learn what it refuses before anything is written.

    Evaluation mode and a mask of its own: no statistic moves and no random number of the run is drawn.

    Raises:
        MissingRuleError: an operator of the encoder has no rule for sparse values.
    """
    spark.eval()
    for size in sizes:
        visible = visible_at(
            range(2), spark.grid_of(*size), mean_ratio(spark.mask_ratio), seed=0, device=device
        )
        spark(torch.zeros(2, spark.in_chans, *size, device=device), visible)
    spark.train()


def resolve(config: PretrainConfig, spark: SparK, transform: PretrainTransform) -> PretrainConfig:
    """Fill in what was left to a rule: betas by the encoder's norms, mean and std by the transform."""
    return replace(
        config,
        optim=replace(config.optim, betas=config.optim.betas or default_betas(spark)),
        data=replace(config.data, mean=tuple(transform.mean or ()), std=tuple(transform.std or ())),
    )


def default_betas(spark: SparK) -> tuple[float, float]:
    """Betas of the paper's recipes: with batch norm those of ResNets, without those of ConvNeXts.

    Tian et al. (ICLR 2023) give them for these two families only; for others they are an extrapolation, by the rule
    that also chooses the norm between encoder and decoder (`spark.model.spark.norm_kind`).
    """
    return (0.9, 0.95) if norm_kind(spark.encoder) == "bn" else (0.9, 0.999)


def summary(
    config: PretrainConfig,
    spark: SparK,
    sizes: Sequence[tuple[int, int]],
    layout: Choice,
    accelerator: Accelerator,
    images: str,
    epochs: float | None,
    total_steps: int,
    warmup_steps: int,
    workers: int,
) -> str:
    """What is going to run, in a few lines; `images` says what the data are, `epochs` is None where nobody knows."""

    def millions(module: nn.Module, used: bool = True) -> str:
        counts = [p.numel() for p in module.parameters() if p.requires_grad == used]
        return f"{sum(counts) / 1e6:.2f}M"

    idle = any(not parameter.requires_grad for parameter in spark.encoder.parameters())
    unused = f" ({millions(spark.encoder, used=False)} more are not used)" if idle else ""

    optim, world = config.optim, accelerator.num_processes
    warmup = (
        f"{warmup_steps} of warm-up"
        if warmup_steps < total_steps or not warmup_steps
        else "all of them warm-up"
    )
    family = "ResNets, as it has" if norm_kind(spark.encoder) == "bn" else "ConvNeXts, as it has no"
    recipe = f" (those of {family} batch norm)" if optim.betas == default_betas(spark) else ""
    return "\n".join(
        (
            f"model      {config.model.name}: {millions(spark.encoder)} parameters{unused}, with decoder "
            f"{millions(spark)}; {', '.join(f'{h}x{w}' for h, w in sizes)} px, patches of {spark.patch_size}, "
            f"mask {config.model.mask_ratio}",
            f"layout     {layout.layout} ({layout.reason})",
            f"data       {images}; loader processes {world} x {workers}",
            f"batch      {optim.batch_size} images: processes {world} x accumulation {config.accumulation} x "
            f"{optim.batch_size // world // config.accumulation} at once; "
            f"{accelerator.device.type}, {config.precision}",
            f"optimizer  {optim.name}, betas {list(optim.betas or ())}{recipe}, "
            f"lr {optim.base_lr * optim.batch_size / 256:.3g} at its peak",
            f"length     {total_steps} steps ({warmup}), {'unknown' if epochs is None else f'{epochs:.1f}'} epochs",
            f"output     {config.output_dir}; kill -USR1 {os.getpid()} writes the encoder at once",
        )
    )
