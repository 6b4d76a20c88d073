"""A plain folder of images and depth maps, as of one's own camera."""

import math
import re
from contextlib import suppress
from pathlib import Path

from finetune.depth_data.base import BadDepth, OpenOptions
from finetune.depth_data.depth_files import DEPTH_EXTENSIONS, MILLIMETRE, read_depth_file, stored_scale
from finetune.depth_data.lists import ListedSet, existing_root, files_below, find_list, first_lines
from finetune.depth_data.sample import (
    DepthFileError,
    DepthSample,
    check_pair_headers,
    checked_metres,
    file_error,
    read_rgb,
)
from finetune.depth_data.sets.nyu import SyncEntry, parse_list
from spark.errors import UserError
from spark.images.decode import EXTENSIONS

DEPTH_WORDS = {"depth", "depths", "sync", "gt", "groundtruth"}
IMAGE_WORDS = {"rgb", "rgbs", "color", "colors", "colour", "colours", "image", "images", "img", "imgs"}
SPLITS = {"train": ("train", "training"), "test": ("val", "validation", "test")}
OTHER_WORDS = {"label", "labels", "labels13", "labels40", "mask", "masks", "seg"}


class PlainFolder(ListedSet):
    """Pairs of an image and a depth map of the same name, apart from the words that say which is which.

    `rgb/0001.jpg` goes with `depth/0001.png`, `frame-01.color.jpg` with `frame-01.depth.png`, `a/rgb_7.png` with
    `a/depth_7.npy`. Folders `train` and `val` (or `test`) are the splits, where there are any. With a list,
    its lines `image depth` say what belongs together.

    Args:
        root: the folder.
        split: "train" or "test".
        list_file: list of the pairs instead.
        depth_scale: metres of one unit of the depth files; None: what is stored in a PNG (16 bits), else 0.001, and 1
            for NPY and PFM.
        bad_depth: see `checked_metres`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        list_file: str | Path | None = None,
        *,
        depth_scale: float | None = None,
        bad_depth: BadDepth = "refuse",
    ):
        self.root, self.depth_scale, self.bad_depth = existing_root(root), depth_scale, bad_depth
        if depth_scale is not None and depth_scale <= 0:
            raise UserError(f"data.depth_scale is metres of one unit, above 0, not {depth_scale}")
        if list_file is None:
            folders = split_folders(self.root)
            if any(folders.values()) and not folders[split]:
                raise UserError(
                    f"{self.root} has no folder {' or '.join(SPLITS[split])} beside that of the other split"
                )
            self.entries = find_pairs(self.root, folders[split][0] if folders[split] else self.root)
        else:
            self.list_file = find_list(self.root, list_file)
            self.entries = parse_list(self.list_file)
            self.refuse_missing(file for entry in self.entries for file in entry.files)
        for entry in self.entries:
            if Path(entry.depth).suffix.lower() not in DEPTH_EXTENSIONS:
                raise UserError(
                    f"{self.root / entry.depth} is no depth map: they are {', '.join(DEPTH_EXTENSIONS)} here"
                )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether there are depth maps beside images and no list of pairs, or the list given has other depth than PNG.

        With a list of pairs the choice of those to train on is made: a folder must not be taken as a whole.
        """
        if not root.is_dir():
            return False
        try:
            if list_file is None:
                return not pair_lists(root) and bool(find_pairs(root, root))
            return Path(parse_list(find_list(root, list_file))[0].depth).suffix.lower() in (".npy", ".pfm")
        except (ValueError, OSError):
            return False

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "PlainFolder":
        """Open `options.list`, or the folder of `options.split`."""
        return cls(
            root,
            options.split,
            options.list,
            depth_scale=options.depth_scale,
            bad_depth=options.bad_depth,
        )

    def __repr__(self) -> str:
        """What a run prints about its data."""
        first = {
            Path(entry.depth).suffix.lower(): self.root / entry.depth for entry in reversed(self.entries)
        }
        scales = dict.fromkeys(sorted(first), "unknown")
        for kind in scales:
            with suppress(DepthFileError):  # which reading it will tell
                scales[kind] = f"{self.scale(first[kind]):g}"
        units = ", ".join(f"{kind[1:].upper()} of {scale} m a unit" for kind, scale in scales.items())
        listed = f" of {self.list_file}" if self.list_file else ""
        return f"plain folder, {len(self)} pairs{listed} under {self.root}, depth as {units}"

    def scale(self, path: Path) -> float:
        """Metres of one unit of a depth file.

        Raises:
            DepthFileError: the file cannot be read, or stores another number than `depth_scale`.
        """
        if path.suffix.lower() != ".png":
            return self.depth_scale or 1.0
        stored = stored_scale(path)
        if stored is None:
            return self.depth_scale or MILLIMETRE
        if self.depth_scale is not None and not math.isclose(stored, self.depth_scale, rel_tol=1e-6):
            raise file_error(
                path,
                f"says itself that one unit is {stored:g} m, but data.depth_scale is {self.depth_scale:g}, leave that"
                " out, or give the one that is right for files which say nothing",
            )
        return stored

    def has_test_split(self) -> bool:
        """Whether there is a folder for it."""
        return self.list_file is None and bool(split_folders(self.root)["test"])

    def check_header(self, entry: SyncEntry) -> None:
        """Check PNG files; the others have no header worth the name."""
        if entry.depth.lower().endswith(".png"):
            check_pair_headers(self.root / entry.image, self.root / entry.depth)
            self.scale(self.root / entry.depth)

    def read(self, entry: SyncEntry) -> DepthSample:
        """The pair, in metres."""
        image, path = read_rgb(self.root / entry.image), self.root / entry.depth
        depth = checked_metres(read_depth_file(path, self.scale(path)), path, self.bad_depth)
        return DepthSample(image, depth, entry.name)


