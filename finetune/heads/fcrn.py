"""FCRN head: up-projections from the deepest map, computed without the zeros of unpooling.

Source: Laina et al. 2016 (arXiv 1606.00373, sections 3.2 and 3.3).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads.base import Head, levels_at
from finetune.heads.output import DepthOutput, DepthRange
from spark.errors import UserError
from spark.model.encoder import PyramidLevel

Padding: TypeAlias = Literal["bottom_right", "top_left"]
EPSILON = 1e-4
"""Of batch norm, as in the authors' code."""


class FCRN(Head):
    """A 1x1 convolution, up-projections from stride 32 to 2, dropout, and a 3x3 convolution to depth.

    The depth of the paper has no bounds; here it keeps to the model's range. With ResNet-50 and the usual widths the
    model has 63.6 million parameters.

    Args:
        levels: The encoder's pyramid, with a map at stride 32.
        depth_range: From the last convolution's output to metres.
        widths: Channels of the 1x1 convolution and of the four up-projections.
        padding: Side on which up-convolutions pad, see `UpConvolution`.
        dropout: Share of the last features that training drops.
    """

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        depth_range: DepthRange,
        widths: Sequence[int] = (1024, 512, 256, 128, 64),
        padding: Padding = "bottom_right",
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.levels = levels_at("fcrn", levels, (32,))
        if len(widths) != 5 or min(widths) < 1:
            raise UserError(
                f"widths must hold 5 positive numbers, for strides 32, 16, 8, 4, 2, got {list(widths)}."
            )
        if padding not in ("bottom_right", "top_left"):
            raise UserError(f"padding must be bottom_right or top_left, got {padding!r}.")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {dropout}.")
        self.reduce = nn.Conv2d(self.levels[0].channels, widths[0], kernel_size=1)
        self.norm = nn.BatchNorm2d(widths[0], EPSILON)
        self.up = nn.Sequential(*(UpProjection(a, b, padding) for a, b in pairwise(widths)))
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Conv2d(widths[-1], 1, kernel_size=3, padding=1)
        self.depth_range = depth_range
        # A tenth of the usual gain, so that the first predictions are the initial depth and not noise around it.
        nn.init.xavier_uniform_(self.project.weight, gain=0.1)
        nn.init.constant_(self.project.bias, depth_range.initial_logit)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at half the size of the images."""
        (deepest,) = features
        x = self.up(self.norm(self.reduce(deepest)))  # no ReLU behind this norm
        return DepthOutput(depth=self.depth_range(self.project(self.dropout(x))))


class UpProjection(nn.Module):
    """Residual block that doubles the size: two up-convolutions, one of them followed by a 3x3 convolution, added up.

    Args:
        channels: Of the input.
        width: Of the output.
        padding: Of the up-convolutions.
    """

    def __init__(self, channels: int, width: int, padding: Padding = "bottom_right") -> None:
        super().__init__()
        self.main = nn.Sequential(
            UpConvolution(channels, width, padding),
            nn.BatchNorm2d(width, EPSILON),
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.BatchNorm2d(width, EPSILON),
        )
        self.shortcut = nn.Sequential(UpConvolution(channels, width, padding), nn.BatchNorm2d(width, EPSILON))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, h, w] to [B, width, 2h, 2w]."""
        return (self.main(x) + self.shortcut(x)).relu()


class UpConvolution(nn.Conv2d):
    """Unpooling by zeros and a 5x5 convolution, as four small convolutions whose results interleave.

    Unpooling puts each value at the upper left of a 2x2 block of zeros. A 5x5 kernel then meets values with 3x3, 3x2,
    2x3 or 2x2 of its taps, by the parity of row and column.

    Args:
        channels: Of the input.
        width: Of the output.
        padding: Where the two taps of odd rows and columns lie. "bottom_right": on the values of this block and the
            next, which is that convolution, padded alike on all sides. "top_left": on those of the block before and
            this one, as the authors' TensorFlow code has it; weights from there need it.
    """

    def __init__(self, channels: int, width: int, padding: Padding = "bottom_right") -> None:
        super().__init__(channels, width, kernel_size=5)
        self.odd = (1, 0) if padding == "top_left" else (0, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Map [B, C, h, w] to [B, width, 2h, 2w]."""
        phases = []
        for row in (0, 1):
            for column in (0, 1):
                taps = self.weight[:, :, row::2, column::2]
                beside, above = (self.odd if odd else (1, 1) for odd in (column, row))
                phases.append(F.conv2d(F.pad(input, (*beside, *above)), taps, self.bias))
        return F.pixel_shuffle(torch.stack(phases, 2).flatten(1, 2), 2)
