"""The spconv layout: packed rows whose ungrouped convolutions run through the library spconv.

Legend: K = kh * kw taps of a window, N rows of its input, N' rows of its output, -1 = no row.

Everything but `conv2d` is the packed layout's; so is `conv2d` in a type that spconv lacks (`DTYPES`), which under bf16
autocast is all of it.  spconv never sees coordinates and never searches for neighbours: it is handed tables of rows
that follow from the mask like every other index map.  So rows keep the packed order, a strided convolution has exactly
the visible sites of its output (spconv's own would add every site that a window touches), and even kernels and dilation
need nothing of their own.

spconv's functional layer is passed by for its `ops`: the functional layer casts to fp16 under any autocast and keeps
the rows for the backward pass, where the packed layout computes them again from a recipe.

Weights are the module's own: spconv's order [O, kh, kw, C] is a view of channels_last memory (elsewhere a copy for the
length of the call), and their gradient comes back as a view, too.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from spark.errors import UserError
from spark.sparse import common_ops as common
from spark.sparse import packed_ops as packed
from spark.sparse.packed_conv import Plan, Window, convolve_by
from spark.sparse.sites import Sites
from spark.sparse.tensor import Layout, SparseTensor

# What spconv 2.3 computes in: its binding to PyTorch does not know bfloat16, its CUDA kernels not fp64, and its fp16 on
# a CPU passes through NumPy.
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float16)}
# Taps that implicit matrix products (CUDA only) serve: one bit each of a non-negative int32.
IMPLICIT_UP_TO = 31
_ALL_TAPS = np.array([0xFFFFFFFF], dtype=np.uint32)  # of those, the ones that one pass computes


class _Order(NamedTuple):
    """Rows sorted by the taps that they have, so that neighbouring threads skip the same ones.

    Attributes:
        taps: [rows, 1] int32, bit k set where tap k has a partner; sorted.
        row: [rows] int32, whose taps these are.
    """

    taps: Tensor
    row: Tensor


class _Table:
    """Which input row each tap of a window reads for each output row, in the forms of spconv's two algorithms.

    Args:
        sites: of the map.
        h, w: size of the map.
        window: of the convolution; its outputs keep to patches.
    """

    def __init__(self, sites: Sites, h: int, w: int, window: Window):
        tiles = sites.tiles(h, w, *window.reach)
        taps = tiles.rows_or(-1).int().view(tiles.shape)
        for dim, (kernel, stride, _, dilation) in enumerate(zip(*window, strict=True)):
            taps = taps.unfold(1 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        self.num_inputs = tiles.num_rows
        self.num_outputs = taps.shape[:3].numel()
        self.reads = taps.flatten(3).flatten(0, 2).T.contiguous()  # [K, N'] int32
        self.empty = not bool((self.reads >= 0).any())

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Native: (input row, output row) of every pair [2, K, most pairs of a tap] and their number [K], int32."""
        tap, output = (self.reads >= 0).nonzero().unbind(1)
        count = tap.bincount(minlength=len(self.reads))
        place = torch.arange(len(tap), device=tap.device) - (count.cumsum(0) - count)[tap]
        pairs = self.reads.new_full((2, len(self.reads), int(count.max())), -1)
        pairs[0, tap, place] = self.reads[tap, output]
        pairs[1, tap, place] = output.int()
        return pairs, count.int()

    @cached_property
    def read_by(self) -> Tensor:
        """Implicit: which output row reads each input row at each tap, at most one: [K, N] int32."""
        tap, output = (self.reads >= 0).nonzero().unbind(1)
        read_by = self.reads.new_full((len(self.reads), self.num_inputs), -1)
        read_by[tap, self.reads[tap, output].long()] = output.int()
        return read_by

    @cached_property
    def orders(self) -> tuple[_Order, _Order]:
        """Implicit: of the output rows, and of the input rows."""
        return _order(self.reads), _order(self.read_by)


def _order(partners: Tensor) -> _Order:
    """Of the columns of partners [K, rows]."""
    bits = 1 << torch.arange(len(partners), dtype=torch.int32, device=partners.device)
    taps, row = ((partners >= 0) * bits[:, None]).sum(0, dtype=torch.int32).sort()
    return _Order(taps[:, None], row.int())


