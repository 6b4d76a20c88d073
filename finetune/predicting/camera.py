"""Intrinsics of the camera that took an image: from its EXIF, a file, a data set, a field of view, or assumed.

The pinhole camera without distortion, in pixels, the middle of the first pixel at (0, 0). Intrinsics know their source
and whether they were assumed: where they are wrong, point clouds have the wrong shape.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import ExifTags

from finetune.depth_data.sample import DepthFileError, opened_image
from spark.errors import UserError

ASSUMED_VIEW = 60.0
"""Assumed angle of view along the long side, where nothing is known [degrees]."""
FULL_FRAME = math.hypot(36.0, 24.0)
"""Diagonal that "35 mm equivalent" refers to [mm] (CIPA DCG-001)."""


@dataclass(frozen=True)
class Intrinsics:
    """Of an image of (height, width) pixels.

    Args:
        fx: focal length along rows [px].
        fy: focal length along columns [px].
        cx: column of the principal point [px].
        cy: row of the principal point [px].
        height: of the image [px].
        width: of the image [px].
        source: where they come from, for people.
        assumed: whether they are an assumption.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    height: int
    width: int
    source: str
    assumed: bool = False

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy)
        if not all(math.isfinite(number) for number in numbers) or min(self.fx, self.fy) <= 0:
            raise UserError(f"intrinsics of {self.source}: fx and fy are above 0, all finite, not {numbers}")
        if min(self.height, self.width) < 1:
            raise UserError(f"intrinsics of {self.source}: the image has no size {self.height}x{self.width}")

    def at(self, size: tuple[int, int]) -> "Intrinsics":
        """The same camera for its image resized to (H, W) `size`."""
        down, across = size[0] / self.height, size[1] / self.width
        if abs(down / across - 1) > 0.02:
            raise UserError(
                f"the intrinsics of {self.source} are of {self.height}x{self.width}, the image is"
                f" {size[0]}x{size[1]}, which is no such image resized: give those of this image (--camera)"
            )
        centre = (self.cx + 0.5) * across - 0.5, (self.cy + 0.5) * down - 0.5
        return Intrinsics(self.fx * across, self.fy * down, *centre, *size, self.source, self.assumed)

    @property
    def relative_focal(self) -> float:
        """Focal length in shares of the image's long side; it decides how large things look to a network."""
        return (self.fx if self.width >= self.height else self.fy) / max(self.width, self.height)

    def points(self, depth: np.ndarray, step: int = 1) -> np.ndarray:
        """Back-project every `step`-th row and column of depth [H, W] [m] to points [h, w, 3] [m], float32.

        Axes are opencv's: x right, y down, z forward.
        """
        camera, metres = self.at((depth.shape[0], depth.shape[1])), depth[::step, ::step]
        columns = (np.arange(0, depth.shape[1], step) - camera.cx) / camera.fx
        rows = (np.arange(0, depth.shape[0], step) - camera.cy) / camera.fy
        return np.stack((columns * metres, rows[:, None] * metres, metres), -1).astype(np.float32)

    def __str__(self) -> str:
        """One line for people."""
        view = math.degrees(2 * math.atan(self.width / 2 / self.fx))
        return f"fx {self.fx:.1f} px, {view:.0f} degrees across, {self.source}"


WIDEST_VIEW = 150.0
"""Angle of view across beyond which intrinsics are doubted [degrees]."""


def wide_view(fx: float, width: int) -> str:
    """A sentence on a camera that is wider than lenses without distortion are; "" for any other."""
    view = math.degrees(2 * math.atan(width / 2 / fx))
    if view <= WIDEST_VIEW:
        return ""
    return (
        f"a camera with fx {fx:g} px sees {view:.0f} degrees across {width} px, more than any common lens: fx and fy"
        " are in pixels, are these in millimetres?"
    )


NYU = Intrinsics(518.858, 519.470, 325.582, 253.736, 480, 640, "NYU Depth V2")
"""Of the colour camera of NYU Depth V2 (its toolbox)."""


