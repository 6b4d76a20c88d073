"""From an RGB-D pair to network input: the augmentation of the field, written as one resampling of one window.

Crop and zoom are a single window of the original frame, resampled once: nothing is resized twice, image and
depth agree to the sub-pixel, and without augmentation training sees exactly the pixels that evaluation sees.
Colours are resampled bilinearly over the area of a pixel, depth by nearest neighbour, so a hole or an edge is
never averaged with what lies beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from finetune.depth_data.sample import DepthFileError, DepthSample
from spark.seeding import derive_seed

NYU_FRAME = (480, 640)
NYU_BORDER = (45, 472, 43, 608)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
                raise ValueError(f"{name} must be a range 0 < low <= high, not ({low}, {high})")
        for name in ("flip", "colour"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability between 0 and 1, not {getattr(self, name)}")
        if not 0 <= self.rotation < 90:
            raise ValueError(f"rotation must be at least 0 and below 90 degrees, not {self.rotation}")
        if not 0 <= self.min_depth < self.max_depth:
            raise ValueError(
                f"depths must satisfy 0 <= min_depth < max_depth, not {self.min_depth}, {self.max_depth}"
            )
        if self.border is not None:
            top, bottom, left, right = self.border
            if not (0 <= top < bottom <= NYU_FRAME[0] and 0 <= left < right <= NYU_FRAME[1]):
                raise ValueError(
                    f"border is (top, bottom, left, right) inside a 480x640 frame, not {self.border}"
                )
        window, usable = self._window_size(NYU_FRAME, self.zoom[0]), self._usable(NYU_FRAME)
        available = (usable[1] - usable[0], usable[3] - usable[2])
        if any(need > have + 1e-6 for need, have in zip(window, available, strict=True)):
            largest = [
                int(have / full * size * self.zoom[0] + 1e-6)
                for have, full, size in zip(available, NYU_FRAME, self.image_size, strict=True)
            ]
            raise ValueError(
                f"a crop of {self.crop_size} does not fit: of {self.image_size}, zoom {self.zoom[0]}"
                f" and the border cut leave {tuple(largest)}: use a smaller crop_size or a larger image_size"
            )

    def __call__(self, sample: DepthSample) -> dict[str, Tensor]:
        """Draw an augmentation from torch's global generator and apply it.

        Returns:
            `{"image": float32 [3, h, w], "depth": float32 [1, h, w] in metres, "valid": bool [1, h, w]}` with
            (h, w) = crop_size; depth is 0 where there is no reading, valid is min_depth < depth < max_depth.
        """
        # All numbers are drawn whatever is switched on: switching one thing off leaves the others as they were.
        draw = torch.rand(12, dtype=torch.float64).tolist()
        # The border goes first, so that neither a rotation nor an average over pixels can bring it back.
        top, bottom, left, right = self._usable(sample.image.shape[:2])
        first_row, first_column = math.floor(top), math.floor(left)
        cut = (slice(first_row, math.ceil(bottom)), slice(first_column, math.ceil(right)))
        image, depth = sample.image[cut], sample.metres[cut]
        if self.rotation:
            image, depth = rotate_pair(image, depth, _between((-self.rotation, self.rotation), draw[0]))

        zoom = _between(self.zoom, draw[1])
        height, width = self._window_size(sample.image.shape[:2], zoom)
        row = top - first_row + draw[2] * max(0.0, bottom - top - height)
        column = left - first_column + draw[3] * max(0.0, right - left - width)
        window = (row, row + height, column, column + width)
        colours = to_unit(resample_image(image, window, self.crop_size))
        metres = resample_depth(depth, window, self.crop_size) / np.float32(zoom)

        if draw[4] < self.flip:
            colours, metres = colours[:, ::-1], metres[:, ::-1]
        if draw[5] < self.colour:
            colours = self._recolour(colours, draw[6:])
        target = torch.from_numpy(np.ascontiguousarray(metres))[None]
        valid = (target > self.min_depth) & (target < self.max_depth)
        return {"image": normalise(colours, self.mean, self.std), "depth": target, "valid": valid}

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
        skip_unreadable: let the next readable pair take the place of one that raises `DepthFileError`, and
            report it under "failed" as "path: reason", for `spark.images.UnreadableImages` to count.
            Otherwise the error is raised.
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
                return self.dataset[candidate % len(self)], candidate % len(self), failed
            except DepthFileError as error:
                if not self.skip_unreadable:
                    raise
                failed.append(str(error))
        raise ValueError(f"none of the {len(self)} pairs can be read, the first: {failed[0]}")


def collate_depth(samples: Sequence[dict]) -> dict:
    """Samples of `DepthTrainingSet` -> a batch.

    Returns:
        image `[B, 3, h, w]`, depth and valid `[B, 1, h, w]`, position and index int64 `[B]`, name (list),
        failed (list).
    """
    batch: dict = {
        key: torch.stack([sample[key] for sample in samples]) for key in ("image", "depth", "valid")
    }
    batch |= {key: torch.tensor([sample[key] for sample in samples]) for key in ("position", "index")}
    batch["name"] = [sample["name"] for sample in samples]
    batch["failed"] = [reason for sample in samples for reason in sample["failed"]]
    return batch


def resample_image(image: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """A window of a uint8 image `[H, W, 3]` at `size` (h, w): bilinear, area-averaging if smaller."""
    top, bottom, left, right = window
    box = (max(left, 0.0), max(top, 0.0), min(right, image.shape[1]), min(bottom, image.shape[0]))
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
    return np.asarray(resized)


def resample_depth(depth: np.ndarray, window: Window, size: tuple[int, int]) -> np.ndarray:
    """A window of a depth map `[H, W]` at `size` (h, w): the reading nearest to each new pixel's centre."""
    top, bottom, left, right = window
    rows = top + (np.arange(size[0]) + 0.5) * (bottom - top) / size[0]
    columns = left + (np.arange(size[1]) + 0.5) * (right - left) / size[1]
    inside_rows = np.clip(np.floor(rows).astype(np.int64), 0, depth.shape[0] - 1)
    inside_columns = np.clip(np.floor(columns).astype(np.int64), 0, depth.shape[1] - 1)
    return depth[inside_rows[:, None], inside_columns]


def rotate_pair(image: np.ndarray, depth: np.ndarray, degrees: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate an image (bilinear) and its depth (nearest) about the middle; black and 0 outside."""
    turned = Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)
    turned_depth = Image.fromarray(depth).rotate(degrees, Image.Resampling.NEAREST)
    return np.asarray(turned), np.asarray(turned_depth)


def to_unit(image: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [0, 1]."""
    return image.astype(np.float32) / np.float32(255.0)


def normalise(colours: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours in [0, 1] `[h, w, 3]` -> network input float32 `[3, h, w]`."""
    out = (colours - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(out.transpose(2, 0, 1)))


def _between(limits: tuple[float, float], number: float) -> float:
    return limits[0] + (limits[1] - limits[0]) * number


def _check_sizes(**sizes: tuple[int, int]) -> None:
    for name, size in sizes.items():
        if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
            raise ValueError(f"{name} is (height, width) in whole pixels, not {size}")


def _check_colours(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or any(s <= 0 for s in std):
        raise ValueError(f"mean and std need three numbers each, std above 0, not {mean} and {std}")
