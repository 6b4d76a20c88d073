"""Encoders in and out.

An exported encoder is a folder with `config.json` and `model.safetensors` in the layout of timm's hub models, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` reads it without this package.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from spark.errors import FileError, UserError
from spark.files import whole_folder, write_tensors
from spark.model.encoder import build_encoder, create_model, first_convolution, input_channels, timm_config
from spark.model.names import is_own
from spark.weights.channels import adapt_input, adapt_statistics
from spark.weights.keys import KeyReport
from spark.weights.official import (
    MODEL_NAME,
    encoder_name,
    fit_encoder,
    own_names,
    read_torch_file,
    read_weights,
    stored_channels,
)

logger = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
STATE = "state.pt"
EMA = "ema.safetensors"
"""Averaged weights in a checkpoint of a run, under the names of the model."""

_NOT_ARCHITECTURE = (
    "features_only",
    "out_indices",
    "feature_cls",
    "num_classes",
    "global_pool",
    "drop_rate",
    "drop_path_rate",
    "drop_path",
    "drop_block_rate",
    "pretrained_cfg_overlay",
    "pretrained_strict",
)
"""Options of `timm.create_model` and of one's own factory that are not part of an export: recorded elsewhere, or a
matter of use."""

_OWN_CONFIG = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD, "input_size": (3, 224, 224)}
"""Default preparation of the images of one's own encoder."""

_PREPROCESSING = ("interpolation", "crop_pct", "crop_mode", "fixed_input_size", "classifier")
"""Entries of a timm model's `pretrained_cfg` that stay true of other weights."""


def save_encoder(
    encoder: nn.Module,
    folder: str | Path,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | tuple[int, int] | None = None,
    card: Callable[[dict[str, Any]], str] | None = None,
    label_names: Sequence[str] | None = None,
) -> Path:
    """Export an encoder; `timm.create_model("local-dir:FOLDER", pretrained=True)` loads timm's.

    One's own encoder loads with `load_encoder(FOLDER, model_name="package.module:factory")`.

    Args:
        encoder: A stock timm model, or one's own encoder, such as `SparK.encoder`.
        folder: Written whole or not at all; an earlier export there is replaced.
        mean: Of each channel, as the images were normalised. Default: that of the model's `pretrained_cfg`.
        std: Likewise.
        input_size: Training size [px], one number or (H, W), for the record: the encoder takes any.
        card: Makes the model card, README.md, of the content of config.json.
        label_names: Names of the classes of a model with a classifier, in the order of its logits.

    Raises:
        UserError: Neither a stock timm model nor an encoder, or mean and std do not have a value for each channel.
        OSError: Disk full, or not writable.
    """
    from accelerate.utils import extract_model_from_parallel  # slow to import, and only exports need it

    encoder = extract_model_from_parallel(encoder, keep_torch_compile=False)
    config = _encoder_config(encoder, mean, std, input_size)
    if "architecture" in config:
        _require_rebuildable(encoder, config)
    if label_names is not None:
        config["label_names"] = list(label_names)
    text = None if card is None else card(config)
    with whole_folder(folder, (CONFIG, WEIGHTS, CARD)) as temporary:
        write_tensors(encoder, temporary / WEIGHTS, {})
        if text is not None:
            (temporary / CARD).write_text(text, encoding="utf-8")
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def architecture(encoder: nn.Module) -> dict[str, Any]:
    """What timm needs to build an encoder again, as plain values."""
    known = timm_config(encoder)
    if not known.get("architecture"):
        raise UserError(
            f"{type(encoder).__name__} is not a timm model (it has no pretrained_cfg), so timm could not load its"
            " export: save its state_dict() instead"
        )
    options = _of_architecture(getattr(encoder, "_model_args", {}))
    options["in_chans"] = input_channels(encoder)
    for key, value in options.items():
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(
                f"the encoder was built with {key}={value!r}, which a config.json cannot hold: give timm its name,"
                " as a string"
            ) from None
    return {"architecture": known["architecture"], "model_args": options}


def description(encoder: nn.Module) -> dict[str, Any]:
    """What is needed to build an encoder again: `architecture`, or for one's own what named it (`own`).

    Of a model that was handed over as an object only the class can be named. UserError for what yields no feature maps.
    """
    if timm_config(encoder).get("architecture") or not hasattr(encoder, "feature_info"):
        return architecture(encoder)
    unnamed = {"own": f"{type(encoder).__module__}:{type(encoder).__qualname__}", "model_args": {}}
    built: dict[str, Any] = getattr(encoder, "own_encoder", unnamed)
    options = _of_architecture(built["model_args"])
    return {**built, "model_args": {**options, "in_chans": input_channels(encoder)}}


