"""SparK: mask, encode, densify, decode, compare.

Source: Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023.
Shapes: images [B, C, H, W], a mask of fh x fw patches of `patch_size` pixels.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spark.errors import UserError
from spark.model.ablations import dense_pyramid, fill_masked
from spark.model.criterion import TARGETS, masked_patch_loss
from spark.model.decoder import Densify, LightDecoder, mask_token
from spark.model.encoder import (
    PyramidLevel,
    build_encoder,
    cut_pyramid,
    freeze_unreached,
    pyramid,
    pyramid_info,
)
from spark.model.masking import MaskRatio, check_masks, mean_ratio, num_visible, random_visible, ratio_range
from spark.sparse import LAYOUTS, SparseTensor, sites, sparsify
from spark.sparse.choice import AUTO, Choice, choose_layout, convolution_kind

MASKED_PIXELS = ("absent", "zero", "token")
LOSS_ON = ("masked", "all")


class SparKOutput(NamedTuple):
    """Result of one masked forward.

    Attributes:
        loss: scalar, over the masked patches.
        prediction: [B, C, H, W], in the space of the target.
        target: [B, C, H, W], each patch normalised by its own mean and deviation. (With `target="hog"` both are
            [B, 9 C, H / 8, W / 8].)
        visible: [B, 1, fh, fw] bool, the mask that was used.
    """

    loss: Tensor
    prediction: Tensor
    target: Tensor
    visible: Tensor


class SparK(nn.Module):
    """Sparse and hierarchical masked modelling around a stock timm convnet.

    Weights are kept in channels_last memory, the order of packed rows; values and state dict are the same.
    Nothing in it depends on the image size, so weights trained at one size run and load at any other.

    Args:
        encoder: a timm model name, "package.module:factory" for one's own (see `spark.model.encoder`), or such a model.
        input_size: [px], an int or (H, W); only used to check sizes early and to report `grid`. Forward takes any size
            that is a multiple of the patch size.
        mask_ratio: share of patches hidden from the encoder, or a range (low, high) of it; masks that the model draws
            itself take one number of the range for all images of a forward.
        in_chans: image channels (of a named encoder; a given one must have been made with as many).
        patch_size: [px], a multiple of the stride; default the stride itself.
        stride: of the deepest feature map that is used [px], which decides about smallest patches and decoder depth;
            deeper parts of the encoder neither run nor train. Default: the encoder's own. To keep all parts at a lower
            stride, have timm dilate them with its option `output_stride`.
        decoder_width: channels at the decoder's deepest block; 768 is the official one, 256 is much cheaper.
        layout: "packed" computes visible sites only, "masked" is the dense reference of equal value; "spconv" and
            "triton" are "packed" with the convolutions of these packages, on CUDA. "auto" is the one of them that was
            the fastest in the committed measurements, chosen in the first forward on each kind of device.
        drop_path: stochastic depth rate of a named encoder.
        sync_bn: batch statistics over all processes.
        densify_norm: "bn" or "ln"; default "bn" for an encoder with any batch norm, "ln" for all others (layer norm,
            group norm, no norm).
        decoder_stages: blocks of the decoder, each doubling the resolution; default as many as it takes to reach the
            image's. With fewer, each position of the last block predicts a square of pixels, and feature maps of higher
            resolution than that are not read.
        densify_kernel: 3, or 1 for cheaper projections (the deepest one always has 1).
        decoder_maps: feature maps that the decoder receives, the deepest ones; 4 are the official hierarchy (strides 4
            to 32 of a common convnet), 1 is a decoder of a single scale.
        masked_pixels: what the encoder finds at masked patches. "absent": nothing, it runs on visible sites only
            (SparK). "zero": zeros, and the dense network runs on the whole image; its features at masked sites are then
            replaced by tokens as ever. "token": one learned number a channel, and the dense network runs on the whole
            image; its features are kept at all sites (SimMIM). The last two are ablations: `layout` then only
            concerns what is between encoder and decoder.
        target: "normalised": pixels, every patch by its own mean and deviation; "pixels": as they are given; "hog":
            histograms of oriented gradients (MaskFeat; `spark.model.hog`), which the decoder predicts at a stride of 8.
        loss_on: "masked" patches, or "all".
        mask_block_size: side of the blocks of patches that are hidden or shown together, see `spark.model.masking`.

    Raises:
        UserError: unknown model, sizes or options that do not fit; the message says what does.
    """

    def __init__(
        self,
        encoder: str | nn.Module,
        input_size: int | tuple[int, int] = 224,
        mask_ratio: MaskRatio = 0.6,
        in_chans: int = 3,
        patch_size: int | None = None,
        decoder_width: int = 768,
        layout: str = "packed",
        drop_path: float = 0.0,
        sync_bn: bool = True,
        densify_norm: str | None = None,
        decoder_stages: int | None = None,
        densify_kernel: int = 3,
        decoder_maps: int = 4,
        masked_pixels: str = "absent",
        target: str = "normalised",
        loss_on: str = "masked",
        mask_block_size: int = 1,
        stride: int | None = None,
        **timm_kwargs: Any,
    ):
        super().__init__()
        if isinstance(encoder, str):
            encoder = build_encoder(encoder, in_chans, drop_path, **timm_kwargs)
        elif drop_path or timm_kwargs:
            raise UserError(
                "drop_path and timm options shape a named encoder; a model that is already made keeps its own"
            )
        _require_one_of("layout", layout, (AUTO, *LAYOUTS))
        if layout != AUTO:
            LAYOUTS[layout]()  # refuses now what needs a package that is not there
        _require_one_of("masked_pixels", masked_pixels, MASKED_PIXELS)
        _require_one_of("target", target, TARGETS)
        _require_one_of("loss_on", loss_on, LOSS_ON)
        self.encoder = encoder
        self.in_chans = in_chans
        self.mask_ratio = mask_ratio
        self.mask_block_size = mask_block_size
        self.layout = layout
        self._choices: dict[tuple[str, str], Choice] = {}
        self.sync_bn = sync_bn
        self.masked_pixels = masked_pixels
        self.target = target
        self.loss_on = loss_on
        levels = pyramid_info(encoder)
        if stride is not None:
            levels = cut_pyramid(levels, stride)
        self.stride = levels[-1].stride
        self.patch_size = _patch_size(patch_size, levels)
        stages, upscale = _decoder_stages(decoder_stages, self.stride, target)
        if decoder_maps < 1:
            raise UserError(
                f"decoder_maps {decoder_maps} must be at least 1: the decoder needs a feature map"
            )
        if densify_kernel not in (1, 3):
            raise UserError(f"densify_kernel {densify_kernel} must be 1 or 3")
        self.levels = levels[-min(decoder_maps, stages + 1) :]
        self.input_size = (
            (input_size, input_size) if isinstance(input_size, int) else (input_size[0], input_size[1])
        )
        self.grid = self.grid_of(*self.input_size)
        check_masks(self.grid, mask_ratio, mask_block_size)

        norm = densify_norm or norm_kind(encoder)
        if norm not in ("bn", "ln"):
            raise UserError(f"densify_norm {densify_norm!r} does not exist: use 'bn' or 'ln'")
        channels = in_chans * TARGETS[target].features
        self.decoder = LightDecoder(decoder_width, stages, channels, sync_bn, upscale)
        self.densify = nn.ModuleList(
            Densify(
                level.channels,
                self.decoder.widths[depth],
                norm=norm,
                kernel_size=1 if depth == 0 else densify_kernel,
                identity_if_equal=depth == 0,
                sync_bn=sync_bn,
                has_token=masked_pixels != "token",
            )
            for depth, level in enumerate(reversed(self.levels))
        )
        if masked_pixels == "token":
            self.token = mask_token(in_chans)
        freeze_unreached(encoder, self.levels, in_chans)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as packed rows lie in memory

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches (fh, fw) of an image of this size [px], which must be a multiple of the patch size."""
        p = self.patch_size
        if height % p or width % p or min(height, width) < p:
            low = (max(height // p, 1) * p, max(width // p, 1) * p)
            high = (max(math.ceil(height / p), 1) * p, max(math.ceil(width / p), 1) * p)
            sizes = " or ".join(f"{h}x{w}" for h, w in dict.fromkeys((low, high)))
            raise UserError(
                f"image size {height}x{width} is no multiple of the patch size {p}: use {sizes}, for example"
            )
        return height // p, width // p

    def layout_on(self, device_type: str, precision: str) -> Choice:
        """The layout of a forward on "cpu" or "cuda", in "fp32", "bf16", "fp16" or "fp64", and why."""
        if self.layout != AUTO:
            return Choice(self.layout, "as named")
        key = (device_type, precision)
        if key not in self._choices:
            self._choices[key] = choose_layout(
                device_type, convolution_kind(self.encoder), precision, mean_ratio(self.mask_ratio)
            )
        return self._choices[key]

    def forward(
        self, images: Tensor, visible: Tensor | None = None, visible_count: int | None = None
    ) -> SparKOutput:
        """One masked forward.

        Args:
            images: [B, C, H, W], normalised as the encoder expects; H and W multiples of the patch size.
            visible: [B, 1, fh, fw] bool, True = seen; drawn at random by default.
            visible_count: visible patches of all images together; with it, nothing in a forward waits for a GPU. Count
                them before the mask moves there. A mask that is drawn here is of known count.

        Raises:
            UserError: sizes, channels or types that do not fit, or (not looked at on a GPU) nothing visible or another
                number of visible patches. On a GPU a wrong number fails an assertion of the device.
        """
        if not images.is_floating_point():
            raise UserError(
                f"images are {str(images.dtype).removeprefix('torch.')}: give floating-point numbers, divided by 255 "
                "and normalised as the encoder expects"
            )
        grid = self.grid_of(*images.shape[2:])
        if images.shape[1] != self.in_chans:
            raise UserError(
                f"images have {images.shape[1]} channels, the model was made for in_chans={self.in_chans}"
            )
        if visible is None:
            low, high = ratio_range(self.mask_ratio)
            ratio = low if low == high else low + (high - low) * torch.rand(()).item()
            visible = random_visible(
                len(images), grid, ratio, device=images.device, block=self.mask_block_size
            )
            visible_count = len(images) * num_visible(grid, ratio)
        elif tuple(visible.shape) != (len(images), 1, *grid):
            raise UserError(
                f"visible must be [{len(images)}, 1, {grid[0]}, {grid[1]}], got {list(visible.shape)}"
            )
        # Not on a GPU: looking would wait for all work under way.
        if not sites.static_on(images.device) and not visible.any():
            raise UserError("visible hides every patch of every image: leave at least one True")
        features = self._features(images, visible, visible_count)
        densified = [
            densify(x, dense=depth > 0 or not self.decoder.takes_filled)
            for depth, (densify, x) in enumerate(zip(self.densify, reversed(features), strict=True))
        ]
        prediction = self.decoder(densified)
        task = TARGETS[self.target]
        target = task.make(images, self.patch_size)
        side = self.patch_size // task.cell
        loss = masked_patch_loss(prediction, target, visible, side, everywhere=self.loss_on == "all")
        return SparKOutput(loss, prediction, target, visible)

    def _features(self, images: Tensor, visible: Tensor, visible_count: int | None) -> list[Any]:
        """What the encoder makes of the masked images, shallow first; sparse but for `masked_pixels="token"`."""

        def sparse(x: Tensor) -> SparseTensor:
            layout = self.layout_on(images.device.type, _precision(images)).layout
            return sparsify(x, visible, layout, self.sync_bn, visible_count)

        if self.masked_pixels == "absent":
            return pyramid(self.encoder, sparse(images), self.levels)
        filled = fill_masked(images, visible, self.token if self.masked_pixels == "token" else 0.0)
        features = dense_pyramid(self.encoder, filled, self.levels, self.sync_bn)
        return features if self.masked_pixels == "token" else [sparse(x) for x in features]

    def reconstruct(self, images: Tensor, output: SparKOutput) -> Tensor:
        """Visible patches of the images, and at masked ones the prediction in image space: [B, C, H, W].

        UserError for a target that is no image.
        """
        restore = TARGETS[self.target].restore
        if restore is None:
            raise UserError(
                f"no image can be made of target {self.target!r}: spark.hog.draw_hog draws histograms, and "
                "spark.monitor.panels.reconstruction_panels true ones beside predicted ones"
            )
        predicted = restore(output.prediction.to(images.dtype), images, self.patch_size)
        seen = output.visible.repeat_interleave(self.patch_size, 2).repeat_interleave(self.patch_size, 3)
        return predicted.where(~seen, images)


def _patch_size(wanted: int | None, levels: Sequence[PyramidLevel]) -> int:
    """The patch size, the deepest stride by default [px]; UserError where that does not divide it."""
    stride = levels[-1].stride
    if wanted is None or (wanted > 0 and wanted % stride == 0):
        return wanted or stride
    fitting = [level.stride for level in levels if wanted > 0 == wanted % level.stride]
    advice = f"; or use the encoder at stride {fitting[-1]} (stride or output_stride)" if fitting else ""
    raise UserError(f"patch_size {wanted} must be a multiple of the encoder's stride {stride}{advice}")


def _decoder_stages(wanted: int | None, stride: int, target: str) -> tuple[int, int]:
    """Blocks of the decoder, and the side of the square that a position of the last one predicts [cells of the target].

    Raises:
        UserError: no decoder of such blocks leads from the stride to the target.
    """
    if 2 ** int(math.log2(stride)) != stride:
        raise UserError(
            f"the encoder's total stride is {stride}; the decoder doubles sizes and needs a power of 2"
        )
    cell = TARGETS[target].cell
    most = int(math.log2(stride / cell))
    if most < 1:
        raise UserError(
            f"target {target!r} is predicted at a stride of {cell}, which the encoder's stride of {stride} does not "
            "exceed: use another target or a deeper encoder"
        )
    stages = most if wanted is None else wanted
    if not 1 <= stages <= most:
        raise UserError(
            f"decoder_stages {wanted} must be 1 to {most}, log2 of the encoder's stride"
            + (f" over that of the target, {cell}" if cell > 1 else "")
        )
    return stages, 2 ** (most - stages)


def _require_one_of(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise UserError(f"{name} {value!r} does not exist: use one of {', '.join(map(repr, known))}")


def _precision(images: Tensor) -> str:
    """What a forward of these images computes in, as measurements name it: "fp32", "bf16", "fp16" or "fp64"."""
    device = images.device.type
    autocast = torch.is_autocast_enabled(device) and images.dtype != torch.float64  # which it leaves alone
    dtype = torch.get_autocast_dtype(device) if autocast else images.dtype
    return f"{'bf' if dtype == torch.bfloat16 else 'fp'}{8 * dtype.itemsize}"


def norm_kind(encoder: nn.Module) -> str:
    """Whose recipe an encoder takes, "bn" (ResNets') or "ln" (ConvNeXts').

    The official rule goes by the name: batch norm for ResNets, layer norm for ConvNeXts. Networks with neither norm do
    not depend on the batch, as with layer norm.
    """
    batch = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules())
    return "bn" if batch else "ln"
