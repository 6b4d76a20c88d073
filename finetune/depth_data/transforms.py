"""From an RGB-D pair to network input: the augmentation of the field, written as one resampling of one window.

Crop and zoom are a single window of the original frame, resampled once: nothing is resized twice, image and
depth agree to the sub-pixel, and without augmentation training sees exactly the pixels that evaluation sees.
Colours are resampled bilinearly over the area of a pixel, depth, disparity and classes by nearest neighbour, so a hole
or an edge is never averaged with what lies beside it; annotated points move with the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from finetune.depth_data.base import DepthSet
from finetune.depth_data.sample import VOID, DepthFileError, DepthSample, file_error
from spark.errors import UserError
from spark.seeds import derive_seed

NYU_FRAME = (480, 640)
NYU_BORDER = (45, 472, 43, 608)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CUT_DEPTH_SIZE = 0.75
"""Largest part of what lies right of (below) its left (upper) edge that CutDepth pastes over; p of its paper."""

PAIR_KEYS = ("pairs", "relation", "pairs_valid")
TENSOR_KEYS = ("image", "depth", "valid", "affine", "affine_valid", *PAIR_KEYS, "labels")

Window = tuple[float, float, float, float]  # top, bottom, left, right [px]; fractions are fine


@dataclass(frozen=True)
class EvalTransform:
    """The whole frame at the size that the network works at; ground truth stays as it is.

    Args:
        image_size: (H, W) of the network input [px].
        mean: what the encoder subtracts from RGB in [0, 1].
        std: what it divides by.
    """

    image_size: tuple[int, int] = (144, 192)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        _check_sizes(image_size=self.image_size)
        _check_colours(self.mean, self.std)

    def __call__(self, sample: DepthSample) -> dict[str, Tensor]:
        """`{"image": float32 [3, h, w]}` of a pair."""
        return {"image": self.prepare(sample.image)}

    def prepare(self, image: np.ndarray) -> Tensor:
        """Network input float32 `[3, h, w]` of a uint8 image `[H, W, 3]` that has no depth map."""
        height, width = image.shape[:2]
        window = (0.0, float(height), 0.0, float(width))
        return normalise(to_unit(resample_image(image, window, self.image_size)), self.mean, self.std)


@dataclass(frozen=True)
class TrainTransform:
    """Random window, flip, rotation and colours of an RGB-D pair.

    The whole frame is understood at `image_size`; the random crop of `crop_size` is taken from it (after the
    zoom), so training and evaluation see equally many pixels per metre. Colour ranges are those of BTS
    (bts_dataloader.py, `augment_image`), the zoom is that of Eigen et al. 2014 (section 3.3): magnifying by s
    brings the scene closer by s.

    Args:
        image_size: (H, W) that the whole frame is presented at [px].
        crop_size: (H, W) of the random crop, what the network gets [px].
        border: (top, bottom, left, right) of the part of a 480x640 frame that is used; BTS's cut of the white
            border of the labelled NYU images. Scaled with frames of another size. None uses the whole frame.
        zoom: range of the random magnification s; depth is divided by s. (1, 1) switches it off.
        flip: probability of a horizontal flip.
        rotation: largest random rotation, either way [degrees]; 0 switches it off, BTS takes 2.5. It turns
            about the middle of the used part; what comes from outside is black and has no valid depth.
        colour: probability that the colours change at all.
        gamma: range of the exponent of RGB in [0, 1].
        brightness: range of the factor common to the three channels.
        channel: range of the factor of each channel.
        contrast: range of the factor on the difference from the mean colour; (1, 1) is off, as in BTS.
        cut_depth: probability that a rectangle of the image shows its depth instead of its colours, as a share of
            max_depth, black where there is no reading (CutDepth, arXiv 2107.07684).
        min_depth: a reading must be more than this to count [m].
        max_depth: a reading must be less than this to count, after the zoom [m].
        mean: what the encoder subtracts from RGB in [0, 1].
        std: what it divides by.
    """

    image_size: tuple[int, int] = (144, 192)
    crop_size: tuple[int, int] = (128, 160)
    border: tuple[int, int, int, int] | None = NYU_BORDER
    zoom: tuple[float, float] = (1.0, 1.5)
    flip: float = 0.5
    rotation: float = 0.0
    colour: float = 0.5
    gamma: tuple[float, float] = (0.9, 1.1)
    brightness: tuple[float, float] = (0.75, 1.25)
    channel: tuple[float, float] = (0.9, 1.1)
    contrast: tuple[float, float] = (1.0, 1.0)
    cut_depth: float = 0.0
    min_depth: float = 1e-3
    max_depth: float = 10.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self):
        _check_sizes(image_size=self.image_size, crop_size=self.crop_size)
        _check_colours(self.mean, self.std)
        for name in ("zoom", "gamma", "brightness", "channel", "contrast"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise UserError(f"{name} must be a range 0 < low <= high, not ({low}, {high})")
        for name in ("flip", "colour", "cut_depth"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is a probability between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.rotation < 90:
            raise UserError(f"rotation must be at least 0 and below 90 degrees, not {self.rotation}")
        if not 0 <= self.min_depth < self.max_depth:
            raise UserError(
                f"depths must satisfy 0 <= min_depth < max_depth, not {self.min_depth}, {self.max_depth}"
            )
        if self.border is not None:
            top, bottom, left, right = self.border
            if not (0 <= top < bottom <= NYU_FRAME[0] and 0 <= left < right <= NYU_FRAME[1]):
                raise UserError(
                    f"border is (top, bottom, left, right) inside a 480x640 frame, not {self.border}"
                )
        window, usable = self._window_size(NYU_FRAME, self.zoom[0]), self._usable(NYU_FRAME)
        available = (usable[1] - usable[0], usable[3] - usable[2])
        if any(need > have + 1e-6 for need, have in zip(window, available, strict=True)):
            largest = [
                int(have / full * size * self.zoom[0] + 1e-6)
                for have, full, size in zip(available, NYU_FRAME, self.image_size, strict=True)
            ]
            raise UserError(
                f"a crop of {self.crop_size} does not fit: of {self.image_size}, zoom {self.zoom[0]}"
                f" and the border cut leave {tuple(largest)}: use a smaller crop_size or a larger image_size"
            )

    def __call__(self, sample: DepthSample) -> dict[str, Tensor]:
        """Draw an augmentation from torch's global generator and apply it.

        A crop is drawn among those that hold all annotated points, where they fit into one.

        Returns:
            the keys "image", "depth" and so on of one sample, as `finetune.depth_data.sample` lists them for a batch,
            with (h, w) = crop_size.
        """
        # All numbers are drawn whatever is switched on: switching one thing off leaves the others as they were.
        draw = torch.rand(12, dtype=torch.float64).tolist()
        # The border goes first, so that neither a rotation nor an average over pixels can bring it back.
        top, bottom, left, right = self._usable(sample.image.shape[:2])
        first_row, first_column = math.floor(top), math.floor(left)
        cut = (slice(first_row, math.ceil(bottom)), slice(first_column, math.ceil(right)))
        image = sample.image[cut]
        depth, affine, labels = (
            None if values is None else values[cut] for values in (sample.depth, sample.affine, sample.labels)
        )
        points = np.empty((0, 2)) if sample.pairs is None else sample.pairs.reshape(-1, 2)
        points = points + 0.5 - (first_row, first_column)  # (row, column) from the corner of the first pixel
        if self.rotation:
            degrees = _between((-self.rotation, self.rotation), draw[0])
            image, depth, affine, labels = (
                None if values is None else rotate_map(values, degrees, fill)
                for values, fill in ((image, 0), (depth, 0.0), (affine, math.nan), (labels, VOID))
            )
            assert image is not None
            points = rotate_points(points, image.shape[:2], degrees)

        zoom = _between(self.zoom, draw[1])
        height, width = self._window_size(sample.image.shape[:2], zoom)
        rows, columns = points.T
        row = _place((top - first_row, bottom - first_row), height, rows, draw[2])
        column = _place((left - first_column, right - first_column), width, columns, draw[3])
        window = (row, row + height, column, column + width)
        colours = to_unit(resample_image(image, window, self.crop_size))
        flipped = draw[4] < self.flip
        side = slice(None, None, -1 if flipped else 1)
        colours = colours[:, side]
        if draw[5] < self.colour:
            colours = self._recolour(colours, draw[6:])

        out = {}
        if depth is not None:
            metres = resample_map(depth, window, self.crop_size)[:, side] / np.float32(zoom)
            colours = self._cut_depth(colours, metres)
            target = torch.from_numpy(np.ascontiguousarray(metres))[None]
            out |= {"depth": target, "valid": (target > self.min_depth) & (target < self.max_depth)}
        if affine is not None:
            disparity = np.ascontiguousarray(resample_map(affine, window, self.crop_size)[:, side])
            known = torch.from_numpy(np.isfinite(disparity))[None]
            out |= {"affine": torch.from_numpy(disparity)[None].nan_to_num(0.0), "affine_valid": known}
        if sample.pairs is not None and sample.relation is not None:
            pairs, inside = points_in_crop(points, window, self.crop_size, flipped)
            out |= {"pairs": pairs, "relation": torch.from_numpy(sample.relation), "pairs_valid": inside}
        if labels is not None:
            classes = resample_map(labels, window, self.crop_size)[:, side]
            out["labels"] = torch.from_numpy(classes.astype(np.int64))
        return {"image": normalise(colours, self.mean, self.std), **out}

    def _cut_depth(self, colours: np.ndarray, metres: np.ndarray) -> np.ndarray:
        """CutDepth of an image in [0, 1] `[h, w, 3]` with its depth `[h, w]` [m]; draws five numbers."""
        chance, *place, high, wide = torch.rand(5, dtype=torch.float64).tolist()
        if chance >= self.cut_depth:
            return colours
        (top, bottom), (left, right) = (
            (
                int(start * full),
                int(start * full) + int(max((full - start * full) * part * CUT_DEPTH_SIZE, 1)),
            )
            for start, part, full in zip(place, (high, wide), metres.shape, strict=True)
        )
        pasted = colours.copy()
        shown = metres[top:bottom, left:right, None] / np.float32(self.max_depth)
        pasted[top:bottom, left:right] = shown.clip(0.0, 1.0)
        return pasted

    def _recolour(self, colours: np.ndarray, draw: Sequence[float]) -> np.ndarray:
        """BTS's colour change of an image in [0, 1] `[h, w, 3]`; six draws in [0, 1)."""
        factors = [_between(self.channel, number) for number in draw[2:5]]
        changed = colours ** _between(self.gamma, draw[0]) * _between(self.brightness, draw[1])
        changed = changed * np.asarray(factors, np.float32)
        mean = changed.mean(axis=(0, 1))
        changed = mean + (changed - mean) * _between(self.contrast, draw[5])
        return changed.clip(0.0, 1.0).astype(np.float32)

    def _window_size(self, frame: Sequence[int], zoom: float) -> tuple[float, float]:
        """(H, W) that the crop covers in a frame of (H, W) `frame` [px of the frame]."""
        height, width = (
            crop * full / (size * zoom)
            for crop, full, size in zip(self.crop_size, frame, self.image_size, strict=True)
        )
        return height, width

    def _usable(self, frame: Sequence[int]) -> Window:
        """The part of a frame that crops are taken from."""
        if self.border is None:
            return 0.0, float(frame[0]), 0.0, float(frame[1])
        vertical, horizontal = frame[0] / NYU_FRAME[0], frame[1] / NYU_FRAME[1]
        top, bottom, left, right = self.border
        return top * vertical, bottom * vertical, left * horizontal, right * horizontal


