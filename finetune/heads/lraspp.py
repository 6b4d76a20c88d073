"""LR-ASPP head: torchvision's Lite R-ASPP on two feature maps, its channels combined to one of depth."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.lraspp import LRASPPHead

from finetune.heads.base import Head, levels_at
from finetune.heads.output import DepthOutput, DepthRange
from spark.errors import UserError
from spark.model.encoder import PyramidLevel


class LiteASPP(Head):
    """Lite R-ASPP (Howard et al. 2019, arXiv 1905.02244) on strides 8 and 32, then a 1x1 convolution to depth.

    With MobileNetV3-Large it has the 3.22 million parameters of torchvision's network for 21 classes, and 22 more that
    combine these to depth. torchvision's encoder is dilated: its deepest map has stride 16, where timm's has 32.

    Args:
        levels: The encoder's pyramid, with a map of stride 8; the deepest map is the other one.
        depth_range: From the last convolution's output to metres.
        width: Channels inside.
        maps: Channels that are combined to depth.
    """

    def __init__(
        self, levels: Sequence[PyramidLevel], depth_range: DepthRange, width: int = 128, maps: int = 21
    ) -> None:
        super().__init__()
        if width < 1 or maps < 1:
            raise UserError(f"width and maps must be at least 1, got {width} and {maps}.")
        self.levels = levels_at("lraspp", levels, (8, max(16, levels[-1].stride)))
        low, high = (level.channels for level in self.levels)
        self.decoder = LRASPPHead(low, high, maps, width)
        self.project = nn.Conv2d(maps, 1, kernel_size=1)
        self.depth_range = depth_range
        nn.init.constant_(self.project.bias, depth_range.initial_logit)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor], size: tuple[int, int]) -> DepthOutput:
        """Return depth at the size of the images."""
        low, high = features
        x = self.project(self.decoder({"low": low, "high": high}))
        # Before the sigmoid of the range: a model's own resize would come after it.
        x = F.interpolate(x, size, mode="bilinear", align_corners=False)
        return DepthOutput(depth=self.depth_range(x))
