"""Fusion head: the RefineNet decoder of MiDaS and DPT on a pyramid, to inverse depth without scale and shift.

It is the relative-depth core of ZoeDepth too (`finetune.heads.metric_bins`). Sources: MiDaS (arXiv 1907.01341), DPT
(arXiv 2103.13413), RefineNet (arXiv 1611.06612). All resizes have align_corners=True.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads.base import Head, levels_at
from finetune.heads.output import DepthOutput, DepthRange, at_least_fp32
from spark.errors import UserError
from spark.model.encoder import PyramidLevel

STRIDES = (4, 8, 16, 32)
SCALES = ("scale_32", "scale_16", "scale_8", "scale_4", "scale_2")
"""Names of the core's maps in `DepthOutput.extras`, by their stride."""


class CoreOutput(NamedTuple):
    """What the core makes of a pyramid, for images [B, C, H, W]."""

    relative: Tensor
    """Inverse depth up to scale and shift, not negative [B, 1, H, W]."""

    features: Tensor
    """What it was read from [B, 32, H, W]."""

    scales: tuple[Tensor, ...]
    """The bottleneck at stride 32 and the fused maps at strides 16, 8, 4, 2, each with the core's width."""

    def extras(self) -> dict[str, Tensor]:
        """The scales by name."""
        return dict(zip(SCALES, self.scales, strict=True))


class FusionCore(nn.Module):
    """Projections of four maps, fused from the deepest up, and three convolutions to relative depth.

    Args:
        levels: The pyramid at strides 4, 8, 16, 32.
        width: Channels of the fused maps.
        features: Channels that relative depth is read from.
    """

    def __init__(self, levels: Sequence[PyramidLevel], width: int = 256, features: int = 32) -> None:
        super().__init__()
        self.project = nn.ModuleList(
            nn.Conv2d(level.channels, width, kernel_size=3, padding=1, bias=False) for level in levels
        )
        # The deepest map has nothing to be fused with. The original keeps a unit there that never runs.
        self.fuse = nn.ModuleList(FusionBlock(width, skip=stage > 0) for stage in range(len(levels)))
        self.reduce = nn.Conv2d(width, width // 2, kernel_size=3, padding=1)
        self.feature = nn.Conv2d(width // 2, features, kernel_size=3, padding=1)
        self.relative = nn.Conv2d(features, 1, kernel_size=1)
        # Relative depth ends in a ReLU, and one that starts below zero everywhere would never learn.
        nn.init.ones_(self.relative.bias)  # type: ignore[arg-type]

    def forward(self, pyramid: Sequence[Tensor]) -> CoreOutput:
        """Fuse one map [B, C_i, H / s_i, W / s_i] for each level, shallow first."""
        maps = [project(level) for project, level in zip(self.project, pyramid, strict=True)]
        scales = [maps[-1]]
        for block, skip in zip(self.fuse, reversed(maps), strict=True):
            scales.append(block(scales[-1], skip) if len(scales) > 1 else block(skip))
        features = self.feature(double(self.reduce(scales[-1]))).relu()
        return CoreOutput(self.relative(features).relu(), features, tuple(scales))


class FusionBlock(nn.Module):
    """Add a map to what is deeper, refine, and double the size."""

    def __init__(self, width: int, skip: bool) -> None:
        super().__init__()
        self.refine_skip = ResidualUnit(width) if skip else None
        self.refine = ResidualUnit(width)
        self.project = nn.Conv2d(width, width, kernel_size=1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Fuse `x` [B, C, h, w] with `skip` of the same shape into [B, C, 2h, 2w]."""
        if self.refine_skip is not None:
            x = x + self.refine_skip(skip)
        return self.project(double(self.refine(x)))


class ResidualUnit(nn.Module):
    """`x + conv(relu(conv(relu(x))))`, the pre-activation unit of RefineNet, without norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, kernel_size=3, padding=1)
        self.second = nn.Conv2d(width, width, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Refine [B, C, h, w]."""
        return x + self.second(self.first(x.relu()).relu())


def double(x: Tensor) -> Tensor:
    """Bilinearly to twice the size, align_corners=True."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)


class Fusion(Head):
    """The core alone: inverse depth up to scale and shift, under `disparity_affine`; no metres.

    Args:
        levels: The encoder's pyramid, with maps at strides 4, 8, 16, 32.
        depth_range: Not used: this head gives no metres.
        width: Channels of the fused maps.
    """

    outputs = ("disparity_affine",)

    def __init__(self, levels: Sequence[PyramidLevel], depth_range: DepthRange, width: int = 256) -> None:
        super().__init__()
        self.levels = levels_at("fusion", levels, STRIDES)
        check_width(width)
        self.core = FusionCore(self.levels, width)
        self.extras = dict.fromkeys(SCALES, width)

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return relative depth at the size of the images and, in training, the core's scales."""
        core: CoreOutput = self.core(features)
        relative = at_least_fp32(core.relative)
        return DepthOutput(disparity_affine=relative, extras=core.extras() if self.training else {})


def check_width(width: int) -> None:
    """Refuse a width that cannot be halved."""
    if width < 2 or width % 2:
        raise UserError(f"width must be even and at least 2, got {width}.")