class DepthTrainingSet(Dataset[dict]):
    """Pairs, augmented by their position in the stream: the result depends neither on workers nor on ranks.

    Args:
        dataset: pairs, such as `NYUSync`: `len` and items of `DepthSample`.
        transform: what augments a pair with torch's global generator.
        seed: of the run.
        skip_unreadable: let the next readable pair take the place of one that raises `DepthFileError` or has no
            reading at all, and report it under "failed" as "path: reason", for
            `spark.training.skipped.UnreadableImages` to count. Otherwise the error is raised.
    """

    def __init__(
        self,
        dataset: Dataset[DepthSample],
        transform: TrainTransform,
        seed: int,
        *,
        skip_unreadable: bool = False,
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.skip_unreadable = skip_unreadable

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, where: tuple[int, int]) -> dict:
        """The sample of `(position in the stream, index in the data set)`.

        Returns:
            what the transform returns, with "name", "position", "index" (of the pair that was read), "failed".
        """
        position, index = where
        sample, index, failed = self._read(index)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, position))
            out = self.transform(sample)
        return {**out, "name": sample.name, "position": position, "index": index, "failed": failed}

    def _read(self, index: int) -> tuple[DepthSample, int, list[str]]:
        failed = []
        for candidate in range(index, index + len(self)):
            try:
                sample = self.dataset[candidate % len(self)]
                if not has_reading(sample):
                    data, origin = self.dataset, ""
                    if isinstance(data, DepthSet):
                        origin = data.origin(candidate % len(self))
                    reason = f"the depth map has no reading at all, take the pair out of the data{origin}"
                    raise file_error(sample.name, reason)
                return sample, candidate % len(self), failed
            except DepthFileError as error:
                if not self.skip_unreadable:
                    raise
                failed.append(str(error))
        raise UserError(f"none of the {len(self)} pairs can be read, the first: {failed[0]}")


