"""Convolutions of a map that has rows at the visible sites and one token at all others, at the cost of the rows.

A 3x3 convolution is linear: that of the map is that of a constant map, the token everywhere, plus that of a sparse one,
`row - token` at the visible sites and zero elsewhere. The first takes nine different values (inside, four edges, four
corners). The second is the transpose of reading patches with their surroundings: every patch is spread over its tile,
and overlapping tiles add up.

For a transposed convolution that doubles the resolution the token is one more row. Each row is multiplied by all taps
of the kernel once, and every result adds up four of the products.

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

    Token [1, C, 1, 1], weight [O, C, 3, 3], bias [O].
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


class Filled(NamedTuple):
    """A map [B, C, h, w] of which every masked site is the token.

    It is not a tensor: reentrant gradient checkpointing of what receives one would find nothing to differentiate.

    Attributes:
        x: its visible sites, packed.
        token: [1, C, 1, 1].
    """

    x: SparseTensor
    token: Tensor

    def dense(self) -> Tensor:
        """[B, C, h, w]."""
        return self.x.to_dense(self.token)

    def upsampled(self, weight: Tensor, bias: Tensor) -> Tensor:
        """`F.conv_transpose2d(self.dense(), weight, bias, stride=2, padding=1)`: [B, O, 2h, 2w].

        Weight [C, O, 4, 4], bias [O].
        """
        h, w = self.x.size4[2:]
        table = self.x.sites.cached(("upsampled", h, w), lambda: _Upsampling(self.x.sites, h, w))
        token = self.token.view(1, -1)
        rows = torch.cat([self.x.data, token, torch.zeros_like(token)])
        return _FilledUpsample.apply(rows, weight, bias, table)  # type: ignore[return-value]


class _Upsampling:
    """Which products of rows and taps each result of `_FilledUpsample` adds up: one table for both passes.

    Product 16 n + t is that of row n and tap t = 4 ky + kx; row N is the token, row N + 1 is zero, what lies beyond the
    border.

    Args:
        sites: of the mask.
        h, w: size of the map.

    Attributes:
        size: of the result, (B, 2h, 2w).
        products: that each result adds up, [B * 2h * 2w, 4].
        results: the result that each product is part of, [16 (N + 2)]; B * 2h * 2w if it is part of none or many (as
            the token's).
        of_token: whether the token's product of each tap is part of a result, [B, 16, 2h * 2w] bool.
    """

    def __init__(self, sites: Sites, h: int, w: int):
        places = sites.rows(h, w)
        n, device = len(places), places.device
        row = torch.full((sites.batch, h * w), n, device=device).flatten()
        row = row.index_copy(0, places, torch.arange(n, device=device)).view(-1, h, w)
        row = F.pad(row, (1, 1, 1, 1), value=n + 1)
        # Of a line, result 2 i adds up sites i (tap 1) and i - 1 (tap 3), result 2 i + 1 sites i (2) and i + 1 (0).
        y, x = torch.arange(2 * h, device=device), torch.arange(2 * w, device=device)
        near = [(y // 2, 1 + y % 2), (y // 2 + 2 * (y % 2) - 1, 3 - 3 * (y % 2))]
        across = [(x // 2, 1 + x % 2), (x // 2 + 2 * (x % 2) - 1, 3 - 3 * (x % 2))]
        products = [
            row[:, i[:, None] + 1, j + 1] * 16 + 4 * ky[:, None] + kx for i, ky in near for j, kx in across
        ]
        self.size = (sites.batch, 2 * h, 2 * w)
        self.products = torch.stack(products, 3).view(-1, 4)
        flat = self.products.flatten()
        result = torch.arange(len(flat), device=device) // 4
        nowhere = len(self.products)
        self.results = torch.full((16 * (n + 2),), nowhere, device=device).index_copy(0, flat, result)
        self.results[16 * n :] = nowhere
        # By comparison: `F.one_hot` reads values, for which a GPU would have to be waited for.
        of_token = flat[:, None] == 16 * n + torch.arange(16, device=device)
        self.of_token = of_token.view(sites.batch, -1, 4, 16).any(2).transpose(1, 2)


class _FilledUpsample(torch.autograd.Function):
    """See `Filled.upsampled`; rows [N + 2, C], the last two the token and zero."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, table: _Upsampling) -> Tensor:
        ctx.table = table
        ctx.save_for_backward(rows, weight)
        products = _times(rows, _taps(weight)).view(-1, weight.shape[1])
        out = F.embedding_bag(table.products, products, mode="sum").add_(bias)
        return out.view(*table.size, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        table: _Upsampling = ctx.table
        o = grad.shape[1]
        results = as_rows(grad.contiguous(memory_format=torch.channels_last))
        products = F.pad(results, (0, 0, 0, 1)).index_select(0, table.results)
        # By images: a long sum loses digits.
        products[-32:-16] = (table.of_token.to(grad.dtype) @ results.view(len(grad), -1, o)).sum(0)
        products = products.view(len(rows), -1)
        grad_rows, grad_taps = _times_gradients(products, rows, _taps(weight))
        grad_weight = grad_taps.view(-1, *weight.shape[2:], o).permute(0, 3, 1, 2)
        return grad_rows, grad_weight, results.sum(0), None


def _taps(weight: Tensor) -> Tensor:
    """[C, O, kh, kw] -> [C, kh * kw * O], a view in channels_last memory."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """[N, C] @ [C, D], by the fastest library."""
    if by_mkl(rows):
        return rows @ matrix
    return as_rows(F.conv_transpose2d(as_image(rows), matrix[..., None, None]))


def _times_gradients(grad: Tensor, rows: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and matrix of `_times`."""
    if by_mkl(rows):
        return grad @ matrix.t(), rows.t() @ grad
    kernel = matrix[..., None, None]
    _, grad_matrix, _ = torch.ops.aten.convolution_backward(
        *(as_image(rows), as_image(grad), kernel, None),
        *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]),
    )
    return as_rows(F.conv2d(as_image(grad), kernel)), grad_matrix.flatten(1)


