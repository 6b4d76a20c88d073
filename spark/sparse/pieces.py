"""Two pointwise convolutions with a GELU between them, one piece of the rows after the other.

Between the two of an inverted bottleneck (ConvNeXt's MLP) rows are four times as wide as anywhere else. Layer after
layer, a CPU writes and reads such rows a dozen times: product, activation, and backwards the activation again, its
gradient, the weights' gradients and the sums for the biases. Here a piece of the rows goes all the way while it is in
the cache, and the next piece uses its memory again; only the first product's result is kept, as it is layer by layer.

The first convolution cannot know what follows. Its result is deferred (`Deferred`): GELU and the second convolution
take over from there, and for every other operator it is made as usual.

Legend: rows [N, C], hidden [N, H], result [N, O].
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark.sparse.packed_conv import POINTWISE, Plan
from spark.sparse.tensor import Recipe

_PLAN = Plan(POINTWISE, 1)
# Bytes of the hidden rows from which pieces pay, and of a piece of them.
PIECES_FROM = 8 * 2**20
PIECE_BYTES = 6 * 2**20


class Product(NamedTuple):
    """A pointwise convolution that has not been computed yet, or the GELU of one.

    Attributes:
        rows: [N, C].
        version: of the rows when the convolution was called.
        weight: [H, C, 1, 1].
        bias: [H] or None.
        recipe: how to compute the rows again.
        gelu: None before the activation, its `approximate` after it.
    """

    rows: Tensor
    version: int
    weight: Tensor
    bias: Tensor | None
    recipe: Recipe | None
    gelu: str | None = None

    def require_unchanged(self) -> None:
        """Refuse rows that were changed in place after the convolution was called.

        Raises:
            RuntimeError: they were.
        """
        if self.rows._version != self.version:
            raise RuntimeError(
                "the input of a pointwise convolution was modified by an inplace operation before its result was read: "
                "use one that is not in place there"
            )


def _trained_in_full_precision(rows: Tensor, weight: Tensor) -> bool:
    """Whether gradients are recorded, on a CPU, in fp32 or fp64."""
    if rows.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    wide = rows.dtype in (torch.float32, torch.float64) and rows.dtype == weight.dtype
    return wide and not torch.is_autocast_enabled("cpu")


def pieces_pay(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a product should wait: where rows widen, are many, and a bias tells that no batch norm follows."""
    widens = len(weight) > weight.shape[1] == rows.shape[1] and bias is not None
    large = len(rows) * len(weight) * rows.element_size() >= PIECES_FROM
    return widens and large and _trained_in_full_precision(rows, weight)


def may_follow(call: Product | None, weight: Tensor) -> bool:
    """Whether a pointwise convolution, `weight` [O, H, 1, 1], of this call's result can be computed in pieces."""
    if call is None or call.gelu is None or weight.shape[1] != len(call.weight):
        return False
    return _trained_in_full_precision(call.rows, weight)


def mlp_in_pieces(call: Product, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve the call's result, which is that of a GELU, by `weight` [O, H, 1, 1]: rows [N, O]."""
    call.require_unchanged()
    inner = (call.rows, call.weight, call.bias, call.recipe, call.gelu)
    return _InPieces.apply(*inner, weight, bias)  # type: ignore[return-value]


class _InPieces(torch.autograd.Function):
    """See `mlp_in_pieces`. Keeps the rows, or what they can be computed from, and the first product's result."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *args: Any) -> Tensor:
        weight1, bias1, recipe, ctx.gelu, weight2, bias2 = args
        ctx.size = max(1, PIECE_BYTES // (len(weight1) * rows.element_size()))
        hidden = [_PLAN.convolve(piece, weight1, bias1) for piece in rows.split(ctx.size)]
        out = rows.new_empty(len(rows), len(weight2))
        for piece, h in zip(out.split(ctx.size), hidden, strict=True):
            piece.copy_(_PLAN.convolve(F.gelu(h, approximate=ctx.gelu), weight2, bias2))
        ctx.compute = None if recipe is None else recipe.compute
        ctx.save_for_backward(weight1, weight2, *hidden, *((rows,) if recipe is None else recipe.inputs))
        ctx.parts = len(hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        weight1, weight2, *kept = ctx.saved_tensors
        hidden, kept = kept[: ctx.parts], kept[ctx.parts :]
        need_rows, need_weight1, need_bias1, _, _, need_weight2, need_bias2 = ctx.needs_input_grad
        rows = ctx.compute(*kept) if ctx.compute else kept[0]
        of_rows = torch.empty_like(rows) if need_rows else None
        sums: list[Tensor | None] = [None] * 4
        pieces = zip(*(t.split(ctx.size) for t in (rows, grad.contiguous())), hidden, strict=True)
        for i, (x, g, h) in enumerate(pieces):
            active = F.gelu(h, approximate=ctx.gelu)
            of_active, of_weight2 = _PLAN.gradients(g, active, weight2, (True, need_weight2))
            assert of_active is not None
            of_hidden = torch.ops.aten.gelu_backward(of_active, h, approximate=ctx.gelu)
            of_x, of_weight1 = _PLAN.gradients(of_hidden, x, weight1, (need_rows, need_weight1))
            if of_rows is not None and of_x is not None:
                of_rows[i * ctx.size : (i + 1) * ctx.size] = of_x
            of_bias1 = of_hidden.sum(0) if need_bias1 else None
            of_bias2 = g.sum(0) if need_bias2 else None
            parts = (of_weight1, of_bias1, of_weight2, of_bias2)
            sums = [part if i == 0 else _add(total, part) for total, part in zip(sums, parts, strict=True)]
        of_weight1, of_bias1, of_weight2, of_bias2 = sums
        return of_rows, of_weight1, of_bias1, None, None, of_weight2, of_bias2


def _add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return None if total is None or part is None else total.add_(part)
