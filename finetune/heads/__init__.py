"""Depth heads by name, one file a family.

A head is an `nn.Module` made as `Head(levels, depth_range, **options)` from the encoder's pyramid. It keeps in
`levels` those it wants to be given, says in `outputs` which entries of a `DepthOutput` it gives, and
`forward(images, features)` returns one whose maps have the size of `images`. It may say `frozen_encoder = True`, and in
`scale_channels` the channels of its core's scales (`DepthOutput.scales`), which training-only decoders read. To add a
head: write it in a file of this folder and name it in `HEADS`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from finetune.heads.fusion import Fusion
from finetune.heads.linear import Linear
from finetune.heads.lraspp import LiteASPP
from finetune.heads.metric_bins import MetricBins
from finetune.heads.output import DepthOutput, DepthRange
from finetune.heads.unetpp import UnetPlusPlus

__all__ = [
    "HEADS",
    "DepthOutput",
    "DepthRange",
    "Fusion",
    "Linear",
    "LiteASPP",
    "MetricBins",
    "UnetPlusPlus",
]

HEADS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "unetpp": UnetPlusPlus,
        "fusion": Fusion,
        "metric_bins": MetricBins,
        "lraspp": LiteASPP,
        "linear": Linear,
    }
)
"""Name in a configuration -> class; the arguments of its constructor after `depth_range` are its options."""
