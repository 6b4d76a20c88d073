"""NYU Depth V2: the "sync" folders that BTS introduced, and the official nyu_depth_v2_labeled.mat."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
from scipy.io import loadmat

from finetune.depth_data.base import BadDepth, DepthSet, OpenOptions, WhiteBorder
from finetune.depth_data.entries import Labels, size_text
from finetune.depth_data.files import PerProcess
from finetune.depth_data.labels import MAPPING_40, LabelOptions, read_mapping_40
from finetune.depth_data.lists import (
    LABELED_MAT,
    WITHOUT_LISTS,
    ListedSet,
    at_line,
    existing_root,
    find_list,
    lists_text,
    numbered_lines,
)
from finetune.depth_data.sample import (
    DepthSample,
    check_pair_headers,
    checked_metres,
    file_error,
    opened_image,
    read_depth_mm,
    read_rgb,
)
from spark.errors import UserError

SPLITS_MAT = "splits.mat"


def paint_border(image: np.ndarray, white_border: WhiteBorder) -> np.ndarray:
    """Paint over the white border of a labelled NYU image: all but rows 7:474, columns 7:632 of 480x640.

    Training crops leave the border out, so a network that sees it when it is scored sees something new. The test images
    that published models were scored on have it painted black by the script that unpacks them (BTS,
    extract_official_train_test_set_from_mat.py).

    Args:
        image: uint8 `[480, 640, 3]`; it is not changed.
        white_border: "black" paints it black, "fill" continues the pixels next to it, "keep" leaves it.
    """
    if white_border == "keep":
        return image
    if image.shape[:2] != (480, 640):
        raise UserError(
            f"white_border is meant for 480x640 images, not {size_text(image.shape)}: set it to keep"
        )
    mode = "edge" if white_border == "fill" else "constant"
    return np.pad(image[7:474, 7:632], ((7, 6), (7, 8), (0, 0)), mode)


@dataclass(frozen=True)
class SyncEntry:
    """A line of a list file: image and depth relative to the root, the focal length [px] or None, its number."""

    image: str
    depth: str
    focal: float | None
    line: int

    @property
    def name(self) -> str:
        """That of the image."""
        return self.image

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """Both, with the line."""
        return (self.image, self.line), (self.depth, self.line)


class NYUSync(ListedSet):
    """RGB-D pairs named by a list file, as BTS lays NYU out.

    A line of the list is `/scene/rgb_00045.jpg /scene/sync_depth_00045.png 518.8579`. Depth files are 16-bit
    PNG in millimetres, 0 = no reading. A leading slash does not make a path absolute: entries are always
    relative to `root`. The third column (focal length in pixels) may be missing. Blank lines and lines that
    start with # are skipped.

    Args:
        root: the folder that the entries are relative to.
        list_file: name of the list inside `root`, or its path, see `find_list`.
        white_border: what becomes of the white border of the labelled NYU images, see `paint_border`.
        labels: classes to read along, from `labels13_00045.png` (or 40) beside `rgb_00045.jpg`.
    """

    benchmark = "nyu"

    def __init__(
        self,
        root: str | Path,
        list_file: str | Path,
        *,
        white_border: WhiteBorder = "keep",
        labels: LabelOptions | None = None,
    ):
        self.root = existing_root(root)
        self.list_file = find_list(self.root, list_file)
        self.white_border: WhiteBorder = white_border
        self.labels, self.labelled = labels, labels is not None
        self.entries = parse_list(self.list_file)
        self.refuse_missing(file for entry in self.entries for file in entry.files)
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether a list is given."""
        return list_file is not None and root.is_dir()

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "NYUSync":
        """Open the pairs of `options.list`."""
        if options.list is None:
            raise UserError(f"nyu_sync needs a list of pairs: name it (data.list). {lists_text(root)}")
        return cls(root, options.list, white_border=options.white_border, labels=options.labels)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        return f"NYU sync layout, {len(self)} pairs of {self.list_file} under {self.root}"

    def check_header(self, entry: SyncEntry) -> None:
        """Both can be opened, depth has 16 bits, and they have one size."""
        check_pair_headers(self.root / entry.image, self.root / entry.depth)

    def read(self, entry: SyncEntry) -> DepthSample:
        """The pair, with its classes if they are asked for."""
        image = paint_border(read_rgb(self.root / entry.image), self.white_border)
        depth = read_depth_mm(self.root / entry.depth)
        return DepthSample(image, depth, entry.name, labels=self._classes(entry))

    def labels_of(self, index: int) -> np.ndarray:
        """See `DepthSet`."""
        entry = self.entries[index]
        with at_line(self.list_file, entry.line), opened_image(self.root / entry.image, "an image") as image:
            labels = self._classes(entry)
            assert labels is not None
            if wrong := Labels.other_size(Labels.what, image.size[::-1], labels.shape):
                raise file_error(entry.name, wrong)
            return labels

    def _classes(self, entry: SyncEntry) -> np.ndarray | None:
        path = self.root / entry.image
        return self.labels and self.labels.read(path.parent, path.stem.removeprefix("rgb_"))


