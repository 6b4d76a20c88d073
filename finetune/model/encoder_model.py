"""What models on an encoder share: preparation of images, an encoder that can be held still, padding, files."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark.errors import UserError
from spark.files import whole_folder, write_tensors
from spark.model.encoder import PyramidLevel, pyramid, pyramid_info
from spark.weights.encoder import CARD, CONFIG, WEIGHTS


class EncoderModel(nn.Module):
    """An encoder that can be held still, and what a subclass puts on it.

    Args:
        encoder: The encoder, used and not copied.
    """

    always_frozen = False
    """Whether the encoder never learns."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: nn.Module = encoder
        self.encoder_frozen = False

    def freeze_encoder(self, frozen: bool = True) -> None:
        """Hold the encoder still, or let it learn again: no gradients, and batch norm uses its stored statistics.

        The parameters keep `requires_grad`, so an optimizer can be built before; it passes over those without
        gradient. An encoder that is only probed stays still.
        """
        self.encoder_frozen = frozen or self.always_frozen
        self.train(self.training)

    def probe_encoder(self) -> None:
        """Hold the encoder still for good, without parameters to learn."""
        self.always_frozen = True
        self.encoder.requires_grad_(False)
        self.freeze_encoder()

    def train(self, mode: bool = True) -> "EncoderModel":
        """Switch between training and evaluation; a frozen encoder stays in evaluation."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self

    def encoder_gradients(self) -> AbstractContextManager[Any]:
        """The context in which the encoder is to run: without gradients while it is frozen."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and not self.encoder_frozen)


class DenseModel(EncoderModel):
    """A model that says something of each pixel, from the pyramid of the encoder.

    Args:
        encoder: The encoder, used and not copied.
        image_size: (H, W) at which whole images are presented to the model [px]; None: as they are.
        mean: What is subtracted from RGB in [0, 1]; None: what the encoder was trained with. That of an encoder of one
            channel counts for red, green and blue alike, as timm spreads its first weights over the three.
        std: What RGB is then divided by; None likewise.

    Attributes:
        levels: The levels of the pyramid that are used; all of them, until a subclass chooses.
        stride: The deepest stride of the encoder [px].
    """

    def __init__(
        self,
        encoder: nn.Module,
        image_size: tuple[int, int] | None,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
    ) -> None:
        super().__init__(encoder)
        self.levels: list[PyramidLevel] = pyramid_info(encoder)
        self.stride = self.levels[-1].stride
        self.image_size = None if image_size is None else (int(image_size[0]), int(image_size[1]))
        self.mean = _three("mean", mean, encoder)
        self.std = _three("std", std, encoder)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, C_i, h / s_i, w / s_i] of images [B, 3, H, W] of any size, (h, w) as `padded_size` says.

        Sides that are no multiple of the encoder's stride are padded right and below with the edge pixels.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise UserError(f"images must be [B, 3, H, W] and not empty, got {list(images.shape)}.")
        height, width = images.shape[-2:]
        rows, columns = self.padded_size((height, width))
        missing = (0, columns - width, 0, rows - height)
        padded = F.pad(images, missing, mode="replicate") if any(missing) else images
        with self.encoder_gradients():
            return pyramid(self.encoder, padded, self.levels)

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the padded images that the encoder sees, for images of `size`."""
        height, width = size
        return height + -height % self.stride, width + -width % self.stride

    def to_frame(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        """Bring a map of the padded images, of any stride [B, C, h, w], to images of `size` (H, W) [B, C, H, W].

        Bilinearly, with align_corners=False.
        """
        padded = self.padded_size(size)
        if values.shape[-2:] != padded:
            values = F.interpolate(values, padded, mode="bilinear", align_corners=False)
        return values[..., : size[0], : size[1]]


def write_model(
    model: nn.Module, folder: str | Path, config: Mapping[str, Any], card: str | None = None
) -> Path:
    """Write `config.json` and `model.safetensors`, and `card` as README.md, whole or not at all.

    Raises:
        ValueError: The folder holds something else.
        OSError: The disk is full or not writable.
    """
    with whole_folder(folder, (CONFIG, WEIGHTS, CARD)) as temporary:
        if card is not None:
            (temporary / CARD).write_text(card, encoding="utf-8")
        write_tensors(model, temporary / WEIGHTS, {})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _three(name: str, values: Sequence[float] | None, encoder: nn.Module) -> tuple[float, ...]:
    """The given mean or std, or the encoder's own; a single one of an encoder for grey images is repeated."""
    if values is None:
        known: Any = getattr(encoder, "pretrained_cfg", None) or {}
        values = known.get(name)
        if values is not None and len(values) == 1:
            values = tuple(values) * 3
    if values is None or len(values) != 3:
        raise UserError(f"{name} must hold three numbers, one for each of red, green, blue, got {values}.")
    return tuple(float(value) for value in values)
