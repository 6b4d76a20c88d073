"""Convolution and pooling over packed rows: the work of the visible sites, the memory of one row a site.

A convolution reads each visible patch with its surroundings (`Sites.tiles`).  How it is computed depends on the shape:

- pointwise: one matrix product over all rows;
- blocks: windows that lie side by side inside of a patch (stride at least the kernel) are the columns of one matrix
  product, by views of the rows alone;
- tiles: where 4 outputs and more lie along a patch, patches become a batch of small images, convolved without padding;
- columns: below that, every output gets its window as columns (im2col), and one matrix product does the rest;
- dense: grouped and depthwise convolutions of small patches, whose tiles would be mostly surroundings, scatter into a
  zero-filled map instead (`common_ops.window`).

Weight gradients of depthwise convolutions on a CPU are convolutions (`correlation`) or matrix products
(`depthwise_products`) of their own. Everything else is written as `conv2d` on channels_last memory, matrix products
included: PyTorch's CPU convolution is oneDNN, on some processors twice as fast as the matrix product behind `F.linear`
(docs/log.md has the measurements). Only matrix products without bias are left to MKL where MKL is at home (`by_mkl`).
The backward pass gathers again instead of keeping tiles or columns, and where a recipe says how the rows came about,
they are not kept either.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark.sparse.processor import cpu_name
from spark.sparse.sites import Cells, Sites, as_image, as_rows
from spark.sparse.tensor import Product, Recipe

# Outputs along a patch from which a batch of tiles beats the alternative.
TILES_FROM = 4
GROUPED_TILES_FROM = 8
# Depthwise weight gradients as matrix products were the faster way at 4 to 8 sites along a patch, up to tiles of so
# many times the patch's sites (what is gathered) and the kernel's taps (what is multiplied for each that is needed).
_PRODUCTS_AT = range(4, 9)
_PRODUCTS_GATHER_UP_TO = 8
_PRODUCTS_WASTE_UP_TO = 4


class Window(NamedTuple):
    """What a convolution or a pooling reads; each (down, right)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)

    def output_size(self, h: int, w: int) -> tuple[int, int]:
        """Size of the dense operator's output."""
        parts = zip((h, w), *self, strict=True)
        a, b = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
        return a, b

    def keeps_patches(self, sites: Sites, h: int, w: int) -> bool:
        """Whether the outputs of an h x w map form the same patches, so that each can be computed from its tile."""
        (ph, pw), (sh, sw) = sites.patch_sides(h, w), self.stride
        return ph % sh == 0 and pw % sw == 0 and self.output_size(h, w) == (h // sh, w // sw)

    @property
    def symmetric(self) -> bool:
        """Stride 1 and as much padding on either side: the gradient of its input is a window of the same kind."""
        same = all(
            2 * p == d * (k - 1) for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True)
        )
        return same and self.stride == (1, 1)

    @property
    def side_by_side(self) -> bool:
        """Whether windows neither overlap nor reach beyond their outputs' strides."""
        return (
            all(k <= s for k, s in zip(self.kernel, self.stride, strict=True))
            and self.padding == (0, 0)
            and (self.dilation == (1, 1) or self.kernel == (1, 1))
        )

    @property
    def reach(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sites that it reads around a patch: (up, left), (down, right)."""
        after = [max(0, d * (k - 1) - p - s + 1) for k, s, p, d in zip(*self, strict=True)]
        return self.padding, (after[0], after[1])


class Plan:
    """How one convolution is computed: as a plain convolution of an image made from the rows.

    This class is the pointwise case; the others replace what differs.

    Args:
        window: of the plain convolution.
        groups: of channels.
    """

    surroundings: Callable[[], Cells] | None = None
    """Makes the tiles of `depthwise_products`, where that is faster."""

    def __init__(self, window: Window, groups: int):
        self.window = window
        self.groups = groups

    def image(self, rows: Tensor) -> Tensor:
        """Rows [N, C] -> input of the plain convolution, in channels_last memory."""
        return as_image(rows)

    def image_transposed(self, image: Tensor) -> Tensor:
        """Gradient of such an input -> gradient of the rows."""
        return as_rows(image)

    def output(self, image: Tensor) -> Tensor:
        """Result of the plain convolution -> rows [N', O]."""
        return as_rows(image)

    def output_transposed(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Gradient of the rows -> gradient of the plain convolution's result [M, O, h, w]; `shape` is (M, h, w)."""
        return rows.view(*shape, rows.shape[1]).permute(0, 3, 1, 2)

    def filters(self, weight: Tensor) -> Tensor:
        """Weights [O, C / groups, kh, kw] -> those of the plain convolution."""
        return weight

    def filters_transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Their gradient -> gradient of the weights."""
        return grad

    def convolve(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The convolution: rows [N, C] -> rows [N', O]."""
        _, stride, padding, dilation = self.window
        image, filters = self.image(rows), self.filters(weight)
        if bias is None and self._product_by_mkl(image):
            return as_rows(image) @ filters.flatten(1).t()
        return self.output(F.conv2d(image, filters, bias, stride, padding, dilation, self.groups))

    def convolve_transposed(self, grad: Tensor, weight: Tensor) -> Tensor | None:
        """Gradient of the input by the same gathering as forwards, where the window allows that."""
        return None

    def gradients(
        self, grad: Tensor, rows: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of rows and weights, those that are wanted."""
        if wanted[1] and self._depthwise_on_cpu(rows, weight):
            of_rows = self.gradients(grad, rows, weight, (True, False))[0] if wanted[0] else None
            return of_rows, self.depthwise_gradient(grad, rows, weight.shape[2:])
        image, filters = self.image(rows), self.filters(weight)
        if self._product_by_mkl(image):
            of_columns = grad @ filters.flatten(1) if wanted[0] else None
            of_filters = grad.t() @ as_rows(image) if wanted[1] else None
            return (
                None if of_columns is None else self.image_transposed(as_image(of_columns)),
                None if of_filters is None else self.filters_transposed(of_filters[..., None, None], weight),
            )
        _, stride, padding, dilation = self.window
        out = self.output_transposed(grad, (len(image), *self.window.output_size(*image.shape[2:])))
        of_image, of_weight, _ = torch.ops.aten.convolution_backward(
            *(out, image, filters, None),
            *(stride, padding, dilation, False, [0, 0], self.groups, [*wanted, False]),
        )
        return (
            self.image_transposed(of_image) if wanted[0] else None,
            self.filters_transposed(of_weight, weight) if wanted[1] else None,
        )

    def depthwise_gradient(self, grad: Tensor, rows: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Gradient of the weights [C, 1, kh, kw] of a depthwise convolution with stride 1, by a way of our own."""
        if self.surroundings is not None:
            return depthwise_products(rows, grad, self.surroundings(), kernel)
        return correlation(*self.planes(rows, grad), self.window.padding, rows.shape[1])

    def planes(self, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Input and gradient of the result of the plain convolution, for `correlation`."""
        image = self.image(rows)
        out = self.output_transposed(grad, (len(image), *self.window.output_size(*image.shape[2:])))
        first, second = (t.permute(2, 3, 0, 1).flatten(2) for t in (image, out))
        return first, second

    def _product_by_mkl(self, image: Tensor) -> bool:
        return self.groups == 1 and self.window == _POINTWISE and by_mkl(image)

    def _depthwise_on_cpu(self, rows: Tensor, weight: Tensor) -> bool:
        """Whether our own weight gradients do it, and faster (half precision was not measured)."""
        dense = self.window.stride == self.window.dilation == (1, 1)
        return dense and 1 < self.groups == rows.shape[1] == len(weight) and _wide_on_cpu(rows)


_POINTWISE = Window((1, 1), (1, 1), (0, 0))


def _wide_on_cpu(x: Tensor) -> bool:
    """Whether it is in fp32 or fp64 on the CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def by_mkl(x: Tensor) -> bool:
    """Whether matrix products are MKL's: on Intel's processors it is the faster library, where no bias is added."""
    if torch.compiler.is_compiling():  # which would trace how the processor's name is read
        return False
    return _wide_on_cpu(x) and torch.backends.mkl.is_available() and "Intel" in cpu_name()


class _Tiles(Plan):
    """A batch of patches with their surroundings, convolved without padding."""

    def __init__(self, cells: Cells, window: Window, groups: int):
        super().__init__(window._replace(padding=(0, 0)), groups)
        self.cells = cells
        self.symmetric = window.symmetric

    def image(self, rows: Tensor) -> Tensor:
        return self.cells.gather(rows).permute(0, 3, 1, 2)

    def image_transposed(self, image: Tensor) -> Tensor:
        return self.cells.spread(image.permute(0, 2, 3, 1))

    def convolve_transposed(self, grad: Tensor, weight: Tensor) -> Tensor | None:
        return self.convolve(grad, transposed(weight, self.groups)) if self.symmetric else None


class _Product(Plan):
    """Columns for each output, the window's sites one after the other; the convolution is a matrix product."""

    def __init__(self) -> None:
        super().__init__(_POINTWISE, 1)

    def filters(self, weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)

    def filters_transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        o, c, kh, kw = weight.shape
        return grad.view(o, kh, kw, c).permute(0, 3, 1, 2)


class _Columns(_Product):
    """Columns that a table reads."""

    def __init__(self, cells: Cells):
        super().__init__()
        self.cells = cells

    def image(self, rows: Tensor) -> Tensor:
        return as_image(self.cells.gather(rows).flatten(1))

    def image_transposed(self, image: Tensor) -> Tensor:
        return self.cells.spread(image.permute(0, 2, 3, 1))


class _SymmetricColumns(_Columns):
    """Those of a symmetric window."""

    def convolve_transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        if by_mkl(grad):
            taps = weight.permute(2, 3, 0, 1).flatten(0, 1).unbind()
            return as_rows(self.image(grad)) @ torch.cat(taps[::-1])
        return self.convolve(grad, transposed(weight, 1))


class _Blocks(_Product):
    """Columns of windows side by side, which need no table."""

    def __init__(self, sites: Sites, h: int, w: int, window: Window):
        super().__init__()
        (ph, pw), (sh, sw), self.kernel = sites.patch_sides(h, w), window.stride, window.kernel
        self.blocks = (len(sites.patches()), ph // sh, sh, pw // sw, sw)
        self.covers = window.kernel == window.stride

    def image(self, rows: Tensor) -> Tensor:
        kh, kw = self.kernel
        windows = rows.view(*self.blocks, rows.shape[1])[:, :, :kh, :, :kw]
        return as_image(windows.transpose(2, 3).reshape(-1, kh * kw * rows.shape[1]))

    def image_transposed(self, image: Tensor) -> Tensor:
        m, oh, _, ow, _ = self.blocks
        kh, kw = self.kernel
        c = image.shape[1] // (kh * kw)
        windows = as_rows(image).view(m, oh, ow, kh, kw, c).transpose(2, 3)
        if self.covers:
            return windows.reshape(-1, c)
        rows = windows.new_zeros(*self.blocks, c)
        rows[:, :, :kh, :, :kw] = windows
        return rows.flatten(0, 4)


class _Dense(Plan):
    """The zero-filled map; the result is read at the visible sites."""

    def __init__(self, sites: Sites, h: int, w: int, window: Window, groups: int):
        super().__init__(window, groups)
        self.shape = (sites.batch, h, w)
        self.places = sites.rows(h, w)
        self.output_places = sites.rows(*window.output_size(h, w))
        self.output_shape = (sites.batch, *window.output_size(h, w))
        self.symmetric = window.symmetric

    def image(self, rows: Tensor) -> Tensor:
        return _scatter(rows, self.places, self.shape)

    def image_transposed(self, image: Tensor) -> Tensor:
        return as_rows(image).index_select(0, self.places)

    def output(self, image: Tensor) -> Tensor:
        return as_rows(image).index_select(0, self.output_places)

    def output_transposed(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _scatter(rows, self.output_places, shape)

    def convolve_transposed(self, grad: Tensor, weight: Tensor) -> Tensor | None:
        # Where the weights' gradient is not one of our own, one call gives both.
        if not self.symmetric or not self._depthwise_on_cpu(grad, weight):
            return None
        return self.convolve(grad, transposed(weight, self.groups))

    def planes(self, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Scattered into their order at once."""
        first = _scatter_planes(rows, self.places, self.shape)
        return first, _scatter_planes(grad, self.output_places, self.output_shape)


def _scatter(rows: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows at places of a zero-filled [B, C, h, w] in channels_last memory."""
    b, h, w = shape
    flat = rows.new_zeros(b * h * w, rows.shape[1]).index_copy_(0, places, rows)
    return flat.view(b, h, w, -1).permute(0, 3, 1, 2)


def _scatter_planes(rows: Tensor, places: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows at places of a zero-filled [B, h, w, C], in the order [h, w, B * C]."""
    b, h, w = shape
    image, site = places // (h * w), places % (h * w)
    flat = rows.new_zeros(h * w * b, rows.shape[1]).index_copy_(0, site * b + image, rows)
    return flat.view(h, w, -1)


def plan_of(sites: Sites, h: int, w: int, window: Window, groups: int) -> Plan:
    """Choose by shape."""
    if groups == 1 and window.kernel == window.stride == (1, 1) and window.padding == (0, 0):
        return Plan(window, 1)
    if not window.keeps_patches(sites, h, w):
        return _Dense(sites, h, w, window, groups)
    before, after = window.reach
    if groups > 1:
        small = min(sites.patch_sides(h, w)) < GROUPED_TILES_FROM
        tiles = partial(sites.tiles, h, w, before, after)
        plan = _Dense(sites, h, w, window, groups) if small else _Tiles(tiles(), window, groups)
        # `torch.compile` traces no backward pass that still has to make tiles.
        traced = torch.compiler.is_compiling()
        if window.symmetric and not traced and _products_pay(sites.patch_sides(h, w), window.kernel):
            plan.surroundings = tiles
        return plan
    if window.side_by_side:
        return _Blocks(sites, h, w, window)
    if min(sites.patch_sides(*window.output_size(h, w))) < TILES_FROM:
        cells = sites.columns(h, w, before, after, window.kernel, window.stride, window.dilation)
        return (_SymmetricColumns if window.symmetric else _Columns)(cells)
    return _Tiles(sites.tiles(h, w, before, after), window, groups)


def correlation(planes: Tensor, kernels: Tensor, padding: tuple[int, int], channels: int) -> Tensor:
    """Weight gradient [C, 1, kh, kw] of a depthwise convolution with stride 1, as a depthwise convolution itself.

    Every channel of every image is a channel here, and its output gradient the kernel that slides over it. oneDNN's own
    routine for this gradient is several times slower where images are small.

    Args:
        planes: [h, w, M * C], the input.
        kernels: [h', w', M * C], the output's gradient.
        padding: of the convolution.
        channels: C.
    """
    image, filters = planes[None].permute(0, 3, 1, 2), kernels[..., None].permute(2, 3, 0, 1)
    each = F.conv2d(image, filters, padding=padding, groups=planes.shape[2])
    return each.view(-1, channels, 1, *each.shape[2:]).sum(0)


def _products_pay(patch: tuple[int, int], kernel: tuple[int, int]) -> bool:
    """Whether `depthwise_products` is the faster way for a symmetric window."""
    (ph, pw), (kh, kw) = patch, kernel
    tile = (ph + kh - 1) * (pw + kw - 1)
    measured = ph in _PRODUCTS_AT and pw in _PRODUCTS_AT
    return measured and tile <= _PRODUCTS_GATHER_UP_TO * ph * pw and tile <= _PRODUCTS_WASTE_UP_TO * kh * kw


def depthwise_products(rows: Tensor, grad: Tensor, tiles: Cells, kernel: tuple[int, ...]) -> Tensor:
    """Weight gradient [C, 1, kh, kw] of a depthwise convolution, as a matrix product for each channel.

    All sites of a patch meet all sites of its tile, summed over patches: each tap is the sum of a diagonal of that.
    More is multiplied than is used, but at the speed of matrix products.

    Args:
        rows: [N, C].
        grad: of the output, [N, C].
        tiles: cells [M, ph + kh - 1, pw + kw - 1] that the kernel reads around each patch.
        kernel: (kh, kw).
    """
    (m, th, tw), (kh, kw), c = tiles.shape, kernel, rows.shape[1]
    ph, pw = th - kh + 1, tw - kw + 1
    channels = F.pad(rows, (0, 0, 0, 1)).t().contiguous()  # the last site, zero, is under cells without a row
    x = channels.index_select(1, tiles.rows_or(len(rows))).view(c, m, th * tw)
    g = grad.t().contiguous().view(c, m, ph * pw)
    pairs = torch.bmm(g.transpose(1, 2), x)  # [C, ph * pw, th * tw]
    step = th * tw
    diagonals = pairs.as_strided((c, ph, pw, kh, kw), (ph * pw * step, pw * step + tw, step + 1, tw, 1))
    return diagonals.sum((1, 2))[:, None]


def transposed(weight: Tensor, groups: int) -> Tensor:
    """Weights that carry gradients back through a symmetric window: in and out swapped, taps reversed."""
    o, c, kh, kw = weight.shape
    if groups == 1:
        # Two dimensions are transposed by a kernel of their own, ten times as fast as four.
        taps = weight.permute(0, 2, 3, 1).reshape(o, -1).t().contiguous().view(kh * kw, c, o)
        return taps.flip(0).transpose(0, 1).contiguous().view(c, kh, kw, o).permute(0, 3, 1, 2)
    swapped = (
        weight.view(groups, o // groups, c, kh, kw).transpose(1, 2).reshape(groups * c, o // groups, kh, kw)
    )
    return swapped.flip(2, 3).contiguous(memory_format=torch.channels_last)


class _PackedConv(torch.autograd.Function):
    """Rows [N, C] -> rows [N', O] by a plan; keeps the inputs of the recipe, or the rows, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, recipe: Recipe | None
    ) -> Tensor:
        ctx.plan, ctx.compute = plan, None if recipe is None else recipe.compute
        ctx.save_for_backward(weight, *((rows,) if recipe is None else recipe.inputs))
        # Rows that are a view of an image are none to autograd: an activation may work in place on them.
        return plan.convolve(rows, weight, bias).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight, *kept = ctx.saved_tensors
        need_rows, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_rows, grad_weight = _gradients(ctx, grad.contiguous(), weight, kept, (need_rows, need_weight))
        return grad_rows, grad_weight, grad.sum(0) if need_bias else None, None, None


def _gradients(
    ctx: Any, grad: Tensor, weight: Tensor, kept: list[Tensor], wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and weights, those that are wanted, from what the forward pass has kept."""
    plan: Plan = ctx.plan
    grad_rows = plan.convolve_transposed(grad, weight) if wanted[0] else None
    wanted = (wanted[0] and grad_rows is None, wanted[1])
    if not any(wanted):
        return grad_rows, None
    rows = (ctx.compute(*kept) if ctx.compute else kept[0]).to(grad.dtype)
    of_rows, grad_weight = plan.gradients(grad, rows, weight, wanted)
    return of_rows if wanted[0] else grad_rows, grad_weight


class _ScaledProduct(torch.autograd.Function):
    """A product times a factor per channel, as the product with scaled weights: the backward pass needs no result.

    Factor and weights share their gradient: that of a factor is the sum, over its row, of weights times gradients of
    the scaled weights. So two passes over the rows take the place of six.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        data: Tensor,
        recipe: Recipe | None,
    ) -> Tensor:
        ctx.plan, ctx.compute = Plan(_POINTWISE, 1), None if recipe is None else recipe.compute
        ctx.save_for_backward(weight, bias, scale, *((rows,) if recipe is None else recipe.inputs))
        return data * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight, bias, scale, *kept = ctx.saved_tensors
        need_rows, need_weight, need_bias, need_scale = ctx.needs_input_grad[:4]
        grad, per_filter = grad.contiguous(), scale.view(-1, 1, 1, 1)
        wanted = (need_rows, need_weight or need_scale)
        grad_rows, of_scaled = _gradients(ctx, grad, weight * per_filter, kept, wanted)
        of_sum = grad.sum(0) if need_bias or need_scale else None
        grad_weight = grad_bias = grad_scale = None
        if of_scaled is not None:
            grad_weight = of_scaled * per_filter if need_weight else None
            grad_scale = (of_scaled * weight).flatten(1).sum(1) if need_scale else None
        if of_sum is not None:
            grad_bias = of_sum * scale if need_bias else None
            grad_scale = None if grad_scale is None else grad_scale + of_sum * bias
        return grad_rows, grad_weight, grad_bias, grad_scale, None, None


def scaled_product(product: Product, data: Tensor, scale: Tensor) -> Tensor:
    """Result [N, O] of a product times a factor for each channel, [O]."""
    rows, weight, bias, recipe, _ = product
    return _ScaledProduct.apply(rows, weight, bias, scale, data.detach(), recipe)  # type: ignore[return-value]


def packed_conv(
    rows: Tensor,
    sites: Sites,
    h: int,
    w: int,
    window: Window,
    weight: Tensor,
    bias: Tensor | None = None,
    groups: int = 1,
    recipe: Recipe | None = None,
) -> Tensor:
    """Convolve the rows of an h x w map: rows [N, C] -> rows [N', O].

    Weight [O, C / groups, kh, kw]; `recipe` computes the rows again in the backward pass.
    """
    return convolve_by(plan_of(sites, h, w, window, groups), rows, weight, bias, recipe)


def convolve_by(
    plan: Plan, rows: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe | None
) -> Tensor:
    """Convolve by a plan: in the type of autocast, keeping the recipe's inputs for the backward pass."""
    device = rows.device.type
    if torch.is_autocast_enabled(device) and rows.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _PackedConv.apply(rows, weight, bias, plan, recipe)  # type: ignore[return-value]


class _PackedMaxPool(torch.autograd.Function):
    """Max pooling of rows over tiles; the backward pass finds the maxima again."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Cells, window: Window, recipe: Recipe | None) -> Tensor:
        ctx.cells, ctx.window, ctx.compute = cells, window, None if recipe is None else recipe.compute
        ctx.save_for_backward(*((rows,) if recipe is None else recipe.inputs))
        return as_rows(_max_pool(rows, cells, window)[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        kept = ctx.saved_tensors
        rows = (ctx.compute(*kept) if ctx.compute else kept[0]).to(grad.dtype)
        image, out, indices = _max_pool(rows, ctx.cells, ctx.window)
        window: Window = ctx.window
        grad_out = grad.contiguous().view(len(out), *out.shape[2:], -1).permute(0, 3, 1, 2)
        grad_image = torch.ops.aten.max_pool2d_with_indices_backward(
            grad_out, image, window.kernel, window.stride, [0, 0], window.dilation, False, indices
        )
        return ctx.cells.spread(grad_image.permute(0, 2, 3, 1)), None, None, None


def _max_pool(rows: Tensor, cells: Cells, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles, their maxima and where those lie."""
    image = cells.gather(rows, outside=float("-inf")).permute(0, 3, 1, 2)
    out, indices = F.max_pool2d(image, window.kernel, window.stride, 0, window.dilation, return_indices=True)
    return image, out, indices


def packed_max_pool(
    rows: Tensor, sites: Sites, h: int, w: int, window: Window, recipe: Recipe | None
) -> Tensor | None:
    """Max pooling of the rows of an h x w map, or None where only the dense operator can do it.

    Masked sites compete with 0, sites beyond the border with -inf, as on the zero-filled map.
    """
    if not window.keeps_patches(sites, h, w):
        return None
    return _PackedMaxPool.apply(rows, sites.tiles(h, w, *window.reach), window, recipe)  # type: ignore[no-any-return]
