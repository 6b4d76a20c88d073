"""Depth in the Wild (Chen et al. 2016): photos, each with one pair of points of which the farther one is known."""

from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from finetune.depth_data.base import DepthSet, OpenOptions, at_line
from finetune.depth_data.sample import DepthFileError, DepthSample, Supervision, read_rgb, size_text
from finetune.depth_data.sets.nyu import existing_root, find_list
from spark.errors import UserError

RELATIONS = {">": 1, "<": -1, "=": 0}
OFFICIAL = {
    "train": ("DIW_train_val.csv", "DIW_Annotations/DIW_train_val.csv"),
    "test": ("DIW_test.csv", "DIW_Annotations/DIW_test.csv"),
}


class DIW(DepthSet):
    """Photos with the relation of two points each, from a file of alternating lines.

        ./DIW_test/0a9b.thumb
        118,206,309,72,>,480,360

    The second is `yA,xA,yB,xB,relation,width,height`: y first, counted from 1, in pixels of the photo. Several such
    lines may follow one path. What `>` means is told in two ways: the code of the authors reads it as the larger depth
    at A, other texts as the closer point being "higher". So it is an option. Relation +1 of a sample is A farther.

    Args:
        root: folder that the paths are relative to.
        csv: the file, a name inside `root` or a path; None: that of the split.
        split: "train" or "test".
        polarity: what `>` says of A, "farther" or "closer".

    Raises:
        ValueError: no such file, a line that is neither a path nor an annotation, photos that are missing, or a first
            one that cannot be used. A point outside its photo, or a photo of another size than its annotation says, is
            a `DepthFileError` of that sample.
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
        self.csv = find_list(self.root, csv or found[0])
        self.photos = parse_annotations(self.csv)
        missing = [(name, line) for name, line, _ in self.photos if not (self.root / name).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.photos)} photos named in {self.csv} are missing, the first is"
                f" {self.root / missing[0][0]} (line {missing[0][1]}): is {root} what the paths are relative to?"
            )
        self._names: list[str] = []
        seen: set[str] = set()
        for name, line, _ in self.photos:
            self._names.append(name if name not in seen else f"{name} (line {line})")
            seen.add(name)
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the list is a file of alternating lines, or an official one is there."""
        if not root.is_dir():
            return False
        if list_file is None:
            return any((root / name).is_file() for names in OFFICIAL.values() for name in names)
        try:
            with find_list(root, list_file).open(encoding="utf-8-sig") as file:
                lines = [line.strip() for line in (file.readline(), file.readline())]
        except (ValueError, OSError):
            return False
        return "," not in lines[0] and lines[1].count(",") == 6

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "DIW":
        """Open `options.list`, or the official file of `options.split`."""
        return cls(root, options.list, options.split, polarity=options.polarity)

    def has_test_split(self) -> bool:
        """Whether the official annotations of it are there."""
        return any((self.root / name).is_file() for name in OFFICIAL["test"])

    def __repr__(self) -> str:
        """What a run prints about its data."""
        return (
            f"DIW layout, {len(self)} photos with {sum(len(rows) for *_, rows in self.photos)} pairs of points of"
            f" {self.csv}, where > says that A is {self.polarity}"
        )

    def __len__(self) -> int:
        return len(self.photos)

    def names(self) -> list[str]:
        """Names of the photos, in order; a photo that comes twice has the line beside its name."""
        return self._names

    def __getitem__(self, index: int) -> DepthSample:
        name, line, rows = self.photos[index]
        path = self.root / name
        with at_line(self.csv, line):
            image = read_rgb(path)
        pairs, relations = [], []
        for points, relation, (width, height), row in rows:
            with at_line(self.csv, row):
                if image.shape[:2] != (height, width):
                    raise DepthFileError(
                        f"{path}: the photo is {size_text(image.shape)}, its annotation is for {height}x{width}"
                        " (height x width), the points would lie elsewhere"
                    )
                pair = np.array([points], np.float64) - 1  # counted from 1
                DepthSample(image, None, str(path), pairs=pair)  # refuses points outside
            pairs.append(pair[0])
            relations.append(relation if self.polarity == "farther" else -relation)
        name = self._names[index]
        return DepthSample(image, None, name, pairs=np.stack(pairs), relation=np.array(relations, np.int64))


Annotation = tuple[tuple[float, ...], int, tuple[int, int], int]
"""Points (yA, xA, yB, xB) counted from 1, relation, (width, height), line."""


def parse_annotations(path: Path) -> list[tuple[str, int, list[Annotation]]]:
    """Name, line and annotations of each photo of a DIW file.

    Raises:
        ValueError: a line that is neither, or a path without an annotation.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file of DIW annotations: {error}") from error
    photos: list[tuple[str, int, list[Annotation]]] = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if "," not in text:
            photos.append((text.removeprefix("./").lstrip("/"), number, []))
            continue
        try:
            *points, relation, width, height = text.split(",")
            if len(points) != 4 or not photos:
                raise UserError("4 numbers, a relation and a size, below the path of a photo")
            row = (
                tuple(float(value) for value in points),
                RELATIONS[relation.strip()],
                (int(float(width)), int(float(height))),
                number,
            )
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{path}, line {number}: expected `yA,xA,yB,xB,relation,width,height` with > or < (or =) below the path"
                f" of its photo, got {line!r}"
            ) from error
        photos[-1][2].append(row)
    empty = [(name, number) for name, number, rows in photos if not rows]
    if empty or not photos:
        what = f"line {empty[0][1]}: {empty[0][0]} has no annotation" if empty else "the file is empty"
        raise UserError(f"{path}, {what}: the file alternates between paths and annotations")
    assert all(before[1] < after[1] for before, after in pairwise(photos))
    return photos
