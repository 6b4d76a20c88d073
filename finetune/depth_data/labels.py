"""The classes of NYU Depth V2: 894 of the labelled file, the 40 of Gupta et al. 2013, the 13 of Couprie et al. 2013."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.io import loadmat

from finetune.depth_data.entries import VOID
from finetune.depth_data.sample import file_error, read_grey
from spark.errors import UserError

MAPPING_40 = "classMapping40.mat"
NYU13_NAMES = (
    *("bed", "books", "ceiling", "chair", "floor", "furniture", "objects"),
    *("picture", "sofa", "table", "tv", "wall", "window"),
)
"""The 13 classes; files count them from 1, with 0 = void."""

NYU40_TO_13 = np.array(
    [
        *(0, 12, 5, 6, 1, 4, 9, 10, 12, 13, 6, 8, 6, 13, 10, 6, 13, 6, 7, 7, 5),
        *(7, 3, 2, 6, 11, 7, 7, 7, 7, 7, 7, 6, 7, 7, 7, 7, 7, 7, 6, 7),
    ],
    np.uint8,
)
"""Number of the 13 (0 = void) of each number of the 40 (0 = void), as in class13Mapping.mat of the field."""


@dataclass(frozen=True)
class LabelOptions:
    """Which classes, and what becomes of pixels without one.

    Args:
        classes: 13 or 40.
        void: "ignore": void is 255, which losses pass over. "class": void is one class more, behind the others.
    """

    classes: Literal[13, 40] = 13
    void: Literal["ignore", "class"] = "ignore"

    def convert(self, values: np.ndarray, stored: int, where: str | Path) -> np.ndarray:
        """Classes as files count them -> classes as losses count them.

        Args:
            values: whole numbers `[H, W]`, 0 = void, 1 to `stored`.
            stored: how many classes the file has, 13 or 40.
            where: the file, for errors.

        Returns:
            uint8 `[H, W]`, from 0 on; void is 255, or `classes` with the policy "class".
        """
        if stored < self.classes:
            raise UserError(
                f"{where} holds {stored} classes, from which {self.classes} cannot be had: give data.labels {stored}"
            )
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > stored:
            row, column = np.argwhere((values < 0) | (values > stored))[0]
            raise file_error(
                where,
                f"class {values[row, column]} at row {row}, column {column} is not one of 0 (void) to {stored}",
            )
        numbers = NYU40_TO_13[values] if stored > self.classes else values.astype(np.uint8)
        void = VOID if self.void == "ignore" else self.classes
        return np.where(numbers == 0, np.uint8(void), numbers - np.uint8(1)).astype(np.uint8)

    def files(self, folder: Path, number: str) -> list[Path]:
        """The files of these classes of a NYU image that are there, best first."""
        names = (f"labels{stored}_{number}.png" for stored in ((13, 40) if self.classes == 13 else (40,)))
        return [folder / name for name in names if (folder / name).is_file()]

    def read(self, folder: Path, number: str) -> np.ndarray:
        """The classes of a NYU image, from `labels13_NUMBER.png` or `labels40_NUMBER.png` in its folder."""
        for path in self.files(folder, number):
            values = read_grey(path, what="a map of classes")
            return self.convert(values, 13 if path.stem.startswith("labels13") else 40, path)
        raise file_error(
            folder / f"labels{self.classes}_{number}.png",
            "there is no such file of classes, give --data.labels null or write it beside the image",
        )


def read_mapping_40(path: Path) -> np.ndarray:
    """Number of the 40 (0 = void) of each of the 894 of the labelled file (0 = void), uint8 `[895]`."""
    if not path.is_file():
        raise UserError(
            f"no file {path}: {MAPPING_40} of the field is needed beside the labelled file for its classes;"
            " or give data.labels null"
        )
    try:
        mapping = np.asarray(loadmat(path)["mapClass"]).ravel()
    except Exception as error:  # scipy raises a dozen kinds of error for a file that is not MATLAB 5
        raise UserError(f"cannot read mapClass of {path} as a MATLAB file: {error}") from error
    if mapping.size != 894 or mapping.min() < 1 or mapping.max() > 40:
        raise UserError(f"{path} should map 894 classes to 1..40, the official {MAPPING_40} does")
    return np.concatenate([np.zeros(1, np.uint8), mapping.astype(np.uint8)])
