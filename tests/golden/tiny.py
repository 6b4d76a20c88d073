"""A ResNet of a few thousand weights under a name of timm's, so that whole checkpoints fit into the repository."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

NAME = "golden_resnet"

default_cfgs = generate_default_cfgs(
    {
        "golden_resnet.untrained": {
            "num_classes": 1000,
            "input_size": (3, 64, 64),
            "pool_size": (2, 2),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "conv1.0",
            "classifier": "fc",
        }
    }
)


@register_model
def golden_resnet(pretrained: bool = False, **options: Any) -> ResNet:
    """ResNet with one basic block a stage, of 8, 8, 16 and 24 channels."""
    given: dict[str, Any] = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (8, 8, 16, 24)}
    given |= {"stem_type": "deep", "stem_width": 4, "avg_down": True}
    return build_model_with_cfg(ResNet, NAME, pretrained, **{**given, **options})
