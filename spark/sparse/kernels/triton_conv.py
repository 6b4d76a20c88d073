"""Convolutions of packed rows by Triton kernels: what `packed_conv.py` is given as plans.

They read the rows of neighbours where these lie: no tiles, no columns, no zero-filled map in memory.  What the backward
pass keeps is the packed layout's: the inputs of a recipe, or the rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from spark.errors import UserError
from spark.sparse.kernels import triton_kernels as kernels
from spark.sparse.packed_conv import Plan, Window, convolve_by
from spark.sparse.sites import Sites
from spark.sparse.tensor import Recipe


class _Submanifold(Plan):
    """A convolution with an odd window, stride 1 and the same sites: ungrouped, or with one filter a channel."""

    def __init__(self, window: Window, geometry: kernels.Geometry, groups: int):
        super().__init__(window, groups)
        self.geometry = geometry

    def convolve(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._run(rows, weight, bias)

    def convolve_transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        return self._run(grad, weight, None, reverse=True)

    def _run(self, rows: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool = False) -> Tensor:
        run = kernels.convolution if self.groups == 1 else kernels.depthwise_convolution
        return run(rows, weight, bias, self.geometry, reverse)

    def gradients(
        self, grad: Tensor, rows: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[None, Tensor]:
        """Of the weights; the rows' gradient is `convolve_transposed`."""
        run = kernels.weight_gradient if self.groups == 1 else kernels.depthwise_weight_gradient
        return None, run(grad, rows, self.geometry, self.window.kernel)


def fits(sites: Sites, h: int, w: int, window: Window) -> bool:
    """Whether the kernels compute this window: odd, stride 1, the same sites, no dilation, and not too wide."""
    sides = sites.patch_sides(h, w)
    near = all(k % 2 == 1 and k // 2 <= kernels.RING * p for k, p in zip(window.kernel, sides, strict=True))
    return near and window.symmetric and window.dilation == (1, 1)


def submanifold_conv(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sites: Sites,
    h: int,
    w: int,
    groups: int = 1,
    recipe: Recipe | None = None,
) -> Tensor:
    """Convolve the rows of an h x w map with stride 1 and "same" padding: rows [N, C] -> rows [N, O].

    Weight [O, C, kh, kw] with odd sides, or depthwise (groups C) [C, 1, kh, kw]; `recipe` computes the rows again.

    Raises:
        UserError: a window that `fits` refuses, or rows on a CPU without Triton's interpreter.
    """
    kh, kw = weight.shape[2:]
    window = Window((kh, kw), (1, 1), (kh // 2, kw // 2))
    if not fits(sites, h, w, window):
        raise UserError(
            f"a {kh}x{kw} window does not suit the Triton kernels on patches of {sites.patch_sides(h, w)} sites: its "
            f"sides must be odd and reach over at most {kernels.RING} patches"
        )
    kernels.require_device(rows)
    if rows.dtype != weight.dtype and not torch.is_autocast_enabled(rows.device.type):
        raise UserError(f"values are {rows.dtype} and weights {weight.dtype}: convert one, or use autocast")
    return convolve_by(_Submanifold(window, _geometry(sites, h, w), groups), rows, weight, bias, recipe)


def _geometry(sites: Sites, h: int, w: int) -> kernels.Geometry:
    """The table is the same for every size of map: made once for a mask, and kept with it."""
    table, corners = sites.cached("triton", lambda: _table(sites))
    return kernels.Geometry(table, corners, sites.patch_sides(h, w))


def _table(sites: Sites) -> tuple[Tensor, Tensor]:
    """Table and corners of `kernels.Geometry`."""
    ring = kernels.RING
    fh, fw = sites.grid
    table = F.pad(sites.slots().int().view(-1, fh, fw), (ring, ring, ring, ring), value=-1)
    image, row, column = sites.patches().unbind(1)
    corners = (image * (fh + 2 * ring) + row) * (fw + 2 * ring) + column
    return table, corners.int()