def _of_architecture(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key not in _NOT_ARCHITECTURE}


def _encoder_config(
    encoder: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: int | tuple[int, int] | None,
) -> dict[str, Any]:
    """Content of config.json: the architecture and how its images are prepared."""
    built = description(encoder)
    known = _OWN_CONFIG | timm_config(encoder)
    channels = built["model_args"]["in_chans"]
    if input_size is None:
        input_size = tuple(known["input_size"][1:])
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    statistics = {
        "mean": known["mean"] if mean is None else mean,
        "std": known["std"] if std is None else std,
    }
    for name, values in statistics.items():
        if len(values) != channels:
            raise UserError(
                f"{name} has {len(values)} values and the encoder reads {channels} channels: give {name} with"
                f" {channels} values, as the training images were normalised"
            )
    classes = getattr(encoder, "num_classes", 0)
    return {
        **built,
        "num_classes": classes,
        "num_features": getattr(encoder, "num_features", None),
        "pretrained_cfg": {
            **{key: known[key] for key in _PREPROCESSING if key in known},
            **{name: list(values) for name, values in statistics.items()},
            "first_conv": first_convolution(encoder),
            "input_size": [channels, height, width],
            "pool_size": None,
            "num_classes": classes,
        },
    }


def _require_rebuildable(encoder: nn.Module, config: dict[str, Any]) -> None:
    """Refuse an encoder whose tensors are not those of the timm model that its export would name."""
    with torch.random.fork_rng(
        devices=[]
    ):  # exporting in mid-training must not change what the run draws next
        stock = timm.create_model(
            config["architecture"], num_classes=config["num_classes"], **config["model_args"]
        )
    there = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    here = {key: tuple(value.shape) for key, value in stock.state_dict().items()}
    different = [key for key in {**here, **there} if here.get(key) != there.get(key)]
    if different:
        first = different[0]
        raise UserError(
            f"the encoder is not timm's {config['architecture']} as it comes: {len(different)} tensors differ, first"
            f" {first} ({there.get(first, 'absent')} in the encoder, {here.get(first, 'absent')} in timm's). Export the"
            " stock model, not a features_only wrapper or a changed network"
        )


@dataclass
class _Source:
    """Encoder weights read from a file or folder.

    Attributes:
        label: Where they came from, for messages.
        name: timm name.
        tensors: Under timm's names.
        options: Of `timm.create_model`, `in_chans` among them.
        preparation: `mean`, `std`, `input_size` (H, W), as far as known.
        ignored: (name, why it is not wanted).
    """

    label: str
    name: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    preparation: dict[str, Any]
    ignored: list[tuple[str, str]] = field(default_factory=list)


def load_encoder(
    source: str | Path,
    *,
    features_only: bool = False,
    in_chans: int | None = None,
    pretrained: bool = False,
    model_name: str | None = None,
    **timm_kwargs: Any,
) -> nn.Module:
    """Build an encoder from a folder, a file or a name; logs every key that did not match.

    Args:
        source: An exported folder, a checkpoint folder of a run (`checkpoints/step_*`), an official `.pth` file of any
            kind (see `spark.weights.official`), or a timm model name.
        features_only: timm's wrapper that returns the list of feature maps, instead of the model itself.
        in_chans: Input channels. Default: those of the weights; 3 for a timm name. Where they differ, timm adapts the
            first convolution.
        pretrained: For a timm name: load timm's published weights (needs the network) in place of random ones.
        model_name: timm name of the encoder in a `.pth` file that does not name it; "package.module:factory" of one's
            own encoder in any file or folder, always required there: no file decides which code is run.
        timm_kwargs: Further options of `timm.create_model`, such as `drop_path_rate` or `out_indices`.

    Returns:
        A timm model without classifier; `encoder.pretrained_cfg` has `mean`, `std` and `input_size`.

    Raises:
        UserError: Unknown name or path, unreadable or unsafe file, or weights of another architecture.
        OSError: timm's published weights could not be downloaded.
    """
    encoder, report = read_encoder(
        source,
        features_only=features_only,
        in_chans=in_chans,
        pretrained=pretrained,
        model_name=model_name,
        **timm_kwargs,
    )
    if report.source:
        logger.log(logging.WARNING if report.missing else logging.INFO, "%s", report)
    return encoder