class NYULabeled(DepthSet):
    """The 795 training or 654 test pairs of the official labelled file.

    The file is MATLAB 7.3, that is HDF5 with the axes reversed: `images` (N, 3, W, H), depths (N, W, H).

    Args:
        mat_path: nyu_depth_v2_labeled.mat.
        splits_path: splits.mat with `trainNdxs` and `testNdxs` (1-based); None looks beside the labelled
            file.
        split: "train" (795 pairs) or "test" (654).
        depth: "raw" is what the sensor measured, with holes: what the BTS, AdaBins and ZoeDepth protocol
            scores against. "filled" is the inpainted map (`depths`): dense training targets; DenseDepth and
            Laina score against it.
        white_border: what becomes of the white border, see `paint_border`.
        labels: classes to read along, from `labels` of the file and classMapping40.mat beside it.
        bad_depth: what becomes of NaN, infinite and negative depths, see `checked_metres`.
    """

    benchmark = "nyu"

    def __init__(
        self,
        mat_path: str | Path,
        splits_path: str | Path | None = None,
        split: Literal["train", "test"] = "train",
        depth: Literal["raw", "filled"] = "raw",
        *,
        white_border: WhiteBorder = "keep",
        labels: LabelOptions | None = None,
        bad_depth: BadDepth = "refuse",
    ):
        keys = {"raw": "rawDepths", "filled": "depths"}
        if depth not in keys:
            raise UserError(f"depth of the labelled file is 'raw' or 'filled', not {depth!r}")
        self.mat_path = Path(mat_path)
        self.splits_path = Path(splits_path or self.mat_path.with_name(SPLITS_MAT))
        self.split, self.depth = split, depth
        self.ground_truth = depth
        self.white_border: WhiteBorder = white_border
        self.labels, self.labelled = labels, labels is not None
        self._mapping = read_mapping_40(self.mat_path.with_name(MAPPING_40)) if labels else None
        self.bad_depth: BadDepth = bad_depth
        self._depth_key = keys[depth]
        self._file = PerProcess(self._open)
        self.ids = read_split(self.splits_path, split)
        with self._open() as file:  # closed again: an open handle must not cross a fork
            images, depths = self._array(file, "images").shape, self._array(file, self._depth_key).shape
            if labels is not None and self._array(file, "labels").shape != depths:
                raise UserError(f"labels of {self.mat_path} are not of the shape {depths} of its depths")
        count = images[0] if images else 0
        if len(images) != 4 or images[1] != 3 or depths != (count, *images[2:]):
            raise UserError(
                f"{self.mat_path} holds images {images} and {self._depth_key} {depths}:"
                f" expected (N, 3, W, H) and (N, W, H), as in the official {LABELED_MAT}"
            )
        if self.ids.max() > count:
            raise UserError(
                f"{self.splits_path} names image {self.ids.max()} but {self.mat_path} holds {count}:"
                " the two files do not belong together, or one download was cut short"
            )

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether `root` is a .mat file, or a folder with the labelled one, and no list is given."""
        return list_file is None and (root.suffix == ".mat" or (root / LABELED_MAT).is_file())

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "NYULabeled":
        """Open the pairs of `options.split`."""
        if options.list is not None:
            raise UserError(f"{root} is the labelled file, which takes no list: {WITHOUT_LISTS}")
        path = root / LABELED_MAT if root.is_dir() else root
        return cls(
            path,
            split=options.split,
            depth=options.depth,
            white_border=options.white_border,
            labels=options.labels,
            bad_depth=options.bad_depth,
        )

    def __repr__(self) -> str:
        """What a run prints about its data."""
        return f"NYU labelled layout, {len(self)} {self.split} pairs of {self.mat_path}, {self.depth} depth"

    def __len__(self) -> int:
        return len(self.ids)

    def names(self) -> list[str]:
        """Names of the pairs, in order."""
        return [f"{number:04d}" for number in self.ids]

    def has_test_split(self) -> bool:
        """The file has the official one."""
        return True

    def check_headers(self) -> None:
        """Nothing: all pairs share the arrays that opening the file checked."""

    def __getitem__(self, index: int) -> DepthSample:
        number = int(self.ids[index])
        name = f"{number:04d}"
        where = f"{self.mat_path}, image {name}"
        file = self._file()
        try:
            image = self._array(file, "images")[number - 1]
            depth = self._array(file, self._depth_key)[number - 1]
            classes = None if self.labels is None else self._array(file, "labels")[number - 1]
        except OSError as error:
            raise file_error(where, f"cannot be read ({error}), download or copy the file again") from error
        # (3, W, H) -> [H, W, 3] and (W, H) -> [H, W]: a transpose, because a rotation would mirror the scene.
        image = np.ascontiguousarray(image.transpose(2, 1, 0))
        image = paint_border(image, self.white_border)
        depth = checked_metres(depth.T, where, self.bad_depth)
        labels = None
        if self.labels is not None and self._mapping is not None and classes is not None:
            if classes.max() >= len(self._mapping):
                raise file_error(where, f"class {classes.max()} is not one of 0 (void) to 894")
            labels = self.labels.convert(self._mapping[np.ascontiguousarray(classes.T)], 40, where)
        return DepthSample(image, depth, name, labels=labels)

    def _array(self, file: h5py.File, key: str) -> h5py.Dataset:
        array = file.get(key)
        if not isinstance(array, h5py.Dataset):
            raise UserError(
                f"{self.mat_path} holds no array {key!r}: it should be the official {LABELED_MAT}"
            )
        return array

    def _open(self) -> h5py.File:
        if not self.mat_path.is_file():
            raise UserError(f"no file {self.mat_path}: give the path of {LABELED_MAT}")
        with self.mat_path.open("rb") as file:
            version = file.read(19)
        if version.startswith(b"MATLAB 5.0"):
            raise UserError(
                f"{self.mat_path} is of version 5 of MATLAB's files, the official {LABELED_MAT} is of 7.3 (HDF5):"
                " download it again, or save it with MATLAB's -v7.3"
            )
        try:
            return h5py.File(self.mat_path, "r")
        except OSError as error:
            raise UserError(
                f"cannot open {self.mat_path} as HDF5: damaged, cut short, or not a MATLAB 7.3 file ({error})"
            ) from error


def read_split(path: str | Path, split: str) -> np.ndarray:
    """The 1-based image numbers of a split of splits.mat, int64 `[N]`."""
    if split not in ("train", "test"):
        raise UserError(f"split of the labelled file is 'train' or 'test', not {split!r}")
    path, key = Path(path), f"{split}Ndxs"
    if not path.is_file():
        raise UserError(f"no file {path}: the official split (splits.mat) is needed beside {LABELED_MAT}")
    try:
        splits = loadmat(path)
    except Exception as error:  # scipy raises a dozen kinds of error for a file that is not MATLAB 5
        raise UserError(f"cannot read {path} as a MATLAB file: {error}") from error
    numbers = splits[key].ravel().astype(np.int64) if key in splits else np.empty(0, np.int64)
    if numbers.size == 0 or numbers.min() < 1:
        raise UserError(
            f"{path} has no 1-based image numbers under {key!r}: expected the official splits.mat"
        )
    return numbers


def parse_list(list_file: Path) -> list[SyncEntry]:
    """The entries of a BTS list file; ValueError if it is empty or a line is not `image depth [focal]`."""
    entries = []
    for number, line in numbered_lines(list_file):
        columns = line.split()
        if columns[0].startswith("#"):
            continue
        try:
            image, depth = columns[:2]
            (focal,) = columns[2:] or (None,)
            length = None if focal is None else float(focal)
            entry = SyncEntry(image.lstrip("/"), depth.lstrip("/"), length, number)
        except ValueError as error:
            raise UserError(
                f"{list_file}, line {number}: expected `image depth focal`, without spaces inside the names,"
                f" got {line!r}"
            ) from error
        entries.append(entry)
    if not entries:
        raise UserError(f"the list {list_file} is empty: it needs a line `image depth focal` for each pair")
    return entries
