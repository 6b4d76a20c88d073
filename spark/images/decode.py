"""One image: its kind and size before it is decoded, its pixels as upright 8-bit RGB, why it cannot be read.

Pixels are `[H, W, 3]` uint8. JPEG, the kind that large collections have, is decoded by libjpeg-turbo straight from
memory and, where a crop needs no more, at a half, a quarter or an eighth of its size; everything else by Pillow.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from spark.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# The format of a file may differ from its extension: the web has GIF under .png. JPEG includes phones' MPO.
# Pillow knows more formats, among them EPS, which starts another program.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF")

# Pillow's own limit for "a decompression bomb": 2 x 89,478,485 pixels, half a gigabyte as RGB.
MAX_PIXELS = 178_956_970

# The upright picture in terms of the stored one, by EXIF orientation (1 is upright): transposed first, then
# reversed along these axes.
_UPRIGHT = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}


class UnreadableImageError(UserError):
    """The pixels of an image cannot be decoded; the message is the reason."""


class Picture(Protocol):
    """An image whose upright size is known; the pixels may not be decoded yet."""

    height: int
    width: int

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """Decode: -> [H, W, 3] uint8, writable.

        Args:
            reduce: 1, 2, 4 or 8: the result may be smaller by this factor, sides rounded up, or have full size; its
                shape shows which.

        Raises:
            UnreadableImageError: truncated or corrupt.
        """
        ...


class RawPicture:
    """Decoded pixels: [H, W, 3] uint8 or, for grey ones, [H, W] or [H, W, 1]."""

    def __init__(self, values: np.ndarray):
        if values.dtype != np.uint8 or not (
            values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (1, 3))
        ):
            raise UserError(
                f"pixels must be uint8, [H, W] or [H, W, 1 or 3], not {values.dtype} {list(values.shape)}"
            )
        if not values.size:
            raise UserError("an image without pixels")
        self.height, self.width = values.shape[:2]
        self._values = values

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """See `Picture`; never reduced."""
        values = self._values if self._values.ndim == 3 else self._values[..., None]
        return np.array(np.broadcast_to(values, (*values.shape[:2], 3)))


class JpegPicture:
    """A JPEG of grey or of three colours, not yet decoded.

    Args:
        content: the file.
        size: as stored, (width, height) [px].
        orientation: of EXIF, 1 to 8.
    """

    def __init__(self, content: bytes, size: tuple[int, int], orientation: int):
        self._content = content
        self._stored = size
        self._turned, self._reversed = _UPRIGHT.get(orientation, (False, ()))
        self.height, self.width = size if self._turned else size[::-1]

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """See `Picture`."""
        width, height = self._stored
        try:
            # The smallest of libjpeg-turbo's scales with sides of at least these, which is 1 / reduce.
            values = simplejpeg.decode_jpeg(
                self._content,
                "RGB",
                min_height=-(-height // reduce),
                min_width=-(-width // reduce),
                min_factor=reduce,
            )
        except ValueError:
            # Strict about every irregularity; Pillow knows which of them cost pixels, and is right where it reads on.
            values = self._by_pillow()
        if self._turned:
            values = values.transpose(1, 0, 2)
        return np.ascontiguousarray(np.flip(values, self._reversed)) if self._reversed else values

    def _by_pillow(self) -> np.ndarray:
        try:
            with _strict_pillow(), Image.open(io.BytesIO(self._content), formats=FORMATS) as image:
                return np.array(image.convert("RGB"))
        except Exception as error:  # on corrupt bytes Pillow's readers raise nearly everything
            raise UnreadableImageError(_reason(error)) from error


def open_picture(content: bytes, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open an encoded image; only a JPEG is left to be decoded later. Converted as by `read_image`.

    Raises:
        UserError: more than `max_pixels` pixels; a kind of pixel whose white level is unknown.
        Exception: of Pillow, for a file that is no image or is truncated.
    """
    with _opened(io.BytesIO(content), max_pixels) as image:
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            return JpegPicture(content, image.size, image.getexif().get(ExifTags.Base.Orientation, 1))
        return RawPicture(np.asarray(_upright_rgb(image)))


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode one image file, whole and upright, to a PIL image of mode RGB.

    Transparency is composited over white. 16 bits a channel become 8 (65535 becomes 255). CMYK is converted without a
    colour profile. Of several frames the first is read. The content decides about the kind of file, not the name.

    Raises:
        UserError: more than `max_pixels` pixels, or a kind of pixel whose white level is unknown (32-bit integers;
            floats outside 0..1).
        Exception: of Pillow, for a truncated or corrupt file.
    """
    with open(path, "rb") as file, _opened(file, max_pixels) as image:
        return _upright_rgb(image)


@contextmanager
def _opened(file: IO[bytes], max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    with _strict_pillow(), Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise UserError(f"{width} x {height} pixels are more than max_pixels = {max_pixels}")
        yield image


@contextmanager
def _strict_pillow() -> Iterator[None]:
    """Set Pillow's two process-wide switches for a while, and restore them.

    Truncated files are errors. The caller limits the number of pixels, because Pillow's limit is not per call.
    """
    saved = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = None, False
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = saved


def _upright_rgb(image: ImageFile.ImageFile) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    return _to_rgb(image, image.format)


def _to_rgb(image: Image.Image, file_format: str | None) -> Image.Image:
    """Convert a decoded image of any mode to RGB; Pillow's own conversion clips what has more than 8 bits."""
    # 16-bit grey has mode I;16 (big-endian: I;16B); from PGM, and from PNG in older versions, mode I.
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise UserError("32-bit integer pixels have no known white level, convert the image to 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also false for NaN
            raise UserError("floating-point pixels outside 0..1 have no known white level, convert the image")
        return Image.fromarray(np.round(values * 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def describe_failure(path: str | Path, error: Exception) -> str:
    """Why a file could not be read, in one line "path: reason".

    The reason has no ": ", so the last one ends the path, which `UnreadableImages` counts.
    """
    return f"{os.fspath(path)}: " + " ".join(_reason(error).split()).replace(": ", ", ")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known kind, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
