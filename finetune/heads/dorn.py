"""DORN head: depth as the number of thresholds that it exceeds, each asked by two channels of its own.

Source: Fu et al. 2018 (arXiv 1806.02446), channel order and counting as in the authors' published network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads.base import Head
from finetune.heads.output import DepthOutput, DepthRange, full_precision
from spark.errors import UserError
from spark.model.encoder import PyramidLevel

LOGITS = "ordinal_logits"
"""Name of the logits in `DepthOutput.extras`."""


@dataclass(frozen=True)
class Discretisation:
    """Spacing-increasing discretisation: edges of K bins at equal steps of log(depth + xi) (equation 1).

    Edge k is `exp(log(alpha + xi) + k / K * log((beta + xi) / (alpha + xi))) - xi`, k from 0 to K.

    Args:
        bins: K.
        alpha: The nearest edge [m].
        beta: The farthest edge [m].
        xi: Shift [m].
    """

    bins: int
    alpha: float
    beta: float
    xi: float = 0.0

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise UserError(f"bins must be at least 2, got {self.bins}.")
        if not 0 < self.alpha < self.beta:
            raise UserError(
                f"bins need 0 < alpha < beta [m], got alpha={self.alpha:g} and beta={self.beta:g}."
            )
        if self.xi < 0:
            raise UserError(f"xi must be 0 or more, got {self.xi:g}.")

    def edges(self) -> Tensor:
        """The edges fp64 [K + 1] [m]."""
        step = math.log((self.beta + self.xi) / (self.alpha + self.xi)) / self.bins
        return torch.exp(
            math.log(self.alpha + self.xi) + step * torch.arange(self.bins + 1, dtype=torch.float64)
        ).sub(self.xi)

    def thresholds(self) -> Tensor:
        """The lower edges of the bins, which logits ask about, fp64 [K] [m]."""
        return self.edges()[:-1]

    def centres(self) -> Tensor:
        """The means of the edges of each bin, fp64 [K] [m]."""
        edges = self.edges()
        return (edges[:-1] + edges[1:]) / 2


def log_odds(logits: Tensor) -> Tensor:
    """Log-odds [B, K, h, w] that depth is at least threshold k, of logits [B, 2K, h, w].

    Channel 2k + 1 stands for "at least threshold k", channel 2k for "nearer"; a softmax of the two is the probability.
    """
    return logits[:, 1::2] - logits[:, 0::2]


class DORN(Head):
    """Scene understanding (atrous pyramid and the mean of the image) on the deepest map, and 2K ordinal channels.

    `depth` is the middle of the bin that the count of exceeded thresholds gives, kept within the model's range: no
    gradient passes, and loss `ordinal` trains the logits. The defaults are the bins of the authors' network for NYU.
    Their full-image encoder has a fully connected layer for one size of image; here it is a mean over the whole image,
    which takes any.

    Args:
        levels: The encoder's pyramid, whose deepest map is used: of a ResNet with `output_stride: 8` as in the paper.
        depth_range: `max_depth` must not lie beyond `beta`.
        bins: K.
        alpha: The nearest edge of the bins [m]; what is nearer counts as the first bin.
        beta: The farthest edge [m].
        xi: Shift of depth before its logarithm [m].
        width: Channels of each of the five branches.
        fused: Channels behind them.
        dilations: Of the three atrous branches; 4, 8, 12 for NYU, 6, 12, 18 for KITTI.
        dropout: Share of channels that training drops, before and behind the fusion.
    """

    counted = ("depth",)

    centres: Tensor

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        depth_range: DepthRange,
        bins: int = 68,
        alpha: float = 0.6977,
        beta: float = 10.591,
        xi: float = 0.0,
        width: int = 512,
        fused: int = 2048,
        dilations: Sequence[int] = (4, 8, 12),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.bins = Discretisation(bins, alpha, beta, xi)
        if depth_range.max_depth > beta:
            raise UserError(
                f"the bins of head 'dorn' end at beta={beta:g} m, and max_depth is {depth_range.max_depth:g} m: raise"
                " head_options.beta, or lower max_depth"
            )
        if min(width, fused, *dilations) < 1 or not dilations:
            raise UserError(
                f"width, fused and dilations must be at least 1, got {width}, {fused}, {list(dilations)}."
            )
        if not 0 <= dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {dropout}.")
        self.levels = list(levels[-1:])
        channels = self.levels[0].channels
        self.image = nn.Sequential(
            nn.Dropout2d(dropout), nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.branches = nn.ModuleList(
            [branch(channels, width, 1, 1), *(branch(channels, width, 3, dilation) for dilation in dilations)]
        )
        self.fuse = nn.Sequential(
            nn.Dropout2d(dropout),
            nn.Conv2d((len(self.branches) + 1) * width, fused, 1),
            nn.ReLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(fused, 2 * bins, 1),
        )
        self.extras = {LOGITS: 2 * bins}
        centres = self.bins.centres().clamp(depth_range.min_depth, depth_range.max_depth)
        self.register_buffer("centres", centres.float(), persistent=False)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at the size of the images, and the logits at the stride of the features."""
        (deepest,) = features
        image = self.image(deepest.mean((2, 3), keepdim=True)).expand(-1, -1, *deepest.shape[-2:])
        logits = self.fuse(torch.cat([image, *(branch(deepest) for branch in self.branches)], 1))
        with torch.no_grad(), full_precision(logits):
            odds = F.interpolate(log_odds(logits), size, mode="bilinear", align_corners=False)
            depth = self.decode(odds)
        return DepthOutput(depth, extras={LOGITS: logits})

    def decode(self, odds: Tensor) -> Tensor:
        """Depth [B, 1, H, W] [m] of log-odds [B, K, H, W]: that of bin n - 1 where n thresholds are exceeded."""
        exceeded = (odds >= 0).sum(1, keepdim=True)
        return self.centres[(exceeded - 1).clamp(min=0)]


def branch(channels: int, width: int, size: int, dilation: int) -> nn.Sequential:
    """A convolution, dilated if it is larger than 1x1, and a 1x1 convolution."""
    return nn.Sequential(
        nn.Conv2d(channels, width, size, padding=dilation * (size // 2), dilation=dilation),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.ReLU(),
    )
