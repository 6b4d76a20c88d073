"""Pairs of points of NYU Depth V2 with their relation (Zoran et al. 2015), in the files of Chen et al. 2016."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from finetune.depth_data.base import DepthSet, OpenOptions, at_line, line_text
from finetune.depth_data.sample import DepthSample, Supervision, read_rgb
from finetune.depth_data.sets.diw import RELATIONS
from finetune.depth_data.sets.nyu import existing_root, find_list, lists_text
from spark.errors import UserError


@dataclass(frozen=True)
class Photo:
    """An image below the root, its pairs (yA, xA, yB, xB) counted from 0 `[N, 4]`, relations `[N]`, and its line."""

    image: Path
    pairs: np.ndarray
    relation: np.ndarray
    line: int


class NYUPairs(DepthSet):
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

    Raises:
        ValueError: no such file, a line that is not what it should be, images that are missing, or a first one that
            cannot be used. A point outside its image is a `DepthFileError` of that sample.
    """

    supervision: ClassVar[Supervision] = "ordinal"
    benchmark = "nyu"

    def __init__(self, root: str | Path, csv: str | Path):
        self.root = existing_root(root)
        self.csv = find_list(self.root, csv)
        self.photos = self._parse()
        missing = [photo for photo in self.photos if not (self.root / photo.image).is_file()]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(self.photos)} images named in {self.csv} are missing, the first is"
                f" {self.root / missing[0].image} (line {missing[0].line}): is {root} the folder that holds them?"
            )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the list has an image with a number of pairs in its second line, and a pair in its third."""
        if list_file is None or not root.is_dir():
            return False
        try:
            with find_list(root, list_file).open(encoding="utf-8-sig") as file:
                _, image, pair = ([cell.strip() for cell in file.readline().split(",")] for _ in range(3))
        except (ValueError, OSError):
            return False
        return len(image) >= 3 and image[2].isdigit() and len(pair) >= 5 and pair[4] in RELATIONS

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "NYUPairs":
        """Open `options.list`."""
        if options.list is None:
            raise UserError(f"nyu_pairs needs a CSV file of pairs: name it (data.list). {lists_text(root)}")
        return cls(root, options.list)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        pairs = sum(len(photo.relation) for photo in self.photos)
        return f"NYU pairs layout, {len(self)} images with {pairs} pairs of points of {self.csv}"

    def __len__(self) -> int:
        return len(self.photos)

    def names(self) -> list[str]:
        """Names of the images, in order."""
        return [photo.image.as_posix() for photo in self.photos]

    def origin(self, index: int) -> str:
        """The line of the file."""
        return line_text(self.csv, self.photos[index].line)

    def __getitem__(self, index: int) -> DepthSample:
        photo = self.photos[index]
        path = self.root / photo.image
        with at_line(self.csv, photo.line):
            name = photo.image.as_posix()
            return DepthSample(read_rgb(path), None, name, pairs=photo.pairs, relation=photo.relation)

    def _find(self, name: str) -> Path:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        candidates = [Path(*parts[parts[0] == "/" :]), Path(*parts[-2:]), Path(parts[-1])]
        return next((path for path in candidates if (self.root / path).is_file()), candidates[0])

    def _parse(self) -> list[Photo]:
        lines = self.csv.read_text(encoding="utf-8-sig").splitlines()
        rows = [(number, line.split(",")) for number, line in enumerate(lines, start=1) if line.strip()][1:]
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
                    f"{self.csv}, line {number}: expected `IMAGE,ANYTHING,N` and below it N lines"
                    f" `yA,xA,yB,xB,relation` with >, < or =, got {','.join(rows[place][1])!r} and what follows"
                ) from error
            pairs = np.array(points, np.float64)
            photos.append(Photo(self._find(name.strip()), pairs, np.array(relation, np.int64), number))
            place += 1 + count
        if not photos:
            raise UserError(f"{self.csv} is empty: it needs images with pairs below the first line")
        return photos
