"""One image with what is known of it, how its files are read, and the names in a batch.

A data set has one kind of supervision, and a micro-batch comes from one data set. So a batch always has

    image       float32 [B, 3, H, W]   normalised as the encoder expects
    name, set, supervision             lists of B texts: of the sample, of its data set, and "metric", "affine" or
                                       "ordinal"
    position, index                    int64 [B]
    failed                             list of "path: reason", of samples that could not be read

and what the entries of its samples say (`finetune.depth_data.entries`), with the same H and W (the crop). The usual are

    depth        float32 [B, 1, H, W]   metres, 0 where there is no reading
    valid        bool    [B, 1, H, W]   min_depth < depth < max_depth
    affine       float32 [B, 1, H, W]   disparity up to scale and shift of each image: larger is nearer; 0 where it is
                                        unknown
    affine_valid bool    [B, 1, H, W]   where it is known
    pairs        int64   [B, N, 4]      (yA, xA, yB, xB), pixels of the crop, 0-based, inside it (0 where not valid)
    relation     int64   [B, N]         +1: A is farther than B, -1: A is closer, 0: as far
    pairs_valid  bool    [B, N]         both points lie inside the crop; false fills up to the longest list
    labels       int64   [B, H, W]      class of each pixel from 0 on, 255 = void: not to be learnt

Classes: the 13 of NYU are bed, books, ceiling, chair, floor, furniture, objects, picture, sofa, table, tv, wall and
window, in this order from 0; files count them from 1 with 0 = void. Void is 255, or with the policy "class" a class of
its own behind the others (number 13 of 14, number 40 of 41).
"""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import cv2
import numpy as np
from PIL import Image

from finetune.depth_data.entries import Depth, Entry, Labels, Pairs, RelativeDepth
from spark.errors import UserError
from spark.images.decode import MAX_PIXELS, describe_failure

Supervision: TypeAlias = Literal["metric", "affine", "ordinal"]


class DepthFileError(UserError):
    """A pair that cannot be used as it lies on disk; the message is "path: reason"."""


def file_error(path: str | Path, reason: str) -> DepthFileError:
    """The error for a file; ": " occurs in its message only where the path ends."""
    return DepthFileError(f"{path}: {reason.replace(': ', ', ')}")


def unreadable(path: str | Path, what: str, error: Exception) -> DepthFileError:
    """The error for a file that does not open as `what` it should be, "an image" or "a depth map"."""
    _, _, reason = describe_failure(path, error).rpartition(": ")
    advice = "copy the file again, or take the pair out of the list"
    return file_error(path, f"cannot be read as {what} ({reason}), {advice}")


@dataclass(frozen=True)
class Plane:
    """A flat surface of a scene.

    Args:
        surface: what it is, such as "wall".
        mask: its pixels, bool `[H, W]`.
        normal: its unit normal, float64 `[3]`: x right, y ahead, z up; of either sign.
    """

    surface: str
    mask: np.ndarray
    normal: np.ndarray


@dataclass(frozen=True)
class SceneGeometry:
    """What is known of a scene besides its depth, for the scores of iBims-1 (`finetune.scoring.ibims`).

    Args:
        edges: where depth jumps, bool `[H, W]`.
        planes: its flat surfaces.
        camera: fx, fy, cx, cy [px], the middle of the first pixel at (1, 1).
    """

    edges: np.ndarray
    planes: tuple[Plane, ...]
    camera: tuple[float, float, float, float]


class DepthSample:
    """One image with what is known of it, by name.

    The usual entries have arguments of their own, whose arrays are attributes, too; None where a sample has none.
    All samples of a data set have the same entries.

    Args:
        image: uint8 `[H, W, 3]`, RGB.
        depth: float32 `[H, W]` in metres; 0 where there is no reading. None where no distance is known.
        name: what reports call it, unique in its data set.
        affine: float32 `[H, W]`, disparity up to scale and shift: larger is nearer. NaN where it is unknown.
        pairs: float64 `[N, 4]`, points (yA, xA, yB, xB) [px], the middle of the first pixel at (0, 0).
        relation: int64 `[N]`, +1: A is farther than B, -1: A is closer, 0: as far.
        labels: uint8 `[H, W]`, class of each pixel from 0 on; 255 = void.
        geometry: edges, planes and camera of a scene that is there to be tested on.
        entries: whatever else the data set brings, such as `{"intrinsics": Intrinsics(K), "next": Frame(image)}`.

    Raises:
        DepthFileError: sizes that differ, an image that is none, a point outside the image.
    """

    def __init__(
        self,
        image: np.ndarray,
        depth: np.ndarray | None,
        name: str,
        affine: np.ndarray | None = None,
        pairs: np.ndarray | None = None,
        relation: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        geometry: SceneGeometry | None = None,
        entries: Mapping[str, Entry] | None = None,
    ):
        usual = {
            "depth": None if depth is None else Depth(depth),
            "affine": None if affine is None else RelativeDepth(affine),
            "pairs": None if pairs is None else Pairs(pairs, relation),
            "labels": None if labels is None else Labels(labels),
        }
        self.image, self.name, self.geometry = image, name, geometry
        self.entries: dict[str, Entry] = {key: entry for key, entry in usual.items() if entry is not None}
        self.entries |= entries or {}
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise file_error(name, f"the image is {image.dtype} {list(image.shape)}, not uint8 [H, W, 3]")
        for key, entry in self.entries.items():
            if (wrong := entry.check(key, (image.shape[0], image.shape[1]))) is not None:
                raise file_error(name, wrong)

    @property
    def depth(self) -> np.ndarray | None:
        """Metres."""
        return self._values("depth")

    @property
    def affine(self) -> np.ndarray | None:
        """Disparity up to scale and shift."""
        return self._values("affine")

    @property
    def labels(self) -> np.ndarray | None:
        """Classes."""
        return self._values("labels")

    @property
    def pairs(self) -> np.ndarray | None:
        """Pairs of points."""
        return self._values("pairs")

    @property
    def relation(self) -> np.ndarray | None:
        """Which point of each pair is farther."""
        return getattr(self.entries.get("pairs"), "relation", None)

    @property
    def metres(self) -> np.ndarray:
        """`depth`; UserError where no distance is known."""
        if self.depth is None:
            raise UserError(f"{self.name} has no depth in metres, which this needs: use a set of RGB-D pairs")
        return self.depth

    def _values(self, name: str) -> np.ndarray | None:
        return getattr(self.entries.get(name), "values", None)


