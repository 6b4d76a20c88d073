"""What spark-probe does, once its options are read."""

import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader

from finetune.model.prediction import chosen_device
from finetune.scoring.metrics import write_results
from spark.errors import UserError
from spark.model.encoder import PyramidLevel, pyramid, pyramid_info
from spark.monitor.probes import (
    MAX_ITERATIONS,
    TEMPERATURE,
    Preparation,
    PreparedImages,
    choose_strength,
    fit_logistic,
    knn_predict,
    list_labelled,
    require_images_of_each_class,
    share_equal,
    standardise,
)
from spark.options import ProbeConfig
from spark.training.log import progress_bar
from spark.training.skipped import UnreadableImages
from spark.training.stop import ignore_stop_signals
from spark.weights.encoder import description, load_encoder
from spark.weights.official import input_channels, timm_config

# ----------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One encoder to probe: where it came from, what is read of it, and how its images are prepared."""

    source: str
    model: nn.Module
    levels: list[PyramidLevel]
    preparation: Preparation


def open_candidate(source: str, options: ProbeConfig) -> Candidate:
    """Load an encoder. Random weights are a function of the seed alone, not of the encoders before.

    Raises:
        ValueError: no encoder, no such level, an image size below its stride, or not an encoder of images.
        FileNotFoundError: a path that does not exist.
    """
    torch.manual_seed(options.seed)
    model = load_encoder(source, pretrained=options.pretrained, model_name=options.model_name)
    known = timm_config(model)
    channels = input_channels(model)
    if channels not in (1, 3):
        raise UserError(
            f"{source} reads {channels} channels: image files have 3 channels (colour) or 1 (grey)"
        )
    size = options.size or known["input_size"][1:]
    size = (size, size) if isinstance(size, int) else size
    stride = pyramid_info(model)[-1].stride
    if min(size) < stride:
        raise UserError(
            f"images of {size[0]}x{size[-1]} px are smaller than the stride of {source}, {stride} px: "
            f"give a larger --size"
        )
    preparation = Preparation(
        (size[0], size[-1]),
        tuple(known.get("mean", IMAGENET_DEFAULT_MEAN)),
        tuple(known.get("std", IMAGENET_DEFAULT_STD)),
    )
    return Candidate(source, model, chosen_levels(source, model, options.level), preparation)


def chosen_levels(source: str, model: nn.Module, level: str) -> list[PyramidLevel]:
    """The feature maps that `level` names: "deepest", "all", or a stride [px]."""
    levels = pyramid_info(model)
    if level == "all":
        return levels
    if level == "deepest":
        return levels[-1:]
    chosen = [known for known in levels if str(known.stride) == level]
    if not chosen:
        strides = ", ".join(str(known.stride) for known in levels)
        raise UserError(
            f"{source} has no feature map of level {level!r}: give deepest, all, or a stride of {strides}"
        )
    return chosen