def pair_lists(root: Path) -> list[Path]:
    """The lists of pairs directly inside `root`: text files whose first line names an image and a depth map."""
    found = []
    for path in sorted(root.glob("*.txt")):
        columns = " ".join(first_lines(root, path.absolute(), 1)).split()
        suffixes = [Path(column).suffix.lower() for column in columns[:2]]
        if len(suffixes) == 2 and suffixes[0] in EXTENSIONS and suffixes[1] in DEPTH_EXTENSIONS:
            found.append(path)
    return found


def split_folders(root: Path) -> dict[str, list[Path]]:
    """The folders of each split directly inside `root`."""
    return {
        split: [root / name for name in names if (root / name).is_dir()] for split, names in SPLITS.items()
    }


def find_pairs(root: Path, below: Path) -> list[SyncEntry]:
    """The pairs of images and depth maps under `below`, with names relative to `root`, in order of the images."""
    found: dict[bool, dict[tuple[str, ...], str]] = {True: {}, False: {}}
    for path in sorted(files_below(below)):
        name = path.relative_to(root).as_posix()
        words = re.split(r"[/._\- ]+", name.lower().rpartition(".")[0])
        extension = path.suffix.lower()
        if OTHER_WORDS & set(words):
            continue
        is_depth = extension in DEPTH_EXTENSIONS and (extension != ".png" or bool(DEPTH_WORDS & set(words)))
        if not is_depth and extension not in EXTENSIONS:
            continue
        key = tuple(word for word in words if word not in DEPTH_WORDS | IMAGE_WORDS)
        if key in found[is_depth]:
            what = "depth maps" if is_depth else "images"
            raise UserError(
                f"{root}: {found[is_depth][key]} and {name} are {what} of one pair: name the pairs in a list"
            )
        found[is_depth][key] = name
    images, depths = found[False], found[True]
    if not images.keys() & depths.keys():
        raise UserError(
            f"no pairs of an image and a depth map in {below}: expected such as rgb/0001.jpg with depth/0001.png"
            " (or .npy, .pfm), of one name apart from words like rgb and depth"
        )
    lonely = sorted(
        [images[key] for key in images.keys() - depths.keys()]
        + [depths[key] for key in depths.keys() - images.keys()]
    )
    if lonely:
        raise UserError(
            f"{len(lonely)} of {len(images) + len(depths)} files in {below} have no partner, the first is {lonely[0]}:"
            " remove them, or name the pairs in a list (data.list)"
        )
    pairs = sorted((images[key], depths[key]) for key in images)
    return [SyncEntry(image, depth, None, 0) for image, depth in pairs]
