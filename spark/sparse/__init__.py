"""Masked feature maps that run through stock convnets: `sparsify`, `SparseTensor`, and their layouts."""

from collections.abc import Callable

from torch import Tensor

from spark.errors import UserError
from spark.sparse.kernels.spconv import spconv_layout
from spark.sparse.kernels.triton_ops import triton_layout
from spark.sparse.masked_ops import MASKED
from spark.sparse.packed_ops import PACKED
from spark.sparse.sites import Sites
from spark.sparse.tensor import Layout, SparseTensor

# Name -> how to make it; those of optional packages are imported when they are asked for.
LAYOUTS: dict[str, Callable[[], Layout]] = {
    "masked": lambda: MASKED,
    "packed": lambda: PACKED,
    "spconv": spconv_layout,
    "triton": triton_layout,
}


def sparsify(
    images: Tensor,
    visible: Tensor,
    layout: str = "packed",
    sync: bool = False,
    visible_count: int | None = None,
) -> SparseTensor:
    """Keep the visible patches of images: the input of a masked encoder.

    Args:
        images: [B, C, H, W].
        visible: [B, 1, fh, fw] bool, True = seen; H and W multiples of fh and fw.
        layout: "packed", "masked", "spconv" or "triton".
        sync: batch statistics cover the visible sites of all processes.
        visible_count: visible patches of all images together; if given, nothing waits for a GPU.

    Raises:
        UserError: unknown layout, one whose package is missing, sizes that do not line up, or (on the CPU; on a GPU an
            assertion of the device fails) another number of visible patches.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} does not exist: use one of {', '.join(map(repr, LAYOUTS))}")
    if images.ndim != 4 or visible.shape[0] != images.shape[0]:
        raise UserError(
            f"images must be [B, C, H, W] with the batch size of visible, got {list(images.shape)} and "
            f"{list(visible.shape)}"
        )
    sites = Sites(visible, sync, visible_count)
    chosen = LAYOUTS[layout]()
    b, c, h, w = images.shape
    return SparseTensor(chosen.from_dense(images, sites), sites, chosen, (b, c, h, w))
