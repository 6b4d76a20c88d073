"""KITTI: raw frames, with the depth of the KITTI depth benchmark or with the laser scan itself as their depth."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from finetune.depth_data.base import OpenOptions
from finetune.depth_data.depth_files import read_npy
from finetune.depth_data.lists import (
    ListedSet,
    existing_root,
    find_list,
    first_lines,
    lists_text,
    numbered_lines,
)
from finetune.depth_data.sample import (
    DepthSample,
    check_pair_headers,
    checked_metres,
    file_error,
    read_depth_png,
    read_rgb,
    unreadable,
)
from spark.errors import UserError

SCALE = 1 / 256
"""Metres of one unit of the depth benchmark's PNG files."""
IMAGE_FOLDERS = ("", "raw", "input")
DEPTH_FOLDERS = tuple(
    f"{folder}{split}" for folder in ("", "data_depth_annotated/", "gts/") for split in ("", "train", "val")
)
"""Where frames and the benchmark's maps lie below the root; "" is the root itself."""
EXPORTED = "gt_depths"

FRAME = re.compile(r"(\d{4}_\d\d_\d\d)/\1_drive_\d{4}_sync/image_0[23]/data/\d{10}\.(png|jpg)$")
DRIVE = re.compile(r"(\d{4}_\d\d_\d\d)/\1_drive_\d{4}_sync$")
EXPECTED = (
    "expected `DATE/DRIVE/image_02/data/0000000069.png DRIVE/proj_depth/groundtruth/image_02/0000000069.png 721.5`"
    " (None where there is no depth), or `DATE/DRIVE 69 l`"
)


@dataclass(frozen=True)
class Frame:
    """Paths relative to the root of an image and of what its depth comes from, its camera (2 or 3), and its line.

    The depth is a map of the benchmark (.png), a laser scan (.bin) or an exported projection of one (.npy).
    """

    image: Path
    depth: Path
    camera: int
    line: int

    @property
    def name(self) -> str:
        """That of the image."""
        return self.image.as_posix()


