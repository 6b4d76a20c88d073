"""NYU Depth V2 as DenseDepth publishes it: `nyu_data.zip` with CSV files of pairs, `nyu_test.zip` with arrays, or what
these unpack to."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from finetune.depth_data.base import BadDepth, DepthSet, OpenOptions
from finetune.depth_data.files import ArrayRows, Files
from finetune.depth_data.lists import ListedSet
from finetune.depth_data.sample import (
    DepthSample,
    checked_metres,
    file_error,
    read_depth_png,
    read_grey,
    read_rgb,
)
from spark.errors import UserError

TRAIN_CSV, TEST_CSV = "nyu2_train.csv", "nyu2_test.csv"
TEST_RGB, TEST_DEPTH = "eigen_test_rgb.npy", "eigen_test_depth.npy"
FULL_SCALE = 10.0
"""Depth that 255 stands for in a training file [m]."""


class DenseDepth(ListedSet):
    """The 50,688 training or 654 test pairs of `nyu_data.zip`.

    A line of `data/nyu2_train.csv` is `data/nyu2_train/SCENE/1.jpg,data/nyu2_train/SCENE/1.png`, without a header.
    Depth under `nyu2_test` is uint16 in millimetres; all other depth has 8 bits, value * 10 / 255 m (steps of 39 mm,
    filled, 255 = at least 10 m). A file of the other kind is an error.

    Args:
        root: the zip, or a folder that holds `data/nyu2_train.csv` or `nyu2_train.csv`.
        csv: file of pairs, a name inside `root` or a path; None: that of the split.
        split: "train" or "test".
    """

    benchmark = "nyu"

    def __init__(self, root: str | Path, csv: str | Path | None = None, split: str = "train"):
        self.archive, self.root = Files(root), Path(root)
        text, found = self._csv(csv, TRAIN_CSV if split == "train" else TEST_CSV)
        self.list_file = Path(found)
        self.entries = [
            parse_line(found, number, line)
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
        if not self.entries:
            raise UserError(f"{found} is empty: it needs a line `image,depth` for each pair")
        # Entries begin with data/; where the folder data itself is the root, they lie without it.
        self._drop = 0 if self.entries[0].name in self.archive else 1
        self.refuse_missing(
            ((name, entry.line) for entry in self.entries for name in (entry.name, entry.depth)),
            lambda name: self._inside(name) in self.archive,
        )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether a CSV or the test arrays lie at `root`, and no list is given that is no CSV."""
        if list_file is not None and Path(list_file).suffix != ".csv":
            return False
        try:
            files = Files(root)
        except ValueError:
            return False
        return any(files.find(name) is not None for name in (TRAIN_CSV, TEST_CSV, TEST_RGB))

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> DepthSet:
        """Open `options.list`, or the CSV of `options.split`; the test arrays where there is no CSV of the test."""
        if options.list is None and options.split == "test":
            files = Files(root)
            if files.find(TEST_CSV) is None and files.find(TEST_RGB) is not None:
                return DenseDepthTest(root, bad_depth=options.bad_depth)
        return cls(root, options.list, options.split)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        kinds = sorted({entry.eight_bits for entry in self.entries})
        bits = " and ".join("8 bits (value * 10 / 255 m)" if eight else "16 bits (mm)" for eight in kinds)
        return f"DenseDepth layout, {len(self)} pairs of {self.list_file}, depth of {bits}"

    def read(self, entry: "Pair") -> DepthSample:
        """The pair, in metres."""
        inside = self._inside(entry.name)
        image = read_rgb(self.archive.where(inside), self.archive.read(inside, "an image"))
        inside = self._inside(entry.depth)
        where, content = self.archive.where(inside), self.archive.read(inside, "a depth map")
        if not entry.eight_bits:
            return DepthSample(image, read_depth_png(where, 0.001, content), entry.name)
        values = read_grey(where, content)
        if values.dtype != np.uint8:
            raise file_error(
                where,
                f"the depth map is {values.dtype}, and training depth of this layout has 8 bits, value * 10 / 255;"
                " list 16-bit millimetres as layout nyu_sync or folder",
            )
        return DepthSample(image, values.astype(np.float32) * np.float32(FULL_SCALE / 255), entry.name)

    def has_test_split(self) -> bool:
        """Whether the test CSV or the test arrays are there."""
        return any(self.archive.find(name) is not None for name in (TEST_CSV, TEST_RGB))

    def _csv(self, csv: str | Path | None, official: str) -> tuple[str, str]:
        """Text and name of the file of pairs."""
        name = str(official if csv is None else csv)
        found = name if name in self.archive else self.archive.find(PurePosixPath(name).name)
        if found is not None:
            return self.archive.read(found, "a list of pairs").decode("utf-8-sig"), self.archive.where(found)
        if csv is not None and Path(csv).is_file():
            return Path(csv).read_text(encoding="utf-8-sig"), str(csv)
        raise UserError(
            f"no {name} in {self.archive.root}: the layout of DenseDepth has {TRAIN_CSV} and {TEST_CSV}, and for the"
            f" test alone {TEST_RGB} with {TEST_DEPTH}"
        )

    def _inside(self, name: str) -> str:
        return "/".join(PurePosixPath(name).parts[self._drop :])


