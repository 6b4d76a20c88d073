"""Images that are no photographs: any number of channels, of 8 or 16 bits or floats, in NumPy files or multi-band TIFF.

Their values are not converted here. Later bytes stay bytes, 16 bits become value / 65535, floats keep their unit.
"""

import io

import numpy as np
import tifffile

from spark.errors import UserError
from spark.images.decode import MAX_PIXELS, Picture, RawPicture, open_picture

_NUMPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two: BigTIFF
KINDS = ("uint8", "uint16", "float32")


class Bands:
    """Decoded pixels of any number of channels, in memory or mapped from the disk.

    Args:
        values: [H, W] or [H, W, C]; uint8, uint16 or float32.
        channels: C, as the model has it.
        max_pixels: H * W at most.
    """

    def __init__(self, values: np.ndarray, channels: int, max_pixels: int = MAX_PIXELS):
        if values.ndim not in (2, 3) or not values.size:
            raise UserError(f"it holds {list(values.shape)}, and an image is [H, W] or [H, W, C]")
        values = values[..., None] if values.ndim == 2 else values
        self.height, self.width = values.shape[:2]
        if values.shape[2] != channels:
            raise UserError(
                f"it has {values.shape[2]} channels (the last of {list(values.shape)}), and model.in_chans is "
                f"{channels}"
            )
        if values.dtype.newbyteorder("=") not in KINDS:
            raise UserError(f"it holds {values.dtype}, not {', '.join(KINDS)}; convert it")
        if self.height * self.width > max_pixels:
            raise UserError(f"{self.width} x {self.height} pixels are more than max_pixels = {max_pixels}")
        self._values = values

    def pixels(self, reduce: int = 1) -> np.ndarray:
        """See `spark.images.decode.Picture`: [H, W, C] of the type that was given, never reduced."""
        return self._values


def open_image(content: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS) -> Picture:
    """Open what a source gives as an image for a model with `channels` channels.

    Models of 1 and 3 channels read photographs; uint8 arrays of 1 or 3 channels count as such.

    Raises:
        UserError: another number of channels, or a type that is not read.
        Exception: of Pillow, NumPy or tifffile, for a damaged image.
    """
    if isinstance(content, np.ndarray):
        values = content
    elif content.startswith(_NUMPY):
        values = np.load(io.BytesIO(content), allow_pickle=False)
    elif channels in (1, 3):
        return open_picture(content, max_pixels)
    elif content.startswith(_TIFF):
        values = _read_tiff(content, max_pixels)
    else:
        raise UserError(
            f"it is neither a NumPy file (.npy) nor TIFF, which images of model.in_chans {channels} are read from"
        )
    is_colour = values.dtype == np.uint8 and values.shape[2:] in ((), (1,), (3,)) and channels in (1, 3)
    return RawPicture(values) if is_colour else Bands(values, channels, max_pixels)


def _read_tiff(content: bytes, max_pixels: int) -> np.ndarray:
    """The bands of a TIFF file, interleaved, planar, or as pages: -> [H, W, C]."""
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        axes = series.axes
        others = [place for place, axis in enumerate(axes) if axis not in "YX"]
        if "Y" not in axes or "X" not in axes or len(others) > 1:
            raise UserError(
                f"its axes are {axes} {list(series.shape)}, and an image has rows, columns, bands"
            )
        height, width = series.shape[axes.index("Y")], series.shape[axes.index("X")]
        if height * width > max_pixels:
            raise UserError(f"{width} x {height} pixels are more than max_pixels = {max_pixels}")
        values = series.asarray()
    return np.moveaxis(values, others[0], -1) if others else values
