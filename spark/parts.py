"""A decoder block of large maps, one part of the batch after the other.

What large maps cost on a CPU is memory more than arithmetic: glibc's allocator asks the kernel for every tensor above 32
MiB anew, and the kernel fills its pages with zeros when they are first touched. Layer after layer, a block makes a
dozen such tensors. Here the batch goes through it in parts whose maps stay below that, so that memory is used again,
and what is between two convolutions is written once, into memory that the next part overwrites. In the backward pass it
is computed again. Batch norm needs the statistics of all parts first, forwards and backwards; nothing else crosses them.

Legend: x [B, c, h, w], squares of the folded convolution [b, h, w, 2, 2, m] (`spark/folding.py`), their image [b, m, 2h,
2w], result of the second convolution [b, o, 2h, 2w], prediction [B, k, 2h, 2w]; b images of a part.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark.folding import Fold, border_of, folded_weights
from spark.sparse.batch_norm import BatchNormCall, in_recomputation, move_running_statistics
from spark.sparse.sites import as_image, as_rows

# Half of what glibc's allocator keeps when it is freed.
PART_BYTES = 16 * 2**20
# Numbers that are read and written while they are in the cache, and how many of them lie next to each other at least.
_PIECE, _LINE = 2**18, 1024


def parts_pay(x: Tensor) -> bool:
    """Whether a block works on x [B, c, h, w] in parts: on a CPU, in full precision, where it is trained."""
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(x.device.type)
    return x.device.type == "cpu" and exact and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def block_in_parts(
    x: Tensor,
    upsample: nn.ConvTranspose2d,
    conv1: nn.Conv2d,
    norm1: nn.BatchNorm2d,
    conv2: nn.Conv2d,
    norm2: nn.BatchNorm2d,
    head: nn.Conv2d | None = None,
) -> Tensor:
    """`norm2(conv2(relu6(norm1(conv1(upsample(x))))))` in training, then `head`, a 1x1 convolution: [B, o or k, 2h, 2w].

    Running statistics move as the modules would move them.

    Raises:
        ValueError: batch norm over a single site.
    """
    assert upsample.bias is not None
    weights = folded_weights(upsample.weight, upsample.bias, conv1.weight)
    tail = (norm1.weight, norm1.bias, conv2.weight, norm2.weight, norm2.bias)
    ends = (None, None) if head is None else (head.weight, head.bias)
    x = x.contiguous(memory_format=torch.channels_last)
    out, *statistics = _InParts.apply(x, *weights, *tail, *ends, (norm1.eps, norm2.eps))  # type: ignore[misc]
    count = 4 * x.numel() // x.shape[1]
    for norm, mean, var in zip((norm1, norm2), statistics[::2], statistics[1::2], strict=True):
        _count_batch(norm, mean, var, count)
    return out


def _count_batch(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """What a module of batch norm does to its buffers in training."""
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    if not in_recomputation():
        call = BatchNormCall(norm.running_mean, norm.running_var, momentum=float(norm.momentum or 0.0))
        move_running_statistics(call, mean, var, count)


class _Normed(NamedTuple):
    """Batch norm as a line, `scale x + shift`, by channel. All [C]."""

    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def line(self) -> tuple[Tensor, Tensor]:
        """(scale, shift)."""
        scale = self.invstd * self.weight
        return scale, self.bias - self.mean * scale

    def sums(self, grad: Tensor, rows: Tensor) -> Tensor:
        """Gradients of weight and bias, [2, C], from rows [N, C] of the result's gradient and of x."""
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            *(as_image(grad), as_image(rows), self.weight, None, None, self.mean, self.invstd),
            *(True, 0.0, [False, True, True]),
        )
        return torch.stack([of_weight, of_bias])

    def plane(self, sums: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """(a, b, c): the gradient of x is `a grad + b x + c`, by channel; sums over all `count` sites."""
        of_weight, of_bias = sums / count
        a = self.invstd * self.weight
        b = -a * self.invstd * of_weight
        return a, b, -a * of_bias - b * self.mean


def _statistics(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of the channels of rows [N, C], those of the parts merged."""
    count = sum(len(part) for part in parts)
    found = [torch.ops.aten.batch_norm_update_stats(as_image(part), None, None, 0.0) for part in parts]
    shares = [len(part) / count for part in parts]
    mean = sum(share * m for share, (m, _) in zip(shares, found, strict=True))
    assert isinstance(mean, Tensor)
    var = sum(share * (v + (m - mean).square()) for share, (m, v) in zip(shares, found, strict=True))
    assert isinstance(var, Tensor)
    return mean, var


def _pieces(channels: int, rows: Sequence[Tensor], vectors: Sequence[Tensor]) -> Any:
    """Rows [N, C] in pieces of long lines, with vectors [C] as long: what is done to a piece is done in the cache."""
    lines = max(1, _LINE // channels)
    while rows[0].numel() % (lines * channels):
        lines -= 1
    long = [vector.repeat(lines) for vector in vectors]
    height = max(1, _PIECE // (lines * channels))
    for pieces in zip(*(row.view(-1, lines * channels).split(height) for row in rows), strict=True):
        yield *pieces, *long


def _activated(squares: Tensor, norm: _Normed, image: Tensor) -> Tensor:
    """ReLU6 of the batch norm of squares, written into an image's memory [b, h, 2, w, 2 m]: a view [b, m, 2h, 2w]."""
    b, h, w, _, _, m = squares.shape
    scale, shift = (t.repeat(2) for t in norm.line)
    for i in range(b):
        torch.addcmul(shift, squares[i].view(h, w, 2, 2 * m), scale, out=image[i].transpose(1, 2))
        image[i].clamp_(0, 6)
    return image[:b].view(b, 2 * h, 2 * w, m).permute(0, 3, 1, 2)


class _InParts(torch.autograd.Function):
    """See `block_in_parts`. Keeps squares and results of the second convolution, part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Any:
        *weights, weight1, bias1, conv2, weight2, bias2, head, head_bias, eps = args
        fold = Fold(*weights)
        ctx.size = _images_per_part(x, len(bias1))
        parts = x.split(ctx.size)
        beyond = zip(*(t.split(ctx.size) for t in fold.beyond(x)), strict=True)
        squares = [fold.squares(part, less) for part, less in zip(parts, beyond, strict=True)]
        mean1, var1 = _statistics([s.view(-1, s.shape[-1]) for s in squares])
        norm1 = _Normed(mean1, (var1 + eps[0]).rsqrt(), weight1, bias1)
        image = _image_of(squares[0])
        results = [as_rows(F.conv2d(_activated(s, norm1, image), conv2, padding=1)) for s in squares]
        mean2, var2 = _statistics(results)
        norm2 = _Normed(mean2, (var2 + eps[1]).rsqrt(), weight2, bias2)
        ctx.parts = len(squares)
        ctx.save_for_backward(x, *norm1, *norm2, *weights, conv2, head, *squares, *results)
        ctx.mark_non_differentiable(mean1, var1, mean2, var2)
        b, _, h, w = x.shape
        scale, shift = norm2.line
        if head is not None:
            flat = head.flatten(1)
            out = x.new_empty(b, 2 * h, 2 * w, len(head))
            for part, rows in zip(out.split(ctx.size), results, strict=True):
                torch.addmm(head_bias + flat @ shift, rows, (flat * scale).t(), out=part.view(-1, len(head)))
        else:
            out = x.new_empty(b, 2 * h, 2 * w, len(bias2))
            for part, rows in zip(out.split(ctx.size), results, strict=True):
                for to, given, a, c in _pieces(len(scale), [part, rows], [scale, shift]):
                    torch.addcmul(c, given, a, out=to)
        return out.permute(0, 3, 1, 2), mean1, var1, mean2, var2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        norm1, norm2 = _Normed(*saved[:4]), _Normed(*saved[4:8])
        fold, conv2, head = Fold(*saved[8:13]), saved[13], saved[14]
        squares, results = saved[15 : 15 + ctx.parts], saved[15 + ctx.parts :]
        grads = [as_rows(g) for g in grad.contiguous(memory_format=torch.channels_last).split(ctx.size)]
        count = 4 * x.numel() // x.shape[1]

        grad_head = grad_head_bias = None
        if head is None:
            sums = sum(norm2.sums(g, rows) for g, rows in zip(grads, results, strict=True))
        else:
            flat = head.flatten(1)
            grad_head_bias = sum(g.sum(0) for g in grads)
            products = sum(g.t() @ rows for g, rows in zip(grads, results, strict=True))
            normed = (products - torch.outer(grad_head_bias, norm2.mean)) * norm2.invstd
            sums = torch.stack([(flat * normed).sum(0), grad_head_bias @ flat])
            grad_head = (normed * norm2.weight + torch.outer(grad_head_bias, norm2.bias)).view_as(head)
        grad_norm2 = sums
        a2, b2, c2 = norm2.plane(sums, count)

        image, buffer = _image_of(squares[0]), torch.empty_like(results[0])
        grad_squares, grad_norm1, grad_conv2 = [], 0, 0
        for square, rows, g in zip(squares, results, grads, strict=True):
            of_result = buffer[: len(rows)]
            if head is None:
                for to, given, r, a, b, c in _pieces(len(a2), [of_result, g, rows], [a2, b2, c2]):
                    torch.addcmul(c, r, b, out=to).addcmul_(given, a)
            else:
                for to, r, b, c in _pieces(len(a2), [of_result, rows], [b2, c2]):
                    torch.addcmul(c, r, b, out=to)
                of_result.addmm_(g, head.flatten(1) * a2)
            activated = _activated(square, norm1, image)
            n, _, height, width = activated.shape
            of_image, of_conv2, _ = torch.ops.aten.convolution_backward(
                *(of_result.view(n, height, width, -1).permute(0, 3, 1, 2), activated, conv2, None),
                *([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]),
            )
            grad_conv2 = grad_conv2 + of_conv2
            of_square = _through_relu6(of_image, activated, square)
            m = square.shape[-1]
            grad_norm1 = grad_norm1 + norm1.sums(of_square.view(-1, m), square.view(-1, m))
            grad_squares.append(of_square)

        plane = norm1.plane(grad_norm1, count)
        grad_x, grad_weight, grad_bias, borders = torch.empty_like(x), 0, 0, []
        for part, to, square, g in zip(
            x.split(ctx.size), grad_x.split(ctx.size), squares, grad_squares, strict=True
        ):
            for of, s, a, b, c in _pieces(len(plane[0]), [g, square], plane):
                of.mul_(a).addcmul_(s, b).add_(c)
            of_part, of_weight = fold.gradients(g, part)
            to.copy_(of_part)
            grad_weight = grad_weight + of_weight
            borders.append(border_of(g))
        of_borders = [torch.cat(same) for same in zip(*borders, strict=True)]
        grad_parts = fold.border_gradients(of_borders, x, grad_x)
        # Batch norm takes the mean off again: what is added to all sites alike has no gradient but rounding errors.
        grad_bias = torch.zeros_like(fold.bias)
        return (
            *(grad_x, grad_weight, grad_bias, *grad_parts, *grad_norm1, grad_conv2, *grad_norm2),
            *(grad_head, grad_head_bias, None),
        )


def _images_per_part(x: Tensor, channels: int) -> int:
    """Images whose upsampled map of so many channels fits into a part; one if none does."""
    one = 4 * x[0, 0].numel() * channels * x.element_size()
    return max(1, PART_BYTES // one)


def _image_of(squares: Tensor) -> Tensor:
    """Memory for the image of squares, [b, h, 2, w, 2 m]."""
    b, h, w, _, _, m = squares.shape
    return squares.new_empty(b, h, 2, w, 2 * m)


def _through_relu6(grad: Tensor, activated: Tensor, squares: Tensor) -> Tensor:
    """Gradient of squares from that of their activated image [b, m, 2h, 2w]."""
    b, h, w, _, _, m = squares.shape
    out = torch.empty_like(squares)
    lines = [t.permute(0, 2, 3, 1).view(b, h, 2, w, 2 * m).transpose(2, 3) for t in (grad, activated)]
    torch.ops.aten.hardtanh_backward.grad_input(*lines, 0, 6, grad_input=out.view(b, h, w, 2, 2 * m))
    return out
