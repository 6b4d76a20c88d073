"""ReDWeb (Xian et al. 2018): photos with relative depth from stereo."""

from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from finetune.depth_data.base import DepthSet, OpenOptions, at_line, line_text
from finetune.depth_data.sample import DepthSample, Supervision, file_error, read_grey, read_rgb
from finetune.depth_data.sets.nyu import existing_root, find_list
from spark.errors import UserError


class ReDWeb(DepthSet):
    """ReDWeb_V1: 3,600 photos `Imgs/*.jpg` with relative depth `RDs/*.png` from stereo.

    Depth is 8-bit: near = 0, far up to 254, 255 = unknown. Samples hold it as a disparity, (254 - value) / 254, of
    unknown scale and shift.

    There is no official split: a list names the photos to train or to score on.

    Args:
        root: the folder that holds `Imgs` and `RDs`.
        list_file: text file with the name of a photo a line, with .jpg or without; None: all of them.

    Raises:
        ValueError: no photos, an empty list, photos without a map or that are missing; a first pair that cannot be
            used.
    """

    supervision: ClassVar[Supervision] = "affine"
    benchmark = "redweb"

    def __init__(self, root: str | Path, list_file: str | Path | None = None):
        self.root = existing_root(root)
        self.list_file: Path | None = None
        self._lines: list[int] = []
        if list_file is None:
            self._names = sorted(path.name for path in (self.root / "Imgs").glob("*.jpg"))
        else:
            self.list_file = find_list(self.root, list_file)
            lines = enumerate(self.list_file.read_text(encoding="utf-8-sig").splitlines(), start=1)
            rows = [(number, text.strip()) for number, text in lines if text.strip()]
            self._lines = [number for number, _ in rows]
            self._names = [PurePosixPath(name).name.removesuffix(".jpg") + ".jpg" for _, name in rows]
        missing = [
            (path, number)
            for number, name in enumerate(self._names)
            for path in (self.root / "Imgs" / name, self._map(name))
            if not path.is_file()
        ]
        if missing or not self._names:
            what = "none are there" if self.list_file is None else f"{self.list_file} is empty"
            if missing:
                path, number = missing[0]
                what = f"{len(missing)} files are missing, the first is {path}{self.origin(number)}"
            raise UserError(f"{root}: expected photos Imgs/NAME.jpg with RDs/NAME.png, but {what}")
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

    def __len__(self) -> int:
        return len(self._names)

    def names(self) -> list[str]:
        """Names of the photos, in order."""
        return self._names

    def origin(self, index: int) -> str:
        """The line of the list, if there is one."""
        return "" if self.list_file is None else line_text(self.list_file, self._lines[index])

    def __getitem__(self, index: int) -> DepthSample:
        if self.list_file is None:
            return self._read(self._names[index])
        with at_line(self.list_file, self._lines[index]):
            return self._read(self._names[index])

    def _read(self, name: str) -> DepthSample:
        path = self._map(name)
        values = read_grey(path)
        if values.dtype != np.uint8:
            raise file_error(path, f"relative depth of this layout has 8 bits, not {values.dtype}")
        disparity = (254 - values.astype(np.float32)) / 254
        disparity[values == 255] = np.nan
        return DepthSample(read_rgb(self.root / "Imgs" / name), None, name, affine=disparity)

    def _map(self, name: str) -> Path:
        return (self.root / "RDs" / name).with_suffix(".png")
