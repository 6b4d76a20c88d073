"""Any timm convnet as a pyramid of features.  The only module of this package that knows timm's model API.

An encoder is a stock timm model, unwrapped: its state dict is timm's.  `pyramid` reads its feature maps through
timm's `forward_intermediates`, which works on plain tensors and on sparse ones.

Or it is anybody's own module that keeps this contract:
1. `forward(images)` returns the list of feature maps [B, C_i, H / s_i, W / s_i], the largest first, each stride s_i
   twice the one before;
2. the attribute `feature_info` says which: a list of `{"num_chs": C_i, "reduction": s_i}`;
3. sizes divide evenly: images whose sides are multiples of the last stride give maps of exactly these sizes.
"""

import difflib
import importlib
import itertools
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import timm
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from spark.errors import FileError, UserError
from spark.model.names import is_own


class RefusedOptions(UserError):
    """An encoder does not take the options that it is to be made with."""


class PyramidLevel(NamedTuple):
    """One feature map of an encoder: timm's index of it, its channels, and its stride [px]."""

    index: int
    channels: int
    stride: int


def build_encoder(
    name: str, in_chans: int = 3, drop_path: float = 0.0, pretrained: bool = False, **timm_kwargs: Any
) -> nn.Module:
    """Make a stock timm model without classifier, or one's own encoder.

    Args:
        name: a timm model name, with or without a tag; or "package.module:factory", a function or class of one's own
            that is called with `in_chans` (and with `drop_path` where that is not 0).
        in_chans: input channels.
        drop_path: stochastic depth rate of the deepest block; 0 turns off a model's own, too.
        pretrained: load timm's published weights (needs network or a cache).
        timm_kwargs: handed to `timm.create_model`.

    Raises:
        UserError: unknown name (nearest names are offered), or a model without a feature pyramid.
        OSError: the published weights could not be downloaded.
    """
    if is_own(name):
        if pretrained:
            raise UserError(f"{name} is not timm's, so timm has no weights of it: leave pretrained false")
        return _build_own(
            name, {"in_chans": in_chans} | ({"drop_path": drop_path} if drop_path else {}) | timm_kwargs
        )
    if drop_path > 0:
        timm_kwargs["drop_path_rate"] = drop_path
    encoder = create_model(name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **timm_kwargs)
    if drop_path == 0:  # some models have a rate of their own
        for module in encoder.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    pyramid_info(encoder)
    return encoder


def _build_own(name: str, options: dict[str, Any]) -> nn.Module:
    """Call one's own factory; the encoder remembers its name and options as `own_encoder`, for the export."""
    module_name, _, attribute = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{name} cannot be imported ({error}): the name is package.module:factory, and the package must be "
            "installed or its folder be on PYTHONPATH"
        ) from error
    try:
        encoder = factory(**options)
    except TypeError as error:
        raise RefusedOptions(
            f"{name} could not be called with {', '.join(f'{k}={v!r}' for k, v in options.items())} ({error}): it "
            "must take the number of image channels as in_chans, and drop_path where a run sets it"
        ) from error
    if not isinstance(encoder, nn.Module):
        raise UserError(f"{name} made a {type(encoder).__name__}, not a torch.nn.Module")
    pyramid_info(encoder)
    encoder.own_encoder = {"own": name, "model_args": options}  # type: ignore[assignment]
    return encoder