def read_encoder(
    source: str | Path,
    *,
    features_only: bool = False,
    in_chans: int | None = None,
    pretrained: bool = False,
    model_name: str | None = None,
    averaged: bool = False,
    name_option: str = MODEL_NAME,
    **timm_kwargs: Any,
) -> tuple[nn.Module, KeyReport]:
    """`load_encoder`, with the report as a value; it is empty for a name.

    With `averaged`, the averaged weights of a checkpoint of a run (`optim.ema_decay`) in place of the last ones.
    `name_option` is how messages call `model_name`.
    """
    if "num_classes" in timm_kwargs:
        raise UserError(
            "an encoder has no classifier: for one, export it (save_encoder) and use"
            " timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=...)"
        )
    found = _find_encoder(source, model_name, averaged, name_option)
    if found is None:
        name = str(source)
        if features_only:
            options = {"in_chans": in_chans or 3, **timm_kwargs}
            return create_model(name, pretrained=pretrained, features_only=True, **options), KeyReport()
        encoder = build_encoder(name, in_chans or 3, pretrained=pretrained, **timm_kwargs)
        if is_own(name):
            encoder.pretrained_cfg = _own_preparation(in_chans or 3)  # type: ignore[assignment]
        return encoder, KeyReport()

    stored = found.options["in_chans"]
    channels = in_chans or stored
    if channels != stored:
        found.label += f" (of {stored} channel{'s' * (stored > 1)}, made to read {channels})"
    about = {
        "source": found.label,
        "name": found.name,
        "ignored": found.ignored,
        "name_option": name_option,
    }
    options = {**found.options, "in_chans": channels, **timm_kwargs}
    preparation = found.preparation
    if channels != stored:
        for key in preparation.keys() & {"mean", "std"}:
            preparation[key] = adapt_statistics(preparation[key], channels)
    if is_own(found.name):
        encoder = build_encoder(found.name, **options)
        first = f"{first_convolution(encoder)}.weight"
        if first in found.tensors:
            found.tensors[first] = adapt_input(found.tensors[first], channels)
        report = fit_encoder(found.tensors, encoder, **about)
        known = {**_own_preparation(channels), **preparation}
        size = known["input_size"][-2:]
        encoder.pretrained_cfg = {**known, "input_size": (channels, *size)}  # type: ignore[assignment]
        return encoder, report
    encoder = build_encoder(found.name, **found.options)
    report = fit_encoder(found.tensors, encoder, **about)
    size = preparation.get("input_size", timm_config(encoder)["input_size"][1:])
    preparation["first_conv"] = first_convolution(encoder)
    if features_only or options != found.options:
        # timm itself wraps and adapts: the weights go in as if they were its published ones
        weights = {"state_dict": encoder.state_dict(), "num_classes": 0, "label_offset": None}
        encoder = create_model(
            found.name,
            pretrained=True,
            pretrained_cfg_overlay={**preparation, "input_size": (stored, *size), **weights},
            features_only=features_only,
            num_classes=0,
            **options,
        )
        timm_config(encoder).pop("state_dict")
    timm_config(encoder).update(preparation, input_size=(channels, *size))
    return encoder, report


def _own_preparation(channels: int) -> dict[str, Any]:
    """Default preparation of the images of one's own encoder; other than colour images have no default mean."""
    known = _OWN_CONFIG if channels == 3 else {}
    return {**known, "input_size": (channels, *_OWN_CONFIG["input_size"][1:])}


