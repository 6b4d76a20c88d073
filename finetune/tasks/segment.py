"""Semantic segmentation as a task of the engine."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from segmentation_models_pytorch.losses import DiceLoss
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from finetune.config import SegmentConfig, ViewConfig
from finetune.depth_data import (
    DepthFileError,
    DepthSet,
    EvalTransform,
    MixedSampler,
    MixedSet,
    TrainingMix,
    TrainTransform,
    collate_depth,
)
from finetune.depth_data.entries import VOID
from finetune.model.depth_model import open_encoder
from finetune.model.segmentation_model import SegmentationModel, classes_of, load_segmentation_model
from finetune.report.classes import classes_page
from finetune.scoring.classes import class_results, pixel_row
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import write_results
from finetune.tasks.masks import open_masks
from finetune.tasks.tuning import Tuning, fingerprint
from spark.errors import UserError
from spark.images.loader import load_batches
from spark.seeds import Purpose, derive_seed
from spark.training.accelerator import check_memory
from spark.training.option_types import values_of
from spark.training.run import Run
from spark.training.task import StepLoss

BATCH = 8  # images of one forward of a validation


class SegmentationTraining(Tuning):
    """Training of one model on images with a class in each pixel.

    Args:
        config: the options.
        run: that trains it.

    Raises:
        UserError: options, data or encoder do not fit; the sentence says what to do.
        OSError: a file cannot be read; likewise.
    """

    unit = "images"
    entry = "finetune.segment"
    idle_reason = "every pixel of theirs was void"

    def __init__(self, config: SegmentConfig, run: Run):
        check_memory(run.micro_batch, (3, *config.data.crop_size), run.device)
        self.masks = masks = open_masks(config.data)
        self.held_out = masks.held_out
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.ENCODER_WEIGHTS))
        encoder, self.report_of_weights = open_encoder(
            config.encoder, config.encoder_name, config.pretrained, config.drop_path, config.encoder_options
        )
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.HEAD_WEIGHTS))
        self.modules = self.model = SegmentationModel(
            encoder,
            masks.classes,
            config.decoder,
            config.decoder_channels,
            config.frozen,
            config.data.image_size,
            config.data.mean,
            config.data.std,
        )
        data = replace(config.data, mean=self.model.mean, std=self.model.std)
        self.config = replace(config, data=data)
        transform = TrainTransform(**values_of(data, ViewConfig))
        self.samples = TrainingMix([MixedSet("masks", masks.train, transform)], config.seed)
        self.plan(self.config, run, len(self.samples), config.select)
        self.dice = DiceLoss("multiclass", ignore_index=VOID)
        self.terms = ("cross_entropy", "dice") if config.dice else ()
        self.facts = {"images": fingerprint(self.samples.names()), "classes": masks.classes}

    # --- what is trained

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> StepLoss:
        """Cross-entropy over labelled pixels, and Dice."""
        images = batch["image"].to(self.device, non_blocking=True, memory_format=self.memory_format)
        labels = batch["labels"].to(self.device, non_blocking=True)
        logits = model(images).float()
        known = labels != VOID
        if not known.any():
            return StepLoss(0.0 * logits.sum(), learns=False)
        loss = F.cross_entropy(logits, labels, ignore_index=VOID)
        if not self.config.dice:
            return StepLoss(loss)
        # smp multiplies ignored pixels by 0, which leaves NaN there; taken out they can do nothing.
        dice = self.dice(torch.where(known[:, None], logits, torch.zeros_like(logits)), labels)
        terms = {"cross_entropy": loss.detach(), "dice": dice.detach()}
        return StepLoss(loss + self.config.dice * dice, terms)

    # --- where its batches come from

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """See `Task`."""
        sampler = MixedSampler(
            self.samples, self.micro_batch, rank=self.rank, world_size=self.world, start=start, stop=stop
        )
        options = {"batch_sampler": sampler, "collate_fn": collate_depth}
        return load_batches(self.samples, self.workers, self.device, **options)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """See `Task`; UserError: the checkpoint is of other classes."""
        if before["classes"] != self.facts["classes"]:
            raise UserError(
                f"the checkpoint is of the classes {', '.join(before['classes'])}, and now they are"
                f" {', '.join(self.facts['classes'])}: go on with those of then, or begin a new run"
            )
        then, now = before["images"], self.facts["images"]
        if then == now:
            return []
        return [
            f"the images to train on, {then['count']} then and {now['count']} now, or their names or order"
        ]

    # --- validation

    @torch.inference_mode()
    def validate(self, run: Run, model: SegmentationModel, finished: bool = False) -> dict[str, float]:
        """See `Tuning`; logits are resized to the size of the mask. One that cannot be read ends the run."""
        assert self.held_out is not None
        assert model.image_size is not None
        was_training, count = model.training, len(self.masks.classes)
        data = WholeImages(self.held_out, EvalTransform(model.image_size, model.mean, model.std))
        rows: list[dict[str, Any]] = []
        model.eval()
        try:
            options = {"batch_size": BATCH, "collate_fn": list}
            for batch in load_batches(data, self.workers, self.device, **options):
                for sample in batch:
                    if isinstance(sample, str):
                        raise UserError(
                            f"an image to validate on cannot be read, {sample}: mend it or take it out"
                        )
                images = torch.stack([image for _, image, _ in batch])
                logits = model(images.to(self.device, memory_format=self.memory_format))
                for (name, _, labels), own in zip(batch, logits, strict=True):
                    predicted = classes_of(own[None], (labels.shape[0], labels.shape[1]))[0]
                    rows.append(pixel_row(name, predicted, labels, count))
        finally:
            model.train(was_training)
        results = class_results("segmentation", rows, self.masks.classes)
        if finished:
            about = {"model": str(run.folder / "model"), "step": run.step}
            about |= {"training_images": len(self.samples), "image_size": list(model.image_size)}
            about |= {"data": repr(self.held_out)}
            write_results(run.folder / "evaluation.json", {**with_intervals(results), **about})
        return results["metrics"]

    def words(self, metrics: dict[str, float]) -> str:
        """See `Tuning`."""
        return "   ".join(f"{name} {value:.3f}" for name, value in metrics.items())

    def reload(self, folder: Any) -> SegmentationModel:
        """See `Tuning`."""
        return load_segmentation_model(folder, self.config.own_encoder())

    # --- what it says and writes

    def columns(self, run: Run, batch: dict[str, Any]) -> dict[str, float | str]:
        """See `Task`."""
        seen = (run.step + run.state.offset) * self.config.optim.batch_size
        return {"epoch": seen / len(self.samples)}

    def report(self, run: Run) -> Path:
        """See `Task`."""
        return classes_page(run.folder)

    def summary(self, run: Run) -> str:
        """See `Task`."""
        config, length, model, masks = self.config, self.length, self.model, self.masks
        own = "timm's published" if config.pretrained else "random"
        weights = (
            self.report_of_weights if self.report_of_weights.source else f"{config.encoder}, {own} weights"
        )
        absent = [name for name, pixels in zip(masks.classes, masks.pixels, strict=True) if not pixels]
        learns = "the decoder on the frozen encoder" if config.frozen else "the whole network"
        size = "x".join(map(str, config.data.crop_size))
        return "\n".join(
            (
                f"encoder    {weights}",
                f"data       {masks.train}; {len(masks.classes)} classes",
                *([f"absent     no pixel to learn from: {', '.join(absent)}"] if absent else []),
                f"validation {masks.held_out or 'none: name images to validate on with --data.val_list'}",
                f"trains     {learns}, decoder {model.decoder_name}, crops of {size} px; {config.optim.name}, lr"
                f" {config.optim.lr:.3g}",
                f"length     {length.steps} steps of {config.optim.batch_size}, {length.warmup} of warm-up,"
                f" {length.steps / length.steps_per_epoch:.1f} epochs",
                f"output     {config.output_dir}",
            )
        )


class WholeImages(Dataset):
    """Images as (name, network input [3, h, w], classes uint8 [H, W]); of one that cannot be read, "path: reason"."""

    def __init__(self, data: DepthSet, transform: EvalTransform):
        self.data, self.transform = data, transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self.data[index]
        except DepthFileError as error:
            return str(error)
        return sample.name, self.transform.prepare(sample.image), sample.labels