def create_model(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """`timm.create_model`; unknown names, wrong options and failed downloads raise `UserError`."""
    require_timm_name(name)
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except (AssertionError, TypeError, RuntimeError, KeyError) as error:
        raise RefusedOptions(f"timm model {name!r} does not accept these options: {error}") from error
    except OSError as error:  # huggingface_hub's errors, and urllib's, are of this kind
        if not pretrained:
            raise
        raise FileError(
            f"timm's weights of {name} could not be downloaded ({str(error).rstrip('.')}): connect to the network, "
            "or give an exported folder or a .pth file"
        ) from error


def require_timm_name(name: str) -> None:
    """Refuse a model or a tag that timm does not have; the nearest names are offered."""
    base = name.split(".")[0]
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=4, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else "; timm.list_models() lists all names"
        raise UserError(f"timm {timm.__version__} has no model named {name!r}{hint}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        published = timm.list_pretrained(f"{base}.*")
        hint = f"use {base} or one of {', '.join(published)}" if published else f"use {base}"
        raise UserError(f"timm {timm.__version__} has no weights named {name!r}: {hint}") from error


def pyramid_info(encoder: nn.Module) -> list[PyramidLevel]:
    """List the feature maps of an encoder, shallow (large) first, the deepest of each stride.

    Raises:
        UserError: the model does not yield maps of at least two strides, each twice the one before.
    """
    name = type(encoder).__name__
    entries = getattr(encoder, "feature_info", None)
    if entries is None:
        raise UserError(
            f"{name} yields no feature pyramid (it has no feature_info): use a convnet that "
            "timm.create_model(..., features_only=True) supports, or have your own say what maps it returns "
            "(docs/use/model_options.md)"
        )
    by_stride: dict[int, PyramidLevel] = {}
    for index, entry in enumerate(entries):
        level = PyramidLevel(index, int(entry["num_chs"]), int(entry["reduction"]))
        by_stride[level.stride] = level
    levels = [by_stride[stride] for stride in sorted(by_stride)]
    strides = [level.stride for level in levels]
    if len(levels) < 2 or any(b != 2 * a for a, b in itertools.pairwise(strides)):
        raise UserError(
            f"{name} yields no feature pyramid: its feature maps have strides {strides}, "
            "each should be twice the one before (plain vision transformers, for one, are not convnets)"
        )
    return levels


def pyramid(encoder: nn.Module, x: Any, levels: Sequence[PyramidLevel] | None = None) -> list[Any]:
    """Feature maps of `x` [B, C, H, W] (plain or sparse) at these levels, shallow first: [B, C_i, H / s_i, W / s_i]."""
    levels = pyramid_info(encoder) if levels is None else levels
    indices = [level.index for level in levels]
    if not hasattr(encoder, "forward_intermediates"):
        maps, count = encoder(x), len(encoder.feature_info)  # type: ignore[arg-type]
        if not isinstance(maps, list | tuple) or len(maps) != count:
            got = f"{len(maps)} maps" if isinstance(maps, list | tuple) else f"a {type(maps).__name__}"
            raise UserError(
                f"{type(encoder).__name__} returns {got}, not the list of {count} feature maps that its feature_info "
                "announces"
            )
        return [maps[index] for index in indices]
    return encoder.forward_intermediates(  # type: ignore[operator]
        x, indices=indices, intermediates_only=True, stop_early=True
    )


def unreached_parameters(encoder: nn.Module, levels: Sequence[PyramidLevel], in_chans: int) -> list[str]:
    """Names of the trainable parameters that take part in none of these feature maps (a classifier's norm, say).

    Found by differentiating a small dense forward.

    Raises:
        UserError: the encoder does not run on an image of twice its stride, or returns other maps than it announces.
    """
    return _probe(encoder, levels, in_chans)[0]


def _probe(
    encoder: nn.Module, levels: Sequence[PyramidLevel], in_chans: int
) -> tuple[list[str], set[nn.Module]]:
    """`unreached_parameters`, and the modules that were called on the way."""
    called: set[nn.Module] = set()
    hooks = [part.register_forward_pre_hook(lambda part, _: called.add(part)) for part in encoder.modules()]
    named = [(name, p) for name, p in encoder.named_parameters() if p.requires_grad]
    first, side = named[0][1], 2 * levels[-1].stride
    was_training = encoder.training
    encoder.eval()
    try:
        with torch.enable_grad():
            probe = torch.zeros(1, in_chans, side, side, device=first.device, dtype=first.dtype)
            features = pyramid(encoder, probe, levels)
            if not hasattr(encoder, "forward_intermediates"):
                _require_announced(encoder, features, levels, side)
            total = torch.stack([feature.sum() for feature in features]).sum()
            grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{type(encoder).__name__} does not run on an image of {side}x{side} px, {in_chans} channels ({reason}"
            f"{_where(encoder, error)}): use a convnet that takes any multiple of its stride (ResNet, ConvNeXt, ...), "
            "made for these channels"
        ) from error
    finally:
        encoder.train(was_training)
        for hook in hooks:
            hook.remove()
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is None], called


def _where(encoder: nn.Module, error: Exception) -> str:
    """The module of the encoder in which an error was raised, in words; empty if it was none of them."""
    names = {module: name for name, module in encoder.named_modules() if name}
    callers = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    inner = [caller for caller in callers if isinstance(caller, nn.Module) and caller in names]
    return f" in module {names[inner[-1]]} ({type(inner[-1]).__name__})" if inner else ""


def _require_announced(
    encoder: nn.Module, features: Sequence[Tensor], levels: Sequence[PyramidLevel], side: int
) -> None:
    for feature, level in zip(features, levels, strict=True):
        announced = [1, level.channels, side // level.stride, side // level.stride]
        if list(feature.shape) != announced:
            raise UserError(
                f"{type(encoder).__name__} made a feature map {list(feature.shape)} of an image of {side}x{side} px, "
                f"where its feature_info announces {announced}: correct num_chs and reduction there, or "
                "the padding inside"
            )


def cut_pyramid(levels: Sequence[PyramidLevel], stride: int) -> list[PyramidLevel]:
    """The levels down to a stride [px]; deeper parts of the encoder then do not run. UserError for no such map."""
    strides = [level.stride for level in levels]
    if stride not in strides:
        raise UserError(f"the encoder has no feature map of stride {stride}: use one of {strides}")
    return list(levels[: strides.index(stride) + 1])


def freeze_unreached(encoder: nn.Module, levels: Sequence[PyramidLevel], in_chans: int) -> None:
    """Freeze what `unreached_parameters` finds: without gradients, it would trouble DistributedDataParallel."""
    for name in unreached_parameters(encoder, levels, in_chans):
        encoder.get_parameter(name).requires_grad_(False)


class Unneeded(nn.Module):
    """Stands where a part of an encoder was that no feature map in use depends on.

    Weights for that part, in files of an encoder that still had it, are passed over.
    """

    def forward(self, *inputs: Any) -> None:
        """Refuse: whoever needs this part wants an encoder of which it was not taken."""
        raise UserError(
            "a part of this encoder was taken out, no map that its depth model reads needs it: make the encoder anew"
        )

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Take nothing, and miss nothing."""


def drop_unneeded(encoder: nn.Module, levels: Sequence[PyramidLevel], in_chans: int) -> None:
    """Take out, in place, every module that neither runs for these feature maps nor has a parameter in them.

    Single parameters that are left without effect, in modules that do run, are frozen (see `freeze_unreached`).
    """
    unreached, called = _probe(encoder, levels, in_chans)

    def drop(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            own = {f"{prefix}{name}.{key}" for key, _ in child.named_parameters()}
            if own and own <= set(unreached) and called.isdisjoint(child.modules()):
                parent._modules[name] = Unneeded()
            else:
                drop(child, f"{prefix}{name}.")

    drop(encoder, "")
    left = dict(encoder.named_parameters())
    for name in unreached:
        if name in left:
            left[name].requires_grad_(False)


def without_unneeded(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a file without those of parts that were taken out of the model that is to receive them."""
    gone = tuple(f"{name}." for name, part in model.named_modules() if isinstance(part, Unneeded))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}


def timm_config(encoder: nn.Module) -> dict[str, Any]:
    """A timm model's `pretrained_cfg`, to read and to change; empty for any other network."""
    config: Any = getattr(encoder, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def first_convolution(encoder: nn.Module) -> str | list[str] | None:
    """Name of the convolution that reads the image.

    timm's own note of it goes first (some models have several), unless an option such as `stem_type` made it untrue.
    """
    noted = timm_config(encoder).get("first_conv")
    names = [noted] if isinstance(noted, str) else list(noted or ())
    parameters = dict(encoder.named_parameters())
    if names and all(f"{name}.weight" in parameters for name in names):
        return noted
    return next((key.removesuffix(".weight") for key, p in parameters.items() if p.ndim == 4), None)


def input_channels(encoder: nn.Module) -> int:
    """Channels that a convnet reads: those of its first convolution."""
    return next((p.shape[1] for p in encoder.parameters() if p.ndim == 4), 3)
