"""Scores of classes: of whole images, and of their pixels.

Classification: `top1` and `top5` are means over images, `class_top1` is the mean over the classes that have an image.
Segmentation: pixels of all images are pooled, void ones left out. Of class c, I is the number of pixels that have it
and are given it, U of those that have it or are given it, N of those that have it: `miou` is the mean of I / U over the
classes with U > 0, `class_accuracy` that of I / N over those with N > 0, `pixel_accuracy` is the sum of I over that of
N (Long et al. 2015, section 5).
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from finetune.depth_data.entries import VOID
from finetune.scoring.metrics import Columns, columns_of, mean_of_images
from spark.errors import UserError

Aggregate = Callable[[Columns, np.ndarray, str], dict[str, np.ndarray]]


def of_images(columns: Columns, counts: np.ndarray, aggregation: str = "") -> dict[str, np.ndarray]:
    """Scores of classified images, each counted `counts` `[R, N]` times: name -> `[R]`."""
    names = [name for name in ("top1", "top5") if name in columns]
    label = columns["label"].astype(int)
    one_hot = np.eye(label.max() + 1)[label]  # [N, K]
    total = counts @ one_hot
    with np.errstate(invalid="ignore"):
        shares = (counts * columns["top1"]) @ one_hot / total
    return {**mean_of_images(columns, counts, names), "class_top1": np.nanmean(shares, 1)}


def of_pixels(columns: Columns, counts: np.ndarray, aggregation: str = "") -> dict[str, np.ndarray]:
    """Scores of segmented images, each counted `counts` `[R, N]` times: name -> `[R]`."""
    classes = sum(name.startswith("right_") for name in columns)
    right, has, given = (
        np.stack([counts @ columns[f"{what}_{c}"] for c in range(classes)], 1)
        for what in ("right", "has", "given")
    )
    with np.errstate(invalid="ignore"):
        return {
            "miou": np.nanmean(right / (has + given - right), 1),
            "pixel_accuracy": right.sum(1) / has.sum(1),
            "class_accuracy": np.nanmean(right / has, 1),
        }


CLASS_AGGREGATES: Mapping[str, Aggregate] = MappingProxyType(
    {"classification": of_images, "segmentation": of_pixels}
)


def image_row(name: str, logits: np.ndarray, label: int) -> dict[str, Any]:
    """The row of a classified image from its logits `[K]`; `top5` only where there are more than five classes."""
    order = np.argsort(-logits, kind="stable")
    row = {"name": name, "label": label, "predicted": int(order[0]), "top1": int(order[0] == label)}
    return row | ({"top5": int(label in order[:5])} if len(logits) > 5 else {})


def pixel_row(name: str, predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, Any]:
    """The row of a segmented image from classes `[H, W]`, both: for each class pixels that are `right`, that have it in
    the ground truth (`has`), and that are `given` it, void ones left out."""
    if predicted.shape != labels.shape:
        raise UserError(
            f"{name}: classes of {list(predicted.shape)} are compared with labels {list(labels.shape)}"
        )
    known = labels != VOID
    if known.any() and labels[known].max() >= classes:
        raise UserError(
            f"{name} has class {labels[known].max()}, and there are {classes}, 0 to {classes - 1}, beside void, {VOID}"
        )
    predicted, labels = predicted[known], labels[known]
    counted = {
        "right": np.bincount(labels[predicted == labels], minlength=classes),
        "has": np.bincount(labels, minlength=classes),
        "given": np.bincount(predicted, minlength=classes),
    }
    return {"name": name} | {
        f"{what}_{c}": int(n) for what, all in counted.items() for c, n in enumerate(all)
    }


def class_results(family: str, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """What results.json holds: metrics, `per_class` (class -> its accuracy, or IoU of its pixels), `confusion` of
    images (class -> class it was given -> images), and the rows."""
    columns = columns_of(rows)
    metrics = {
        name: float(v[0])
        for name, v in CLASS_AGGREGATES[family](columns, np.ones((1, len(rows))), "").items()
    }
    per_class: dict[str, float | None] = {}
    more: dict[str, Any] = {}
    for number, name in enumerate(names):
        if family == "classification":
            mine = columns["label"] == number
            per_class[name] = float(columns["top1"][mine].mean()) if mine.any() else None
        else:
            right, has, given = (columns[f"{what}_{number}"].sum() for what in ("right", "has", "given"))
            per_class[name] = float(right / (has + given - right)) if has + given else None
    if family == "classification":
        confusion = np.zeros((len(names), len(names)), int)
        np.add.at(confusion, (columns["label"].astype(int), columns["predicted"].astype(int)), 1)
        more["confusion"] = {
            name: {names[k]: int(n) for k, n in enumerate(row) if n}
            for name, row in zip(names, confusion, strict=True)
        }
    return {
        "protocol": family,
        "images": len(rows),
        "metrics": metrics,
        "per_class": per_class,
        **more,
        "settings": {"family": family, "aggregation": "", "metrics": list(metrics), "classes": list(names)},
        "per_image": list(rows),
    }