def _find_encoder(
    source: str | Path, model_name: str | None, averaged: bool, name_option: str
) -> _Source | None:
    """Find the encoder weights that a path means; None if it is a name."""
    path = Path(str(source).removeprefix("local-dir:")).expanduser()
    if averaged and not (path / STATE).is_file():
        raise UserError(
            f"averaged weights are in checkpoints of a run only, and {source} is none: name a folder "
            "checkpoints/step_NNNNNNN, or leave --ema out"
        )
    is_name = is_own(str(source)) or (os.sep not in str(source) and timm.is_model(str(source).split(".")[0]))
    if (path / CONFIG).is_file():
        return _from_export(path, model_name, name_option)
    if (path / STATE).is_file():
        return _from_run(path, model_name, averaged, name_option)
    if path.is_dir() and not is_name:
        hint = "save_encoder and spark-export write such folders"
        if (path / "encoder" / CONFIG).is_file():
            hint = f"did you mean {path / 'encoder'}?"
        raise UserError(f"{path} is not an exported encoder (it has no {CONFIG}): {hint}")
    if path.is_file():
        return _from_file(path, model_name, name_option)
    if os.sep in str(source) or path.suffix in (".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
        raise FileError(
            f"no encoder at {path}: give an exported folder, a checkpoint file or a timm model name"
        )
    return None


def _from_file(path: Path, model_name: str | None, name_option: str) -> _Source:
    """Read a `.pth` file. The official code normalises images with ImageNet's statistics."""
    weights = read_weights(path)
    name = encoder_name(weights, model_name, name_option)
    tensors = own_names(weights.encoder, name)
    channels = stored_channels(tensors, name)
    preparation: dict[str, Any] = {}
    if channels == 3:
        preparation = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    if weights.input_size is not None:
        preparation["input_size"] = (weights.input_size, weights.input_size)
    ignored = [*weights.ignored, *((key, "not part of the encoder") for key in weights.others)]
    return _Source(weights.source, name, tensors, {"in_chans": channels}, preparation, ignored)


def name_of(
    built: dict[str, Any], source: Path, model_name: str | None, name_option: str = MODEL_NAME
) -> str:
    """timm name of an encoder, or `model_name` for one's own, which the caller must name.

    Args:
        built: Of `description`, as a file has it.
        source: The file or folder, for messages.
        model_name: A name other than the file's is accepted with a warning, because modules get renamed.
        name_option: How messages call it.
    """
    if "own" not in built:
        return built["architecture"]
    if model_name is None or not is_own(model_name):
        raise UserError(
            f"{source} holds {built['own']}, which is not timm's, and no code is run because a file names it: name "
            f"your network with {name_option}, such as {built['own']}"
        )
    if model_name != built["own"]:
        logger.warning(
            "%s was written of %s and is read as %s: right if this is the same network under another name",
            source,
            built["own"],
            model_name,
        )
    return model_name


def _from_export(folder: Path, model_name: str | None, name_option: str) -> _Source:
    """Read a folder with config.json: of `save_encoder`, or of another timm model on disk."""
    config: Any = None
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        cfg = config.get("pretrained_cfg", {})
        name = None if "own" in config else config["architecture"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = "does not describe a timm model (no architecture in it)"
        if isinstance(config, dict) and {"encoder", "head"} <= config.keys():
            what = (
                "is of a model with a head, not of an encoder: name the encoder that it was trained from (training "
                "goes on from a whole model with the option model.init)"
            )
        raise UserError(f"{folder / CONFIG} {what}") from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{folder / WEIGHTS} is missing, cut short or damaged ({error}): export it again"
        ) from error
    name = name or name_of(config, folder, model_name, name_option)
    preparation = {key: tuple(cfg[key]) for key in ("mean", "std") if key in cfg}
    if "input_size" in cfg:
        preparation["input_size"] = tuple(cfg["input_size"][1:])
    options = {"in_chans": cfg.get("input_size", (3,))[0], **config.get("model_args", {})}
    return _Source(str(folder), name, tensors, _of_architecture(options), preparation)


def _from_run(folder: Path, model_name: str | None, averaged: bool, name_option: str) -> _Source:
    """Read the encoder out of a checkpoint folder of a run."""
    path = folder / (EMA if averaged else WEIGHTS)
    if averaged and not path.is_file():
        raise UserError(
            f"{folder} holds no averaged weights, for its run kept none (optim.ema_decay): export the last weights, "
            "without --ema"
        )
    try:
        with safe_open(path, framework="pt") as file:
            described = (file.metadata() or {}).get("encoder")
            names = list(file.keys())
            tensors = {
                n.removeprefix("encoder."): file.get_tensor(n) for n in names if n.startswith("encoder.")
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, cut short or damaged ({error})") from error
    if described is None or not tensors:
        raise UserError(f"{folder} holds no timm encoder: only runs over a stock timm model can be exported")
    ignored = [(name, "not part of the encoder") for name in names if not name.startswith("encoder.")]
    built = json.loads(described)
    return _Source(
        f"{folder} ({'averaged' if averaged else 'last'} weights)",
        name_of(built, folder, model_name, name_option),
        tensors,
        _of_architecture(built["model_args"]),
        _run_preparation(folder),
        ignored,
    )


def _run_preparation(folder: Path) -> dict[str, Any]:
    """How a run prepared its images: from the config in its checkpoint, or config.yaml of its output folder."""
    config = read_torch_file(folder / STATE)["extra"].get("config")
    written = folder.parent.parent / "config.yaml"
    if config is None and written.is_file():
        with contextlib.suppress(yaml.YAMLError):
            config = yaml.safe_load(written.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        logger.warning(
            "%s: no config in it and no readable one at %s, so mean, std and input_size are those of timm's model",
            folder,
            written,
        )
        return {}
    data, model = config.get("data") or {}, config.get("model") or {}
    preparation = {key: tuple(data[key]) for key in ("mean", "std") if data.get(key)}
    if size := model.get("input_size"):
        preparation["input_size"] = (size, size) if isinstance(size, int) else tuple(size)
    return preparation
