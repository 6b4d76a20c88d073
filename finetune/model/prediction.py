"""Depth of photos of any size: shown to the model at the size it knows, whole or in tiles, and resized back.

A tile shows the model a region of the photo larger than the whole photo would. The model gives a region another scale
(it looks like a nearer scene), so every tile is fitted to the prediction for the whole photo by scale and
shift (of ln depth; of inverse depth for a head without metres). What still differs over an eighth of a tile and more is
taken from the whole photo, for a region shows less of the shape of a room. Tiles are averaged with weights that fall to
0 at their edges: no seams, the depth of the whole photo, and the detail of the tiles.
"""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F

from finetune.depth_data.transforms import EvalTransform
from finetune.heads.output import DepthOutput
from finetune.least_squares import scale_and_shift
from spark.errors import UserError
from spark.images.decode import MAX_PIXELS, RawPicture, describe_failure, read_image

if TYPE_CHECKING:
    from finetune.model.depth_model import DepthModel

OVERLAP = 0.25
"""Least share of a tile that its neighbour covers too."""
CELLS = 8
"""Cells along a side of a tile; over a cell and more the prediction for the whole photo counts."""
SLOPES = (0.5, 2.0)
"""Limits of the factor on the contrast of a tile's depth."""


def read_photo(photo: str | Path | Image.Image | np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A photo as upright RGB, uint8 [H, W, 3].

    Args:
        photo: A file, a PIL image of any mode, or pixels, uint8 [H, W, 3] (RGB) or [H, W] (grey).
        max_pixels: Files with more are refused.

    Raises:
        UserError: It cannot be read as an image; "PATH: REASON" of a file.
    """
    if isinstance(photo, np.ndarray):
        return RawPicture(photo).pixels()
    if isinstance(photo, Image.Image):
        return np.asarray(ImageOps.exif_transpose(photo).convert("RGB"))
    if Path(photo).is_dir():
        raise UserError(
            f"{photo}: it is a folder, and this takes one photo; spark-predict --input {photo} predicts all in it"
        )
    try:
        return np.asarray(read_image(photo, max_pixels))
    except Exception as error:  # Pillow raises a dozen kinds for a damaged file
        raise UserError(describe_failure(photo, error)) from error


def transform_of(model: "DepthModel", image_size: tuple[int, int] | None = None) -> EvalTransform:
    """The image preparation that a model asks for, at its own size unless another (H, W) is given."""
    size = image_size or model.image_size
    if size is None:
        raise UserError(
            "the model does not record an image_size: give the size [height, width] at which it sees images."
        )
    return EvalTransform(size, model.mean, model.std)


@torch.inference_mode()
def predicted_maps(model: "DepthModel", images: Tensor, wanted: Collection[bool]) -> dict[bool, np.ndarray]:
    """One forward in evaluation mode, after which the model returns to its mode.

    Args:
        model: On any device.
        images: [B, 3, H, W], normalised as the model expects.
        wanted: Which maps: inverse depth (True), metres (False).

    Returns:
        The wanted maps, float32 [B, h, w].
    """
    was_training = model.training
    model.eval()
    try:
        output: DepthOutput = model(images.to(next(model.parameters()).device))
    finally:
        model.train(was_training)
    found = {}
    for inverse in wanted:
        values = output.disparity() if inverse else output.depth
        assert values is not None
        found[inverse] = values[:, 0].float().cpu().numpy()
    return found


def predict_image(
    model: "DepthModel",
    image: np.ndarray,
    image_size: tuple[int, int] | None = None,
    flip_average: bool = False,
    tiles: int = 1,
) -> np.ndarray:
    """Predict depth [H, W] [m] float32 for an image, uint8 [H, W, 3], of any size; inverse depth without metres.

    The image is presented at the size the model was trained at. If it has other proportions they are kept and the
    long sides are matched, so a photo held upright is seen as large as one held across. The depth is resized back
    bilinearly.

    Args:
        model: On any device.
        image: RGB.
        image_size: (H, W) to present it at instead [px].
        flip_average: Average with the prediction for the mirror image.
        tiles: How many tiles along the long side; 1 is the image as a whole alone.
    """
    whole = predict_images(model, [image], image_size, flip_average)[0]
    if tiles == 1:
        return whole
    return _tiled(model, image, whole, image_size, flip_average, tiles)


def predict_images(
    model: "DepthModel",
    images: Sequence[np.ndarray],
    image_size: tuple[int, int] | None = None,
    flip_average: bool = False,
) -> list[np.ndarray]:
    """`predict_image` of several images that are presented at one size, in one forward.

    Raises:
        ValueError: They are not (see `fitted_size`).
    """
    depths = seen_depths(model, images, image_size, flip_average)
    return [
        resized(depth, (image.shape[0], image.shape[1])) for depth, image in zip(depths, images, strict=True)
    ]


def seen_depths(
    model: "DepthModel",
    images: Sequence[np.ndarray],
    image_size: tuple[int, int] | None = None,
    flip_average: bool = False,
) -> list[np.ndarray]:
    """What `predict_images` resizes: depth [h, w] float32 at the size at which the model sees the images."""
    wanted = transform_of(model, image_size).image_size
    sizes = {fitted_size((image.shape[0], image.shape[1]), wanted) for image in images}
    if len(sizes) != 1:
        raise UserError(f"images of one batch are presented at one size, these at {sorted(sizes)}")
    transform = transform_of(model, sizes.pop())
    prepared = torch.stack([transform.prepare(image) for image in images])
    inverse = "depth" not in model.outputs
    depths = predicted_maps(model, prepared, [inverse])[inverse]
    if flip_average:
        mirrored = predicted_maps(model, prepared.flip(-1), [inverse])[inverse][..., ::-1]
        depths = ((depths.astype(np.float64) + mirrored) / 2).astype(np.float32)
    return list(depths)


def fitted_size(image: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The size (H, W) to present an image of `image` (H, W) at: `wanted`, or its long side at the image's
    proportions.

    Proportions within 1 % count as equal, so that 640x480 at 192x144 is not turned into 192x143 by rounding.
    """
    stretch = (wanted[0] / image[0]) / (wanted[1] / image[1])
    if abs(stretch - 1) <= 0.01:
        return wanted
    scale = max(wanted) / max(image)
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def tile_starts(length: int, tile: int) -> list[int]:
    """Where tiles of `tile` pixels begin along a side of `length`, evenly, sharing `OVERLAP` of a tile at least."""
    if tile >= length:
        return [0]
    count = 1 + math.ceil((length - tile) / (tile * (1 - OVERLAP)))
    return [round(index * (length - tile) / (count - 1)) for index in range(count)]


def tile_side(length: int, tiles: int) -> int:
    """The side of a tile of which `tiles` cover `length` with their overlap [px]."""
    return min(length, math.ceil(length / (1 + (tiles - 1) * (1 - OVERLAP))))


def _tiled(
    model: "DepthModel",
    image: np.ndarray,
    whole: np.ndarray,
    image_size: tuple[int, int] | None,
    flip_average: bool,
    tiles: int,
) -> np.ndarray:
    """The prediction `whole` [H, W] with the detail of tiles."""
    size = image.shape[:2]
    share = tile_side(max(size), tiles) / max(size)
    height, width = (max(1, math.ceil(side * share)) for side in size)
    total, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    weight = np.outer(_window(height), _window(width))
    relative = "depth" not in model.outputs
    for top in tile_starts(size[0], height):
        for left in tile_starts(size[1], width):
            part = slice(top, top + height), slice(left, left + width)
            detail = predict_images(model, [np.ascontiguousarray(image[part])], image_size, flip_average)[0]
            total[part] += weight * _fitted(detail, whole[part], relative)
            weights[part] += weight
    return total / weights


def _window(length: int) -> np.ndarray:
    """Weights along a side of a tile: a half wave of a squared sine, above 0 everywhere; float32."""
    return np.sin(np.pi * (np.arange(length) + 0.5) / length).astype(np.float32) ** 2 + np.float32(1e-4)


def _fitted(tile: np.ndarray, whole: np.ndarray, relative: bool) -> np.ndarray:
    """A tile's prediction with scale, shift and coarse shape such that it fits that of the whole image."""
    x, y = (tile, whole) if relative else (np.log(tile), np.log(whole))
    slope, _ = scale_and_shift(x, y)
    # Of relative depth a tile's own unit is arbitrary, and so is the slope; but nearer stays nearer.
    slope = max(slope, 0.0) if relative else min(max(slope, SLOPES[0]), SLOPES[1])
    fitted = float(y.mean()) + slope * (x - x.mean())
    height, width = x.shape
    coarse = cv2.resize(y - fitted, (min(CELLS, width), min(CELLS, height)), interpolation=cv2.INTER_AREA)
    fitted = fitted + cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return fitted if relative else np.exp(fitted)


def resized(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [H, W] bilinearly."""
    tensor = torch.from_numpy(depth)[None, None]
    return F.interpolate(tensor, size=size, mode="bilinear", align_corners=False)[0, 0].numpy()
