"""What may be known of an image beside its pixels, and how each kind of it follows an augmentation.

An augmentation is a `View`: one window of a frame, seen at another size, mirrored or not. An `Entry` of a sample knows
what it looks like in a view. Transform, collation and losses go by the names that a data set gives its entries, so a
set may bring what no other has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Window: TypeAlias = tuple[float, float, float, float]
"""Top, bottom, left, right [px]; fractions are fine."""

VOID = 255
"""The label that no loss and no metric looks at."""


@dataclass(frozen=True)
class View:
    """What an augmentation shows of a frame.

    Args:
        cut: rows and columns of the frame that are used at all; the rest is cut off first.
        degrees: rotation of this part about its middle, counterclockwise; None: none.
        window: what is shown of the part.
        size: (h, w) at which it is shown [px].
        flipped: whether it is mirrored, left for right.
        zoom: how much nearer the scene comes: what is in metres is divided by it.
        limits: depths between which a reading counts [m].
        colours: from RGB in [0, 1] float32 `[h, w, 3]` to network input `[3, h, w]`, all images of a sample alike.
    """

    cut: tuple[slice, slice]
    degrees: float | None
    window: Window
    size: tuple[int, int]
    flipped: bool
    zoom: float
    limits: tuple[float, float]
    colours: Callable[[np.ndarray], Tensor]

    @property
    def part(self) -> tuple[int, int]:
        """(H, W) of the part of the frame that is used [px]."""
        rows, columns = self.cut
        return rows.stop - rows.start, columns.stop - columns.start

    def image(self, values: np.ndarray) -> np.ndarray:
        """Colours uint8 `[H, W, 3]` in [0, 1] float32 `[h, w, 3]`: bilinear, area-averaging if smaller."""
        values = values[self.cut]
        if self.degrees is not None:
            values = rotate_map(values, self.degrees, 0)
        return to_unit(resample_image(values, self.window, self.size))[:, self._side]

    def map(self, values: np.ndarray, fill: float) -> np.ndarray:
        """A map `[H, W]` as `[h, w]`, the value nearest to each pixel; `fill` is what a rotation brings in."""
        values = values[self.cut]
        if self.degrees is not None:
            values = rotate_map(values, self.degrees, fill)
        return np.ascontiguousarray(resample_map(values, self.window, self.size)[:, self._side])

    def in_part(self, points: np.ndarray) -> np.ndarray:
        """Points (row, column) `[N, 2]` of the frame, the middle of the first pixel at (0, 0), as points of the rotated
        part, measured from its corner."""
        points = points + 0.5 - (self.cut[0].start, self.cut[1].start)
        return points if self.degrees is None else rotate_points(points, self.part, self.degrees)

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """The pixels (row, column) int64 `[N, 2]` in which points of the frame lie; outside of the view, too."""
        top, bottom, left, right = self.window
        scale = np.array([self.size[0] / (bottom - top), self.size[1] / (right - left)])
        pixels = np.floor((self.in_part(points) - (top, left)) * scale).astype(np.int64)
        if self.flipped:
            pixels[:, 1] = self.size[1] - 1 - pixels[:, 1]
        return pixels

    def matrix(self) -> np.ndarray:
        """From (x, y, 1) in the frame to (x, y, 1) in the view, the middle of the first pixel at (0, 0); float64."""
        top, bottom, left, right = self.window
        height, width = self.size
        to_part = _shift(0.5 - self.cut[1].start, 0.5 - self.cut[0].start)
        turn = np.eye(3)
        if self.degrees is not None:
            middle_y, middle_x = (side / 2 for side in self.part)
            cosine, sine = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
            turn[:2, :2] = [[cosine, sine], [-sine, cosine]]
            turn = _shift(middle_x, middle_y) @ turn @ _shift(-middle_x, -middle_y)
        scale = np.diag([width / (right - left), height / (bottom - top), 1.0])
        mirror = np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if self.flipped else np.eye(3)
        return mirror @ _shift(-0.5, -0.5) @ scale @ _shift(-left, -top) @ turn @ to_part

    @property
    def _side(self) -> slice:
        return slice(None, None, -1 if self.flipped else 1)


class Entry:
    """Something that is known of an image."""

    def check(self, name: str, frame: tuple[int, int]) -> str | None:
        """What is wrong with the entry `name` of an image of (H, W) `frame`; None if nothing is."""
        return None

    @property
    def blank(self) -> bool:
        """Whether it is ground truth without a single reading."""
        return False

    @property
    def points(self) -> np.ndarray:
        """Points (row, column) `[N, 2]` of the frame that a crop should hold."""
        return np.empty((0, 2))

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """What a batch has of it, by name; tensors of unequal length are padded with zeros to one batch.

        Args:
            name: of this entry in its sample.
            view: of the augmentation.
        """
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Map(Entry):
    """Base of maps with one value a pixel.

    Args:
        values: `[H, W]`.
    """

    values: np.ndarray
    what: ClassVar[str] = "map"

    def check(self, name: str, frame: tuple[int, int]) -> str | None:
        """A map has the size of the image."""
        return self.other_size(self.what, frame, self.values.shape)

    @staticmethod
    def other_size(what: str, frame: tuple[int, ...], size: tuple[int, ...]) -> str | None:
        """A sentence where a map has another (H, W) `size` than its image; None where it has not."""
        if size == frame:
            return None
        return (
            f"the image is {size_text(frame)}, its {what} {size_text(size)}; a pair has one size (was one of them"
            " resized or cropped?)"
        )


class Depth(Map):
    """Metres float32 `[H, W]`, 0 where there is no reading; `name` [1, h, w], and where it counts."""

    what = "depth map"

    @property
    def blank(self) -> bool:
        """Whether there is no reading."""
        return not (self.values > 0).any()

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """Nearer by the zoom; `valid` (of another name than depth: `name_valid`) bool."""
        metres = torch.from_numpy(view.map(self.values, 0.0) / np.float32(view.zoom))[None]
        low, high = view.limits
        return {name: metres, mask_name(name): (metres > low) & (metres < high)}


class RelativeDepth(Map):
    """Disparity up to scale and shift float32 `[H, W]`, larger is nearer, NaN where it is unknown."""

    what = "map of relative depth"

    @property
    def blank(self) -> bool:
        """Whether there is no reading."""
        return not np.isfinite(self.values).any()

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """`name` [1, h, w], 0 where it is unknown, and `name_valid` bool."""
        disparity = torch.from_numpy(view.map(self.values, math.nan))[None]
        return {name: disparity.nan_to_num(0.0), mask_name(name): disparity.isfinite()}


class Labels(Map):
    """Class of each pixel from 0 on, 255 = void, uint8 `[H, W]`; int64 [h, w]."""

    what = "map of classes"

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """Void comes from outside."""
        return {name: torch.from_numpy(view.map(self.values, VOID).astype(np.int64))}


@dataclass(frozen=True, eq=False)
class Pairs(Entry):
    """Pairs of points, and which of each is farther.

    Args:
        values: float64 `[N, 4]`, (yA, xA, yB, xB) [px], the middle of the first pixel at (0, 0).
        relation: int64 `[N]`, +1: A is farther than B, -1: A is closer, 0: as far.
    """

    values: np.ndarray
    relation: np.ndarray | None

    def check(self, name: str, frame: tuple[int, int]) -> str | None:
        """Points lie inside the image."""
        limits = np.tile(np.asarray(frame) - 0.5, 2)
        outside = ((self.values < -0.5) | (self.values >= limits)).any(1)
        if not outside.any():
            return None
        return (
            f"a pair of points (yA, xA, yB, xB) {self.values[outside][0].tolist()}, counted from 0, lies outside the"
            f" image of {size_text(frame)}"
        )

    @property
    def points(self) -> np.ndarray:
        """All points, A and B in turn."""
        return self.values.reshape(-1, 2)

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """`name` int64 [N, 4], pixels inside the view (0 where not both are), `relation` [N] (of another name than
        pairs: `name_relation`), `name_valid` bool [N]."""
        assert self.relation is not None
        pixels = view.pixels(self.points).reshape(-1, 4)
        inside = np.all((pixels >= 0) & (pixels < np.tile(view.size, 2)), axis=1)
        return {
            name: torch.from_numpy(pixels * inside[:, None]),
            "relation" if name == "pairs" else f"{name}_relation": torch.from_numpy(self.relation),
            mask_name(name): torch.from_numpy(inside),
        }


@dataclass(frozen=True, eq=False)
class Frame(Entry):
    """Another image of the same scene, such as the next of a video, uint8 `[H, W, 3]` RGB; float32 [3, h, w].

    It is seen in the same window and changes its colours like the image.
    """

    values: np.ndarray

    def check(self, name: str, frame: tuple[int, int]) -> str | None:
        """It has the size of the image."""
        if self.values.shape == (*frame, 3) and self.values.dtype == np.uint8:
            return None
        return f"{name} is {self.values.dtype} {list(self.values.shape)}, not uint8 {[*frame, 3]} as the image is"

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """Network input, as the image is."""
        return {name: view.colours(view.image(self.values))}


@dataclass(frozen=True, eq=False)
class Intrinsics(Entry):
    """Camera matrix [[fx, s, cx], [0, fy, cy], [0, 0, 1]] [px], first pixel's middle at (0, 0); float32 [3, 3].

    In a view it still takes points of the scene to their pixels: of the scene mirrored where the view is, and of the
    scene with all lengths divided by the zoom, as depth is. After a rotation it is no longer triangular.
    """

    values: np.ndarray

    def check(self, name: str, frame: tuple[int, int]) -> str | None:
        """It is a matrix."""
        if self.values.shape == (3, 3):
            return None
        return f"{name} is {list(self.values.shape)}, not a matrix [3, 3]"

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """The matrix of the view."""
        mirrored = np.diag([-1.0 if view.flipped else 1.0, 1.0, 1.0])
        return {name: torch.from_numpy(view.matrix() @ self.values @ mirrored).float()}


@dataclass(frozen=True, eq=False)
class Value(Entry):
    """Numbers that no augmentation changes, of any shape."""

    values: np.ndarray | float

    def seen(self, name: str, view: View) -> Mapping[str, Tensor]:
        """As they are."""
        return {name: torch.as_tensor(self.values)}


def size_text(shape: tuple[int, ...]) -> str:
    """`(480, 640, 3)` -> "480x640": height x width, the order used everywhere in this project."""
    return "x".join(str(n) for n in shape[:2])


def mask_name(name: str) -> str:
    """Name of the mask that says where an entry is known."""
    return "valid" if name == "depth" else f"{name}_valid"


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255.0)


def resample_image(image: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """A window of a uint8 image `[H, W, 3]` at `size` (h, w): bilinear, area-averaging if smaller."""
    top, bottom, left, right = window
    box = (max(left, 0.0), max(top, 0.0), min(right, image.shape[1]), min(bottom, image.shape[0]))
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def resample_map(values: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """A window of a map `[H, W]` at `size` (h, w): the value nearest to each new pixel's centre."""
    top, bottom, left, right = window
    rows = top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]
    columns = left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]
    inside_rows = np.clip(np.floor(rows).astype(np.int64), 0, values.shape[0] - 1)
    inside_columns = np.clip(np.floor(columns).astype(np.int64), 0, values.shape[1] - 1)
    return values[inside_rows[:, None], inside_columns]


def rotate_map(values: np.ndarray, degrees: float, fill: float) -> np.ndarray:
    """Rotate an image `[H, W, 3]` (bilinear) or a map `[H, W]` (nearest) counterclockwise about its middle."""
    method = Image.Resampling.BILINEAR if values.ndim == 3 else Image.Resampling.NEAREST
    colour = (fill,) * 3 if values.ndim == 3 else fill
    return np.asarray(Image.fromarray(values).rotate(degrees, method, fillcolor=colour))  # type: ignore[arg-type]


def rotate_points(points: np.ndarray, size: Sequence[int], degrees: float) -> np.ndarray:
    """Where `rotate_map` of a map of (H, W) `size` takes points (row, column) `[N, 2]`, measured from its corner."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    middle = np.asarray(size[:2]) / 2
    return (points - middle) @ np.array([[cosine, sine], [-sine, cosine]]) + middle


def _shift(x: float, y: float) -> np.ndarray:
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]])
