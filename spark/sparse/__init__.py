"""Masked feature maps that run through stock convnets: `sparsify`, `SparseTensor`, and their layouts."""

from torch import Tensor

from spark.sparse.batch_norm import SyncBatchNorm2d
from spark.sparse.masked_ops import MASKED
from spark.sparse.packed_ops import PACKED
from spark.sparse.sites import Sites
from spark.sparse.tensor import Layout, MissingRuleError, SparseTensor

__all__ = [
    "LAYOUTS",
    "MASKED",
    "PACKED",
    "Layout",
    "MissingRuleError",
    "Sites",
    "SparseTensor",
    "SyncBatchNorm2d",
    "sparsify",
]

LAYOUTS = {layout.name: layout for layout in (MASKED, PACKED)}


def sparsify(images: Tensor, visible: Tensor, layout: str = "packed", sync: bool = False) -> SparseTensor:
    """Keep the visible patches of images: the input of a masked encoder.

    Args:
        images: [B, C, H, W].
        visible: [B, 1, fh, fw] bool, True = seen; H and W multiples of fh and fw.
        layout: "masked" or "packed".
        sync: batch statistics cover the visible sites of all processes.

    Raises:
        ValueError: unknown layout, or sizes that do not line up.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} does not exist: use one of {', '.join(map(repr, LAYOUTS))}")
    if images.ndim != 4 or visible.shape[0] != images.shape[0]:
        raise ValueError(
            f"images must be [B, C, H, W] with the batch size of visible, got {list(images.shape)} and "
            f"{list(visible.shape)}"
        )
    sites = Sites(visible, sync)
    chosen = LAYOUTS[layout]
    b, c, h, w = images.shape
    return SparseTensor(chosen.from_dense(images, sites), sites, chosen, (b, c, h, w))
