"""Depth heads by name, one file a family. To add one: write it as a `Head` in a file of this folder, name it here."""

from typing import TYPE_CHECKING

from finetune.construct import Registry

if TYPE_CHECKING:
    from finetune.heads.base import Head

HEADS: "Registry[Head]" = Registry(
    {
        "unetpp": "finetune.heads.unetpp:UnetPlusPlus",
        "fusion": "finetune.heads.fusion:Fusion",
        "metric_bins": "finetune.heads.metric_bins:MetricBins",
        "lraspp": "finetune.heads.lraspp:LiteASPP",
        "linear": "finetune.heads.linear:Linear",
        "linear_bins": "finetune.heads.linear_bins:LinearBins",
        "fcrn": "finetune.heads.fcrn:FCRN",
        "dorn": "finetune.heads.dorn:DORN",
    }
)
"""Name in a configuration -> class; the arguments of its constructor after `depth_range` are its options."""