@torch.no_grad()
def extract_features(
    candidate: Candidate,
    files: Sequence[Path],
    unreadable: UnreadableImages,
    *,
    device: torch.device,
    precision: str = "fp32",
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Send files through an encoder, in eval mode.

    Args:
        candidate: the encoder; it is moved to the device for the while.
        files: images.
        unreadable: counts the files that cannot be read; each is told to the user once.
        device: where to compute.
        precision: fp32, or bf16 under autocast. The average over positions is taken in fp32.
        batch_size: images of one forward.
        workers: processes that read images; 0 reads in this one.

    Returns:
        Features [M, D] of the M files that could be read, float32 on the CPU, and their indices in `files` [M].

    Raises:
        ValueError: no file could be read, or a feature is not finite.
    """
    model = candidate.model.to(device).eval()
    loader = DataLoader(
        PreparedImages(files, candidate.preparation),
        batch_size,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
    )
    features, kept = [], []
    begin = time.monotonic()
    with progress_bar(len(loader), every=max(1, len(loader) // 5)) as bar:
        bar.say(f"{candidate.source}, {candidate.preparation.size[0]}x{candidate.preparation.size[1]} px")
        for step, samples in enumerate(loader, start=1):
            for line in unreadable.add([image for _, image in samples if isinstance(image, str)]):
                bar.say(f"unreadable, left out: {line}")
            readable = [(index, image) for index, image in samples if isinstance(image, Tensor)]
            if readable:
                images = torch.stack([image for _, image in readable]).to(device)
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                    maps = pyramid(model, images, candidate.levels)
                features.append(torch.cat([x.float().mean((2, 3)) for x in maps], dim=1).cpu())
                kept += [index for index, _ in readable]
            bar.update(step, images_per_second=len(kept) / (time.monotonic() - begin))
    model.cpu()  # the next encoder wants the memory
    if not kept:
        raise UserError(f"none of the {len(files)} image files could be read: check the data")
    result = torch.cat(features)
    broken = int((~result.isfinite()).any(dim=1).sum())
    if broken:
        raise UserError(
            f"{candidate.source} gives features that are not finite for {broken} of {len(kept)} images: "
            "try --precision fp32, or another checkpoint"
        )
    return result, torch.tensor(kept)


# ----------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------


def probe(
    train: Tensor, train_labels: Tensor, val: Tensor, val_labels: Tensor, options: ProbeConfig
) -> dict[str, Any]:
    """Score features [N, D] with labels [N] on those of the validation split, [M, D] and [M]."""
    classes = int(train_labels.max()) + 1
    train, val = standardise(train, val)
    predicted = knn_predict(train, train_labels, val, sorted(set(options.k)), classes)
    strength, held_out = choose_strength(train, train_labels, classes, options.l2, options.seed)
    model = fit_logistic(train, train_labels, classes, strength)
    return {
        "features": train.shape[1],
        "knn": {str(k): share_equal(predicted[k], val_labels) for k in sorted(set(options.k))},
        "linear": {
            "val": model.accuracy(val, val_labels),
            "train": model.accuracy(train, train_labels),
            "l2": strength,
            "converged": model.converged,
            "held_out": held_out,
        },
    }


def run(options: ProbeConfig, command: str) -> dict[str, Any]:
    """Probe every encoder; the output file is written anew after each. Returns its content."""
    device = chosen_device(options.device)
    data = list_labelled(Path(options.data))
    candidates = [open_candidate(source, options) for source in options.encoder]  # mistakes show at once
    unreadable = UnreadableImages(len(data.files), max_share=1.0)
    results: dict[str, Any] = {
        "command": command,
        "settings": {
            **{name: value for name, value in vars(options).items() if name not in ("output", "encoder")},
            "k": sorted(set(options.k)),
            "device": torch.cuda.get_device_name()
            if device.type == "cuda"
            else f"{os.cpu_count()} CPU cores",
            "temperature": TEMPERATURE,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
        "classes": data.classes,
        "encoders": [],
    }
    for candidate in candidates:
        begin = time.monotonic()
        features, kept = extract_features(
            candidate,
            data.files,
            unreadable,
            device=device,
            precision=options.precision,
            batch_size=options.batch_size,
            workers=options.workers,
        )
        train, labels = data.train[kept], data.labels[kept]
        require_images_of_each_class(data.classes, labels[train], labels[~train])
        features, labels, train = features.to(device), labels.to(device), train.to(device)
        scores = probe(features[train], labels[train], features[~train], labels[~train], options)
        majority = labels[train].bincount().argmax()
        results["images"] = {"train": int(train.sum()), "val": int((~train).sum())}
        results["unreadable"] = dict(unreadable.reasons)
        results["chance"] = 1 / len(data.classes)
        results["majority"] = share_equal(majority, labels[~train])
        results["encoders"].append(
            {
                "encoder": candidate.source,
                "architecture": next(iter(description(candidate.model).values())),
                "size": candidate.preparation.size,
                "mean": candidate.preparation.mean,
                "std": candidate.preparation.std,
                "strides": [level.stride for level in candidate.levels],
                **scores,
                "seconds": round(time.monotonic() - begin, 1),
            }
        )
        write_results(options.output, results)
    return results


def print_results(console: Console, results: dict[str, Any]) -> None:
    """Print the table, and below it what its numbers stand on."""
    images = results["images"]
    table = Table(
        title=f"{len(results['classes'])} classes, {images['train']} training and {images['val']} validation images; "
        f"accuracy in %",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    table.add_column("encoder", overflow="fold")
    table.add_column("px", no_wrap=True)
    for heading in (*(f"{k}-NN" for k in results["settings"]["k"]), "linear", "(train)", "L2"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in results["encoders"]:
        scores = [*row["knn"].values(), row["linear"]["val"], row["linear"]["train"]]
        table.add_row(
            Text(row["encoder"]),
            "x".join(map(str, row["size"])),
            *(f"{100 * score:.1f}" for score in scores),
            f"{row['linear']['l2']:g}",
        )
    console.print(table)
    lines = [
        f"chance {100 * results['chance']:.1f}, always the largest class {100 * results['majority']:.1f}"
    ]
    if results["unreadable"]:
        lines.append(f"{len(results['unreadable'])} unreadable images were left out")
    strengths = results["settings"]["l2"]
    for row in results["encoders"]:
        if not row["linear"]["converged"]:
            lines.append(
                f"{row['encoder']}: L-BFGS stopped at {MAX_ITERATIONS} iterations, before it converged"
            )
        if len(strengths) > 1 and row["linear"]["l2"] in (min(strengths), max(strengths)):
            lines.append(
                f"{row['encoder']}: the best L2 strength is at the end of those tried, widen --l2 beyond it"
            )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def run_and_print(options: ProbeConfig, command: str) -> None:
    """Probe every encoder and print the table.

    Args:
        options: of the command.
        command: how it was called, for the results.
    """
    results = run(options, command)
    console = Console()
    print_results(console, results)
    console.print(f"written to {options.output}", markup=False, highlight=False, soft_wrap=True)
