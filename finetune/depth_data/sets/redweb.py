"""ReDWeb (Xian et al. 2018): photos with relative depth from stereo."""

from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from finetune.depth_data.base import OpenOptions
from finetune.depth_data.lists import ListedSet, NamedEntry, existing_root, find_list, numbered_lines
from finetune.depth_data.sample import DepthSample, Supervision, file_error, read_grey, read_rgb
from spark.errors import UserError


class ReDWeb(ListedSet):
    """ReDWeb_V1: 3,600 photos `Imgs/*.jpg` with relative depth `RDs/*.png` from stereo.

    Depth is 8-bit: near = 0, far up to 254, 255 = unknown. Samples hold it as a disparity, (254 - value) / 254, of
    unknown scale and shift.

    There is no official split: a list names the photos to train or to score on.

    Args:
        root: the folder that holds `Imgs` and `RDs`.
        list_file: text file with the name of a photo a line, with .jpg or without; None: all of them.
    """

    supervision: ClassVar[Supervision] = "affine"
    benchmark = "redweb"

    def __init__(self, root: str | Path, list_file: str | Path | None = None):
        self.root = existing_root(root)
        if list_file is None:
            names = sorted(path.name for path in (self.root / "Imgs").glob("*.jpg"))
            self.entries = [NamedEntry(name) for name in names]
        else:
            self.list_file = find_list(self.root, list_file)
            self.entries = [
                NamedEntry(PurePosixPath(text).name.removesuffix(".jpg") + ".jpg", number)
                for number, text in numbered_lines(self.list_file)
            ]
        if not self.entries:
            raise UserError(f"{root} has no photos Imgs/NAME.jpg, which go with RDs/NAME.png")
        self.refuse_missing(
            (path, entry.line)
            for entry in self.entries
            for path in (f"Imgs/{entry.name}", self._map(entry.name))
        )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the two folders are there."""
        return (root / "Imgs").is_dir() and (root / "RDs").is_dir()

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "ReDWeb":
        """Open the photos of `options.list`, or all."""
        return cls(root, options.list)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        listed = f" of {self.list_file}" if self.list_file else ""
        return f"ReDWeb layout, {len(self)} photos{listed} with relative depth under {self.root}"

    def read(self, entry: NamedEntry) -> DepthSample:
        """The photo with its disparity."""
        name = entry.name
        path = self.root / self._map(name)
        values = read_grey(path)
        if values.dtype != np.uint8:
            raise file_error(path, f"relative depth of this layout has 8 bits, not {values.dtype}")
        disparity = (254 - values.astype(np.float32)) / 254
        disparity[values == 255] = np.nan
        return DepthSample(read_rgb(self.root / "Imgs" / name), None, name, affine=disparity)

    @staticmethod
    def _map(name: str) -> str:
        return f"RDs/{name.removesuffix('.jpg')}.png"
