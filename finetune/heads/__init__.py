"""Depth heads by name, one file a family.

A head is an `nn.Module` made as `Head(levels, depth_range, **options)` from the encoder's pyramid. It keeps in
`levels` those it wants to be given, and `forward(images, features)` returns a `DepthOutput` whose depth has the size
of `images`. To add a head: write it in a file of this folder and name it in `HEADS`.
"""

from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from finetune.heads.output import DepthOutput, DepthRange
from finetune.heads.unetpp import UnetPlusPlus

__all__ = ["HEADS", "DepthOutput", "DepthRange", "UnetPlusPlus"]

HEADS: Mapping[str, type[nn.Module]] = MappingProxyType({"unetpp": UnetPlusPlus})
"""Name in a configuration -> class; the arguments of its constructor after `depth_range` are its options."""
