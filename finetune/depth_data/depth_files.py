"""Depth maps as files: NumPy arrays, portable float maps, and 16-bit PNG that say their own scale. Read and written.

A PNG has whole numbers of which one stands for `scale` metres, 0 for no reading. What is written here has the scale in
a text chunk of the file (`depth_scale`, metres of one unit), where Pillow (`Image.open(path).text`) and others find it.
"""

import io
import re
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from finetune.depth_data.sample import file_error, opened_image, read_depth_png, unreadable

DEPTH_EXTENSIONS = (".png", ".npy", ".pfm")
SCALE_KEY = "depth_scale"
"""Keyword of the PNG text chunk that holds the metres of one unit."""
MILLIMETRE = 0.001
LARGEST = np.iinfo(np.uint16).max


def read_depth_file(path: str | Path, scale: float | None = None) -> np.ndarray:
    """A depth map of any of the kinds, by its extension.

    Args:
        path: the file.
        scale: metres of one unit; None: the one stored in a PNG, which must have it, and 1 for NPY and PFM.

    Returns:
        float32 `[H, W]` [m], as stored: of NPY and PFM it may hold NaN, infinite and negative numbers.

    Raises:
        DepthFileError: missing, damaged, not one map of numbers, of another kind, or a PNG without a scale.
    """
    path = Path(path)
    extension = path.suffix.lower()
    if extension == ".png":
        unit = stored_scale(path) if scale is None else scale
        if unit is None:
            raise file_error(
                path, "does not say the metres of one unit, give the scale (0.001 is millimetres)"
            )
        return read_depth_png(path, unit)
    if extension not in DEPTH_EXTENSIONS:
        raise file_error(path, f"is no depth map, these are {', '.join(DEPTH_EXTENSIONS)}")
    values = read_npy(path) if extension == ".npy" else read_pfm(path)
    if values.ndim != 2 or values.dtype.kind not in "fui" or not values.size:
        raise file_error(path, f"depth is numbers [H, W], not {values.dtype} {list(values.shape)}")
    return values.astype(np.float32) * np.float32(1.0 if scale is None else scale)


def read_npy(path: Path) -> np.ndarray:
    """A NumPy array from its file, never unpickled."""
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise unreadable(path, "a depth map", error) from error
    if not isinstance(values, np.ndarray):
        raise file_error(path, "is an archive of arrays, save one array with numpy.save")
    return values


def read_pfm(path: Path) -> np.ndarray:
    """A grey portable float map, float32 `[H, W]`, first row on top.

    Not by opencv, which divides by the header's scale: only its sign counts here, which is the byte order, as for the
    readers of Middlebury and others.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, "a depth map", error) from error
    header = re.match(rb"(P[fF])\s+(\d+)\s+(\d+)\s+([-+.\deE]+)\s", content)
    if header is None or header[1] != b"Pf":
        raise file_error(path, "is no portable float map of one channel (its header begins with Pf)")
    width, height = int(header[2]), int(header[3])
    if len(content) - header.end() < 4 * width * height:
        raise file_error(path, f"is cut short, {height}x{width} numbers were announced, copy the file again")
    order = "<f4" if float(header[4]) < 0 else ">f4"
    values = np.frombuffer(content, order, width * height, header.end()).reshape(height, width)
    return values[::-1].astype(np.float32)


def stored_scale(path: str | Path) -> float | None:
    """The metres of one unit that are stored in a text chunk of a PNG file; None without one."""
    with opened_image(path, "a depth map") as image:
        text = image.info.get(SCALE_KEY)
    if text is None:
        return None
    try:
        scale = float(text)
    except (TypeError, ValueError):
        scale = float("nan")
    if not 0 < scale < float("inf"):
        raise file_error(path, f"says {SCALE_KEY} {text!r}, which is no number of metres above 0")
    return scale


def npy_bytes(depth: np.ndarray) -> bytes:
    """`[H, W]` as the content of a `.npy` file, float32."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(depth, np.float32), allow_pickle=False)
    return buffer.getvalue()


def pfm_bytes(depth: np.ndarray) -> bytes:
    """`[H, W]` as the content of a `.pfm` file: rows from the bottom up, little-endian."""
    height, width = depth.shape
    return f"Pf\n{width} {height}\n-1.0\n".encode() + np.ascontiguousarray(depth[::-1], "<f4").tobytes()


def png_bytes(depth: np.ndarray, scale: float = MILLIMETRE) -> tuple[bytes, int]:
    """`[H, W]` [m] as the content of a 16-bit `.png` file that holds its scale.

    Args:
        depth: metres; what is not finite or not above 0 becomes 0, which is no reading.
        scale: metres of one unit.

    Returns:
        the content, and how many pixels are too far for 16 bits and were set to 65535.
    """
    units, saturated = to_units(depth, scale)
    info = PngImagePlugin.PngInfo()
    info.add_text(SCALE_KEY, repr(float(scale)))
    info.add_text("Description", f"depth: one unit is {scale:g} m, 0 is no reading")
    buffer = io.BytesIO()
    Image.fromarray(units).save(buffer, "png", pnginfo=info)
    return buffer.getvalue(), saturated


def to_units(depth: np.ndarray, scale: float = MILLIMETRE) -> tuple[np.ndarray, int]:
    """Depth [m] as uint16 of `scale` metres, and how many pixels are too far for that and were set to 65535.

    Values that are not finite become 0, which readers of such files take for no reading.
    """
    units = np.rint(np.nan_to_num(depth.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) / scale)
    return units.clip(0, LARGEST).astype(np.uint16), int((units >= LARGEST).sum())