class KITTI(ListedSet):
    """Frames of KITTI's raw recordings that a list names, in one of two forms.

    With the maps of the depth benchmark (16-bit PNG, 1/256 m a unit, 0 = no reading), as BTS lists them:

        DATE/DRIVE/image_02/data/0000000069.png DRIVE/proj_depth/groundtruth/image_02/0000000069.png 721.5377

    where DATE is 2011_09_26 and DRIVE 2011_09_26_drive_0002_sync. `None` in the place of the map leaves the frame out:
    of the 697 of Eigen et al. 652 have one. Both are sought below `root`, the image also in `raw` and `input`, the map
    also in `data_depth_annotated`, `gts`, and the folders `train` and `val` of each.

    With the laser scan of the frame, as Monodepth2 lists them (l is camera 2, r is camera 3):

        DATE/DRIVE 69 l

    projected by `laser_depth` from `velodyne_points` and the calibration of its day; or, where a folder `gt_depths`
    lies beside the list, read from its `000000.npy`, `000001.npy` and so on, one a line. (What Monodepth2 exports as
    gt_depths.npz is a pickle, which is not read here.)

    Args:
        root: the folder that the list's entries are relative to.
        list_file: the list, a name inside the root or a path.
    """

    benchmark = "kitti"

    def __init__(self, root: str | Path, list_file: str | Path):
        self.root = existing_root(root)
        self.list_file = find_list(self.root, list_file)
        self.listed, self.entries = self._parse(self.list_file)
        self.ground_truth = "benchmark" if self.entries[0].depth.suffix == ".png" else "laser"
        self.refuse_missing(
            (path, frame.line) for frame in self.entries for path in (frame.image, frame.depth)
        )
        days = {day_of(frame) for frame in self.entries if frame.depth.suffix == ".bin"}
        for path in (self.root / day / name for day in sorted(days) for name in CALIBRATION):
            if not path.is_file():
                raise UserError(
                    f"no file {path}: laser scans are projected with the calibration of their day"
                )
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the first entry of the list is a frame of KITTI in one of the two forms."""
        if list_file is None or not root.is_dir():
            return False
        columns = next((line.split() for line in first_lines(root, list_file, 10) if line), [])
        return len(columns) > 1 and bool(FRAME.search(columns[0]) or DRIVE.search(columns[0]))

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "KITTI":
        """Open the frames of `options.list`."""
        if options.list is None:
            raise UserError(
                f"kitti needs a list of frames, such as Eigen's 697: name it (data.list). {lists_text(root)}"
            )
        return cls(root, options.list)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        source = {
            ".png": "maps of the depth benchmark",
            ".bin": "projected laser scans",
            ".npy": f"maps in {EXPORTED}",
        }[self.entries[0].depth.suffix]
        return (
            f"KITTI layout, {len(self)} of the {self.listed} frames of {self.list_file} have depth ({source})"
            f" under {self.root}"
        )

    def check_header(self, entry: Frame) -> None:
        """Check maps and their images; laser scans and arrays have no header worth the name."""
        if entry.depth.suffix == ".png":
            check_pair_headers(self.root / entry.image, self.root / entry.depth)

    def read(self, entry: Frame) -> DepthSample:
        """The frame with its map, or with the projected scan."""
        path, image = self.root / entry.depth, read_rgb(self.root / entry.image)
        if path.suffix == ".png":
            depth = read_depth_png(path, SCALE)
        elif path.suffix == ".npy":
            depth = checked_metres(read_npy(path), path, "refuse")
        else:
            depth = laser_depth(path, self.root / day_of(entry), entry.camera, image.shape[:2])
        return DepthSample(image, depth, entry.name)

    def _parse(self, list_file: Path) -> tuple[int, list[Frame]]:
        """How many frames the list names, and those with depth."""
        frames: list[Frame] = []
        forms: set[str] = set()
        rows = numbered_lines(list_file)
        for line, text in rows:
            columns = text.split()
            first = columns[0].lstrip("/")
            if FRAME.search(first) and len(columns) in (2, 3):
                forms.add("maps")
                image = self._find(first, IMAGE_FOLDERS)
                if columns[1] != "None":
                    depth = self._find(columns[1].lstrip("/"), DEPTH_FOLDERS)
                    frames.append(Frame(image, depth, int(image.parts[-3][-1]), line))
            elif (
                DRIVE.search(first)
                and len(columns) == 3
                and columns[1].isdigit()
                and columns[2] in ("l", "r")
            ):
                forms.add("scans")
                camera, number = 2 if columns[2] == "l" else 3, f"{int(columns[1]):010d}"
                image = self._find(f"{first}/image_{camera:02d}/data/{number}.png", IMAGE_FOLDERS)
                scan = image.parents[2] / "velodyne_points" / "data" / f"{number}.bin"
                frames.append(Frame(image, scan, camera, line))
            else:
                raise UserError(f"{self.list_file}, line {line}: {EXPECTED}, got {' '.join(columns)!r}")
            if len(forms) > 1:
                raise UserError(
                    f"{self.list_file}, line {line}: a list names either maps or laser scans, split it in two"
                )
        if not frames:
            raise UserError(f"no frame of {self.list_file} has depth ({len(rows)} are listed): {EXPECTED}")
        return len(rows), frames if "maps" in forms else self._exported(list_file, frames)

    def _find(self, name: str, folders: tuple[str, ...]) -> Path:
        """Path of a file relative to the root, below the first of `folders` that has it; images may be JPEG."""
        names = [name] if folders is DEPTH_FOLDERS else [name, str(Path(name).with_suffix(".jpg"))]
        candidates = [Path(folder) / one for one in names for folder in folders]
        return next((path for path in candidates if (self.root / path).is_file()), candidates[0])

    def _exported(self, list_file: Path, frames: list[Frame]) -> list[Frame]:
        """The frames with their exported depth instead of the scans, where it lies beside the list."""
        folder = list_file.resolve().parent / EXPORTED
        if folder.is_dir():
            if (found := len(list(folder.glob("*.npy")))) != len(frames):
                raise UserError(
                    f"{folder} holds {found} depth maps and {self.list_file} names {len(frames)} frames: it must hold"
                    " 000000.npy, 000001.npy and so on, one for each line"
                )
            return [replace(frame, depth=folder / f"{number:06d}.npy") for number, frame in enumerate(frames)]
        packed = folder.with_suffix(".npz")
        if packed.is_file() and not (self.root / frames[0].depth).is_file():
            raise UserError(
                f"{packed} is a pickle of arrays, which can run any code and is not read here: get velodyne_points and"
                f" the calibration of KITTI's raw data, or, if you made the file yourself, save its arrays as"
                f" {folder / '000000.npy'} and so on (numpy.load with allow_pickle=True), one for each line"
            )
        return frames


def day_of(frame: Frame) -> Path:
    """The folder of the day of a frame, relative to the root, which holds the calibration."""
    return frame.image.parents[3]


CALIBRATION = ("calib_cam_to_cam.txt", "calib_velo_to_cam.txt")


def read_calibration(path: Path) -> dict[str, np.ndarray]:
    """The numbers of a calibration file of KITTI, `NAME: 1.0 2.0 ...` a line; lines of other text are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(path, "a calibration", error) from error
    numbers = {}
    for line in lines:
        name, _, values = line.partition(":")
        try:
            numbers[name.strip()] = np.array([float(value) for value in values.split()])
        except ValueError:
            continue  # calib_time: 09-Jan-2012 13:57:47
    return numbers


