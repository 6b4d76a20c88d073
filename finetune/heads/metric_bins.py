"""Metric-bins head (ZoeDepth): depth as an average over bins whose centres attractors move, from coarse to fine.

Source: ZoeDepth (Bhat et al. 2023, arXiv 2302.12288), and what its published code computes where that differs: the
attractors' alpha is 300 and gamma 2 whatever its configuration says, and their pulls are averaged. All resizes have
align_corners=True.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads.base import Head, levels_at
from finetune.heads.fusion import SCALES, STRIDES, CoreOutput, FusionCore, check_width
from finetune.heads.output import DepthOutput, DepthRange, at_least_fp32, full_precision
from spark.errors import UserError
from spark.model.encoder import PyramidLevel

ALPHA, GAMMA = 300.0, 2


class MetricBins(Head):
    """Relative depth from a fusion core, and metric depth from bins on the core's five scales.

    Depth is positive; as in the original nothing bounds it above, and `depth_range` is not used: an untrained head
    starts near 0.7 m. `disparity_affine` is the core's relative depth.

    Args:
        levels: The encoder's pyramid, with maps at strides 4, 8, 16, 32.
        depth_range: Not used.
        width: Channels of the core's fused maps.
        bins: Number of bins.
        embedding: Channels of the bin embeddings.
        attractors: How many points pull the centres at strides 16, 8, 4, 2.
        min_temperature: Sharpest temperature of the distribution over bins.
        max_temperature: Flattest one.
    """

    outputs = ("depth", "disparity_affine")

    def __init__(
        self,
        levels: Sequence[PyramidLevel],
        depth_range: DepthRange,
        width: int = 256,
        bins: int = 64,
        embedding: int = 128,
        attractors: Sequence[int] = (16, 8, 4, 1),
        min_temperature: float = 0.0212,
        max_temperature: float = 50.0,
    ) -> None:
        super().__init__()
        self.levels = levels_at("metric_bins", levels, STRIDES)
        check_width(width)
        if bins < 2 or embedding < 1:
            raise UserError(f"bins must be at least 2 and embedding at least 1, got {bins} and {embedding}.")
        if len(attractors) != len(STRIDES) or min(attractors) < 1:
            raise UserError(
                f"attractors must hold {len(STRIDES)} positive numbers, for strides 16, 8, 4, 2, got"
                f" {list(attractors)}."
            )
        if not 0 < min_temperature < max_temperature:
            raise UserError(
                f"temperatures must satisfy 0 < min_temperature < max_temperature, got {min_temperature} and"
                f" {max_temperature}."
            )
        self.core = FusionCore(self.levels, width)
        self.extras = dict.fromkeys(SCALES, width)
        features = self.core.feature.out_channels
        self.bottleneck = nn.Conv2d(width, width, kernel_size=1)
        self.seed_bins = pixel_mlp(width, 256, bins)
        self.seed_embedding = pixel_mlp(width, 128, embedding)
        self.embeddings = nn.ModuleList(pixel_mlp(width, 128, embedding) for _ in attractors)
        self.attractors = nn.ModuleList(Attractor(embedding, number) for number in attractors)
        self.distribution = LogBinomial(features + 1, embedding, bins, min_temperature, max_temperature)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return metric and relative depth at the size of the images and, in training, the core's scales."""
        core: CoreOutput = self.core(features)
        bottleneck = self.bottleneck(core.scales[0])
        with full_precision(bottleneck):  # bins a few centimetres apart are one in bf16
            centres = F.softplus(at_least_fp32(self.seed_bins(at_least_fp32(bottleneck))))
            embedding = self.seed_embedding(at_least_fp32(bottleneck))
            for project, attractor, scale in zip(
                self.embeddings, self.attractors, core.scales[1:], strict=True
            ):
                above, embedding = embedding, project(at_least_fp32(scale))
                centres = attractor(embedding + resize(above, embedding), centres)
            condition = torch.cat((at_least_fp32(core.features), at_least_fp32(core.relative)), 1)
            weights = self.distribution(condition, resize(embedding, condition))
            depth = (weights * resize(centres, condition)).sum(1, keepdim=True)
        return DepthOutput(depth, at_least_fp32(core.relative), core.extras() if self.training else {})