@dataclass(frozen=True)
class Pair:
    """Image (`name`) and depth map of a line of the CSV."""

    name: str
    depth: str
    line: int

    @property
    def eight_bits(self) -> bool:
        """Whether its depth has 8 bits: all but the test pairs."""
        return "nyu2_test" not in PurePosixPath(self.depth).parts


def parse_line(csv: str, number: int, line: str) -> Pair:
    """A line of a CSV; UserError if it is no pair."""
    columns = [column.strip().lstrip("/") for column in line.split(",")]
    if len(columns) != 2 or not all(columns):
        raise UserError(f"{csv}, line {number}: expected `image,depth`, got {line!r}")
    return Pair(columns[0], columns[1], number)


class DenseDepthTest(DepthSet):
    """The 654 test pairs of `nyu_test.zip`: `eigen_test_rgb.npy`, `eigen_test_depth.npy`.

    Images are uint8 (N, H, W, 3), RGB; depth is (N, H, W) in metres, filled. `eigen_test_crop.npy` beside them is of
    DenseDepth's protocol and not read: the protocol of the evaluation decides which pixels count. Arrays are read
    image by image, from inside the zip too, and are never unpickled.

    Args:
        root: the zip, or a folder with the arrays.
        bad_depth: see `checked_metres`.
    """

    benchmark = "nyu"

    def __init__(self, root: str | Path, *, bad_depth: BadDepth = "refuse"):
        self.archive, self.bad_depth = Files(root), bad_depth
        self.ground_truth = "filled"
        rgb, depth = (self.archive.find(name) for name in (TEST_RGB, TEST_DEPTH))
        if rgb is None or depth is None:
            missing = TEST_RGB if rgb is None else TEST_DEPTH
            raise UserError(
                f"no {missing} in {root}: the test arrays of DenseDepth are {TEST_RGB} and {TEST_DEPTH}"
            )
        self.rgb, self.depth = ArrayRows(self.archive, rgb), ArrayRows(self.archive, depth)
        if self.rgb.shape[0] != self.depth.shape[0] or not self.rgb.shape[0]:
            raise UserError(
                f"{root} has {self.rgb.shape[0]} images in {TEST_RGB} and {self.depth.shape[0]} in {TEST_DEPTH}: they"
                " belong together image by image, copy both again"
            )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the layout of which this is the test split lies there."""
        return DenseDepth.recognises(root, list_file)

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "DenseDepthTest":
        """Open the arrays."""
        return cls(root, bad_depth=options.bad_depth)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        return f"DenseDepth layout, {len(self)} test pairs of {self.rgb.where}, filled depth in metres"

    def __len__(self) -> int:
        return self.rgb.shape[0]

    def names(self) -> list[str]:
        """Names of the pairs, in order."""
        return [f"eigen_test/{index:04d}" for index in range(len(self))]

    def has_test_split(self) -> bool:
        """This is it."""
        return True

    def __getitem__(self, index: int) -> DepthSample:
        image, where = self.rgb[index], f"{self.depth.where}, image {index}"
        return DepthSample(
            image, checked_metres(self.depth[index], where, self.bad_depth), self.names()[index]
        )
