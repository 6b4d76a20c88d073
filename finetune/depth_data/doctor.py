"""What is wrong with a data set of depth: read a few samples, and compare them with what their layout promises."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np

from finetune.depth_data.base import DepthSet
from finetune.depth_data.depth_files import stored_scale
from finetune.depth_data.lists import files_below
from finetune.depth_data.registry import Kind, open_depth_data, recognise
from finetune.depth_data.sample import DepthFileError, DepthSample
from finetune.depth_data.sets import kitti
from finetune.depth_data.sets.densedepth import DenseDepth
from finetune.depth_data.sets.folder import PlainFolder, pair_lists
from finetune.depth_data.sets.ibims import MAT, IBims
from finetune.depth_data.sets.nyu import NYULabeled, NYUSync, read_split

NYU_KINDS: frozenset[Kind] = frozenset({"nyu_labeled", "nyu_sync", "densedepth", "fastdepth", "hub_tars"})
RAW_KINDS: frozenset[Kind] = frozenset({"nyu_labeled", "nyu_sync"})
NYU_MEDIAN = 2.7
"""Median depth of NYU Depth V2 [m]; those of single rooms are between 1.2 and 5."""

UNITS = {"millimetres": 0.001, "1/256 m": 1 / 256, "1/5000 m": 1 / 5000, "centimetres": 0.01, "metres": 1.0}
MAPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as it is": lambda values: values,
    "mirrored (left and right exchanged)": lambda values: values[:, ::-1],
    "upside down": lambda values: values[::-1],
    "turned by 180 degrees": lambda values: values[::-1, ::-1],
}


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Args:
        fault: its short name; "" for a remark.
        text: what it is and what to do.
    """

    fault: str
    text: str


@dataclass
class Diagnosis:
    """What was found out about a data set.

    Args:
        kind: its layout, None where none was recognised.
        about: its line in the log of a run.
        findings: what is wrong, and remarks.
        drawn: samples to show.
    """

    kind: Kind | None = None
    about: str = ""
    findings: list[Finding] = field(default_factory=list)
    drawn: list[DepthSample] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.fault for finding in self.findings)

    def wrong(self, fault: str, text: str) -> None:
        """Add what is wrong."""
        self.findings.append(Finding(fault, text))

    def note(self, text: str) -> None:
        """Add a remark."""
        self.findings.append(Finding("", text))


