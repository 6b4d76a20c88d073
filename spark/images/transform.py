"""The augmentation of pretraining images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn import functional
from torchvision import transforms

from spark.errors import UserError
from spark.images.decode import Picture, UnreadableImageError
from spark.weights.channels import LUMA, adapt_statistics

# A crop is decoded at a reduced scale where it stays larger than its final size by this factor. At 1 the coarse filter
# of the decoder shows (up to six levels of 255 on average in photos), at 1.5 it is three at most. Pillow's `thumbnail`
# has a similar `reducing_gap`.
REDUCING_GAP = 1.5


@dataclass
class PretrainTransform:
    """The official augmentation: random resized crop (bicubic), horizontal flip; `spark.model.normalise` does the rest.

    Random numbers come from torch's global generator. At a square size this is the transform of SparK's official code
    (Tian et al., ICLR 2023), drawing the same numbers; PyTorch's filter for bytes differs from Pillow's by rounding,
    and large images are decoded at a smaller scale (`REDUCING_GAP`). For a rectangle the crop's aspect ratio, 3/4 to
    4/3, is relative to the rectangle's own.

    Args:
        input_size: size of the result, (H, W) or one number for a square [px].
        in_chans: 3 for colour, 1 for grey; any number for images that are no photographs (`spark.images.bands`).
        crop_scale: smallest and largest share of the image's area that a crop covers.
        mean: per channel, of values in [0, 1]; None: ImageNet's, weighted by luma for one channel. For other numbers of
            channels it must be given.
        std: likewise.
        hflip: probability of a flip.
    """

    input_size: int | tuple[int, int] = 224
    in_chans: int = 3
    crop_scale: tuple[float, float] = (0.67, 1.0)
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    hflip: float = 0.5

    def __post_init__(self) -> None:
        self.mean = self._per_channel("mean", self.mean, IMAGENET_DEFAULT_MEAN)
        self.std = self._per_channel("std", self.std, IMAGENET_DEFAULT_STD)
        if min(self.std) <= 0:
            raise UserError(f"std must be above 0 for every channel, not {self.std}")

        size = self.input_size
        self._size = (size, size) if isinstance(size, int) else size
        aspect = self._size[1] / self._size[0]
        self._aspects = [3 / 4 * aspect, 4 / 3 * aspect]

    def _per_channel(
        self, name: str, values: Sequence[float] | None, colour: Sequence[float]
    ) -> tuple[float, ...]:
        if values is None:
            if self.in_chans not in (1, 3):
                raise UserError(
                    f"model.in_chans is {self.in_chans}: give data.mean and data.std, {self.in_chans} numbers each, of "
                    "your images on the scale 0 to 1 (8 and 16 bits) or in their own unit (floats), for example "
                    f"--data.{name} [{','.join(['0.5'] * self.in_chans)}]; ImageNet's are for colour and grey"
                )
            if self.in_chans == 3:
                return tuple(colour)
            return adapt_statistics(colour, 1)
        if len(values) != self.in_chans:
            raise UserError(
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
