"""Official checkpoints: read without running code, recognised, renamed, and every key accounted for.

There are five kinds of files from SparK's official code (Tian et al., ICLR 2023) and its users:

1. a training file: `{args, input_size, arch, epoch, performance_desc, module, optimizer, is_pretrain}`;
2. `*_withdecoder_1kpretrained_spark_style.pth`: what `module` holds, without the wrapper;
3. `*_1kpretrained_timm_style.pth`: the encoder alone, raw or as `{arch, module, is_pretrain}`;
4. encoders of ConvNeXt, which carry the names of the original ConvNeXt code even when called timm_style;
5. a fine-tuned file: `{module, ema, optimizer, ...}` with a classifier.

`read_weights` reads them all; `load_official` makes a `SparK` of 1 and 2, `spark.load_encoder` an encoder of any.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor, nn

from spark.errors import FileError, UserError
from spark.model.encoder import (
    first_convolution,
    input_channels,
    pyramid_info,
    require_timm_name,
    timm_config,
    unreached_parameters,
)
from spark.model.names import is_own
from spark.model.spark import SparK
from spark.weights.channels import adapt_input, adapt_output
from spark.weights.keys import KeyReport, fit, some

logger = logging.getLogger(__name__)

OFFICIAL_MODELS = (
    "resnet50",
    "resnet101",
    "resnet152",
    "resnet200",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "convnext_large",
)
"""Encoders of the official releases, tried in turn when a file does not name its encoder."""

_ENCODER_PREFIX = "sparse_encoder.sp_cnn."
_WRAPPERS = ("ema", "module", "state_dict", "model")
"""Entries that hold the weights, the averaged ones of a fine-tuned file first."""

_UNUSED = {
    "imn_m": "unused buffer",
    "imn_s": "unused buffer",
    "norm_black": "unused buffer of the training size",
}

MODEL_NAME = "model_name= (--model_name)"
"""Name of the argument that names the encoder, in messages, unless the caller passes another."""

_RENAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"mask_tokens\.(\d+)", r"densify.\1.token"),
        (r"densify_norms\.(\d+)\.(.+)", r"densify.\1.norm.\2"),
        (r"densify_projs\.(\d+)\.(.+)", r"densify.\1.projection.\2"),
        (r"dense_decoder\.dec\.(\d+)\.up_sample\.(.+)", r"decoder.blocks.\1.upsample.\2"),
        (r"dense_decoder\.dec\.(\d+)\.conv\.0\.(.+)", r"decoder.blocks.\1.conv1.\2"),
        (r"dense_decoder\.dec\.(\d+)\.conv\.1\.(.+)", r"decoder.blocks.\1.norm1.\2"),
        (r"dense_decoder\.dec\.(\d+)\.conv\.3\.(.+)", r"decoder.blocks.\1.conv2.\2"),
        (r"dense_decoder\.dec\.(\d+)\.conv\.4\.(.+)", r"decoder.blocks.\1.norm2.\2"),
        (r"dense_decoder\.proj\.(.+)", r"decoder.head.\1"),
    )
)


@dataclass
class Weights:
    """The weights of a file: those of the encoder and others.

    Attributes:
        source: The file, and the entry of it that was read.
        encoder: Encoder tensors under the names of the file.
        others: Tensors of the decoder and the densify layers under the names of `spark.SparK`; empty in a file that
            holds an encoder only.
        ignored: (name, why it is not wanted).
        arch: Name of the encoder in the file, or None.
        input_size: Training size [px] in the file, or None.
        config: The `config` entry of a full file.
    """

    source: str
    encoder: dict[str, Tensor]
    others: dict[str, Tensor]
    ignored: list[tuple[str, str]]
    arch: str | None
    input_size: int | None
    config: dict[str, Any]


def stored_channels(tensors: Mapping[str, Tensor], name: str) -> int:
    """Channels that the first convolution of the encoder `name` reads in these tensors, under its own names."""
    if is_own(name):
        return next((value.shape[1] for value in tensors.values() if value.ndim == 4), 3)
    config = timm.get_pretrained_cfg(name)
    first = config.first_conv if config is not None else None
    weight = tensors.get(f"{first}.weight")
    return 3 if weight is None or weight.ndim != 4 else weight.shape[1]


def read_torch_file(path: str | Path) -> Any:
    """Read a file of `torch.save` onto the CPU without ever running code from it (`weights_only=True`).

    Raises:
        UserError: No such file, damaged, no checkpoint, or Python objects besides tensors and plain values.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, not a checkpoint file: encoders and runs in folders are read with load_encoder"
        )
    if not path.is_file():
        raise FileError(f"no checkpoint file at {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{path} is cut short or damaged: download or copy it again") from error
    except OSError:
        raise
    except Exception as error:  # on other bytes than its own, torch's unpickler raises nearly everything
        if blocked := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} was refused: it holds the Python object {blocked[1]}, and reading such objects can run any"
                " code. Ask its author for a file of tensors and plain values only, or convert it yourself where you"
                " trust it"
            ) from error
        raise UserError(
            f"{path} is not a checkpoint that torch.save wrote: download or copy it again"
        ) from error


