"""A plain folder of images and masks of classes, for segmentation."""

from pathlib import Path

import numpy as np

from finetune.depth_data.base import OpenOptions
from finetune.depth_data.entries import VOID, Labels
from finetune.depth_data.lists import ListedSet, at_line, existing_root, files_below, find_list
from finetune.depth_data.sample import DepthSample, file_error, opened_image, read_rgb
from finetune.depth_data.sets.folder import SPLITS, split_folders
from finetune.depth_data.sets.nyu import SyncEntry, parse_list
from spark.errors import UserError
from spark.images.decode import EXTENSIONS


class MaskFolder(ListedSet):
    """Images `images/NAME.jpg` (any kind) with `masks/NAME.png`, subfolders alike; nothing is known of their depth.

    A mask has one channel, or a palette, whose indices count then: classes from 0 on, 255 is void. Folders `train` and
    `val` (or `test`) with `images` and `masks` in each are the splits, where there are any. With a list, its lines
    `image mask` say what belongs together.

    Args:
        root: the folder.
        classes: how many there are.
        split: "train" or "test".
        list_file: list of the images instead.
    """

    labelled = True

    def __init__(
        self, root: str | Path, classes: int, split: str = "train", list_file: str | Path | None = None
    ):
        self.root, self.classes = existing_root(root), classes
        if list_file is not None:
            self.list_file = find_list(self.root, list_file)
            self.entries = parse_list(self.list_file)
        else:
            folders = split_folders(self.root)
            if any(folders.values()) and not folders[split]:
                raise UserError(
                    f"{self.root} has no folder {' or '.join(SPLITS[split])} beside that of the other split"
                )
            self.entries = find_masks(self.root, folders[split][0] if folders[split] else self.root)
        self.refuse_missing(file for entry in self.entries for file in entry.files)

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether there is a folder `masks` in it, or in one of its splits."""
        splits = (folder for found in split_folders(root).values() for folder in found)
        return any((folder / "masks").is_dir() for folder in (root, *splits))

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "MaskFolder":
        """Open `options.list`, or the folder of `options.split`, with any number of classes."""
        return cls(root, VOID, options.split, options.list)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        listed = f" of {self.list_file}" if self.list_file else ""
        return f"folder of masks, {len(self)} images{listed} under {self.root}"

    def has_test_split(self) -> bool:
        """Whether there is a folder for it."""
        return self.list_file is None and bool(split_folders(self.root)["test"])

    def read(self, entry: SyncEntry) -> DepthSample:
        """The image with its classes."""
        image = read_rgb(self.root / entry.image)
        return DepthSample(image, None, entry.name, labels=self._mask(entry, image.shape[:2]))

    def labels_of(self, index: int) -> np.ndarray:
        """See `DepthSet`."""
        entry = self.entries[index]
        with at_line(self.list_file, entry.line), opened_image(self.root / entry.image, "an image") as image:
            return self._mask(entry, image.size[::-1])

    def _mask(self, entry: SyncEntry, frame: tuple[int, ...]) -> np.ndarray:
        path = self.root / entry.depth
        with opened_image(path, "a mask") as opened:
            if opened.mode not in ("L", "P", "I", "1") and not opened.mode.startswith("I;16"):
                raise file_error(path, f"a mask has one channel, this has pixels of kind {opened.mode}")
            values = np.asarray(opened).astype(np.int64)
        if wrong := Labels.other_size("mask", frame, values.shape):
            raise file_error(path, wrong)
        bad = (values >= self.classes) & (values != VOID)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise file_error(
                path,
                f"class {values[row, column]} at row {row}, column {column} is not one of 0 to {self.classes - 1}, or"
                f" {VOID} for void (data.classes)",
            )
        return values.astype(np.uint8)


def find_masks(root: Path, below: Path) -> list[SyncEntry]:
    """The images under `below`/images with their masks, names relative to `root`, in order of the images."""
    for folder in ("images", "masks"):
        if not (below / folder).is_dir():
            raise UserError(f"no folder {below / folder}: expected images/NAME.jpg with masks/NAME.png")
    images = _by_stem(root, below / "images", *EXTENSIONS)
    masks = _by_stem(root, below / "masks", ".png")
    if not images:
        raise UserError(f"no image in {below / 'images'}: expected images/NAME.jpg with masks/NAME.png")
    if lonely := sorted(images.keys() ^ masks.keys()):
        there, kind = (images, "mask") if lonely[0] in images else (masks, "image")
        raise UserError(
            f"{len(lonely)} files in {below} have no partner, the first is {there[lonely[0]]}, without its {kind}:"
            " remove them, or name the images in a list (data.list)"
        )
    return [SyncEntry(images[name], masks[name], None, 0) for name in images]


def _by_stem(root: Path, folder: Path, *extensions: str) -> dict[str, str]:
    """Files below a folder by their name there without its ending, with names relative to `root`."""
    found: dict[str, str] = {}
    for path in sorted(files_below(folder, *extensions)):
        key, name = path.relative_to(folder).with_suffix("").as_posix(), path.relative_to(root).as_posix()
        if key in found:
            raise UserError(f"{root}: {found[key]} and {name} have one name: rename one of them")
        found[key] = name
    return found
