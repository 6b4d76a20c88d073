"""The official augmentation, unlabeled images as the samples of a training stream, and what could not be read.

Images are `[C, H, W]` uint8 (float32 if they have more than 8 bits, see `spark.bands`), sizes are (H, W); they become
normalised floats on the device that trains, a quarter of the bytes to hand over and nothing left for the loader to
compute.  A sample is a function of the source and of (seed,
position in the training stream): not of workers, of ranks, or of where a run was resumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset
from torchvision import transforms

from spark.bands import open_image
from spark.decoding import MAX_PIXELS, Picture, UnreadableImageError, describe_failure
from spark.folders import write_whole
from spark.seeding import derive_seed
from spark.sources import Source

# So many unreadable files one after another are no accident: better to stop than to walk on in silence.
MAX_CONSECUTIVE_FAILURES = 1000

# Weights of R, G, B in brightness (ITU-R BT.601), as Pillow's conversion to grey uses them.
LUMA = (0.299, 0.587, 0.114)

# A crop is decoded at a reduced scale where it stays so many times larger than what it is resized to: at 1 the coarse
# filter of the decoder shows (up to six levels of 255 on average in photos), at 1.5 it is three at most. Pillow's
# `thumbnail` has such a number too, its reducing_gap.
REDUCING_GAP = 1.5


# ----------------------------------------------------------------------------------------------------
# One image
# ----------------------------------------------------------------------------------------------------


@dataclass
class PretrainTransform:
    """The official augmentation: random resized crop (bicubic), horizontal flip; `Normalise` does the rest.

    Random numbers come from torch's global generator. At a square size this is the transform of SparK's
    official code (Tian et al., ICLR 2023), drawing the same numbers; it resizes with PyTorch's filter for bytes, which
    differs from Pillow's by rounding, and decodes large images at a smaller scale (`REDUCING_GAP`). For a rectangle the
    range of the crop's aspect ratio, 3/4 to 4/3, is taken relative to the rectangle's own, so that images are stretched
    no more than at a square size.

    Args:
        input_size: size of the result, (H, W) or one number for a square [px].
        in_chans: 3 for colour, 1 for grey; any number for images that are no photographs (`spark.bands`).
        crop_scale: smallest and largest share of the image's area that a crop covers.
        mean: for `Normalise`, per channel, of values in [0, 1]; None: ImageNet's, weighted by luma for one channel. For
            other numbers of channels it must be given.
        std: likewise.
        hflip: probability of a flip.

    Raises:
        ValueError: a value out of its range; not one mean or std for each channel, or none where it must be given.
    """

    input_size: int | tuple[int, int] = 224
    in_chans: int = 3
    crop_scale: tuple[float, float] = (0.67, 1.0)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    hflip: float = 0.5

    def __post_init__(self) -> None:
        size = (
            (self.input_size, self.input_size) if isinstance(self.input_size, int) else tuple(self.input_size)
        )
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"input_size is (H, W) in pixels, at least 1 each, not {self.input_size}")
        if self.in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, not {self.in_chans}")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(
                f"crop_scale is (smallest, largest) share of the area in (0, 1], not {self.crop_scale}"
            )
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip is a probability between 0 and 1, not {self.hflip}")
        self.mean = self._per_channel("mean", self.mean, IMAGENET_DEFAULT_MEAN)
        self.std = self._per_channel("std", self.std, IMAGENET_DEFAULT_STD)
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0 for every channel, not {self.std}")

        self._size = size
        aspect = size[1] / size[0]
        self._aspects = [3 / 4 * aspect, 4 / 3 * aspect]

    def _per_channel(
        self, name: str, values: Sequence[float] | None, colour: Sequence[float]
    ) -> tuple[float, ...]:
        if values is None:
            if self.in_chans not in (1, 3):
                raise ValueError(
                    f"model.in_chans is {self.in_chans}: give data.mean and data.std, {self.in_chans} numbers each, of "
                    "your images on the scale 0 to 1 (8 and 16 bits) or in their own unit (floats), for example "
                    f"--data.{name} [{','.join(['0.5'] * self.in_chans)}]; ImageNet's are for colour and grey"
                )
            if self.in_chans == 3:
                return tuple(colour)
            return (sum(weight * value for weight, value in zip(LUMA, colour, strict=True)),)
        if len(values) != self.in_chans:
            raise ValueError(
                f"{name} has {len(values)} values for {self.in_chans} channels: "
                "give one a channel, or leave it out"
            )
        return tuple(float(value) for value in values)

    def __call__(self, picture: Picture) -> Tensor:
        """Decode and augment: -> [C, H, W] uint8 or float32, in the memory of [H, W, C].

        Raises:
            UnreadableImageError: the picture cannot be decoded, or holds numbers that are not finite.
        """
        frame = torch.empty(()).expand(
            1, picture.height, picture.width
        )  # torchvision looks at its shape only
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            frame, list(self.crop_scale), self._aspects
        )
        flip = torch.rand(1).item() < self.hflip

        room = min(height / self._size[0], width / self._size[1]) / REDUCING_GAP
        reduce = next((scale for scale in (8, 4, 2) if scale <= room), 1)
        pixels = picture.pixels(reduce)
        if pixels.shape[0] == picture.height:
            crop = _tensor(pixels[top : top + height, left : left + width]).permute(2, 0, 1)
            image = functional.interpolate(crop[None], self._size, mode="bicubic", antialias=True)[0]
            if np.issubdtype(pixels.dtype, np.integer) and image.is_floating_point():
                image.clamp_(0, 1)  # as the filter for bytes does
            if image.is_floating_point() and not image.isfinite().all():
                raise UnreadableImageError("it holds numbers that are not finite")
        else:
            # The box has fractions of a pixel now, which PyTorch cannot cut.
            box = left / reduce, top / reduce, (left + width) / reduce, (top + height) / reduce
            resized = Image.fromarray(pixels).resize(
                (self._size[1], self._size[0]), Image.Resampling.BICUBIC, box
            )
            image = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        if flip:
            image = image.flip(2)
        return image if len(image) == self.in_chans else _grey(image)


def _tensor(pixels: np.ndarray) -> Tensor:
    """Pixels [H, W, C] as a tensor that can be resized: bytes stay, 16 bits become value / 65535, floats stay."""
    if pixels.dtype == np.uint8:
        return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
    scale = 65535 if np.issubdtype(pixels.dtype, np.integer) else 1
    return torch.from_numpy(np.array(pixels, dtype=np.float32) / scale)


def _grey(image: Tensor) -> Tensor:
    """Brightness of [3, H, W] uint8, rounded as Pillow does: -> [1, H, W] uint8."""
    weights = torch.tensor([round(weight * 65536) for weight in LUMA], dtype=torch.int32)
    return ((image.int() * weights[:, None, None]).sum(0, keepdim=True) + 32768 >> 16).to(torch.uint8)


class Normalise:
    """Bytes to normalised numbers, where the bytes are: (value / 255 - mean) / std; floats: (value - mean) / std.

    Args:
        mean: per channel, of values in [0, 1] or, for floats, in their own unit.
        std: likewise.
        device: of the images that are to come.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device | str = "cpu"):
        mean_, std_ = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
        self._scale = {
            kind: (1 / (white * std_)).to(device, torch.float32)
            for kind, white in ((torch.uint8, 255), (torch.float32, 1))
        }
        self._shift = (-mean_ / std_).to(device, torch.float32)

    def __call__(self, images: Tensor) -> Tensor:
        """[B, C, H, W] uint8 or float32 -> float32, in the same memory format."""
        scale = self._scale[images.dtype]
        values = images.float().mul_(scale) if images.dtype == torch.uint8 else images * scale
        return values.add_(self._shift)


