"""A depth model: a timm convnet, a head on its feature pyramid, and everything needed to predict with it again.

Shapes: images [B, C, H, W] of any size, depth [B, 1, H, W] in metres.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from finetune.heads import HEADS, DepthOutput, DepthRange
from finetune.registry import construct
from spark.encoder import build_encoder, pyramid, pyramid_info, unreached_parameters

FORMAT = 1


class DepthModel(nn.Module):
    """Encoder, head and depth range.

    Args:
        encoder: Where the encoder comes from: an exported folder or an official SparK `.pth` (with their weights), a timm name,
            or a timm model that is already made.
        head: Name of a head in `finetune.heads.HEADS`.
        max_depth: Farthest depth that the model can say [m].
        min_depth: Nearest depth that the model can say [m].
        initial_depth: Depth near which the untrained head starts [m]. 2.7 is the median of NYU Depth V2.
        pretrained: For a timm name: load timm's published weights, or start from random ones. Folders and files have their
            own weights, so it cannot be set for them.
        drop_path: Stochastic depth rate of a named or exported encoder.
        image_size: (H, W) at which whole frames are presented to the model [px]; recorded for evaluation and prediction. None:
            frames are presented as they are.
        mean: What is subtracted from RGB in [0, 1]; default what the encoder was trained with.
        std: What RGB is then divided by; default likewise.
        head_options: Arguments of the head, such as `decoder_channels` of unetpp.

    Raises:
        ValueError: Any of these does not exist or does not fit; the message says what does.
    """

    def __init__(
        self,
        encoder: str | Path | nn.Module,
        head: str = "unetpp",
        max_depth: float = 10.0,
        min_depth: float = 1e-3,
        initial_depth: float = 2.7,
        pretrained: bool = False,
        drop_path: float = 0.0,
        image_size: tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **head_options: Any,
    ) -> None:
        super().__init__()
