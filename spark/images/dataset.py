"""Unlabeled images as the samples of a training stream; what cannot be read is replaced and reported.

Images are `[C, H, W]` uint8 (float32 if they have more than 8 bits, see `spark.images.bands`). They become normalised
floats on the device that trains: a quarter of the bytes to hand over, and nothing left for the loader to compute. A
sample is a function of the source, the seed and its position in the stream; workers, ranks and resuming change nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from spark.errors import UserError
from spark.images.bands import open_image
from spark.images.batches import StepPlan
from spark.images.decode import MAX_PIXELS, Picture, UnreadableImageError, describe_failure
from spark.images.sources import Source
from spark.seeds import derive_seed

# This many unreadable files in a row are no accident: stop instead of searching on in silence.
MAX_CONSECUTIVE_FAILURES = 1000

Candidate = tuple[int, str, Callable[[], bytes | np.ndarray]]
"""An image that may be read: its index in the source (-1 in a stream), its name, and a function that reads it."""


@dataclass
class SampleReader:
    """Reads and augments the images of a run.

    Attributes:
        transform: picture -> [C, H, W] uint8 or float32; random numbers from torch's global generator of the CPU.
        seed: of the run; with the position it seeds the augmentation.
        max_pixels: larger images count as unreadable.
        channels: of the model; photographs are read for 1 and 3, see `spark.images.bands.open_image`.
        plan: gives each position the image size of its step (`transform` must have a field `input_size`); None keeps
            the size of `transform`.
    """

    transform: Callable[[Picture], Tensor]
    seed: int
    max_pixels: int = MAX_PIXELS
    channels: int = 3
    plan: StepPlan | None = None

    def __post_init__(self) -> None:
        sizes = () if self.plan is None else self.plan.sizes
        self._sized = {size: replace(cast(Any, self.transform), input_size=size) for size in sizes}

    def read(self, candidate: Candidate, position: int) -> dict[str, Any] | str:
        """Read and augment one image for a position.

        Returns:
            `image` [C, H, W], `position`, `index`, `name`; or "name: reason" if it cannot be read.
        """
        index, name, content = candidate
        try:
            picture = open_image(content(), self.channels, self.max_pixels)
        except Exception as error:  # on corrupt bytes Pillow's readers raise nearly everything
            return describe_failure(name, error)
        transform = self.transform
        if self.plan is not None:
            transform = self._sized[self.plan.size(self.plan.step_of(position))]
        # The CPU's generator alone is forked and seeded: torch.manual_seed would reset those of the GPUs too.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, position))
            try:
                image = transform(picture)
            except UnreadableImageError as error:
                return describe_failure(name, error)
        return {"image": image, "position": position, "index": index, "name": name}

    def first_readable(self, candidates: Iterable[Candidate], position: int) -> dict[str, Any]:
        """The sample at a position, of the first candidate that can be read, as `read` returns it.

        Its `failed` has "name: reason" of each candidate tried before. UserError if `MAX_CONSECUTIVE_FAILURES` fail.
        """
        failed: list[str] = []
        for candidate in islice(candidates, MAX_CONSECUTIVE_FAILURES):
            sample = self.read(candidate, position)
            if isinstance(sample, dict):
                return {**sample, "failed": failed}
            failed.append(sample)
        raise UserError(
            f"{len(failed)} images were tried one after another and none could be read: check the data. "
            f"First {'; '.join(failed[:3])}"
        )


class UnlabeledImages(Dataset):
    """The images of a source as samples, indexed by (position in the stream, index in the source).

    An image that cannot be read is replaced by the next one that can (after the last comes the first), so that a batch
    is always full and always the same.
    """

    def __init__(self, source: Source, reader: SampleReader):
        self.source = source
        self.reader = reader

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """One sample, see `SampleReader.first_readable`."""
        position, index = item
        source, count = self.source, len(self)
        tried = ((index + step) % count for step in range(count))
        return self.reader.first_readable(
            ((i, source.name(i), partial(source.read, i)) for i in tried), position
        )
