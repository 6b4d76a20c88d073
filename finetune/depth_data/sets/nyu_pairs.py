"""Pairs of points of NYU Depth V2 with their relation (Zoran et al. 2015), in the files of Chen et al. 2016."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from finetune.depth_data.base import OpenOptions
from finetune.depth_data.lists import (
    ListedSet,
    existing_root,
    find_list,
    first_lines,
    lists_text,
    numbered_lines,
)
from finetune.depth_data.sample import DepthSample, Supervision, read_rgb
from finetune.depth_data.sets.diw import RELATIONS
from spark.errors import UserError


@dataclass(frozen=True)
class Photo:
    """An image below the root, its pairs (yA, xA, yB, xB) counted from 0 `[N, 4]`, relations `[N]`, and its line."""

    image: Path
    pairs: np.ndarray
    relation: np.ndarray
    line: int

    @property
    def name(self) -> str:
        """That of the image."""
        return self.image.as_posix()


class NYUPairs(ListedSet):
    """Images with many pairs of points each, of a CSV file such as 654_NYU_MITpaper_test_imgs_orig_size_points.csv.

        a line that is not read
        IMAGE,ANYTHING,2
        118,206,309,72,>
        5,6,7,8,=

    Below an image stand as many lines `yA,xA,yB,xB,relation` as its third column says: y first, counted from 1; `>` is
    the larger depth at A. IMAGE is sought below the root as it is written, by its last two parts, and by its name.

    Args:
        root: folder that holds the images.
        csv: the file, a name inside `root` or a path.
    """

    supervision: ClassVar[Supervision] = "ordinal"
    benchmark = "nyu"

    def __init__(self, root: str | Path, csv: str | Path):
        self.root = existing_root(root)
        self.list_file = find_list(self.root, csv)
        self.entries = self._parse()
        self.refuse_missing((photo.image, photo.line) for photo in self.entries)
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the list has an image with a number of pairs in its second line, and a pair in its third."""
        if list_file is None or not root.is_dir():
            return False
        rows = [[cell.strip() for cell in line.split(",")] for line in first_lines(root, list_file, 3)]
        if not rows:
            return False
        _, image, pair = rows
        return len(image) >= 3 and image[2].isdigit() and len(pair) >= 5 and pair[4] in RELATIONS

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "NYUPairs":
        """Open `options.list`."""
        if options.list is None:
            raise UserError(f"nyu_pairs needs a CSV file of pairs: name it (data.list). {lists_text(root)}")
        return cls(root, options.list)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        pairs = sum(len(photo.relation) for photo in self.entries)
        return f"NYU pairs layout, {len(self)} images with {pairs} pairs of points of {self.list_file}"

    def read(self, entry: Photo) -> DepthSample:
        """The image with its pairs."""
        image = read_rgb(self.root / entry.image)
        return DepthSample(image, None, entry.name, pairs=entry.pairs, relation=entry.relation)

    def _find(self, name: str) -> Path:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        candidates = [Path(*parts[parts[0] == "/" :]), Path(*parts[-2:]), Path(parts[-1])]
        return next((path for path in candidates if (self.root / path).is_file()), candidates[0])

    def _parse(self) -> list[Photo]:
        assert self.list_file is not None
        rows = [(number, text.split(",")) for number, text in numbered_lines(self.list_file)][1:]
        photos, place = [], 0
        while place < len(rows):
            number, (name, *cells) = rows[place]
            try:
                count = int(cells[1])
                below = rows[place + 1 : place + 1 + count]
                points = [[float(cell) - 1 for cell in row[:4]] for _, row in below]
                relation = [RELATIONS[row[4].strip()] for _, row in below]
                if not name.strip() or count < 1 or len(below) < count:
                    raise ValueError
            except (ValueError, KeyError, IndexError) as error:
                raise UserError(
                    f"{self.list_file}, line {number}: expected `IMAGE,ANYTHING,N` and below it N lines"
                    f" `yA,xA,yB,xB,relation` with >, < or =, got {','.join(rows[place][1])!r} and what follows"
                ) from error
            pairs = np.array(points, np.float64)
            photos.append(Photo(self._find(name.strip()), pairs, np.array(relation, np.int64), number))
            place += 1 + count
        if not photos:
            raise UserError(f"{self.list_file} is empty: it needs images with pairs below the first line")
        return photos
