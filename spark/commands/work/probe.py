"""What spark-probe does, once its options are read."""

import json
import logging
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

from spark.errors import UserError
from spark.files import write_whole
from spark.images.loader import load_batches
from spark.model.encoder import PyramidLevel, input_channels, pyramid, pyramid_info, timm_config
from spark.model.names import is_own
from spark.monitor.probes import (
    MAX_ITERATIONS,
    TEMPERATURE,
    Preparation,
    PreparedImages,
    list_labelled,
    probe_scores,
    require_images_of_each_class,
)
from spark.options import ProbeConfig
from spark.training.accelerator import chosen_device
from spark.training.log import progress_bar
from spark.training.skipped import UnreadableImages
from spark.weights.encoder import description, read_encoder

logger = logging.getLogger(__name__)
WEIGHTS_SHOWN = {"random": " (random weights)", "timm": " (timm's weights)", "loaded": ""}

# ----------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One encoder to probe: where it came from, what is read of it, and how its images are prepared.

    `weights` are "random", "timm" (published ones) or "loaded" from the source.
    """

    source: str
    weights: str
    model: nn.Module
    levels: list[PyramidLevel]
    preparation: Preparation


def open_candidate(source: str, options: ProbeConfig, size: int | tuple[int, ...] | None = None) -> Candidate:
    """Load an encoder. Random weights are a function of the seed alone, not of the encoders before.

    `size` (H, W) is that of the images where the options name none; None is the encoder's own.
    """
    torch.manual_seed(options.seed)
    model, report = read_encoder(source, pretrained=options.pretrained, model_name=options.model_name)
    if report.missing:
        logger.warning("%s", report)
    weights = "loaded" if report.source else "timm" if options.pretrained else "random"
    known = timm_config(model)
    channels = input_channels(model)
    if channels not in (1, 3):
        raise UserError(
            f"{source} reads {channels} channels: image files have 3 channels (colour) or 1 (grey)"
        )
    wanted: Any = options.size or size or known["input_size"][1:]
    size = (wanted, wanted) if isinstance(wanted, int) else tuple(wanted)
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
    return Candidate(source, weights, model, chosen_levels(source, model, options.level), preparation)


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
        unreadable: counts the files that cannot be read; each is printed once.
        device: where to compute.
        precision: fp32, or bf16 under autocast. The average over positions is taken in fp32.
        batch_size: images of one forward.
        workers: processes that read images; 0 reads in this one.

    Returns:
        Features [M, D] of the M files that could be read, float32 on the CPU, and their indices in `files` [M].
    """
    model = candidate.model.to(device).eval()
    images = PreparedImages(files, candidate.preparation)
    loader = load_batches(images, workers, device, batch_size=batch_size, collate_fn=list)
    features, kept = [], []
    begin = time.monotonic()
    steps = -(-len(files) // batch_size)
    with progress_bar(steps, every=max(1, steps // 5)) as bar:
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


def run(options: ProbeConfig, command: str) -> dict[str, Any]:
    """Probe every encoder; the output file is written anew after each. Returns its content."""
    device = chosen_device(options.device)
    data = list_labelled(Path(options.data))
    candidates: list[Candidate] = []
    for source in options.encoder:  # mistakes show at once
        size = candidates[0].preparation.size if candidates else None
        candidates.append(open_candidate(source, options, size))
    images = int(data.train.sum())
    if max(options.k) > images:
        fitting = " ".join(str(k) for k in sorted({max(1, images // 10), max(1, images // 5)}))
        raise UserError(
            f"--k {max(options.k)} is more than the {images} training images: give smaller ones, such as --k {fitting}"
        )
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
        scores = probe_scores(features, labels, train, sorted(set(options.k)), options.l2, options.seed)
        majority = labels[train].bincount().argmax()
        results["images"] = {"train": int(train.sum()), "val": int((~train).sum())}
        results["unreadable"] = dict(unreadable.reasons)
        results["chance"] = 1 / len(data.classes)
        results["majority"] = (labels[~train] == majority).double().mean().item()
        results["encoders"].append(
            {
                "encoder": candidate.source,
                "weights": candidate.weights,
                "architecture": next(iter(description(candidate.model).values())),
                "size": candidate.preparation.size,
                "mean": candidate.preparation.mean,
                "std": candidate.preparation.std,
                "strides": [level.stride for level in candidate.levels],
                **scores,
                "seconds": round(time.monotonic() - begin, 1),
            }
        )
        write_whole(options.output, (json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
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
            Text(row["encoder"] + WEIGHTS_SHOWN[row["weights"]]),
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
    if timm_names := [
        row["encoder"]
        for row in results["encoders"]
        if row["weights"] == "random" and not is_own(row["encoder"])
    ]:
        lines.append(
            f"{', '.join(timm_names)}: random weights, a lower bound; --pretrained takes those that timm publishes"
        )
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
    """Probe every encoder and print the table; `command`, how it was called, goes into the results."""
    results = run(options, command)
    console = Console()
    print_results(console, results)
    console.print(f"written to {options.output}", markup=False, highlight=False, soft_wrap=True)