def laser_depth(scan: Path, day: Path, camera: int, size: tuple[int, ...]) -> np.ndarray:
    """Project a laser scan into a camera: depth float32 `[H, W]` [m], 0 where no beam arrives.

    As Monodepth2 makes the ground truth of its evaluation (export_gt_depth.py): points before the scanner; pixels
    rounded, counted from 1; depth is the distance *ahead of the scanner*, which stands 0.27 m behind the camera; of
    several beams in one pixel the nearest. (Its way of finding these also joins the last pixel of a row with the first
    of the next one, which no crop looks at; not so here.)

    Args:
        scan: float32 (x ahead, y left, z up, reflectance) for each beam.
        day: folder with calib_cam_to_cam.txt and calib_velo_to_cam.txt.
        camera: 2 or 3, the left or right colour camera.
        size: (H, W) of its rectified image.

    Raises:
        DepthFileError: a file that is not what it should be, or the calibration of images of another size.
    """
    cameras, scanner = (read_calibration(day / name) for name in CALIBRATION)
    try:
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = scanner["R"].reshape(3, 3), scanner["T"]
        rectify = np.eye(4)
        rectify[:3, :3] = cameras["R_rect_00"].reshape(3, 3)
        project = cameras[f"P_rect_{camera:02d}"].reshape(3, 4) @ rectify @ pose
        width, height = cameras[f"S_rect_{camera:02d}"]
    except (KeyError, ValueError) as error:
        raise file_error(
            day / CALIBRATION[0],
            f"this and {CALIBRATION[1]} lack one of R, T, R_rect_00, P_rect_{camera:02d}, S_rect_{camera:02d}",
        ) from error
    if (height, width) != tuple(size):
        raise file_error(
            day / CALIBRATION[0], f"is for images of {height:g}x{width:g}, the frame is {size[0]}x{size[1]}"
        )
    try:
        points = np.fromfile(scan, "<f4").reshape(-1, 4).astype(np.float64)
    except (OSError, ValueError) as error:
        raise unreadable(scan, "a laser scan", error) from error
    points = points[points[:, 0] >= 0]
    ahead = points[:, 0].copy()
    points[:, 3] = 1
    column, row, distance = project @ points.T
    with np.errstate(divide="ignore", invalid="ignore"):
        column, row = np.round(column / distance) - 1, np.round(row / distance) - 1
    inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
    depth = np.full(size, np.inf)
    np.minimum.at(depth, (row[inside].astype(int), column[inside].astype(int)), ahead[inside])
    return np.where(np.isfinite(depth), depth, 0).astype(np.float32)