# ----------------------------------------------------------------------------------------------------
# The stream of samples
# ----------------------------------------------------------------------------------------------------


class UnlabeledImages(Dataset):
    """The images of a source as the samples of a training stream, indexed by (position, index).

    `index` chooses the image; `position`, where the sample stands in the stream, seeds its augmentation. An image
    that cannot be read is replaced by the next one that can (after the last comes the first), so that a batch is
    always full and always the same; the sample tells what failed, for `UnreadableImages` to count.

    Args:
        source: of the images; kept as `source`.
        transform: picture -> [C, H, W] uint8; random numbers from torch's global generator of the CPU.
        seed: of the run.
        max_pixels: larger images count as unreadable.
        channels: of the model; photographs are read in colour for 1 and 3, see `spark.bands.open_image`.

    Raises:
        ValueError: on reading, when no image can be read, or too many in a row cannot.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Picture], Tensor],
        seed: int,
        max_pixels: int = MAX_PIXELS,
        channels: int = 3,
    ):
        if max_pixels < 1:
            raise ValueError(f"max_pixels must be at least 1, not {max_pixels}")
        self.source = source
        self.transform = transform
        self.seed = seed
        self.max_pixels = max_pixels
        self.channels = channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """One sample.

        Returns:
            `image` [C, H, W] uint8; `position` as given; `index` and `name` of the image that was read in the end;
            `failed`, a list with "name: reason" for each one tried before it.
        """
        position, index = item
        failed: list[str] = []
        for step in range(min(len(self), MAX_CONSECUTIVE_FAILURES)):
            tried = (index + step) % len(self)
            name = self.source.name(tried)
            image = read_sample(
                lambda at=tried: self.source.read(at),
                name,
                self.transform,
                derive_seed(self.seed, position),
                self.max_pixels,
                self.channels,
            )
            if isinstance(image, Tensor):
                return {
                    "image": image,
                    "position": position,
                    "index": tried,
                    "name": name,
                    "failed": failed,
                }
            failed.append(image)
        raise ValueError(
            f"{len(failed)} of {len(self)} images were tried one after another and none could be "
            f"read: check the data. First {_first(failed)}"
        )


def read_sample(
    read: Callable[[], bytes | np.ndarray],
    name: str,
    transform: Callable[[Picture], Tensor],
    seed: int,
    max_pixels: int,
    channels: int = 3,
) -> Tensor | str:
    """Read and augment one image, its random numbers from `seed`.

    Returns:
        The image as `transform` gives it, or "name: reason" if it cannot be read.
    """
    try:
        picture = open_image(read(), channels, max_pixels)
    except Exception as error:  # on corrupt bytes Pillow's readers raise nearly everything
        return describe_failure(name, error)
    # The CPU's generator alone is forked and seeded: torch.manual_seed would reset those of the GPUs too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return transform(picture)
        except UnreadableImageError as error:
            return describe_failure(name, error)


def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples of `UnlabeledImages`.

    Returns:
        `image` [B, C, H, W] uint8 (or float32), channels_last; `position` and `index`, int64 [B]; `name`, B strings;
        `failed`, one list of strings.

    Raises:
        ValueError: bytes beside larger numbers, whose scales differ.
    """
    kinds = {sample["image"].dtype: sample["name"] for sample in samples}
    if len(kinds) > 1:
        raise ValueError(
            f"images of 8 bits and of more were mixed, such as {' and '.join(sorted(kinds.values()))}: convert them to "
            "one kind, for data.mean and data.std fit one scale only"
        )
    rows = torch.stack([sample["image"].permute(1, 2, 0) for sample in samples])
    return {
        "image": rows.permute(0, 3, 1, 2),
        "position": torch.tensor([sample["position"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
        "failed": [failure for sample in samples for failure in sample["failed"]],
    }


class UnreadableImages:
    """The files that could not be read so far, counted once each against a share of the data set; shards likewise.

    A process sees only the failures of its own samples: gather them from all processes before `add`, so that
    all count the same and stop together.

    Args:
        num_files: size of the data set.
        max_share: at most this share of the files may be unreadable, 0 to 1. Above 0 it allows one file at least: in
            a data set of 50 files a share of 0.01 is one file, not none.
        num_shards: shards of the data set, of which at most this share may break off.

    Raises:
        ValueError: a share out of range.
    """

    def __init__(self, num_files: int, max_share: float, num_shards: int = 0):
        if not 0 <= max_share <= 1:
            raise ValueError(f"the share of unreadable images that is accepted lies in 0..1, not {max_share}")
        self.num_files = num_files
        self.max_share = max_share
        self.num_shards = num_shards
        self.reasons: dict[str, str] = {}
        self.shards: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of files."""
        return len(self.reasons)

    def add(self, failed: Sequence[str]) -> list[str]:
        """Count failures as `describe_failure` writes them; all are recorded before anything is raised.

        Returns:
            Those that are new, to be told to the user once.

        Raises:
            ValueError: more than `max_share` of all files, and more than one, have failed by now; with a share of 0
                any failure.
        """
        return self._count(failed, self.reasons, self.num_files, "images could not be read")

    def add_shards(self, failed: Sequence[str]) -> list[str]:
        """Count shards that broke off or could not be had, as `add` counts files."""
        return self._count(failed, self.shards, self.num_shards, "shards could not be read to their end")

    def _count(self, failed: Sequence[str], known: dict[str, str], total: int, what: str) -> list[str]:
        new = []
        for failure in failed:
            path, _, reason = failure.rpartition(": ")
            if path not in known:
                known[path] = reason
                new.append(failure)
        if new and len(known) > allowed_failures(self.max_share, total):
            raise ValueError(
                f"{len(known)} of {total} {what}, more than the accepted share of {self.max_share:g}: repair or remove "
                f"them, or raise data.max_unreadable. First {_first(_lines(known))}"
            )
        return new

    def report(self, path: str | Path) -> None:
        """Write `skipped_images.txt`: a line "path: reason" for each shard and file, sorted; nothing if none failed."""
        if self.reasons or self.shards:
            text = "".join(f"{line}\n" for line in _lines(self.shards) + _lines(self.reasons))
            write_whole(path, text.encode(errors="surrogateescape"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {"reasons": dict(self.reasons), "shards": dict(self.shards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.reasons = dict(state["reasons"])
        self.shards = dict(state.get("shards", {}))


def allowed_failures(max_share: float, total: int) -> float:
    """How many of so many files or shards may fail: their share, and one at least unless the share is 0."""
    return max(max_share * total, 1 if max_share > 0 else 0)


def _lines(reasons: dict[str, str]) -> list[str]:
    return [f"{path}: {reason}" for path, reason in sorted(reasons.items())]


def _first(items: Sequence[str], count: int = 3) -> str:
    return "; ".join(items[:count])