class _Native(Plan):
    """One matrix product a tap over its gathered pairs, added to the outputs (spconv's `ConvAlgo.Native`).

    Args:
        ops: the module `spconv.pytorch.ops`.
        table: of the window.
        window: of the convolution.
    """

    def __init__(self, ops: Any, table: _Table, window: Window):
        super().__init__(window, 1)
        self.ops = ops
        self.table = table

    def filters(self, weight: Tensor) -> Tensor:
        """[O, C, kh, kw] -> [O, kh, kw, C]."""
        return weight.permute(0, 2, 3, 1).contiguous()

    def filters_transposed(self, grad: Tensor, weight: Tensor) -> Tensor:
        return grad.permute(0, 3, 1, 2)

    def convolve(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = self.run(rows.contiguous(), self.filters(weight))
        return out if bias is None else out.add_(bias)

    def gradients(
        self, grad: Tensor, rows: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """spconv computes both, wanted or not."""
        of_rows, of_filters = self.run_backward(grad, rows.contiguous(), self.filters(weight))
        return of_rows, self.filters_transposed(of_filters, weight)

    def run(self, rows: Tensor, filters: Tensor) -> Tensor:
        """Rows [N, C] -> rows [N', O]."""
        return self.ops.indice_conv(rows, filters, *self.table.pairs, self.table.num_outputs)

    def run_backward(self, grad: Tensor, rows: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of rows and filters."""
        return self.ops.indice_conv_backward(rows, filters, grad, *self.table.pairs)


class _Implicit(_Native):
    """One kernel for all taps (spconv's `ConvAlgo.MaskImplicitGemm`), on CUDA only."""

    def run(self, rows: Tensor, filters: Tensor) -> Tensor:
        taps, row = self.table.orders[0]
        out, *self.of_blocks = self.ops.implicit_gemm(
            *(rows, filters, self.table.reads, [taps], [row], self.table.num_outputs, [_ALL_TAPS]),
            is_train=True,  # also without gradients: it says which taps each block of rows has
            is_subm=False,
        )
        return out

    def run_backward(self, grad: Tensor, rows: Tensor, filters: Tensor) -> tuple[Tensor, Tensor]:
        outputs, inputs = self.table.orders
        taps_of_blocks, block = self.of_blocks
        return self.ops.implicit_gemm_backward(
            *(rows, filters, grad, self.table.reads, self.table.read_by),
            *([outputs.taps], [inputs.taps], [outputs.row], [inputs.row]),
            *(taps_of_blocks, [_ALL_TAPS], block),
            is_subm=False,
        )


class _Conv2d:
    """The rule for `conv2d`.

    Args:
        ops: the module `spconv.pytorch.ops`.
    """

    def __init__(self, ops: Any):
        self.ops = ops

    def __call__(self, func: Callable, x: SparseTensor, *args: Any, **kwargs: Any) -> SparseTensor:
        """Through spconv what has neighbours, is ungrouped and keeps to patches, in a type of `DTYPES`.

        The packed rule does the rest: pointwise convolutions (one matrix product there, too), grouped and depthwise
        ones (spconv has none), windows that do not keep to patches, and the types that spconv does not compute in:
        bfloat16 everywhere, fp16 on a CPU, fp64 on CUDA.
        """
        common.require_channels_first(func, x)
        call = packed.ConvCall(*args, **kwargs)
        window = call.window
        device = x.device.type
        autocast = (
            torch.is_autocast_enabled(device) and x.dtype != torch.float64
        )  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        plan = None
        if window is not None and call.groups == 1 and dtype in DTYPES.get(device, ()):
            plan = self.plan(x.sites, *x.size4[2:], window)
        if window is None or plan is None:
            return packed.conv2d(func, x, *call)
        rows = convolve_by(plan, x.data, call.weight, call.bias, packed.valid_recipe(x))
        b, _, h, w = x.size4
        return SparseTensor(rows, x.sites, x.layout, (b, len(call.weight), *window.output_size(h, w)))

    def plan(self, sites: Sites, h: int, w: int, window: Window) -> _Native | None:
        """How spconv computes it; None where it does not."""
        pointwise = window.kernel == window.stride == (1, 1) and window.padding == (0, 0)
        if pointwise or not window.keeps_patches(sites, h, w):
            return None
        table = sites.cached(("spconv", h, w, window), lambda: _Table(sites, h, w, window))
        if table.empty:  # every tap reads a masked site; spconv refuses a table without a pair
            return None
        taps = window.kernel[0] * window.kernel[1]
        implicit = sites.visible.is_cuda and taps <= IMPLICIT_UP_TO
        return (_Implicit if implicit else _Native)(self.ops, table, window)


@cache
def spconv_layout() -> Layout:
    """The packed layout with spconv's convolutions.

    Raises:
        UserError: spconv is missing or does not import.
    """
    rules = {**packed.PACKED.rules, "conv2d": _Conv2d(_import_ops())}
    return Layout("spconv", rules, packed.PACKED.from_dense, packed.PACKED.to_dense)


def _import_ops() -> Any:
    """The module `spconv.pytorch.ops`; spconv itself is imported here and nowhere else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it decorates functions with torch.cuda.amp
            return importlib.import_module("spconv.pytorch.ops")
    except Exception as error:  # beside ImportError whatever a build for another CUDA or NumPy dies of
        raise UserError(
            f"layout 'spconv' needs the package spconv, which does not import here "
            f"({type(error).__name__}: {error}): pip install 'spark-pretrain[spconv]' "
            "(Python up to 3.13), or use layout 'packed'"
        ) from error
