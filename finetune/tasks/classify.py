"""Classification of labelled photos as a task of the engine."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from finetune.config import ClassifyConfig
from finetune.model.classifier import Classifier, load_classifier
from finetune.model.depth_model import open_encoder
from finetune.report.classes import classes_page
from finetune.scoring.classes import class_results, image_row
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import write_results
from finetune.tasks.tuning import Tuning
from spark.errors import UserError
from spark.images.batches import collate_images
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.loader import load_batches
from spark.images.sources.files import FileSource
from spark.images.transform import PretrainTransform
from spark.model.encoder import timm_config
from spark.model.normalise import Normalise
from spark.monitor.probes import LabelledFiles, Preparation, PreparedImages, list_labelled
from spark.seeds import Purpose, derive_seed
from spark.training.accelerator import check_memory
from spark.training.run import Run
from spark.training.sampling import StreamSampler
from spark.training.task import StepLoss


class Classification(Tuning):
    """Training of one classifier on labelled photos.

    Args:
        config: the options.
        run: that trains it.

    Raises:
        UserError: options, data or encoder do not fit; the sentence says what to do.
    """

    unit = "photos"
    entry = "finetune.classify"

    def __init__(self, config: ClassifyConfig, run: Run):
        size = (config.data.size, config.data.size)
        check_memory(run.micro_batch, (3, *size), run.device)
        self.config = config
        found = list_labelled(Path(config.data.root))
        chosen = share_of_classes(found, config.data.labels, config.data.labels_seed)
        self.labels = found.labels[chosen]
        self.held_out = [
            (file, int(label))
            for file, label, train in zip(found.files, found.labels, found.train, strict=True)
            if not train
        ]
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.ENCODER_WEIGHTS))
        encoder, self.report_of_weights = open_encoder(
            config.encoder, config.encoder_name, config.pretrained, config.drop_path, config.encoder_options
        )
        torch.manual_seed(derive_seed(config.seed, 0, Purpose.HEAD_WEIGHTS))
        self.modules = Classifier(encoder, found.classes, size, config.linear)
        known = timm_config(encoder)
        self.mean, self.std = tuple(known["mean"]), tuple(known["std"])
        self.normalise = Normalise(self.mean, self.std, fused=True).to(run.device)
        transform = PretrainTransform(size, 3, config.data.crop_scale, self.mean, self.std, config.data.hflip)
        files = [found.files[i] for i in chosen]
        self.photos = UnlabeledImages(
            FileSource(files, config.data.root), SampleReader(transform, config.seed)
        )
        self.plan(config, run, len(files), "top1")
        self.facts = {"photos": len(files), "classes": found.classes, "labels_seed": config.data.labels_seed}

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """See `Task`."""
        sampler = StreamSampler(
            len(self.photos),
            self.micro_batch,
            rank=self.rank,
            world_size=self.world,
            seed=self.config.seed,
            start=start,
            stop=stop,
        )
        options = {"batch_sampler": sampler, "collate_fn": collate_images}
        return load_batches(self.photos, self.workers, self.device, **options)

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> StepLoss:
        """See `Task`."""
        pixels = batch["image"].to(self.device, non_blocking=True, memory_format=self.memory_format)
        labels = self.labels[batch["index"]].to(self.device)
        logits = model(self.normalise(pixels)).float()
        return StepLoss(F.cross_entropy(logits, labels, label_smoothing=self.config.smoothing))

    def changes(self, before: dict[str, Any]) -> list[str]:
        """See `Task`."""
        if all(before.get(name, now) == now for name, now in self.facts.items()):
            return []
        return ["the photos to train on; the run goes on with those of now, no longer the run it was"]

    def validate(self, run: Run, model: Any, finished: bool = False) -> dict[str, float]:
        """See `Tuning`."""
        side = self.config.data.size
        images = PreparedImages(
            [file for file, _ in self.held_out], Preparation((side, side), self.mean, self.std)
        )
        loader = load_batches(images, self.workers, torch.device("cpu"), batch_size=64, collate_fn=list)
        model.eval()
        rows = []
        with torch.inference_mode():
            for samples in loader:
                for _, image in samples:
                    if isinstance(image, str):
                        raise UserError(
                            f"a photo to validate on cannot be read, {image}: mend it or move it away"
                        )
                stacked = torch.stack([image for _, image in samples]).to(self.device)
                logits = model(stacked).float().cpu().numpy()
                for (index, _), of_image in zip(samples, np.asarray(logits), strict=True):
                    file, label = self.held_out[index]
                    rows.append(image_row(str(file.relative_to(self.config.data.root)), of_image, label))
        results = class_results("classification", rows, self.modules.classes)  # type: ignore[arg-type]
        if finished:
            about = {"model": str(run.folder / "model"), "data": self.config.data.root, "step": run.step}
            write_results(run.folder / "evaluation.json", {**with_intervals(results), **about})
        return results["metrics"]

    def words(self, metrics: dict[str, float]) -> str:
        """Accuracy in words."""
        return "   ".join(f"{name} {value:.3f}" for name, value in metrics.items())

    def reload(self, folder: Any) -> Classifier:
        """See `Tuning`."""
        return load_classifier(folder)

    def columns(self, run: Run, batch: dict[str, Any]) -> dict[str, float | str]:
        """See `Task`."""
        return {"epoch": (run.step + run.state.offset) * self.config.optim.batch_size / len(self.photos)}

    def report(self, run: Run) -> Path:
        """See `Task`."""
        return classes_page(run.folder)

    def summary(self, run: Run) -> str:
        """See `Task`."""
        config, length = self.config, self.length
        own = "timm's published" if config.pretrained else "random"
        weights = (
            self.report_of_weights if self.report_of_weights.source else f"{config.encoder}, {own} weights"
        )
        learns = "a linear layer on the frozen encoder" if config.linear else "the whole network"
        return "\n".join(
            (
                f"encoder    {weights}",
                f"data       {len(self.photos)} photos of {len(self.facts['classes'])} classes,"
                f" {config.data.labels:.0%} of each; {len(self.held_out)} to validate on",
                f"trains     {learns}, at {config.data.size} px; {config.optim.name}, lr {config.optim.lr:.3g}",
                f"length     {length.steps} steps of {config.optim.batch_size}, {length.warmup} of warm-up,"
                f" {length.steps / length.steps_per_epoch:.1f} epochs",
                f"output     {config.output_dir}",
            )
        )


def share_of_classes(found: LabelledFiles, share: float, seed: int) -> list[int]:
    """Indices of a share of the training photos of each class, at least one of each; smaller shares are part of larger
    ones."""
    chosen: list[int] = []
    for number in range(len(found.classes)):
        mine = (found.train & (found.labels == number)).nonzero().flatten()
        generator = torch.Generator().manual_seed(derive_seed(seed, number))
        order = torch.randperm(len(mine), generator=generator)
        chosen += mine[order[: max(1, round(share * len(mine)))]].tolist()
    return sorted(chosen)