class _Reach(NamedTuple):
    """The sites of the map that rows spread over, patch by patch or site by site.

    Attributes:
        cells: that read the map, [M, ph + 2, pw + 2] or [N, 3, 3].
        sides: of the patches; None: site by site, a matrix product.
    """

    cells: Cells
    sides: tuple[int, int] | None

    def patches(self, rows: Tensor) -> Tensor:
        """Rows [N, C] as images [M, C, ph, pw]."""
        assert self.sides
        return rows.view(-1, *self.sides, rows.shape[1]).permute(0, 3, 1, 2)

    def tiles(self, grad: Tensor) -> Tensor:
        """What the cells read of [B, O, h, w]: images [M, O, ph + 2, pw + 2], or rows [N, 9 O]."""
        read = self.cells.gather(as_rows(grad))
        return read.permute(0, 3, 1, 2) if self.sides else read.flatten(1)

    def kernel(self, weight: Tensor) -> Tensor:
        """[O, C, 3, 3] -> that of the transposed convolution from patches to tiles, [C, O, 3, 3], or [C, 9 O]."""
        turned = transposed(weight, 1)
        return turned if self.sides else _taps(turned)

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
        if reach.sides is None:
            tiles = _times(rows, kernel)
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
        if reach.sides is None:
            grad_rows, grad_kernel = _times_gradients(tiles, rows, kernel)
        else:
            grad_rows = as_rows(F.conv2d(tiles, kernel))
            _, grad_kernel, _ = torch.ops.aten.convolution_backward(
                *(reach.patches(rows), tiles, kernel, None),
                *([1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]),
            )
        return grad_rows, reach.kernel_transposed(grad_kernel), grad.sum(0, keepdim=True), None