def _read_safetensors(path: str | Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is cut short or damaged ({error}): download or copy it again") from error


def read_weights(path: str | Path) -> Weights:
    """Read any of the five official kinds of file, or a plain state dict; UserError for anything else."""
    content: Any = _read_safetensors(path) if Path(path).suffix == ".safetensors" else read_torch_file(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    wrapper = next((key for key in _WRAPPERS if isinstance(content.get(key), dict) and content[key]), None)
    entries: dict[Any, Any] = content if wrapper is None else content[wrapper]
    source = str(path) if wrapper is None else f"{path} [{wrapper}]"

    tensors = {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{source} holds no tensors; its entries are: {some([str(key) for key in entries])}")
    if all(key.startswith("module.") for key in tensors):  # saved from a DistributedDataParallel wrapper
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    ignored = [(str(key), "not a tensor") for key, value in entries.items() if not isinstance(value, Tensor)]

    encoder: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    full = any(key.startswith(_ENCODER_PREFIX) for key in tensors)
    for key, value in tensors.items():
        if key in _UNUSED:
            ignored.append((key, _UNUSED[key]))
        elif not full:
            encoder[key] = value
        elif key.startswith(_ENCODER_PREFIX):
            encoder[key.removeprefix(_ENCODER_PREFIX)] = value
        else:
            others[_our_name(key)] = value

    arch, size, config = content.get("arch"), content.get("input_size"), entries.get("config")
    config = config if isinstance(config, dict) else {}
    size = size if isinstance(size, int) else config.get("sparse_encoder.input_size")
    return Weights(source, encoder, others, ignored, arch if isinstance(arch, str) else None, size, config)


def _our_name(key: str) -> str:
    """Name in `spark.SparK` of an official decoder or densify key; a key of neither keeps its name."""
    for pattern, name in _RENAMES:
        if pattern.fullmatch(key):
            return pattern.sub(name, key)
    return key


def own_names(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The encoder tensors of a file under the names that the encoder `name` gives them."""
    return dict(tensors) if is_own(name) else timm_names(tensors)


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the encoder tensors of a file to timm's names.

    ResNets carry them already; timm's own `checkpoint_filter_fn` maps ConvNeXt's original ones. It gets the names one
    by one with an empty tensor, because with real ones it fails on another architecture without saying what differs.
    """
    if not any(key.startswith("downsample_layers.") for key in tensors):
        return dict(tensors)
    empty = torch.empty(0)
    return {
        next(iter(checkpoint_filter_fn({key: empty}, None)), key): value for key, value in tensors.items()
    }


def encoder_name(weights: Weights, model_name: str | None = None, name_option: str = MODEL_NAME) -> str:
    """Name of the encoder that these weights belong to; UserError if none is found.

    `model_name` of the caller goes first, which alone may name one's own encoder; then the name in the file, then the
    official model whose tensors have the same names and shapes. `name_option` is how messages call `model_name`.
    """
    if model_name is not None:
        if not is_own(model_name):
            require_timm_name(model_name)
        return model_name
    if weights.arch is not None:
        if timm.is_model(weights.arch):
            return weights.arch
        raise UserError(
            f"{weights.source} says that its encoder is {weights.arch!r}, which timm does not have: pass"
            f" {name_option} with the timm name of this architecture"
        )
    shapes = {key: tuple(value.shape) for key, value in timm_names(weights.encoder).items()}
    for name in OFFICIAL_MODELS:
        with torch.device("meta"):
            candidate = timm.create_model(name, num_classes=0)
        free = (
            *_classifier_prefixes(candidate),
            "head.norm.",
            f"{timm_config(candidate)['first_conv']}.weight",
        )
        wanted = {key: tuple(value.shape) for key, value in candidate.state_dict().items()}
        if _without(wanted, free) == _without(shapes, free):
            return name
    raise UserError(
        f"{weights.source} does not say which encoder it holds, and it is none of {', '.join(OFFICIAL_MODELS)}: pass"
        f" {name_option} with its timm name"
    )


def _without(shapes: Mapping[str, tuple[int, ...]], prefixes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {key: shape for key, shape in shapes.items() if not key.startswith(prefixes)}


def fit_encoder(
    tensors: Mapping[str, Tensor],
    encoder: nn.Module,
    *,
    source: str,
    name: str,
    ignored: Collection[tuple[str, str]],
    name_option: str = MODEL_NAME,
) -> KeyReport:
    """`fit` for an encoder without classifier, and tensors under its own names.

    The file's classifier is ignored, and what takes no part in the feature maps (ConvNeXt's final norm, which masked
    pretraining does not train) may be missing.
    """
    own = encoder.state_dict()
    classifier = [key for key in tensors if key.startswith(_classifier_prefixes(encoder)) and key not in own]
    return fit(
        {key: value for key, value in tensors.items() if key not in classifier},
        encoder,
        source=source,
        name=name,
        advice=name_another(name_option),
        optional=unreached_parameters(encoder, pyramid_info(encoder), input_channels(encoder)),
        ignored=[*ignored, *((key, "classifier") for key in classifier)],
    )


def name_another(name_option: str) -> str:
    """What to do about weights of another encoder than the one that was named."""
    return f"Name the right one with {name_option}, or give a checkpoint of this one"


def _classifier_prefixes(encoder: nn.Module) -> tuple[str, ...]:
    """What the names of a timm model's classifier begin with."""
    names = timm_config(encoder).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def load_official(
    path: str | Path, *, layout: str = "packed", model_name: str | None = None, **spark_kwargs: Any
) -> SparK:
    """Make a `SparK` of an official checkpoint with decoder (kinds 1 and 2), weights only.

    The file sets the options: encoder, channels, decoder width, mask ratio, kind of norm, training size.

    Args:
        path: The `.pth` file.
        layout: see `SparK`.
        model_name: timm name of the encoder, if the file does not name it and it is none of the official ones.
        spark_kwargs: Options of `SparK`, in place of the file's. With another `in_chans`, what reads and what
            predicts the image is adapted, see `spark.weights.channels`.

    Raises:
        UserError: No such file, not readable safely, no decoder in it, or weights that do not fit the model.
    """
    weights = read_weights(path)
    if not weights.others:
        raise UserError(
            f"{weights.source} holds no SparK model with a decoder, only {some(list(weights.encoder))}: if these are"
            f" the weights of an encoder, use load_encoder({str(path)!r}), and to pretrain it further"
            " SparK(load_encoder(...))"
        )
    name = encoder_name(weights, model_name)
    tensors = own_names(weights.encoder, name)
    options: dict[str, Any] = {
        "input_size": weights.input_size or 224,
        "in_chans": stored_channels(tensors, name),
        "mask_ratio": weights.config.get("mask_ratio", 0.6),
        "densify_norm": "bn" if "densify.0.norm.running_mean" in weights.others else "ln",
    }
    if "decoder.blocks.0.upsample.weight" in weights.others:
        options["decoder_width"] = weights.others["decoder.blocks.0.upsample.weight"].shape[0]
    model = SparK(name, layout=layout, **{**options, **spark_kwargs})
    stored = options["in_chans"]
    if model.in_chans != stored:
        first = f"{first_convolution(model.encoder)}.weight"
        tensors[first] = adapt_input(tensors[first], model.in_chans)
        for key in ("decoder.head.weight", "decoder.head.bias"):
            if key in weights.others:
                weights.others[key] = adapt_output(weights.others[key], stored, model.in_chans)
    tensors = {f"encoder.{key}": value for key, value in tensors.items()}
    unreached = [key for key, parameter in model.encoder.named_parameters() if not parameter.requires_grad]
    report = fit(
        {**tensors, **weights.others},
        model,
        source=weights.source,
        name=f"SparK with {name}",
        advice=name_another(MODEL_NAME),
        optional=[f"encoder.{key}" for key in unreached],
        ignored=weights.ignored,
    )
    logger.log(logging.WARNING if report.missing else logging.INFO, "%s", report)
    return model