def read_rgb(path: str | Path, content: bytes | None = None) -> np.ndarray:
    """Read a colour image as uint8 `[H, W, 3]`, from its file or from the `content` that an archive has for it.

    Pillow reads it rather than opencv, because versions of opencv fill the missing half of a truncated JPEG
    with grey, and because pretraining reads with Pillow too, so that both see the same pixels. An EXIF
    orientation is ignored: the depth map is aligned with the pixels as stored.

    Raises:
        DepthFileError: the file is missing, truncated, too large, or no image.
    """
    with opened_image(path, "an image", content) as image:
        return np.array(image.convert("RGB"))


@contextmanager
def opened_image(path: str | Path, what: str, content: bytes | None = None) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet.

    Raises:
        DepthFileError: it does not open as `what` it should be, or has more than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():  # Pillow warns at half of its own limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path if content is None else io.BytesIO(content))
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except DepthFileError:
        raise
    except Image.DecompressionBombError as error:
        raise file_error(path, f"has more than the {MAX_PIXELS} pixels that are accepted") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise unreadable(path, what, error) from error


def check_pair_headers(image_path: Path, depth_path: Path) -> None:
    """Check what headers tell of a pair, without decoding pixels: readable, depth of 16 bits, one size.

    Raises:
        DepthFileError: one of these is not so.
    """
    with opened_image(image_path, "an image") as image, opened_image(depth_path, "a depth map") as depth:
        if not depth.mode.startswith("I"):
            raise file_error(
                depth_path, f"the depth map has pixels of kind {depth.mode}, expected 16-bit millimetres"
            )
        if wrong := Depth.other_size("depth map", image.size[::-1], depth.size[::-1]):
            raise file_error(image_path, wrong)


def read_depth_mm(path: str | Path) -> np.ndarray:
    """Read a depth map stored as 16-bit millimetres into float32 metres `[H, W]`; 0 = no reading."""
    return read_depth_png(path, 0.001)


def read_depth_png(path: str | Path, scale: float, content: bytes | None = None) -> np.ndarray:
    """Read a depth map of 16 bits, `scale` metres a unit, into float32 metres `[H, W]`; 0 = no reading.

    Args:
        path: the file, or what errors call it where the `content` is given.
        scale: metres of one unit.
        content: what an archive has for the file.

    Raises:
        DepthFileError: the file is missing, damaged, not 16-bit, or has more than one channel.
    """
    values = read_grey(path, content)
    if values.dtype != np.uint16:
        raise file_error(
            path,
            f"the depth map is {values.dtype}, expected 16-bit millimetres (uint16)."
            " 8-bit files hold scaled or normalised depth, which is not metres; convert them first",
        )
    # A division, because a product with the nearest float to 0.001 is another number in the last digit.
    return values.astype(np.float32) / np.float32(1.0 / scale)


def read_grey(path: str | Path, content: bytes | None = None, what: str = "a depth map") -> np.ndarray:
    """Read a PNG of one channel as it is stored, `[H, W]`, from its file or from `content`.

    Raises:
        DepthFileError: the file is missing, damaged, or has more than one channel.
    """
    try:
        data = np.fromfile(path, np.uint8) if content is None else np.frombuffer(content, np.uint8)
    except OSError as error:
        raise unreadable(path, what, error) from error
    # IMREAD_UNCHANGED, because every other mode of opencv turns 16 bits into 8.
    try:
        values = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if data.size else None
    except cv2.error as error:  # above all more pixels than opencv accepts
        raise unreadable(path, what, error) from error
    if values is None:
        raise unreadable(path, what, ValueError("truncated, or not an image file"))
    if values.ndim != 2:
        raise file_error(
            path, f"{what} has one channel, this has {values.shape[2]} channels: a colour picture?"
        )
    return values


def checked_metres(depth: np.ndarray, path: str | Path, bad_depth: str) -> np.ndarray:
    """Depth of a format that can hold any number: float32 metres `[H, W]`, 0 where there is no reading.

    Args:
        depth: values [m].
        path: the file, for errors.
        bad_depth: "refuse", or "hole": NaN, infinite and negative values are no readings.

    Raises:
        DepthFileError: such values, with the policy "refuse"; or not one map.
    """
    if depth.ndim != 2 or depth.dtype.kind not in "fui":
        raise file_error(path, f"depth is numbers [H, W], not {depth.dtype} {list(depth.shape)}")
    metres = np.ascontiguousarray(depth, np.float32)
    bad = ~np.isfinite(metres) | (metres < 0)
    if not bad.any():
        return metres
    if bad_depth == "refuse":
        row, column = np.argwhere(bad)[0]
        raise file_error(
            path,
            f"{int(bad.sum())} of {bad.size} depths are NaN, infinite or negative, the first {metres[row, column]:g} at"
            f" row {row}, column {column}; where they mean no reading, give --data.bad_depth hole",
        )
    return np.where(bad, np.float32(0.0), metres)
