"""A depth model as one module from pixels to depth, for export (`spark.graphs`)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.model import DepthModel
from spark.graphs import Normalised, pad_to_stride


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
        self.normalise = Normalised(model.mean, model.std)
        self.fit = fit
        self.pad = pad
        self.eval()

    @property
    def outputs(self) -> dict[str, str]:
        """Name of the output, as in `DepthOutput`; its height and width are the image's."""
        return {"depth" if "depth" in self.model.outputs else "disparity_affine": ""}

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """Return [B, 1, H, W] of uint8 images [B, 3, H, W]."""
        height, width = image.shape[-2:]
        x = image if self.fit is None else resample(image, fitted(image, self.fit))
        rows, columns = x.shape[-2:]
        x = self.normalise(x)
        output = self.model(pad_to_stride(x, self.model.stride) if self.pad else x)
        values = output.disparity_affine if output.depth is None else output.depth
        values = values[..., :rows, :columns]
        if self.fit is not None:
            values = F.interpolate(values, size=(height, width), mode="bilinear", align_corners=False)
        return (values,)

    def reference(self, image: Tensor) -> list[Tensor]:
        """The same by the model's own padding and cutting."""
        size = (image.shape[-2], image.shape[-1])
        x = image if self.fit is None else resample(image, fitted(image, self.fit))
        output = self.model(self.normalise(x))
        values = output.disparity_affine if output.depth is None else output.depth
        return [
            values if self.fit is None else F.interpolate(values, size, mode="bilinear", align_corners=False)
        ]


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
    """Pillow's bilinear resize with antialiasing of uint8 images [B, C, H, W] to `size` int64 [2] (h, w), as uint8.

    Two matrix products, for the exporter knows no such operator: first within rows, then within columns, each rounded
    to whole levels as Pillow does. Pillow's weights have 22 bits, these 15: where a sum lies about half-way between two
    levels the other one may come out (of noise at odd sizes, up to 3 % of the pixels).
    """
    before = _size(image)
    x = _whole(image.float() @ triangle_weights(before[1], size[1]).t())
    return _whole(triangle_weights(before[0], size[0]) @ x).to(torch.uint8)


def _size(image: Tensor) -> Tensor:
    """(H, W) as int64 [2]: of a tensor, unlike two numbers, tracing keeps what is computed, choices above all."""
    return torch._shape_as_tensor(image)[-2:]  # pyright: ignore[reportPrivateImportUsage]


def _whole(levels: Tensor) -> Tensor:
    return (levels + 0.5).floor()


def triangle_weights(before: Tensor, after: Tensor) -> Tensor:
    """Weights [after, before] of a triangle filter as wide as one new pixel, or one old pixel where that is wider.

    A new pixel is the mean of the old ones weighted by the triangle around its centre (what is outside the image counts
    as nothing), as in `precompute_coeffs` of Pillow's Resample.c. With centres in units of 1 / (2 after) of an old
    pixel all of it is integers, and the weights are multiples of 2^-15: so they are the same in every runtime, and so
    are their products with levels and the sums of these in fp32, whoever adds them up in what order.
    """
    new, old = 2 * torch.arange(after) + 1, 2 * torch.arange(before) + 1  # pyright: ignore[reportArgumentType, reportCallIssue]
    distance = (old[None] * after - new[:, None] * before).abs()
    height = (2 * torch.maximum(before, after) - distance).clamp(min=0)
    total = height.sum(1, keepdim=True)
    weights = torch.div(2**16 * height + total, 2 * total, rounding_mode="floor")
    return weights.float() / 2**15


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
        "resize": "none: the network sees the image as it is"
        if fit is None
        else f"inside, to {fit[0]}x{fit[1]} px",
        "normalisation": {"inside": True, "mean": list(model.mean), "std": list(model.std)},
    }
