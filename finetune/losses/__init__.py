"""Depth losses by name, one file a family. To add one: write it as a `DepthLoss` (or a `MaskedLoss`, for a formula over
valid pixels) in a file of this folder and name it here."""

from typing import TYPE_CHECKING

from finetune.construct import Registry

if TYPE_CHECKING:
    from finetune.losses.base import DepthLoss

LOSSES: "Registry[DepthLoss]" = Registry(
    {
        "silog": "finetune.losses.silog:SILog",
        "l1": "finetune.losses.pointwise:L1",
        "mse": "finetune.losses.pointwise:MSE",
        "berhu": "finetune.losses.pointwise:BerHu",
        "ssi": "finetune.losses.affine:ScaleShiftInvariant",
        "gradient": "finetune.losses.affine:GradientMatching",
        "ranking": "finetune.losses.ranking:PairwiseRanking",
        "ssim": "finetune.losses.structure:SSIM",
        "smoothness": "finetune.losses.structure:Smoothness",
        "segmentation": "finetune.losses.segmentation:Segmentation",
        "ordinal": "finetune.losses.ordinal:OrdinalRegression",
    }
)
"""Name in a configuration -> class; the arguments of its constructor are its options."""
