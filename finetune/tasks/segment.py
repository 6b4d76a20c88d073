"""Semantic segmentation as a task of the engine."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from segmentation_models_pytorch.losses import DiceLoss
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from finetune.config import ViewConfig
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
from finetune.label_config import SegmentConfig
from finetune.model.segmentation_model import SegmentationModel, classes_of, load_segmentation_model
from finetune.report import label_page
from finetune.scoring.classes import mask_results, mask_row
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import summary, write_results
from finetune.tasks.build import build_encoder
from finetune.tasks.masks import open_masks
from finetune.tasks.summary import encoder_line, millions, run_lines
from finetune.tasks.transfer import Transfer, fingerprint
from spark.errors import UserError
from spark.images.loader import load_batches
from spark.seeds import Purpose, derive_seed
from spark.training.option_types import values_of
from spark.training.run import Run
from spark.training.task import StepLoss

BATCH = 8  # images of one forward of a validation


class Segmentation(Transfer):
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
    scored_as = "segmentation"
    idle_reason = "every pixel of theirs was void"

    def __init__(self, config: SegmentConfig, run: Run):
        self.masks = masks = open_masks(config.data)
        self.held_out = masks.held_out
        encoder, self.encoder_report = build_encoder(config)
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.HEAD_WEIGHTS))
        self.model = SegmentationModel(
            encoder,
            masks.classes,
            config.model.decoder,
            config.model.decoder_channels,
            config.model.frozen,
            config.data.image_size,
            config.data.mean,
            config.data.std,
        )
        data = replace(config.data, mean=self.model.mean, std=self.model.std)
        self.config = replace(config, data=data)
        transform = TrainTransform(**values_of(data, ViewConfig))
        self.samples = TrainingMix([MixedSet("masks", masks.train, transform)], config.seed)
        self.place(self.model, run)
        self.plan(len(self.samples), run, config.select)
        self.dice = DiceLoss("multiclass", ignore_index=VOID)
        self.terms = ("cross_entropy", "dice") if config.dice else ()
        self.facts = {"images": fingerprint(self.samples.names())}

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
        """See `Task`."""
        then, now = before["images"], self.facts["images"]
        if then == now:
            return []
        return [
            f"the images to train on, {then['count']} then and {now['count']} now, or their names or order"
        ]

    # --- validation

    @torch.inference_mode()
    def validate(self, run: Run, model: SegmentationModel, finished: bool = False) -> dict[str, float]:
        """See `Transfer`; logits are resized to the size of the mask. Images that cannot be read are listed."""
        assert self.held_out is not None
        assert model.image_size is not None
        was_training, count = model.training, len(self.masks.classes)
        data = WholeImages(self.held_out, EvalTransform(model.image_size, model.mean, model.std))
        rows: list[dict[str, Any]] = []
        skipped: list[str] = []
        total = np.zeros((count, count), np.int64)
        model.eval()
        try:
            options = {"batch_size": BATCH, "collate_fn": list}
            for batch in load_batches(data, self.workers, self.device, **options):
                skipped += [sample for sample in batch if isinstance(sample, str)]
                readable = [sample for sample in batch if not isinstance(sample, str)]
                if not readable:
                    continue
                images = torch.stack([image for _, image, _ in readable])
                logits = model(images.to(self.device, memory_format=self.memory_format))
                for (name, _, labels), own in zip(readable, logits, strict=True):
                    predicted = classes_of(own[None], (labels.shape[0], labels.shape[1]))[0]
                    row, confusion = mask_row(name, labels, predicted, count)
                    rows.append(row)
                    total += confusion
        finally:
            model.train(was_training)
        if not total.any():
            raise UserError(f"no image to validate on can be read, the first: {skipped[0]}")
        results = mask_results(rows, total, self.masks.classes)
        if finished:
            about = {"model": str(run.folder / "model"), "step": run.step, "skipped": skipped}
            about |= {"training_images": len(self.samples), "image_size": list(model.image_size)}
            about |= {"data": repr(self.held_out)}
            write_results(run.folder / "evaluation.json", {**with_intervals(results), **about})
        return results["metrics"]

    def headline(self, metrics: Mapping[str, float]) -> str:
        """See `Transfer`."""
        return summary(metrics)

    # --- what it says and writes

    def save(self, model: SegmentationModel, folder: Path) -> Path:
        """See `Transfer`."""
        return model.save(folder)

    def written(self, folder: Path) -> SegmentationModel:
        """See `Transfer`."""
        return load_segmentation_model(folder, self.config.own_encoder())

    def report(self, run: Run) -> Path:
        """See `Task`."""
        return label_page(run.folder)

    def summary(self, run: Run) -> str:
        """See `Task`."""
        data, model, masks = self.config.data, self.model, self.masks
        absent = [name for name, pixels in zip(masks.classes, masks.pixels, strict=True) if not pixels]
        frozen = ", frozen" if self.config.model.frozen else ""
        return "\n".join(
            (
                encoder_line(self.config, self.encoder_report) + frozen,
                f"model      {millions(model.encoder)} parameters, with {model.decoder_name} decoder {millions(model)};"
                f" {len(masks.classes)} classes",
                f"data       {masks.train}",
                *([f"absent     no pixel to learn from: {', '.join(absent)}"] if absent else []),
                f"sizes      frames at {data.image_size[0]}x{data.image_size[1]}, crops of"
                f" {data.crop_size[0]}x{data.crop_size[1]}",
                f"validation {masks.held_out or 'none: name images to validate on with --data.val_list'}",
                *run_lines(self.config, self.length, run, self.unit),
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
