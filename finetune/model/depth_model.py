"""A depth model: a timm convnet, a head on its feature pyramid, and everything needed to predict with it again.

Shapes: images [B, 3, H, W] of any size, depth [B, 1, H, W] in metres.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from finetune.construct import construct
from finetune.heads import HEADS
from finetune.heads.base import Head
from finetune.heads.output import DepthOutput, DepthRange
from finetune.model.calibration import Calibration
from finetune.model.encoder_model import DenseModel, write_model
from finetune.model.prediction import predict_image, read_photo
from spark.errors import UserError
from spark.files import checksum, write_whole
from spark.model.encoder import (
    RefusedOptions,
    build_encoder,
    drop_unneeded,
    without_unneeded,
)
from spark.model.names import is_own
from spark.weights.encoder import CONFIG, WEIGHTS, description, name_of, read_encoder
from spark.weights.hub import PREFIX, download
from spark.weights.keys import KeyReport

FRAME_MAPS = ("depth", "disparity_affine")
"""Maps that are brought to the size of the images."""

ENCODER_NAME = "encoder_name= (--encoder_name)"
"""How sentences call the argument and the option that name an encoder which a file does not say, or may not."""

# Arguments of `read_encoder` and `timm.create_model` that a depth model sets itself.
_NOT_FREE = {
    **dict.fromkeys(("drop_path", "drop_path_rate"), "set drop_path"),
    **dict.fromkeys(("model_name", "name_option"), "set encoder_name"),
    "pretrained": "set pretrained",
    "in_chans": "images are of three colours",
    "averaged": "export the averaged weights",
    **dict.fromkeys(
        ("source", "name", "model_name_or_path", "checkpoint_path", "cache_dir"),
        "set encoder, which says the weights",
    ),
    **dict.fromkeys(
        ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "kwargs_filter"),
        "weights are loaded whole or not at all",
    ),
    **dict.fromkeys(
        ("features_only", "out_indices", "feature_cls", "num_classes", "global_pool"),
        "the head takes the feature maps that it wants",
    ),
}


class DepthModel(DenseModel):
    """Encoder, head and depth range.

    Args:
        encoder: Where the encoder comes from: an exported folder or a `.pth` file (with their weights), a timm name,
            "package.module:factory" of one's own convnet, or a model that is already made (it is used, not copied).
            Parts of it that no map of the head depends on are taken out, such as the last convolution of a MobileNetV3.
        head: Name of a head in `finetune.heads.HEADS`.
        max_depth: Farthest depth that the model can say [m].
        min_depth: Nearest depth that the model can say [m].
        initial_depth: Depth near which the untrained head starts [m]; 2.7 is the median of NYU Depth V2.
        pretrained: For a timm name: load timm's published weights instead of random ones. Folders and files bring
            their own.
        drop_path: Stochastic depth rate of the encoder, unless it is already made.
        image_size: (H, W) at which whole frames are presented to the model [px], recorded for evaluation and
            prediction.
            None: frames are presented as they are.
        mean: What is subtracted from RGB in [0, 1]; default what the encoder was trained with. That of an encoder of
            one channel counts for red, green and blue alike, as timm spreads its first weights over the three.
        std: What RGB is then divided by; default likewise.
        encoder_name: timm name of the encoder in a `.pth` file that does not say it; "package.module:factory" of one's
            own convnet in a file or folder, for no file decides which code is run.
        encoder_options: Further arguments of `timm.create_model` (of the factory of one's own convnet), unless the
            encoder is already made.
        head_options: Arguments of the head, such as `decoder_channels` of unetpp.

    Attributes:
        sha256: Of a model that `load_depth_model` read, which it is, as `model_sha256` has it; None of any other.

    Raises:
        ValueError: One of these does not exist or does not fit; the message says what does.
    """

    def __init__(
        self,
        encoder: str | Path | nn.Module,
        head: str = "unetpp",
        max_depth: float = 10.0,
        min_depth: float = 1e-3,
        initial_depth: float = 2.7,
        pretrained: bool = False,
        drop_path: float = 0.0,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        encoder_name: str | None = None,
        encoder_options: Mapping[str, Any] | None = None,
        **head_options: Any,
    ) -> None:
        if isinstance(encoder, nn.Module):
            if pretrained or drop_path or encoder_name or encoder_options:
                raise UserError(
                    "pretrained, drop_path, encoder_name and encoder_options shape an encoder given by name: one that"
                    " is already made keeps its own"
                )
        else:
            encoder, _ = open_encoder(encoder, encoder_name, pretrained, drop_path, encoder_options or {})
        super().__init__(encoder, image_size, mean, std)
        self.depth_range = DepthRange(min_depth, max_depth, initial_depth)
        self.head_name = head
        self.head_options = head_options
        self.head: Head = construct("head", HEADS, head, head_options, self.levels, self.depth_range)
        self.levels = self.head.levels
        self.calibration: Calibration | None = None  # of evaluation only, losses see what the head says
        self.sha256: dict[str, str] | None = None
        drop_unneeded(encoder, self.levels, in_chans=3)
        if self.head.frozen_encoder:
            self.probe_encoder()

    def forward(self, images: Tensor) -> DepthOutput:
        """Predict depth for images [B, 3, H, W] normalised with `mean` and `std`, at their size, whatever it is.

        Sides that are no multiple of the encoder's stride are padded right and below with the edge pixels; the
        padding is cut off `depth` and `disparity_affine`, while `extras` stay as the head gives them. In evaluation a
        calibration is applied (`finetune.model.calibration`).
        """
        features, size = self.features(images), (images.shape[-2], images.shape[-1])
        output: DepthOutput = self.head(features, self.padded_size(size))
        given = {
            name: self.to_frame(value, size) for name in FRAME_MAPS if (value := output.get(name)) is not None
        }
        output = replace(output, **given)
        if self.calibration is not None and not self.training:
            output = self.calibration.apply(output)
        return output

    def predict(
        self,
        photo: str | Path | Image.Image | np.ndarray,
        *,
        tiles: int = 1,
        flip_average: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Predict the depth of a photo, float32 [H, W] in metres at the photo's size; a calibration is applied.

        Args:
            photo: A file, a PIL image, or pixels, uint8 [H, W, 3] (RGB) or [H, W] (grey).
            tiles: How many tiles along the long side show the model more detail; 1 shows it the whole photo alone.
            flip_average: Average with the prediction for the mirror image.
            image_size: (H, W) at which the model sees the photo [px]; None: the size it was trained at.

        Raises:
            UserError: The photo cannot be read, or the model gives no metres.
        """
        if "depth" not in self.outputs:
            raise UserError(
                f"head {self.head_name} gives no metres: calibrate the model (spark-calibrate), or"
                " take its inverse depth from finetune.model.prediction.predict_image"
            )
        return predict_image(self, read_photo(photo), image_size, flip_average, tiles)

    def calibrate(self, calibration: Calibration | None) -> None:
        """Take a calibration in place of any other, or none; ValueError for a space that the head has nothing in."""
        if calibration is not None and calibration.space != "disparity" and "depth" not in self.head.outputs:
            raise UserError(
                f"head {self.head_name} gives no metres: it is calibrated in space disparity, not {calibration.space}"
            )
        self.calibration = calibration

    @property
    def outputs(self) -> tuple[str, ...]:
        """What `forward` gives in evaluation: what the head does, and `depth` of a head without metres once it is
        calibrated."""
        own: tuple[str, ...] = self.head.outputs
        return own if self.calibration is None or "depth" in own else (*own, "depth")

    @property
    def max_depth(self) -> float:
        """The farthest depth that it says in evaluation [m]."""
        return self.depth_range.max_depth if self.calibration is None else self.calibration.max_depth

    def save(self, folder: str | Path, card: str | None = None) -> Path:
        """Write `config.json` and `model.safetensors`, whole or not at all; `load_depth_model` reads them.

        With `card`, the text of a model card, README.md too.

        Modules of losses are no part of it; a calibration is part of config.json.

        Raises:
            ValueError: The folder holds something else, or the encoder was built with what no file can hold.
            OSError: The disk is full or not writable.
        """
        config = {
            "encoder": description(self.encoder),
            "head": self.head_name,
            "head_options": self.head_options,
            "min_depth": self.depth_range.min_depth,
            "max_depth": self.depth_range.max_depth,
            "initial_depth": self.depth_range.initial_depth,
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
        }
        if self.calibration is not None:
            config["calibration"] = self.calibration.as_config()
        return write_model(self, folder, config, card)


def open_encoder(
    encoder: str | Path,
    encoder_name: str | None,
    pretrained: bool,
    drop_path: float,
    encoder_options: Mapping[str, Any],
) -> tuple[nn.Module, KeyReport]:
    """The encoder of a model, as the arguments of `DepthModel` say, and what became of its weights."""
    if wrong := sorted(_NOT_FREE.keys() & encoder_options):
        raise UserError(f"encoder_options cannot set {wrong[0]}: {_NOT_FREE[wrong[0]]}")
    options = dict(encoder_options)
    if drop_path:
        own = is_own(str(encoder)) or is_own(encoder_name or "")
        options["drop_path" if own else "drop_path_rate"] = drop_path
    if re.match(r"swin(v2)?_", str(encoder)):
        options["strict_img_size"] = False  # images may have any size
    try:
        made, report = read_encoder(
            encoder,
            in_chans=3,
            pretrained=pretrained,
            model_name=encoder_name,
            name_option=ENCODER_NAME,
            **options,
        )
    except RefusedOptions as error:
        if not encoder_options:
            raise
        raise UserError(
            f"{error} (encoder_options are {dict(encoder_options)}, '{{}}' gives none)"
        ) from error
    asked = report.source and (Path(encoder).is_file() or hasattr(made, "own_encoder"))
    if encoder_name is not None and not asked:
        raise UserError(
            f"encoder_name is for .pth files and for convnets of your own in files and folders: {encoder} says itself "
            "which encoder it is, leave it out"
        )
    if pretrained and report.source:
        raise UserError(f"pretrained is for timm names: {report.source} brings its own weights, leave it out")
    return made, report


def start_from(model: DepthModel, folder: str | Path) -> KeyReport:
    """Start a model from the weights of another.

    With the same head all of it is wanted, from another head with a core (fusion, metric_bins) the encoder and the
    core. Tensors of the same name and shape are taken, everything else is left as it is and reported.

    Args:
        model: Filled in place.
        folder: What `DepthModel.save` wrote.

    Raises:
        ValueError: No such model; the heads have nothing in common; less than half of the encoder or of the head fits;
            or it was trained on images normalised in another way.
    """
    tensors, config = _read(Path(folder))
    own, source, tensors = model.state_dict(), str(folder), without_unneeded(tensors, model)
    head = "head." if config.get("head") == model.head_name else "head.core."
    if not all(any(key.startswith(head) for key in keys) for keys in (own, tensors)):
        raise UserError(
            f"{source} has head {config.get('head')}, here it is {model.head_name}: model.init takes the same head, or"
            " one of fusion and metric_bins for the other"
        )
    if (tuple(config["mean"]), tuple(config["std"])) != (model.mean, model.std):
        raise UserError(
            f"{source} learnt from images with mean {config['mean']} and std {config['std']}, here they are"
            f" {list(model.mean)} and {list(model.std)}: set data.mean and data.std to what it knows"
        )
    report = KeyReport(source)
    for key in own:
        if not key.startswith(("encoder.", head)):
            continue
        if key not in tensors:
            report.missing.append(key)
        elif tensors[key].shape != own[key].shape:
            report.mismatched.append((key, tuple(tensors[key].shape), tuple(own[key].shape)))
        else:
            report.loaded.append(key)
    for key in tensors:
        if not key.startswith(("encoder.", head)):
            report.ignored.append((key, "not of encoder or core"))
        elif key not in own:
            report.unexpected.append(key)
    for part, name in (("encoder.", "encoder"), (head, "head")):
        fitting = sum(own[key].numel() for key in report.loaded if key.startswith(part))
        if 2 * fitting < sum(own[key].numel() for key in own if key.startswith(part)):
            raise UserError(
                f"the {name} in {source} does not fit this model, under half of it has the same shapes: use the same"
                " encoder and head_options"
            )
    model.load_state_dict({key: tensors[key] for key in report.loaded}, strict=False)
    return report


def load_depth_model(folder: str | Path, encoder_name: str | None = None) -> DepthModel:
    """Read a model that `DepthModel.save` wrote, in evaluation mode, on the CPU.

    Args:
        folder: Of the model, or "hf-hub:OWNER/NAME[@REVISION]" of the Hugging Face hub.
        encoder_name: "package.module:factory" of one's own encoder, which must be said: no file decides which code is
            run. Of timm's encoders the folder says which it is.

    Raises:
        ValueError: No such model, an encoder instead of one, a damaged one, weights that do not fit its configuration,
            or an own encoder that was not named, or another than that of the weights.
        OSError: It could not be downloaded.
    """
    folder = download(str(folder)) if str(folder).startswith(PREFIX) else Path(folder)
    tensors, config = _read(folder)
    try:
        built = config["encoder"]
        if encoder_name is not None and "own" not in built:
            raise UserError(
                f"the encoder of {folder} is timm's {built['architecture']}: leave {ENCODER_NAME} out, which names "
                "convnets of your own"
            )
        name = name_of(built, folder, encoder_name, ENCODER_NAME)
        encoder = build_encoder(name, **built["model_args"])
        model = DepthModel(
            encoder,
            head=config["head"],
            max_depth=config["max_depth"],
            min_depth=config["min_depth"],
            initial_depth=config["initial_depth"],
            image_size=config["image_size"],
            mean=config["mean"],
            std=config["std"],
            **config["head_options"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(_undescribed(folder, error)) from error
    if (stored := config.get("calibration")) is not None:
        try:
            model.calibrate(Calibration(**stored))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"the calibration in {folder / CONFIG} cannot be used ({error}): calibrate the model again with"
                " spark-calibrate, from a whole copy of it"
            ) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        if "own" in built:
            raise UserError(
                f"the weights in {folder} are of {built['own']} and do not fit {name}: name the network that it was "
                f"trained with, as it was then, with {ENCODER_NAME}. {' '.join(str(error).split())}"
            ) from error
        raise UserError(_unfitting(folder, error)) from error
    model.sha256 = model_sha256(folder, config)
    return model.eval()


def model_sha256(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Which model is in a folder, wherever that lies: for results, which hold its calibration beside it.

    Args:
        folder: Of the model.
        config: Its config.json.

    Returns:
        SHA-256 of "weights", the file model.safetensors, and of "config", canonical JSON of config.json without the
        calibration.
    """
    lasting = {key: value for key, value in config.items() if key != "calibration"}
    text = json.dumps(lasting, sort_keys=True, separators=(",", ":"))
    return {"weights": checksum(folder / WEIGHTS), "config": hashlib.sha256(text.encode()).hexdigest()}


def write_calibration(folder: str | Path, calibration: Calibration) -> None:
    """Put a calibration into the config.json of a model folder, in place of any that it has; all else stays."""
    _, config = _read(Path(folder))
    config["calibration"] = calibration.as_config()
    write_whole(Path(folder) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the configuration in a folder of a depth model."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        inside = (folder / "model" / CONFIG).is_file()
        hint = (
            f"did you mean {folder / 'model'}?" if inside else "spark-depth writes one to OUTPUT_DIR/model."
        )
        raise UserError(f"{folder} is not a depth model (it has no {' and no '.join(missing)}): {hint}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if "architecture" in config and "encoder" not in config:
            raise UserError(
                f"{folder} is an exported encoder, not a depth model: train one on it with"
                f" spark-depth --encoder {folder}"
            )
        if lacking := {"encoder", "mean", "std"} - config.keys():
            raise KeyError(*sorted(lacking))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(_undescribed(folder, error)) from error
    try:
        return load_file(folder / WEIGHTS), config
    except SafetensorError as error:
        raise UserError(_unfitting(folder, error)) from error


def _undescribed(folder: Path, error: Exception) -> str:
    return f"{folder / CONFIG} does not describe a depth model ({error!r}): copy the folder again."


def _unfitting(folder: Path, error: Exception) -> str:
    return f"{folder / WEIGHTS} does not hold the weights that {CONFIG} describes: copy the folder again. {error}"
