"""Classification of photos as a task of the engine: fine-tuning, or a linear layer on a frozen encoder."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from finetune.label_config import ClassifyConfig
from finetune.model.classifier import Classifier
from finetune.report import label_page
from finetune.scoring.classes import photo_results
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import summary, write_results
from finetune.tasks.build import build_encoder
from finetune.tasks.photos import PhotoTransform, open_photos
from finetune.tasks.summary import encoder_line, millions, run_lines
from finetune.tasks.transfer import Transfer
from spark.errors import UserError
from spark.images.batches import collate_images
from spark.images.loader import load_batches
from spark.model.normalise import Normalise
from spark.seeds import Purpose, derive_seed
from spark.training.run import Run
from spark.training.sampling import StreamSampler
from spark.training.task import StepLoss
from spark.weights.encoder import load_classifier

BATCH = 64  # photos of one forward of a validation


class Classification(Transfer):
    """Training of one classifier on photos in folders of classes.

    Args:
        config: the options.
        run: that trains it.

    Raises:
        UserError: options, photos or encoder do not fit; the sentence says what to do.
        OSError: a file cannot be read; likewise.
    """

    unit = "photos"
    entry = "finetune.classify"
    scored_as = "classification"

    def __init__(self, config: ClassifyConfig, run: Run):
        data = config.data
        self.photos = self.held_out = open_photos(data)
        if config.select == "top5" and len(self.photos.classes) <= 5:
            raise UserError(f"select top5 says nothing of {len(self.photos.classes)} classes: use top1")
        encoder, self.encoder_report = build_encoder(config)
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.HEAD_WEIGHTS))
        size = (data.size, data.size)
        self.model = Classifier(encoder, self.photos.classes, config.model.frozen, size, data.mean, data.std)
        mean, std = self.model.mean, self.model.std
        self.config = replace(config, data=replace(data, mean=mean, std=std))
        self.place(self.model, run)
        self.plan(len(self.photos.train), run, config.select)
        transform = PhotoTransform(size, 3, data.crop_scale, mean, std, data.flip, augment=data.augment)
        self.samples = self.photos.training_set(transform, config.seed)
        self.normalise = Normalise(mean, std).to(run.device)
        mixes = data.mixup > 0
        self.mix = v2.MixUp(alpha=data.mixup, num_classes=len(self.photos.classes)) if mixes else None
        self.facts = {
            "photos": {"count": len(self.samples), "sha256": self.samples.source.digest()},
            "classes": self.photos.classes,
        }

    # --- what is trained

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> StepLoss:
        """See `Task`."""
        images = batch["image"].to(self.device, non_blocking=True, memory_format=self.memory_format)
        images = self.normalise(images)
        labels: Tensor = self.photos.train_labels[batch["index"]].to(self.device)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        logits = model(images).float()
        return StepLoss(F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing))

    # --- where its batches come from

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """See `Task`."""
        sampler = StreamSampler(
            len(self.samples),
            self.micro_batch,
            rank=self.rank,
            world_size=self.world,
            seed=self.config.seed,
            start=start,
            stop=stop,
        )
        options = {"batch_sampler": sampler, "collate_fn": collate_images}
        return load_batches(self.samples, self.workers, self.device, **options)

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """See `Task`."""
        if before["classes"] != self.facts["classes"]:
            raise UserError(
                f"the checkpoint is of the classes {', '.join(before['classes'])}, and the data has"
                f" {', '.join(self.facts['classes'])}: go on with the data of then, or begin a new run"
            )
        then, now = before["photos"], self.facts["photos"]
        if then == now:
            return []
        return [f"the photos to train on, {then['count']} then and {now['count']} now, or their names"]

    # --- validation

    @torch.inference_mode()
    def validate(self, run: Run, model: nn.Module, finished: bool = False) -> dict[str, float]:
        """See `Transfer`; photos that cannot be read are left out and listed."""
        photos, was_training = self.photos, model.training
        size = (self.config.data.size, self.config.data.size)
        data = photos.validation_set(size, self.model.mean, self.model.std)
        found: list[int] = []
        skipped: list[str] = []
        logits: list[np.ndarray] = []
        model.eval()
        try:
            options = {"batch_size": BATCH, "collate_fn": list}
            for batch in load_batches(data, self.workers, self.device, **options):
                skipped += [image for _, image in batch if isinstance(image, str)]
                readable = [(index, image) for index, image in batch if not isinstance(image, str)]
                if readable:
                    images = torch.stack([image for _, image in readable])
                    images = images.to(self.device, memory_format=self.memory_format)
                    logits.append(model(images).float().cpu().numpy())
                    found += [index for index, _ in readable]
        finally:
            model.train(was_training)
        if not found:
            raise UserError(f"none of the photos to validate on can be read, the first: {skipped[0]}")
        names = [photos.name(index) for index in found]
        labels = photos.val_labels[found].numpy()
        results = photo_results(names, labels, np.concatenate(logits), photos.classes)
        if finished:
            about = {"model": str(run.folder / "model"), "step": run.step, "skipped": skipped}
            about |= {"training_photos": len(self.samples), "image_size": list(size)}
            write_results(run.folder / "evaluation.json", {**with_intervals(results), **about})
        return results["metrics"]

    def headline(self, metrics: Mapping[str, float]) -> str:
        """See `Transfer`."""
        return summary(metrics)

    # --- what it says and writes

    def save(self, model: Classifier, folder: Path) -> Path:
        """See `Transfer`."""
        return model.save(folder)

    def written(self, folder: Path) -> nn.Module:
        """See `Transfer`: as timm alone reads it."""
        return load_classifier(folder)

    def report(self, run: Run) -> Path:
        """See `Task`."""
        return label_page(run.folder)

    def summary(self, run: Run) -> str:
        """See `Task`."""
        data, photos = self.config.data, self.photos
        share = "" if data.labels == 1 else f" (data.labels {data.labels:g}, seed {data.labels_seed})"
        counts = photos.train_labels.bincount(minlength=len(photos.classes)).tolist()
        frozen = ", frozen: a linear evaluation" if self.config.model.frozen else ""
        return "\n".join(
            (
                encoder_line(self.config, self.encoder_report) + frozen,
                f"model      {millions(self.model)} parameters, {len(photos.classes)} classes",
                f"data       {len(photos.train)} photos{share}, {min(counts)} to {max(counts)} of each class, at"
                f" {data.size} px; {len(photos.val)} to validate on, under {data.root}",
                *run_lines(self.config, self.length, run, self.unit),
            )
        )
