"""From an RGB-D pair to network input: the augmentation of the field, written as one resampling of one window.

Crop and zoom are a single window of the original frame, resampled once: nothing is resized twice, image and
depth agree to the sub-pixel, and without augmentation training sees exactly the pixels that evaluation sees.
Colours are resampled bilinearly over the area of a pixel, depth, disparity and classes by nearest neighbour, so a hole
or an edge is never averaged with what lies beside it; annotated points move with the picture.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from finetune.depth_data.base import DepthSet
from finetune.depth_data.entries import View, Window, resample_image, to_unit
from finetune.depth_data.sample import DepthFileError, DepthSample, file_error
from spark.errors import UserError
from spark.model.normalise import Normalise
from spark.seeds import derive_seed

NYU_FRAME = (480, 640)
NYU_BORDER = (45, 472, 43, 608)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CUT_DEPTH_SIZE = 0.75
"""Largest part of what lies right of (below) its left (upper) edge that CutDepth pastes over; p of its paper."""


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
        return network_input(to_unit(resample_image(image, window, self.image_size)), self.mean, self.std)


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
        frame = (sample.image.shape[0], sample.image.shape[1])
        # The border goes first, so that neither a rotation nor an average over pixels can bring it back.
        top, bottom, left, right = self._usable(frame)
        row, column = math.floor(top), math.floor(left)
        zoom = _between(self.zoom, draw[1])

        def recoloured(colours: np.ndarray) -> np.ndarray:
            return self._recolour(colours, draw[6:]) if draw[5] < self.colour else colours

        view = View(
            cut=(
                slice(row, min(math.ceil(bottom), frame[0])),
                slice(column, min(math.ceil(right), frame[1])),
            ),
            degrees=_between((-self.rotation, self.rotation), draw[0]) if self.rotation else None,
            window=(0.0, 0.0, 0.0, 0.0),  # which is placed around the points of the entries
            size=self.crop_size,
            flipped=draw[4] < self.flip,
            zoom=zoom,
            limits=(self.min_depth, self.max_depth),
            colours=lambda colours: network_input(recoloured(colours), self.mean, self.std),
        )
        points = np.concatenate([np.empty((0, 2)), *(entry.points for entry in sample.entries.values())])
        rows, columns = view.in_part(points).T
        height, width = self._window_size(frame, zoom)
        first = _place((top - row, bottom - row), height, rows, draw[2])
        left_most = _place((left - column, right - column), width, columns, draw[3])
        view = replace(view, window=(first, first + height, left_most, left_most + width))

        colours = recoloured(view.image(sample.image))
        out: dict[str, Tensor] = {}
        for name, entry in sample.entries.items():
            seen = entry.seen(name, view)
            assert not seen.keys() & {"image", *out}, f"two entries of {sample.name} give {sorted(seen)}"
            out |= seen
        if "depth" in out:
            colours = self._cut_depth(colours, out["depth"][0].numpy())
        return {"image": network_input(colours, self.mean, self.std), **out}

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

    The next readable pair takes the place of one that raises `DepthFileError` or has no reading at all, which "failed"
    names as "path: reason", for `spark.training.skipped.UnreadableImages` to count.

    Args:
        dataset: pairs, such as `NYUSync`: `len` and items of `DepthSample`.
        transform: what augments a pair with torch's global generator.
        seed: of the run.
    """

    def __init__(self, dataset: DepthSet, transform: TrainTransform, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset)

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
                if any(entry.blank for entry in sample.entries.values()):
                    origin = self.dataset.origin(candidate % len(self))
                    reason = f"the depth map has no reading at all, take the pair out of the data{origin}"
                    raise file_error(sample.name, reason)
                return sample, candidate % len(self), failed
            except DepthFileError as error:
                failed.append(str(error))
        raise UserError(f"none of the {len(self)} pairs can be read, the first: {failed[0]}")


def collate_depth(samples: Sequence[dict]) -> dict:
    """Samples of `DepthTrainingSet` of one data set -> a batch.

    Returns:
        what `finetune.depth_data.sample` lists: tensors stacked, filled up with zeros (false) to the longest; numbers
        as a tensor `[B]`, texts as a list, lists as one.
    """
    batch = {}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, Tensor):
            batch[key] = _stacked(values)
        elif isinstance(first, list):
            batch[key] = [item for value in values for item in value]
        else:
            batch[key] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def _stacked(values: Sequence[Tensor]) -> Tensor:
    if len({value.shape for value in values}) > 1:
        longest = max(len(value) for value in values)
        values = [torch.cat([v, v.new_zeros(longest - len(v), *v.shape[1:])]) for v in values]
    return torch.stack(list(values))


def network_input(colours: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Colours in [0, 1] `[h, w, 3]` -> normalised, float32 `[3, h, w]`."""
    return Normalise(mean, std)(torch.from_numpy(np.ascontiguousarray(colours.transpose(2, 0, 1))))


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


def _check_sizes(**sizes: tuple[int, int]) -> None:
    for name, size in sizes.items():
        if len(size) != 2 or any(int(n) != n or n < 1 for n in size):
            raise UserError(f"{name} is (height, width) in whole pixels, not {size}")


def _check_colours(mean: Sequence[float], std: Sequence[float]) -> None:
    if len(mean) != 3 or len(std) != 3 or any(s <= 0 for s in std):
        raise UserError(f"mean and std need three numbers each, std above 0, not {mean} and {std}")