def diagnose(
    root: str | Path,
    list_file: str | None = None,
    *,
    val_list: str | None = None,
    kind: Kind | None = None,
    samples: int = 24,
    draw: int = 5,
    **reading: Any,
) -> Diagnosis:
    """Examine the training part of a data set.

    Args:
        root: where it lies.
        list_file: list of the training pairs, for layouts that have lists.
        val_list: list of the pairs to validate on; None takes the split of the layout, or the other lists at the root.
        kind: its layout; None recognises it.
        samples: how many samples are read, spread evenly.
        draw: how many of them are kept for drawing.
        reading: how to read it, as for `open_depth_data`.
    """
    found = Diagnosis()
    try:
        found.kind = kind or recognise(root, list_file)
        data = open_depth_data(root, list_file, "train", kind=found.kind, **reading)
    except ValueError as error:
        found.wrong(fault_of(str(error)), str(error))
        return found
    found.about = repr(data)
    read: list[DepthSample] = []
    for index in spread(len(data), samples):
        try:
            read.append(data[index])
        except DepthFileError as error:
            found.wrong(fault_of(str(error)), str(error))
    found.drawn = [read[n] for n in spread(len(read), draw)]
    with_depth = [sample for sample in read if sample.depth is not None]
    if with_depth:
        check_depth(found, with_depth, data)
    if mapped := [sample for sample in read if sample.pairs is None]:
        check_alignment(found, mapped)
    if (
        isinstance(data, PlainFolder)
        and data.depth_scale is None
        and data.entries[0].depth.lower().endswith(".png")
        and stored_scale(data.root / data.entries[0].depth) is None
    ):
        # Street scenes in KITTI's unit look like rooms when read as millimetres: only who took them knows.
        found.note(
            "PNG is taken for millimetres: where the scenes are 3.9 times as deep as the median says, it is in units of"
            " 1/256 m, as KITTI's (depth_scale 0.00390625)"
        )
    if isinstance(data, IBims) and data.geometry_folder is None:
        found.note(
            f"edges and planes ({MAT}) are not there, which protocol ibims-official scores; ibims-zoedepth does not"
        )
    if isinstance(data, kitti.KITTI) and len(data) < data.listed:
        found.note(
            f"{data.listed - len(data)} of the {data.listed} listed frames have no depth and are left out"
        )
    if found.kind in NYU_KINDS:
        check_frames(found, read, str(reading.get("white_border", "keep")))
    check_splits(found, data, Path(root), list_file, val_list)
    check_intrinsics(found, data, Path(root))
    return found


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices, evenly over a sequence of `length`, the first and the last among them."""
    return np.unique(np.linspace(0, length - 1, count).round().astype(int)).tolist() if length else []


def fault_of(message: str) -> str:
    """The short name of what an error of a reader is about."""
    sizes = re.search(r"image is (\d+)x(\d+), its (?:depth map|map of relative depth) (\d+)x(\d+)", message)
    arrays = re.search(r"images \(\d+, 3, (\d+), (\d+)\) and \w+ \(\d+, (\d+), (\d+)\)", message)
    for pair in filter(None, (sizes, arrays)):
        if (pair[1], pair[2]) == (pair[4], pair[3]):
            return "transposed"
    if "depth map is uint8" in message:
        return "8-bit"
    if "NaN, infinite or negative" in message:
        return "no distance"
    return "missing" if "missing" in message or "no file" in message else "unreadable"


def other_unit(median: float, data: DepthSet) -> str:
    """In which unit the depth files may be if their median is not `median` [m], for the end of a sentence."""
    if isinstance(data, DenseDepth):
        return ""  # 8 bits have no unit
    unit = 0.001 if isinstance(data, NYUSync) else kitti.SCALE if isinstance(data, kitti.KITTI) else 1.0
    if isinstance(data, PlainFolder):
        unit = data.scale(data.root / data.entries[0].depth)
    taken = {metres: name for name, metres in UNITS.items()}.get(unit, f"units of {unit:g} m")
    better = min(UNITS, key=lambda name: abs(np.log(median * UNITS[name] / unit / NYU_MEDIAN)))
    would = f"a median of {median * UNITS[better] / unit:.2g} m would follow"
    return f" ({would} if values taken for {taken} were {better})"


def check_depth(found: Diagnosis, samples: Sequence[DepthSample], data: DepthSet) -> None:
    """Scale, number of levels, holes."""
    readings = [sample.metres[sample.metres > 0] for sample in samples]
    empty = [sample.name for sample, values in zip(samples, readings, strict=True) if not values.size]
    if empty:
        text = f"{len(empty)} of {len(samples)} depth maps have no reading at all, the first is {empty[0]}"
        found.wrong("empty", text)
    readings = [values for values in readings if values.size]
    if not readings:
        return
    median = float(np.median([np.median(values) for values in readings]))
    nyu = found.kind in NYU_KINDS
    low, high = (1.2, 5.0) if nyu else (0.3, 100.0)
    if not low <= median <= high:
        expected = "rooms have 1.2 to 5" if nyu else "expected 0.3 to 100"
        found.wrong(
            "wrong scale",
            f"the median depth is {median:.3g} m, {expected} m: the files are probably not in the unit that they are"
            f" read in{other_unit(median, data)}",
        )
    elif found.kind == "folder":
        found.note(f"the median depth is {median:.3g} m")
    levels = np.unique(np.concatenate([np.unique(values) for values in readings]))
    steps = np.diff(levels)
    if found.kind == "densedepth":
        found.note(f"training depth of this layout has 8 bits: {len(levels)} levels, filled")
    elif 1 < len(levels) <= 256 and evenly_spaced(steps) and sum(values.size for values in readings) > 10_000:
        found.wrong(
            "8-bit",
            f"all depth maps together have {len(levels)} different values, {np.median(steps) * 1000:.0f} mm apart: they"
            " were 8-bit once, whatever the file says now; take the originals where metres matter",
        )
    holes = float(np.median([(sample.metres == 0).mean() for sample in samples]))
    text = f"{holes:.1%} of a depth map (median) is without a reading"
    asked = isinstance(data, NYULabeled) and data.depth == "filled"
    if holes < 0.005 and found.kind in RAW_KINDS and not asked:
        found.wrong(
            "filled",
            f"{text}: this depth was filled in, what a Kinect measures has holes; good for training, but scores against"
            " it are not those of the published protocols, which stand on raw depth",
        )
    else:
        found.note(text)


def evenly_spaced(steps: np.ndarray) -> bool:
    """Whether most steps [m] between neighbouring values are the same, up to the rounding to millimetres."""
    middle = float(np.median(steps))
    return float((np.abs(steps - middle) <= max(0.0015, 0.05 * middle)).mean()) > 0.5


def check_alignment(found: Diagnosis, samples: Sequence[DepthSample]) -> None:
    """Whether the edges of depth lie where the edges of the image are."""
    scores = {name: [] for name in MAPS}
    for sample in samples:
        edges = edge_map(cv2.cvtColor(sample.image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255)
        if sample.affine is not None:
            depth = edge_map(np.nan_to_num(sample.affine), np.isfinite(sample.affine))
        else:
            depth = edge_map(np.log(np.maximum(sample.metres, 1e-3)), sample.metres > 0)
        for name, change in MAPS.items():
            scores[name].append(agreement(edges, change(depth)))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    best = max(means, key=lambda name: means[name])
    # By a wide margin only: holes, or a depth camera beside the colour camera, blur what is true.
    if best != "as it is" and means[best] > max(0.15, 1.7 * means["as it is"]):
        found.wrong(
            "mirrored",
            f"depth is {best} against its image: their edges agree by {means[best]:.2f} so, and by"
            f" {means['as it is']:.2f} as the files are; transpose arrays of MATLAB, never rotate them",
        )


def edge_map(values: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """How much a map [H, W] changes from place to place, on a grid of 48x64; 0 beside pixels that are not valid."""
    steep = np.hypot(cv2.Sobel(values, cv2.CV_32F, 1, 0), cv2.Sobel(values, cv2.CV_32F, 0, 1))
    if valid is not None:
        steep *= cv2.erode(valid.astype(np.uint8), np.ones((5, 5), np.uint8))
    height, width = values.shape
    steep[: height // 40], steep[-height // 40 :] = 0, 0  # the frame itself is no edge
    steep[:, : width // 40], steep[:, -width // 40 :] = 0, 0
    return cv2.blur(
        cv2.resize(np.minimum(steep, np.quantile(steep, 0.98)), (64, 48), interpolation=cv2.INTER_AREA),
        (3, 3),
    )


def agreement(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of two maps; 0 where one of them is flat."""
    flat = one.std() < 1e-8 or other.std() < 1e-8
    return 0.0 if flat else float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def check_frames(found: Diagnosis, samples: Sequence[DepthSample], white_border: str) -> None:
    """Orientation and border of NYU's frames."""
    portrait = [sample.name for sample in samples if sample.image.shape[0] > sample.image.shape[1]]
    if portrait:
        height, width = samples[0].image.shape[:2]
        found.wrong(
            "transposed",
            f"{len(portrait)} of {len(samples)} frames are upright ({height}x{width}), NYU's are 480x640: the axes of"
            " the MATLAB file were not put back, transpose images and depth",
        )
    white = [sample.name for sample in samples if has_white_border(sample.image)]
    if len(white) > len(samples) / 2 and white_border == "keep":
        found.wrong(
            "white border",
            f"{len(white)} of {len(samples)} images have the white border of NYU's labelled images: leave it out of the"
            " crops (data.border, the default) and paint it over for evaluation (data.white_border fill or black)",
        )


