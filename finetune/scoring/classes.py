"""Scores of classes, of photos and of pixels: what results hold of them, and what follows from their rows alone.

Of a class, tp, fp and fn are the pixels of all images (or the photos) that are rightly, wrongly and not given to it.
Its accuracy is tp / (tp + fn), its IoU tp / (tp + fp + fn) (Everingham et al. 2010, The PASCAL Visual Object Classes
Challenge, section 4.4). mIoU and mean accuracy are means over the classes for which these are defined: a class that is
neither there nor predicted counts nowhere, one that is only predicted has an IoU of 0. Void pixels count nowhere.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finetune.depth_data.entries import VOID
from finetune.scoring.evaluator import Measure
from finetune.scoring.metrics import Columns, Row, columns_of, mean_of_images


class _Classes(Measure):
    """What both kinds of classes have in common."""

    @classmethod
    def unusable_text(cls, settings: Mapping[str, Any]) -> str:
        """No class is the largest."""
        return "they count as wrong"

    @classmethod
    def nonfinite_text(cls, settings: Mapping[str, Any]) -> str:
        """No class is the largest."""
        return "they count as wrong"


class ClassifiedPhotos(_Classes):
    """Photos with one class each. Rows: `label`, `predicted`, `top1`, `top5` (0 or 1), `cross_entropy`."""

    columns = ("top1", "top5", "mean_accuracy", "cross_entropy")

    @classmethod
    def aggregate(cls, columns: Columns, counts: np.ndarray, aggregation: str) -> dict[str, np.ndarray]:
        """See `Measure`: means over photos, and over classes."""
        names = [name for name in cls.columns if name in columns]
        of_class = columns["label"] == np.unique(columns["label"])[:, None]
        return {
            **mean_of_images(columns, counts, names),
            "mean_accuracy": _mean_ratio(counts @ (of_class * columns["top1"]).T, counts @ of_class.T),
        }


class SegmentedImages(_Classes):
    """Images with a class in each pixel. Rows: pixels `tp`, `fp`, `fn` by class, metrics of it alone."""

    columns = ("miou", "pixel_accuracy", "mean_accuracy")

    @classmethod
    def aggregate(cls, columns: Columns, counts: np.ndarray, aggregation: str) -> dict[str, np.ndarray]:
        """See `Measure`: of the pixels of all images together."""
        tp, fp, fn = (counts @ columns[name] for name in ("tp", "fp", "fn"))
        return {
            "miou": _mean_ratio(tp, tp + fp + fn),
            "pixel_accuracy": tp.sum(1) / (tp + fn).sum(1),
            "mean_accuracy": _mean_ratio(tp, tp + fn),
        }


def photo_results(
    names: Sequence[str], labels: np.ndarray, logits: np.ndarray, classes: Sequence[str]
) -> dict[str, Any]:
    """What results hold of classified photos.

    Args:
        names: of the photos.
        labels: their classes, `[N]`.
        logits: `[N, C]`; a photo with one that is not finite is wrong.
        classes: names of the C classes.

    Returns:
        protocol, images, classes, metrics, per_class (class, photos, accuracy), confusion (`[C][C]`, true class by
        predicted one, finite logits only), settings, protocol_hash, per_image.
    """
    usable = np.asarray(np.isfinite(logits).all(axis=1))
    values = np.where(usable[:, None], logits, 0.0).astype(np.float64)
    order = np.argsort(-values, axis=1, kind="stable")
    shifted = values - values.max(1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels]
    rank = (order == labels[:, None]).argmax(1)
    rows: list[Row] = []
    for i, name in enumerate(names):
        row = {"name": name, "label": int(labels[i]), "predicted": int(order[i, 0]) if usable[i] else None}
        row["top1"] = int(usable[i] and rank[i] < 1)
        if len(classes) > 5:
            row["top5"] = int(usable[i] and rank[i] < 5)
        rows.append({**row, "cross_entropy": float(loss[i]) if usable[i] else None})
    confusion = confusion_of(labels[usable], order[usable, 0], len(classes))
    right, there = np.diag(confusion), np.bincount(labels, minlength=len(classes))
    per_class = [
        {"class": name, "photos": int(n), "accuracy": _share(tp, n)}
        for name, n, tp in zip(classes, there, right, strict=True)
    ]
    return _results("classification", "per_image", rows, classes, per_class, confusion)


def mask_row(name: str, labels: np.ndarray, predicted: np.ndarray, classes: int) -> tuple[Row, np.ndarray]:
    """The row of an image, and its confusion matrix.

    Args:
        name: of the image.
        labels: class of each pixel `[H, W]`; 255 is void.
        predicted: likewise.
        classes: how many there are.
    """
    known = labels != VOID
    confusion = confusion_of(labels[known], predicted[known], classes)
    tp = np.diag(confusion)
    counts = {"tp": tp, "fp": confusion.sum(0) - tp, "fn": confusion.sum(1) - tp}
    row: Row = {name: values.tolist() for name, values in counts.items()}
    alone = SegmentedImages.aggregate(columns_of([row]), np.ones((1, 1)), "pooled") if known.any() else {}
    scores = {metric: float(alone[metric][0]) if alone else None for metric in SegmentedImages.columns}
    return {"name": name, **scores, **row}, confusion


def mask_results(rows: Sequence[Row], confusion: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """What results hold of segmented images, as `photo_results` has it; per_class has pixels, accuracy and iou.

    Args:
        rows: of `mask_row`.
        confusion: the sum of theirs, `[C, C]`.
        classes: names of the C classes.
    """
    tp, true, given = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    per_class = [
        {
            "class": name,
            "pixels": int(true[i]),
            "accuracy": _share(tp[i], true[i]),
            "iou": _share(tp[i], true[i] + given[i] - tp[i]),
        }
        for i, name in enumerate(classes)
    ]
    return _results("segmentation", "pooled", rows, classes, per_class, confusion)


def confusion_of(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How often each class, `[C, C]` by row, was taken for each, by column; labels and predictions are `[N]`."""
    pairs = labels.astype(np.int64) * classes + predicted.astype(np.int64)
    return np.bincount(pairs.ravel(), minlength=classes**2).reshape(classes, classes)


def _results(
    family: str,
    aggregation: str,
    rows: Sequence[Row],
    classes: Sequence[str],
    per_class: list[dict[str, Any]],
    confusion: np.ndarray,
) -> dict[str, Any]:
    measure = ClassifiedPhotos if family == "classification" else SegmentedImages
    columns = columns_of(rows)
    values = measure.aggregate(columns, np.ones((1, len(rows))), aggregation)
    metrics = {name: float(values[name][0]) for name in measure.columns if name in values}
    settings = {
        "name": family,
        "family": family,
        "aggregation": aggregation,
        "classes": list(classes),
        "metrics": list(metrics),
        "flip_average": False,
    }
    return {
        "protocol": family,
        "images": len(rows),
        "metrics": metrics,
        "classes": list(classes),
        "per_class": per_class,
        "confusion": confusion.tolist(),
        "settings": settings,
        "protocol_hash": hashlib.sha256(json.dumps(settings).encode()).hexdigest(),
        "per_image": list(rows),
    }


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Mean over the classes of part / whole `[R, C]`, where that is defined: `[R]`."""
    defined = whole > 0
    ratio = np.divide(part, whole, out=np.zeros(part.shape), where=defined)
    return ratio.sum(1) / defined.sum(1)


def _share(part: Any, whole: Any) -> float | None:
    return float(part / whole) if whole else None
