"""Depth in the Wild (Chen et al. 2016): photos, each with one pair of points of which the farther one is known."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from finetune.depth_data.base import OpenOptions
from finetune.depth_data.entries import size_text
from finetune.depth_data.lists import (
    ListedSet,
    at_line,
    existing_root,
    find_list,
    first_lines,
    numbered_lines,
)
from finetune.depth_data.sample import DepthFileError, DepthSample, Supervision, read_rgb
from spark.errors import UserError

RELATIONS = {">": 1, "<": -1, "=": 0}
OFFICIAL = {
    "train": ("DIW_train_val.csv", "DIW_Annotations/DIW_train_val.csv"),
    "test": ("DIW_test.csv", "DIW_Annotations/DIW_test.csv"),
}


class DIW(ListedSet):
    """Photos with the relation of two points each, from a file of alternating lines.

        ./DIW_test/0a9b.thumb
        118,206,309,72,>,480,360

    The second is `yA,xA,yB,xB,relation,width,height`: y first, counted from 1, in pixels of the photo. Several such
    lines may follow one path. `>` has two readings: the code of the authors reads it as the larger depth
    at A, other texts as the closer point being "higher". So it is an option. Relation +1 of a sample is A farther.

    Args:
        root: folder that the paths are relative to.
        csv: the file, a name inside `root` or a path; None: that of the split.
        split: "train" or "test".
        polarity: whether `>` means that A is "farther" or "closer".
    """

    supervision: ClassVar[Supervision] = "ordinal"
    benchmark = "diw"

    def __init__(
        self,
        root: str | Path,
        csv: str | Path | None = None,
        split: Literal["train", "test"] = "train",
        *,
        polarity: Literal["farther", "closer"] = "farther",
    ):
        self.root, self.polarity = existing_root(root), polarity
        found = [name for name in OFFICIAL[split] if (self.root / name).is_file()]
        if csv is None and not found:
            raise UserError(f"no {OFFICIAL[split][0]} in {root}: name the file of annotations (data.list)")
        self.list_file = find_list(self.root, csv or found[0])
        self.entries = parse_annotations(self.list_file)
        self.refuse_missing((photo.path, photo.line) for photo in self.entries)
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the list is a file of alternating lines, or an official one is there."""
        if not root.is_dir():
            return False
        if list_file is None:
            return any((root / name).is_file() for names in OFFICIAL.values() for name in names)
        lines = first_lines(root, list_file, 2)
        return bool(lines) and "," not in lines[0] and lines[1].count(",") == 6

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "DIW":
        """Open `options.list`, or the official file of `options.split`."""
        return cls(root, options.list, options.split, polarity=options.polarity)

    def has_test_split(self) -> bool:
        """Whether the official annotations of it are there."""
        return any((self.root / name).is_file() for name in OFFICIAL["test"])

    def __repr__(self) -> str:
        """What a run prints about its data."""
        pairs = sum(len(photo.pairs) for photo in self.entries)
        return (
            f"DIW layout, {len(self)} photos with {pairs} pairs of points of {self.list_file}, where > says that A is"
            f" {self.polarity}"
        )

    def read(self, entry: "Photo") -> DepthSample:
        """The photo with its pairs."""
        path = self.root / entry.path
        image = read_rgb(path)
        pairs, relations = [], []
        for points, relation, (width, height), row in entry.pairs:
            with at_line(self.list_file, row):
                if image.shape[:2] != (height, width):
                    raise DepthFileError(
                        f"{path}: the photo is {size_text(image.shape)}, its annotation is for {height}x{width}"
                        " (height x width), the points would lie elsewhere"
                    )
                pair = np.array([points], np.float64) - 1  # counted from 1
                DepthSample(image, None, str(path), pairs=pair)  # refuses points outside
            pairs.append(pair[0])
            relations.append(relation if self.polarity == "farther" else -relation)
        return DepthSample(
            image, None, entry.name, pairs=np.stack(pairs), relation=np.array(relations, np.int64)
        )


Annotation = tuple[tuple[float, ...], int, tuple[int, int], int]
"""Points (yA, xA, yB, xB) counted from 1, relation, (width, height), line."""


@dataclass(frozen=True)
class Photo:
    """A photo of the file; `name` is its path, with the line beside it where the path comes for the second time."""

    name: str
    path: str
    line: int
    pairs: list[Annotation] = field(default_factory=list)


def parse_annotations(csv: Path) -> list[Photo]:
    """The photos of a DIW file.

    Raises:
        UserError: a line that is neither a path nor an annotation, or a path without an annotation.
    """
    photos: list[Photo] = []
    seen: set[str] = set()
    for number, text in numbered_lines(csv):
        if "," not in text:
            path = text.removeprefix("./").lstrip("/")
            photos.append(Photo(f"{path} (line {number})" if path in seen else path, path, number))
            seen.add(path)
            continue
        try:
            *points, relation, width, height = text.split(",")
            if len(points) != 4 or not photos:
                raise ValueError("4 numbers, a relation and a size, below the path of a photo")
            places = tuple(float(value) for value in points)
            size = int(float(width)), int(float(height))
            photos[-1].pairs.append((places, RELATIONS[relation.strip()], size, number))
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{csv}, line {number}: expected `yA,xA,yB,xB,relation,width,height` with > or < (or =) below the path"
                f" of its photo, got {text!r}"
            ) from error
    if bare := [photo for photo in photos if not photo.pairs]:
        raise UserError(
            f"{csv}, line {bare[0].line}: {bare[0].path} has no annotation; the file alternates between both"
        )
    return photos
