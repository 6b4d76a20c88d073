"""A model that gives each pixel a class: a convnet, and a decoder of segmentation_models_pytorch on its pyramid."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from segmentation_models_pytorch.base.initialization import initialize_decoder
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.depth_data.transforms import EvalTransform
from finetune.heads.unetpp import DECODER_CHANNELS, SkipDecoder
from finetune.model.depth_model import ENCODER_NAME
from finetune.model.encoder_model import DenseModel, write_model
from finetune.model.prediction import fitted_size, read_photo
from spark.errors import UserError
from spark.model.encoder import PyramidLevel, build_encoder, drop_unneeded
from spark.weights.encoder import CONFIG, WEIGHTS, description, name_of

DecoderName: TypeAlias = Literal["unetpp", "unet", "fpn"]


class SegmentationModel(DenseModel):
    """Encoder, decoder, and a 3x3 convolution to classes.

    Args:
        encoder: A convnet with a feature pyramid; it is used, not copied, and loses parts
            that no map of the decoder depends on.
        classes: Names of the classes.
        decoder: `unetpp` or `unet`, on any pyramid, or `fpn`, on maps at four strides.
        decoder_channels: Widths of unetpp and unet, see `SkipDecoder`; None: 256 down to 16. Of no use to fpn.
        frozen: The encoder never learns.
        image_size: (H, W) at which whole images are presented [px].
        mean: See `DenseModel`.
        std: Likewise.

    Raises:
        UserError: The pyramid does not suit the decoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: Sequence[str],
        decoder: DecoderName = "unetpp",
        decoder_channels: Sequence[int] | None = None,
        frozen: bool = False,
        image_size: tuple[int, int] = (480, 640),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(encoder, image_size, mean, std)
        self.classes, self.decoder_name, self.decoder_channels = list(classes), decoder, decoder_channels
        if decoder == "fpn":
            if decoder_channels is not None:
                raise UserError(
                    "decoder_channels are widths of unetpp and unet: leave them out with decoder fpn"
                )
            self.head: nn.Module = PyramidDecoder(self.levels)
            width = self.head.width
        else:
            widths = decoder_channels or DECODER_CHANNELS
            self.head = SkipDecoder(self.levels, widths, decoder)
            self.head.initialise()
            width = widths[-1]
        self.classify = nn.Conv2d(width, len(self.classes), kernel_size=3, padding=1)
        self.levels = self.head.levels
        drop_unneeded(encoder, self.levels, in_chans=3)
        if frozen:
            self.probe_encoder()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes, H, W] of images [B, 3, H, W] of any size, normalised with `mean` and `std`."""
        features = self.features(images)
        logits = self.classify(self.head.decode(features))  # pyright: ignore[reportCallIssue]
        return self.to_frame(logits, (images.shape[-2], images.shape[-1]))

    @torch.inference_mode()
    def predict(self, photo: str | Path | Image.Image | np.ndarray) -> np.ndarray:
        """The class of each pixel of a photo, uint8 [H, W] at the photo's size: indices of `classes`.

        Args:
            photo: A file, a PIL image, or pixels, uint8 [H, W, 3] (RGB) or [H, W] (grey). Its long side is presented at
                that of `image_size`, in the proportions that it has.

        Raises:
            UserError: The photo cannot be read.
        """
        image = read_photo(photo)
        height, width = image.shape[:2]
        assert self.image_size is not None
        transform = EvalTransform(fitted_size((height, width), self.image_size), self.mean, self.std)
        was_training = self.training
        self.eval()
        try:
            logits = self(transform.prepare(image)[None].to(next(self.parameters()).device))
        finally:
            self.train(was_training)
        return classes_of(logits, (height, width))[0]

    def save(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors`, whole or not at all; `load_segmentation_model` reads them.

        Raises:
            ValueError: The folder holds something else, or the encoder was built with what no file can hold.
            OSError: The disk is full or not writable.
        """
        config = {
            "task": "segmentation",
            "encoder": description(self.encoder),
            "decoder": self.decoder_name,
            "decoder_channels": self.decoder_channels,
            "label_names": self.classes,
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
        }
        return write_model(self, folder, config)


class PyramidDecoder(nn.Module):
    """The FPN decoder of segmentation_models_pytorch (Kirillov et al. 2019, Panoptic FPN) on the deepest four maps.

    Args:
        levels: The encoder's pyramid, with at least four strides.

    Attributes:
        levels: Those that are used.
        width: Channels of what it gives, at the stride of the first of them.
    """

    def __init__(self, levels: Sequence[PyramidLevel]) -> None:
        super().__init__()
        if len(levels) < 4:
            raise UserError(
                f"decoder fpn needs maps at four strides, and this encoder has them at"
                f" {', '.join(str(level.stride) for level in levels)}: use decoder unetpp"
            )
        self.levels = list(levels[-4:])
        self.decoder = FPNDecoder([level.channels for level in self.levels], encoder_depth=4)
        self.width = self.decoder.out_channels
        initialize_decoder(self.decoder)

    def decode(self, features: Sequence[Tensor]) -> Tensor:
        """From the maps of `levels` to [B, width, h, w], (h, w) those of the first."""
        return self.decoder(list(features))


def classes_of(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """The class with the largest logit, uint8 [B, H, W], of logits [B, C, h, w] resized bilinearly to `size` (H, W)."""
    resized = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    return resized.argmax(1).to(torch.uint8).cpu().numpy()


def load_segmentation_model(folder: str | Path, encoder_name: str | None = None) -> SegmentationModel:
    """Read a model that `SegmentationModel.save` wrote, in evaluation mode, on the CPU.

    Args:
        folder: Of the model.
        encoder_name: "package.module:factory" of one's own encoder, which must be said: no file decides which code is
            run.

    Raises:
        UserError: No such model, a damaged one, or weights that do not fit its configuration.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        built = config["encoder"]
        name = name_of(built, folder, encoder_name, ENCODER_NAME)
        model = SegmentationModel(
            build_encoder(name, **built["model_args"]),
            config["label_names"],
            config["decoder"],
            config["decoder_channels"],
            image_size=config["image_size"],
            mean=config["mean"],
            std=config["std"],
        )
        model.load_state_dict(load_file(folder / WEIGHTS))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a whole model of spark-segment ({' '.join(str(error).split())}): name the folder"
            " model/ of such a run, or copy it again"
        ) from error
    return model.eval()