class Attractor(nn.Module):
    """Points on the depth axis, one set a pixel, towards which bin centres move.

    Args:
        embedding: Channels of the bin embedding.
        number: How many points.
    """

    def __init__(self, embedding: int, number: int) -> None:
        super().__init__()
        self.points = pixel_mlp(embedding, embedding, number)

    def forward(self, embedding: Tensor, centres: Tensor) -> Tensor:
        """Return the moved centres [B, N, h, w] [m].

        Args:
            embedding: Bin embedding of this scale, with that of the scale above added, [B, E, h, w].
            centres: Centres of the scale above, of any size [B, N, h', w'] [m].
        """
        points = F.softplus(self.points(embedding))
        centres = resize(centres, embedding)
        # One point after the other: all at once would hold as many copies of the centres as there are points.
        pull = torch.zeros_like(centres)
        for point in points.split(1, dim=1):
            distance = point - centres
            pull = pull + distance / (1 + ALPHA * distance.pow(GAMMA))
        return centres + pull / points.shape[1]


class LogBinomial(nn.Module):
    """Distribution over bins of each pixel: a binomial with a learned probability, and a learned temperature.

    Args:
        main: Channels of the main input.
        condition: Channels of the conditioning bin embedding.
        bins: Number of bins.
        min_temperature: Sharpest temperature.
        max_temperature: Flattest one.
    """

    EPSILON = 1e-4

    coefficients: Tensor

    def __init__(
        self, main: int, condition: int, bins: int, min_temperature: float, max_temperature: float
    ) -> None:
        super().__init__()
        inside = (main + condition) // 2
        self.mlp = nn.Sequential(
            nn.Conv2d(main + condition, inside, kernel_size=1),
            nn.GELU(),
            nn.Conv2d(inside, 4, kernel_size=1),
            nn.Softplus(),
        )
        self.min_temperature, self.max_temperature = min_temperature, max_temperature
        k = torch.arange(bins).reshape(1, -1, 1, 1)
        self.register_buffer("coefficients", log_binomial_coefficients(bins - 1, k), persistent=False)

    def forward(self, main: Tensor, condition: Tensor) -> Tensor:
        """Return the weights of the bins [B, N, H, W], which add up to 1.

        Args:
            main: [B, `main`, H, W].
            condition: [B, `condition`, H, W].
        """
        four = self.mlp(torch.cat((main, condition), 1)) + self.EPSILON
        probability = (four[:, 0] / (four[:, 0] + four[:, 1]))[:, None]
        mix = (four[:, 2] / (four[:, 2] + four[:, 3]))[:, None]
        temperature = (self.max_temperature - self.min_temperature) * mix + self.min_temperature
        last = self.coefficients.shape[1] - 1
        k = torch.arange(last + 1, device=main.device).reshape(1, -1, 1, 1)
        score = (
            self.coefficients
            + k * probability.clamp(self.EPSILON, 1.0).log()
            + (last - k) * (1 - probability).clamp(self.EPSILON, 1.0).log()
        )
        return (score / temperature).softmax(1)


def log_binomial_coefficients(n: int, k: Tensor, epsilon: float = 1e-7) -> Tensor:
    """log(n over k) by Stirling's formula without its square root, in fp32, as ZoeDepth has it."""
    top, k = torch.tensor(n) + epsilon, k + epsilon
    return top * top.log() - k * k.log() - (top - k) * (top - k + epsilon).log()


def pixel_mlp(channels: int, inside: int, out: int) -> nn.Sequential:
    """Two 1x1 convolutions with a ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(channels, inside, kernel_size=1), nn.ReLU(), nn.Conv2d(inside, out, kernel_size=1)
    )


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinearly to the height and width of another map, align_corners=True."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)