def camera_for(choice: str | None, image_path: str | Path | None, size: tuple[int, int]) -> Intrinsics:
    """The camera of an image.

    Args:
        choice: "nyu", a field of view across in degrees, or a file (see `read_camera`); None: from EXIF, else
            `ASSUMED_VIEW` along the long side.
        image_path: the image's file, for EXIF; None: there is none.
        size: (H, W) of the image, upright [px].
    """
    if choice is not None:
        return known_camera(choice, size).at(size)
    found = None if image_path is None else exif_camera(image_path, size)
    if found is not None:
        return found
    return from_view(ASSUMED_VIEW, size, along_long=True)


def known_camera(choice: str, size: tuple[int, int] | None = None) -> Intrinsics:
    """The camera that an option names; `size` (H, W) is needed for a field of view and for files without one."""
    if choice == "nyu":
        return NYU
    try:
        degrees = float(choice)
    except ValueError:
        return read_camera(choice, size)
    return from_view(degrees, size or (480, 640))


def from_view(degrees: float, size: tuple[int, int], along_long: bool = False) -> Intrinsics:
    """A camera by its field of view: across, or along the long side, which is an assumption here."""
    if not 1 <= degrees <= 170:
        raise UserError(f"a field of view is between 1 and 170 degrees, not {degrees:g}")
    side = max(size) if along_long else size[1]
    focal = side / 2 / math.tan(math.radians(degrees) / 2)
    source = f"ASSUMED, {degrees:g} degrees along the long side" if along_long else "the stated field of view"
    return _centred(focal, size, source, along_long)


def exif_camera(path: str | Path, size: tuple[int, int]) -> Intrinsics | None:
    """The camera by an image's EXIF: focal length and resolution of the focal plane, or the 35 mm equivalent; or None.

    The equivalent is taken over the diagonal, as it is defined. The focal length of an image that was
    cropped later is wrong, and nothing shows it. The focal plane counts only where EXIF's own image size is that of
    the file.
    """
    try:
        with opened_image(path, "an image") as image:
            tags = image.getexif().get_ifd(ExifTags.IFD.Exif)
            stored = image.size
    except DepthFileError:
        return None
    tag = ExifTags.Base
    millimetres, equivalent = _number(tags, tag.FocalLength), _number(tags, tag.FocalLengthIn35mmFilm)
    per_unit = _number(tags, tag.FocalPlaneXResolution)
    unit = {2.0: 25.4, 3.0: 10.0, 4.0: 1.0}.get(_number(tags, tag.FocalPlaneResolutionUnit, 2) or 0.0)
    as_taken = _number(tags, tag.ExifImageWidth) == stored[0]
    if equivalent:
        focal, source = equivalent / FULL_FRAME * math.hypot(*size), f"EXIF, {equivalent:g} mm equivalent"
    elif millimetres and per_unit and unit and as_taken:
        focal, source = millimetres * per_unit / unit, f"EXIF, {millimetres:g} mm and its focal plane"
    else:
        return None
    if not 0.1 < focal / max(size) < 100:
        return None
    return _centred(focal, size, source)


def _centred(focal: float, size: tuple[int, int], source: str, assumed: bool = False) -> Intrinsics:
    return Intrinsics(focal, focal, (size[1] - 1) / 2, (size[0] - 1) / 2, *size, source, assumed)


def _number(tags: Any, tag: ExifTags.Base, missing: float = 0) -> float | None:
    """A positive number of EXIF, `missing` where there is none; cameras write 0 for unknown."""
    try:
        value = float(tags.get(tag, missing))
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def read_camera(path: str | Path, size: tuple[int, int] | None = None) -> Intrinsics:
    """Intrinsics from a JSON or YAML file with fx, fy, cx, cy, width and height; without the last two `size` counts."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(
            f"camera {str(path)!r} is neither nyu, nor a field of view in degrees, nor a file with fx, fy, cx, cy"
        )
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
        if size is not None:
            stored = {"height": size[0], "width": size[1], **stored}
        if missing := [key for key in ("fx", "fy", "cx", "cy", "width", "height") if key not in stored]:
            raise UserError(f"it lacks {' and '.join(missing)}")
        fx, fy, cx, cy = (float(stored[key]) for key in ("fx", "fy", "cx", "cy"))
        return Intrinsics(fx, fy, cx, cy, int(stored["height"]), int(stored["width"]), path.name)
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} holds no intrinsics ({' '.join(str(error).split())}): write fx, fy, cx, cy, width and height [px]"
            " as JSON or YAML"
        ) from error
