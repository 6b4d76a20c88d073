"""A depth model as one module from pixels to depth, for export (`spark.weights.graph`)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.model.depth_model import DepthModel
from spark.model.normalise import Normalise
from spark.weights.graph import pad_to_stride


class DepthGraph(nn.Module):
    """From pixels to what a depth model says, at the size of the image.

    Args:
        model: In evaluation mode from here on. Its calibration is applied, as always.
        fit: (H, W) that a model was trained at [px]: images of any size are brought to it inside, as `predict_image`
            does, and the result back to the image's size. None: the network sees images as they are.
        pad: Sides may be other than multiples of the stride, and are padded.
    """

    def __init__(self, model: DepthModel, fit: tuple[int, int] | None = None, pad: bool = True) -> None:
        super().__init__()
        self.model = model
        self.normalise = Normalise(model.mean, model.std)
        self.fit = fit
        self.pad = pad
        self.eval()

    @property
    def outputs(self) -> dict[str, str]:
        """Name of the output, as in `DepthOutput`; its height and width are the image's."""
        return {"depth" if "depth" in self.model.outputs else "disparity_affine": ""}

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Return [B, 1, H, W] of uint8 images [B, 3, H, W]."""
        return (self._values(image, self.pad),)

    def reference(self, image: Tensor) -> list[Tensor]:
        """The same by the model's own padding and cutting."""
        return [self._values(image, pad=False)]

    def _values(self, image: Tensor, pad: bool) -> Tensor:
        height, width = image.shape[-2:]
        x = image if self.fit is None else resample(image, fitted(image, self.fit))
        rows, columns = x.shape[-2:]
        x = self.normalise(x)
        output = self.model(pad_to_stride(x, self.model.stride) if pad else x)
        values = output.disparity_affine if output.depth is None else output.depth
        values = values[..., :rows, :columns]
        if self.fit is not None:
            values = F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)
        return values


def fitted(image: Tensor, wanted: tuple[int, int]) -> Tensor:
    """The size (H, W), int64 [2], at which `predict_image` presents images [B, C, H, W], computed in the graph.

    It is `wanted` [px] for images of its proportions, within 1 %, else its long side at the image's proportions.
    """
    size = _size(image).double()
    goal = torch.tensor(wanted, dtype=torch.float64)
    ratio = goal / size
    scaled = (size * (goal.max() / size.max())).round().clamp(min=1)
    equal = (ratio[0] / ratio[1] - 1).abs() <= 0.01
    return torch.where(equal, goal, scaled).long()


def resample(image: Tensor, size: Tensor) -> Tensor:
    """Pillow's bilinear resize with antialiasing of uint8 images [B, C, H, W] to `size` int64 [2] (h, w), bit for bit.

    Matrix products, for the exporter knows no such operator; as in Pillow first within rows, then within columns.
    """
    before = _size(image)
    x = _shorten(image.float(), triangle_weights(before[1], size[1]))
    return (
        _shorten(x.transpose(-1, -2), triangle_weights(before[0], size[0])).transpose(-1, -2).to(torch.uint8)
    )


def _size(image: Tensor) -> Tensor:
    """(H, W) as int64 [2]: of a tensor, unlike two numbers, tracing keeps what is computed, choices above all."""
    return torch._shape_as_tensor(image)[-2:]  # pyright: ignore[reportPrivateImportUsage]


def _shorten(levels: Tensor, weights: Tensor) -> Tensor:
    """Whole levels [..., before] averaged with weights int64 [after, before] in 2^-22 to whole levels [..., after].

    In two products, of the upper bits of the weights and of the lower 8: fp32 adds up each without rounding, so every
    runtime comes to the same, in whatever order it adds.
    """
    upper = torch.div(weights, 2**8, rounding_mode="floor")
    lower = weights - 2**8 * upper
    sums = 2**8 * (levels @ upper.float().t()).long() + (levels @ lower.float().t()).long()
    return torch.div(sums + 2**21, 2**22, rounding_mode="floor").float()


def triangle_weights(before: Tensor, after: Tensor) -> Tensor:
    """Weights int64 [after, before], in 2^-22, of a triangle as wide as one new pixel or, if wider, one old pixel.

    A new pixel is the mean of the old ones weighted by the triangle around its centre; what is outside the image counts
    as nothing. Source: `precompute_coeffs` and `normalize_coeffs_8bpc` of Pillow's Resample.c, here without floats: in
    units of 1 / (2 after) of an old pixel all places are whole numbers.
    """
    new, old = (2 * torch.arange(count) + 1 for count in (after, before))  # pyright: ignore[reportArgumentType, reportCallIssue]
    distance = (old[None] * after - new[:, None] * before).abs()
    height = (2 * torch.maximum(before, after) - distance).clamp(min=0)
    total = height.sum(1, keepdim=True)
    return torch.div(2**23 * height + total, 2 * total, rounding_mode="floor")


def describe(model: DepthModel, fit: tuple[int, int] | None, protocol: str) -> dict[str, Any]:
    """What a file of a depth model says of itself."""
    metric = "depth" in model.outputs
    calibration = model.calibration
    return {
        "output": "depth [B, 1, H, W]" if metric else "disparity_affine [B, 1, H, W]",
        "unit": "metre" if metric else "inverse depth up to scale and shift, larger is nearer",
        "min_depth": model.depth_range.min_depth,
        "max_depth": model.max_depth,
        "protocol": protocol,
        "calibration": "none" if calibration is None else calibration.as_config(),
        "head": model.head_name,
        "trained_at": "not recorded" if model.image_size is None else list(model.image_size),
        "resize": f"inside, to {fit[0]}x{fit[1]} px" if fit else "none: the network sees the image as it is",
        "normalisation": {"inside": True, "mean": list(model.mean), "std": list(model.std)},
    }
