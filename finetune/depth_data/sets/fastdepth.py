"""NYU Depth V2 as one HDF5 file a pair: the folders of FastDepth, and tars of such files from the Hugging Face hub."""

import io
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from finetune.depth_data.base import BadDepth, DepthSet, OpenOptions
from finetune.depth_data.lists import (
    ListedSet,
    NamedEntry,
    existing_root,
    files_below,
    find_list,
    numbered_lines,
)
from finetune.depth_data.sample import DepthSample, checked_metres, file_error, unreadable
from spark.errors import UserError
from spark.images.sources.tars import TarSource

FOLDERS = {"train": ("train",), "test": ("val", "test")}


def read_h5_pair(where: str, content: bytes, name: str, bad_depth: BadDepth) -> DepthSample:
    """A pair of a file with `rgb` uint8 (3, H, W) and `depth` (H, W) in metres, 0 = no reading.

    Raises:
        DepthFileError: damaged, or without these arrays.
    """
    try:
        with h5py.File(io.BytesIO(content), "r") as file:
            missing = [key for key in ("rgb", "depth") if not isinstance(file.get(key), h5py.Dataset)]
            if missing:
                raise file_error(
                    where, f"holds no array {' and no '.join(missing)}, expected `rgb` and `depth`"
                )
            rgb, depth = (np.asarray(file[key]) for key in ("rgb", "depth"))
    except (OSError, KeyError, RuntimeError) as error:
        raise unreadable(where, "an HDF5 file", error) from error
    if rgb.ndim != 3 or rgb.shape[0] != 3:
        raise file_error(where, f"rgb is {list(rgb.shape)}, expected (3, H, W)")
    return DepthSample(
        np.ascontiguousarray(rgb.transpose(1, 2, 0)), checked_metres(depth, where, bad_depth), name
    )


class FastDepth(ListedSet):
    """The folders `train/SCENE/00001.h5` and `val/official/00001.h5` of FastDepth (and of sparse-to-dense before it).

    Args:
        root: the folder that holds `train` and `val`.
        split: "train" or "test", which is `val`.
        list_file: text file with a path relative to `root` a line, instead of the whole split.
        bad_depth: see `checked_metres`.
    """

    benchmark = "nyu"

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        list_file: str | Path | None = None,
        *,
        bad_depth: BadDepth = "refuse",
    ):
        self.root, self.source = existing_root(root), split
        self.bad_depth: BadDepth = bad_depth
        if list_file is not None:
            self.list_file = find_list(self.root, list_file)
            self.source = str(self.list_file)
            self.entries = [
                NamedEntry(text.lstrip("/"), number) for number, text in numbered_lines(self.list_file)
            ]
            self.refuse_missing((entry.name, entry.line) for entry in self.entries)
        else:
            names = sorted(path.relative_to(self.root).as_posix() for path in h5_files(self.root, split))
            self.entries = [NamedEntry(name) for name in names]
        if not self.entries:
            raise UserError(
                f"no .h5 file of the split {split} in {self.root}: expected {' or '.join(FOLDERS[split])}/SCENE/1.h5"
            )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether a folder of a split holds .h5 files."""
        return root.is_dir() and any(next(h5_files(root, split), None) is not None for split in FOLDERS)

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "FastDepth":
        """Open `options.list`, or `options.split`."""
        return cls(root, options.split, options.list, bad_depth=options.bad_depth)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        return f"FastDepth layout (.h5 files), {len(self)} pairs of {self.source} under {self.root}"

    def has_test_split(self) -> bool:
        """Whether a folder of the test split holds .h5 files."""
        return next(h5_files(self.root, "test"), None) is not None

    def read(self, entry: NamedEntry) -> DepthSample:
        """The pair of a file."""
        path = self.root / entry.name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise unreadable(path, "an HDF5 file", error) from error
        return read_h5_pair(str(path), content, entry.name, self.bad_depth)


def h5_files(root: Path, split: str) -> Iterator[Path]:
    """The .h5 files of a split, in no order."""
    for name in FOLDERS[split]:
        if (root / name).is_dir():
            yield from files_below(root / name, ".h5")


class HubTars(DepthSet):
    """The tars of .h5 files that the Hugging Face data set `sayakpaul/nyu_depth_v2` is made of.

    `train-000000.tar` and so on hold 47,584 training pairs, `val-*.tar` the 654 test pairs. They are read in place: an
    index of where each file lies is built when they are opened. (`datasets` from 4 on refuses the loading script.)

    Args:
        root: the folder with the tars, or with `data/` that has them.
        split: "train" or "test", which is `val`.
        bad_depth: see `checked_metres`.
    """

    benchmark = "nyu"

    def __init__(self, root: str | Path, split: str = "train", *, bad_depth: BadDepth = "refuse"):
        self.root, self.split = existing_root(root), split
        self.bad_depth: BadDepth = bad_depth
        shards = hub_tars(self.root, split)
        if not shards:
            raise UserError(f"no {' or '.join(FOLDERS[split])}-*.tar in {root} or {Path(root) / 'data'}")
        self.source = TarSource(shards, extensions=(".h5",))
        self.shards = len(shards)
        self._names = [
            str(Path(self.source.name(index)).relative_to(self.root)) for index in range(len(self.source))
        ]
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether there is a tar of a split, and no list."""
        return list_file is None and root.is_dir() and any(hub_tars(root, split) for split in FOLDERS)

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "HubTars":
        """Open the tars of `options.split`."""
        if options.list is not None:
            raise UserError(f"the tars in {root} take no list: give --data.list null")
        return cls(root, options.split, bad_depth=options.bad_depth)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        return f"Hugging Face layout, {len(self)} {self.split} pairs of {self.shards} tars under {self.root}"

    def __len__(self) -> int:
        return len(self.source)

    def names(self) -> list[str]:
        """Names of the pairs, in order."""
        return self._names

    def has_test_split(self) -> bool:
        """Whether the tars of the test split are there."""
        return bool(hub_tars(self.root, "test"))

    def __getitem__(self, index: int) -> DepthSample:
        try:
            content = self.source.read(index)
        except OSError as error:
            raise unreadable(self.source.name(index), "an HDF5 file", error) from error
        return read_h5_pair(self.source.name(index), content, self._names[index], self.bad_depth)


def hub_tars(root: Path, split: str) -> list[Path]:
    """The tars of a split, in order."""
    return sorted(
        path
        for folder in (root, root / "data")
        for name in FOLDERS[split]
        for path in folder.glob(f"{name}-*.tar")
    )
