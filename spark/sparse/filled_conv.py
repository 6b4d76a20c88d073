"""A convolution of a map that has rows at the visible sites and one token at all others, for the price of the rows.

The convolution is linear: that of the map is that of a constant map, the token everywhere, plus that of a sparse one,
`row - token` at the visible sites and zero elsewhere. The first takes nine different values (inside, four edges, four
corners). The second is the transpose of reading patches with their surroundings: every patch is spread over its tile,
and overlapping tiles add up.

Legend: rows [N, C], M visible patches of ph x pw sites, kernel 3x3 with padding 1, result [B, O, h, w].
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark.sparse.packed_conv import TILES_FROM, by_mkl, transposed
from spark.sparse.sites import Cells, Sites, as_image, as_rows
from spark.sparse.tensor import SparseTensor

# Visible share up to which the rows cost less: tiles are larger than patches, up to 2.25 times forwards.
PAYS_TO = 0.6


def filled_conv_pays(x: SparseTensor) -> bool:
    """Whether `filled_conv` computes less than the dense convolution, and loses nothing.

    Measured for packed rows on a CPU. The gradient of the token is a difference of two sums, for which half precision
    is too coarse. `torch.compile` cannot trace it.
    """
    if x.data.ndim != 2 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    few = len(x.sites.patches()) <= PAYS_TO * x.sites.visible.numel()
    return exact and few


def filled_conv(x: SparseTensor, token: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d(x.to_dense(token), weight, bias, padding=1)` of packed rows: [B, C, h, w] -> [B, O, h, w].

    Args:
        x: packed.
        token: [1, C, 1, 1].
        weight: [O, C, 3, 3].
        bias: [O] or None.
    """
    wide = (token.double(), weight.double(), None if bias is None else bias.double())
    constant = constant_conv(*wide, *x.size4[2:]).to(x.dtype)
    return _SpreadConv.apply(x.data - token.view(1, -1), weight, constant, x.sites)  # type: ignore[return-value]


def constant_conv(token: Tensor, weight: Tensor, bias: Tensor | None, h: int, w: int) -> Tensor:
    """Convolution of the map that is the token everywhere: [1, O, h, w], from one of 3 x 3 sites at most."""
    small = F.conv2d(token.expand(-1, -1, min(h, 3), min(w, 3)), weight, bias, padding=1)
    for dim, n in ((2, h), (3, w)):
        if n > 3:
            first, middle, last = small.split(1, dim)
            small = torch.cat([first, middle.repeat_interleave(n - 2, dim), last], dim)
    return small


class _Reach(NamedTuple):
    """The sites of the map that rows spread over, patch by patch or site by site.

    Attributes:
        cells: that read the map, [M, ph + 2, pw + 2] or [N, 3, 3].
        sides: of the patches; None: site by site, a matrix product.
    """

    cells: Cells
    sides: tuple[int, int] | None

    def patches(self, rows: Tensor) -> Tensor:
        """Rows [N, C] as images [M, C, ph, pw], or [1, C, 1, N]."""
        return (
            as_image(rows)
            if self.sides is None
            else rows.view(-1, *self.sides, rows.shape[1]).permute(0, 3, 1, 2)
        )

    def tiles(self, grad: Tensor) -> Tensor:
        """What the cells read of [B, O, h, w], as images [M, O, ph + 2, pw + 2], or [1, 9 O, 1, N]."""
        read = self.cells.gather(as_rows(grad))
        return as_image(read.flatten(1)) if self.sides is None else read.permute(0, 3, 1, 2)

    def product_by_mkl(self, rows: Tensor) -> bool:
        """Whether the convolution is a matrix product, and MKL's."""
        return self.sides is None and by_mkl(rows)

    def kernel(self, weight: Tensor) -> Tensor:
        """[O, C, 3, 3] -> that of the transposed convolution from patches to tiles, [C, O, 3, 3] or [C, 9 O, 1, 1]."""
        turned = transposed(weight, 1)
        return turned if self.sides else turned.permute(0, 2, 3, 1).reshape(len(turned), -1, 1, 1)

    def kernel_transposed(self, grad: Tensor) -> Tensor:
        """Gradient of such a kernel -> gradient of the weight."""
        return transposed(grad if self.sides else grad.view(len(grad), 3, 3, -1).permute(0, 3, 1, 2), 1)


def _reach(sites: Sites, h: int, w: int) -> _Reach:
    """By shape, as in `packed_conv.py`: tiles of small patches would be mostly surroundings."""

    def build() -> _Reach:
        sides = sites.patch_sides(h, w)
        if min(sides) < TILES_FROM:
            place = sites.rows(h, w)
            image, y, x = place // (h * w), place // w % h, place % w
            return _Reach(_cells(sites, image, y, x, (1, 1), h, w), None)
        image, row, column = sites.patches().unbind(1)
        return _Reach(_cells(sites, image, row * sides[0], column * sides[1], sides, h, w), sides)

    return sites.cached(("reach", h, w), build)


def _cells(
    sites: Sites, image: Tensor, top: Tensor, left: Tensor, sides: tuple[int, int], h: int, w: int
) -> Cells:
    """Rectangles of the h x w map, one site larger on every side than `sides` at (top, left)."""
    y = top[:, None] + torch.arange(-1, sides[0] + 1, device=top.device)
    x = left[:, None] + torch.arange(-1, sides[1] + 1, device=top.device)
    outside = ((y < 0) | (y >= h))[:, :, None] | ((x < 0) | (x >= w))[:, None]
    place = (image[:, None, None] * h + y.clamp(0, h - 1)[:, :, None]) * w + x.clamp(0, w - 1)[:, None]
    return sites.cells(place, torch.zeros_like(outside), outside, sites.batch * h * w)


class _SpreadConv(torch.autograd.Function):
    """Each row times the kernel, added up where they fall, on top of a map [1, O, h, w] that is there already."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, onto: Tensor, sites: Sites) -> Tensor:
        h, w = onto.shape[2:]
        reach = ctx.reach = _reach(sites, h, w)
        ctx.save_for_backward(rows, weight)
        kernel = reach.kernel(weight)
        if reach.product_by_mkl(rows):
            tiles = rows @ kernel.flatten(1)
        else:
            tiles = F.conv_transpose2d(reach.patches(rows), kernel).permute(0, 2, 3, 1)
        out = reach.cells.spread(tiles.reshape(-1, len(weight)))
        return (out.view(-1, h, w, len(weight)) + onto.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        reach: _Reach = ctx.reach
        tiles, kernel = reach.tiles(grad), reach.kernel(weight)
        if reach.product_by_mkl(rows):
            grad_rows = as_rows(tiles) @ kernel.flatten(1).t()
            grad_kernel = rows.t() @ as_rows(tiles)
        else:
            grad_rows = as_rows(F.conv2d(tiles, kernel))
            _, grad_kernel, _ = torch.ops.aten.convolution_backward(
                *(reach.patches(rows), tiles, kernel, None),
                *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]),
            )
        return grad_rows, reach.kernel_transposed(grad_kernel), grad.sum(0, keepdim=True), None
