"""What a depth run says of itself before its first step."""

import os

from torch import nn

from finetune.config import DepthConfig
from finetune.depth_data import DepthSet, TrainingMix
from finetune.depth_data.transforms import NYU_FRAME
from finetune.tasks.schedule import RunLength
from finetune.tasks.trained import TrainedDepth
from spark.training.run import Run
from spark.weights.keys import KeyReport


def describe(
    config: DepthConfig,
    trained: TrainedDepth,
    report: KeyReport,
    start: KeyReport | None,
    pairs: TrainingMix,
    held_out: DepthSet | None,
    length: RunLength,
    run: Run,
) -> str:
    """What is going to run, in a few lines."""

    def millions(*modules: nn.Module) -> str:
        return f"{sum(p.numel() for module in modules for p in module.parameters()) / 1e6:.2f}M"

    optim, data, model = config.optim, config.data, trained.model
    if report.source:
        weights = str(report)
    elif config.pretrained:
        weights = f"{config.encoder}: timm's published weights"
    else:
        weights = f"{config.encoder}: random weights (--pretrained true takes timm's published ones)"
    frozen = f", encoder frozen for {length.frozen}" if length.frozen else ""
    return "\n".join(
        (
            f"encoder    {weights}",
            *([f"start      {start}"] if start else []),
            f"model      {millions(model.encoder)} parameters, with {model.head_name} head"
            f" {millions(model.encoder, model.head)}; depth {config.model.min_depth:g} to {config.model.max_depth:g} m",
            *(
                f"loss       {name} trains {millions(loss)} parameters of its own"
                for name, loss in trained.criterion.terms.items()
                if any(True for _ in loss.parameters())
            ),
            *(
                f"data       {f'{share:.1%} of the micro-batches: ' if data.sets else ''}{one.name}: {one.data}"
                for one, share in zip(pairs.sets, pairs.shares(), strict=True)
            ),
            f"sizes      frames at {data.image_size[0]}x{data.image_size[1]}, crops of"
            f" {data.crop_size[0]}x{data.crop_size[1]}",
            *([f"border     {border}"] if (border := border_text(data.border, pairs.sets[0].data)) else []),
            f"validation {held_out or 'none: name pairs to validate on with --data.val_list'}",
            f"loss       {' + '.join(f'{weight:g} {name}' for name, weight in config.losses.items())}",
            f"batch      {optim.batch_size} = {run.world} processes x {config.accumulation} parts x"
            f" {optim.batch_size // run.world // config.accumulation} pairs; {run.device.type}, {config.precision}",
            f"optimizer  {optim.name}, lr {optim.lr:.3g} at its peak, encoder x {optim.encoder_lr_factor:g}"
            + (f", layer decay {optim.layer_decay:g}" if optim.layer_decay else ""),
            f"length     {length.steps} steps ({length.warmup} of warm-up{frozen}),"
            f" {length.steps / length.steps_per_epoch:.1f} epochs",
            f"output     {config.output_dir}; kill -USR1 {os.getpid()} writes the model at once",
        )
    )


def border_text(border: tuple[int, int, int, int] | None, pairs: DepthSet) -> str:
    """What the border cut means for frames that are not NYU's, judged by the first pair; "" where it needs no word."""
    frame = pairs[0].image.shape[:2]
    if border is None or frame == NYU_FRAME:
        return ""
    rows, columns = frame[0] / NYU_FRAME[0], frame[1] / NYU_FRAME[1]
    top, bottom, left, right = (
        f"{n * f:.0f}" for n, f in zip(border, (rows, rows, columns, columns), strict=True)
    )
    return (
        f"NYU's cut is scaled to these frames of {frame[0]}x{frame[1]}: crops come from rows {top}:{bottom}, columns"
        f" {left}:{right}; --data.border null uses all of them"
    )
