"""Images with a class in each pixel: what a run trains and validates on, and a look at every mask before it begins."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np

from finetune.config import SegmentDataConfig
from finetune.depth_data import DepthSet, LabelOptions, open_depth_data
from finetune.depth_data.entries import VOID
from finetune.depth_data.labels import NYU13_NAMES
from finetune.depth_data.sets.masks import MaskFolder
from spark.errors import UserError
from spark.training.accelerator import usable_cores


@dataclass(frozen=True)
class Masks:
    """What a run trains and validates on.

    Attributes:
        classes: names.
        train: to train on.
        held_out: to validate on, or None.
        pixels: of each class in the training masks, [C].
    """

    classes: list[str]
    train: DepthSet
    held_out: DepthSet | None
    pixels: np.ndarray


def open_masks(data: SegmentDataConfig) -> Masks:
    """The images of a run.

    Raises:
        UserError: they do not fit the layout, or a mask does not fit its image or the classes, or all is void.
    """
    train = open_set(data, "train")
    names = class_names(data, train)
    held_out = None
    if data.val_list is not None or (data.list is None and train.has_test_split()):
        held_out = open_set(data, "test")
        count_classes(held_out, len(names))
    pixels = count_classes(train, len(names))
    return Masks(names, train, held_out, pixels)


def open_set(data: SegmentDataConfig, split: Literal["train", "test"]) -> DepthSet:
    """The images of a split; of NYU with the classes that are asked for."""
    root, listed = Path(data.root), data.list if split == "train" else data.val_list
    count = data.classes if isinstance(data.classes, int) else len(data.classes)
    if data.kind == "masks" or (data.kind is None and root.is_dir() and MaskFolder.recognises(root, listed)):
        return MaskFolder(root, count, split, listed)
    if count not in (13, 40):
        raise UserError(
            f"data.classes are {count}, and NYU has 13 or 40: give one of these, or, for masks of your own, a folder"
            f" with images/ and masks/, which {root} is not"
        )
    labels = LabelOptions(cast(Literal[13, 40], count))
    return open_depth_data(root, listed, split, kind=data.kind, labels=labels, white_border=data.white_border)


def class_names(data: SegmentDataConfig, opened: DepthSet) -> list[str]:
    """Names of the classes: those that are given, NYU's 13, or their numbers."""
    if isinstance(data.classes, list):
        return data.classes
    if data.classes == 13 and not isinstance(opened, MaskFolder):
        return list(NYU13_NAMES)
    return [str(number) for number in range(data.classes)]


def count_classes(data: DepthSet, classes: int) -> np.ndarray:
    """Pixels of each class `[C]`; every mask is read.

    Raises:
        UserError: a mask that cannot be used, or no pixel with a class in any.
    """

    def count(index: int) -> np.ndarray:
        return np.bincount(data.labels_of(index).ravel(), minlength=VOID + 1)[:classes]

    total = np.zeros(classes, np.int64)
    with ThreadPoolExecutor(min(8, usable_cores())) as pool:
        for counted in pool.map(count, range(len(data))):
            total += counted
    if not total.any():
        raise UserError(
            f"every pixel of the {len(data)} masks is void, there is nothing to learn or score: {data}"
        )
    return total