def has_white_border(image: np.ndarray) -> bool:
    """Whether a strip of 1/120 of an image's height all around is white, and what lies inside is not."""
    strip = max(1, image.shape[0] // 120)
    edges = (image[:strip], image[-strip:], image[:, :strip], image[:, -strip:])
    inner = image[4 * strip : -4 * strip, 4 * strip : -4 * strip]
    return min(float(edge.mean()) for edge in edges) > 235 and float(inner.mean()) < 225


def check_splits(
    found: Diagnosis, data: DepthSet, root: Path, list_file: str | None, val_list: str | None
) -> None:
    """Whether what is validated or tested on is trained on, too."""
    if isinstance(data, NYULabeled):
        train, test = (set(read_split(data.splits_path, split).tolist()) for split in ("train", "test"))
        if both := sorted(train & test):
            text = f"{len(both)} images are in both splits of {data.splits_path}, such as {both[0]}"
            found.wrong("test in training", text)
        if len(train) > 795:
            text = f"{data.splits_path} has {len(train)} training images, the official split 795: test images are among"
            found.wrong("test in training", f"{text} them")
        return
    names = data.names()
    scenes = {scene_of(name) for name in names} - {""}
    lists = [val_list] if val_list else []
    if isinstance(data, NYUSync | PlainFolder) and data.list_file is not None and not val_list:
        lists = [path.name for path in pair_lists(root) if path.resolve() != data.list_file.resolve()]
        lists = [name for name in lists if re.search(r"val|test|eigen", name)]
    compared: list[str | None] = [*lists]
    if not lists and data.has_test_split() and list_file is None:
        compared = [None]
    for name in compared:
        called = name or "the test split"
        try:
            other = open_depth_data(root, name, "test", kind=found.kind).names()
        except ValueError as error:
            found.note(f"{called} was not compared: {error}")
            continue
        files = sorted(set(names) & set(other))
        rooms = sorted(scenes & {scene_of(name) for name in other})
        if files:
            found.wrong(
                "test in training", f"{len(files)} pairs to train on are in {called} too, such as {files[0]}"
            )
        elif rooms:
            found.wrong(
                "test in training",
                f"{len(rooms)} scenes to train on are in {called} too, such as {rooms[0]}: frames of one scene are"
                " nearly the same picture, so the scores would be too good; split by scene",
            )
        else:
            found.note(f"no scene is shared with {called}")


def scene_of(name: str) -> str:
    """The scene of a NYU-like name, kitchen_0004 of kitchen_0004/rgb_0001.jpg, or the drive of KITTI; "" where the
    folder is no scene."""
    scene = re.compile(r"_\d{4}[a-z]?(_out|_sync)?$")
    folders = [part for part in PurePosixPath(name).parts[:-1] if scene.search(part)]
    return folders[-1] if folders else ""


def check_intrinsics(found: Diagnosis, data: DepthSet, root: Path) -> None:
    """Whether the camera is known, which point clouds need."""
    if isinstance(data, NYUSync):
        without = [entry.line for entry in data.entries if entry.focal is None]
        if without:
            found.wrong(
                "no intrinsics",
                f"{len(without)} of {len(data)} lines of {data.list_file} have no focal length (third column, in"
                f" pixels), the first is line {without[0]}: NYU's is 518.8579",
            )
    elif isinstance(data, PlainFolder):
        words = re.compile(r"intrinsic|calib|camera", re.IGNORECASE)
        if not any(words.search(path.name) for path in files_below(root)):
            found.wrong(
                "no intrinsics",
                f"no file in {root} names the camera (looked for intrinsics, calib, camera): depth trains without it,"
                " but point clouds and mixing cameras need fx, fy, cx, cy",
            )