def has_reading(sample: DepthSample) -> bool:
    """Whether something is known of some pixel's depth; of pairs of points there is always one."""
    if sample.depth is not None:
        return bool((sample.depth > 0).any())
    return sample.affine is None or bool(np.isfinite(sample.affine).any())


def collate_depth(samples: Sequence[dict]) -> dict:
    """Samples of `DepthTrainingSet` of one data set -> a batch.

    Returns:
        what `finetune.depth_data.sample` lists, stacked, with position and index int64 `[B]`, name (list), failed
        (list).
    """
    if "pairs" in samples[0]:
        longest = max(len(sample["pairs"]) for sample in samples)
        samples = [sample | {key: _padded(sample[key], longest) for key in PAIR_KEYS} for sample in samples]
    batch: dict = {
        key: torch.stack([sample[key] for sample in samples]) for key in TENSOR_KEYS if key in samples[0]
    }
    batch |= {key: torch.tensor([sample[key] for sample in samples]) for key in ("position", "index")}
    batch |= {key: samples[0][key] for key in ("set", "supervision") if key in samples[0]}
    batch["name"] = [sample["name"] for sample in samples]
    batch["failed"] = [reason for sample in samples for reason in sample["failed"]]
    return batch


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


def points_in_crop(
    points: np.ndarray, window: Window, size: tuple[int, int], flipped: bool
) -> tuple[Tensor, Tensor]:
    """Pixels of a crop in which pairs of points lie.

    Args:
        points: (row, column) `[2 N, 2]` in the frame of the window, A and B in turn.
        window: of the crop.
        size: (h, w) of the crop [px].
        flipped: whether the crop is mirrored.

    Returns:
        int64 `[N, 4]` (yA, xA, yB, xB), 0 where not both points are inside, and bool `[N]` where they are.
    """
    top, bottom, left, right = window
    scale = np.array([size[0] / (bottom - top), size[1] / (right - left)])
    pixels = np.floor((points - (top, left)) * scale).astype(np.int64)
    if flipped:
        pixels[:, 1] = size[1] - 1 - pixels[:, 1]
    pairs = pixels.reshape(-1, 4)
    inside = np.all((pairs >= 0) & (pairs < np.tile(size, 2)), axis=1)
    return torch.from_numpy(pairs * inside[:, None]), torch.from_numpy(inside)


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255.0)


def normalise(colours: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours in [0, 1] `[h, w, 3]` -> network input float32 `[3, h, w]`."""
    out = (colours - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1)))


def _between(limits: tuple[float, float], number: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * number


def _place(limits: tuple[float, float], length: float, points: np.ndarray, draw: float) -> float:
    """Where a window of `length` begins: drawn inside `limits`, around all `points` if they fit into it."""
    first, last = limits[0], max(limits[0], limits[1] - length)
    if len(points):
        nearest, farthest = max(first, float(points.max()) - length + 1e-6), min(last, float(points.min()))
        if nearest <= farthest:
            first, last = nearest, farthest
    return first + draw * (last - first)


def _padded(values: Tensor, length: int) -> Tensor:
    """Zeros (false) below the rows of a tensor `[n, ...]`, up to `length` rows."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])


def _check_sizes(**sizes: tuple[int, int]) -> None:
    for name, size in sizes.items():
        if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
            raise UserError(f"{name} is (height, width) in whole pixels, not {size}")


def _check_colours(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or any(s <= 0 for s in std):
        raise UserError(f"mean and std need three numbers each, std above 0, not {mean} and {std}")
