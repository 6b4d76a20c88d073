"""The official augmentation, unlabeled images as the samples of a training stream, and what could not be read.

Images are `[C, H, W]` uint8 (float32 if they have more than 8 bits, see `spark.images.bands`), sizes are (H, W); they
become
normalised floats on the device that trains, a quarter of the bytes to hand over and nothing left for the loader to
compute.  A sample is a function of the source and of (seed,
position in the training stream): not of workers, of ranks, or of where a run was resumed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spark.errors import UserError
from spark.images.bands import open_image
from spark.images.decode import MAX_PIXELS, Picture, UnreadableImageError, describe_failure
from spark.images.sources import Source
from spark.seeds import derive_seed
from spark.training.skipped import _first

# So many unreadable files one after another are no accident: better to stop than to walk on in silence.
MAX_CONSECUTIVE_FAILURES = 1000


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
        channels: of the model; photographs are read in colour for 1 and 3, see `spark.images.bands.open_image`.

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
            raise UserError(f"max_pixels must be at least 1, not {max_pixels}")
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
        raise UserError(
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
        raise UserError(
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
