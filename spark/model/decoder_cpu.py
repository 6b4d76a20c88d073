"""A decoder block on a CPU by the fastest way that gives the same: `run_block` chooses it.

*Folding.* Nothing nonlinear stands between the transposed convolution and the first 3x3 convolution of a block. So
every 2x2 square of results is a 3x3 convolution of the low-resolution map with weights composed of both: 9 c^2
multiplications a pixel of the result instead of 13 c^2, and the upsampled map is never written. Composing costs a
multiple of c^3, so this pays where maps are large and channels few.

*Parts.* On a CPU large maps cost memory more than arithmetic. glibc's allocator asks the kernel anew for every tensor
above 32 MiB, and the kernel fills its pages with zeros when they are first touched; a block makes a dozen such tensors.
Here the batch goes through the block in parts whose maps stay below that, so that memory is used again. What lies
between two convolutions is written once, into memory that the next part overwrites, and computed again in the backward
pass. Batch norm needs the statistics of all parts first, forwards and backwards.

Legend: x [B, c, h, w], upsampling weight [c, m, 4, 4] (stride 2, padding 1), convolution weight [o, m, 3, 3] (padding
1), squares of the folded convolution [b, h, w, 2, 2, m], their image [b, m, 2h, 2w], result of the second convolution
[b, o, 2h, 2w], prediction [B, k, 2h, 2w]; b images of a part.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from spark.sparse import SparseTensor
from spark.sparse.batch_norm import (
    BatchNormCall,
    SyncBatchNorm2d,
    in_recomputation,
    move_running_statistics,
    world_size,
)
from spark.sparse.filled_conv import Filled
from spark.sparse.sites import as_image, as_rows

# At both ends of a line of pixels: the taps of the two convolutions that reach the pixel beyond it, and use it.
_ENDS = ((0, 0), (3, 2))
# Half of what glibc's allocator keeps when it is freed.
PART_BYTES = 16 * 2**20
# Numbers that are read and written while they are in the cache, and how many of them lie next to each other at least.
_PIECE, _LINE = 2**18, 1024


def run_block(block: Any, x: Tensor | Filled, head: nn.Conv2d | None = None) -> Tensor:
    """The same as `block.plain(x, head)`, by the fastest exact way for this device, these sizes and these modules.

    Args:
        block: a `spark.model.decoder.DecoderBlock`.
        x: its input.
        head: a 1x1 convolution of its result, if there is one.
    """
    up, conv = block.upsample, block.conv1
    folds = folding_pays(x.x if isinstance(x, Filled) else x)
    if isinstance(x, Filled):
        if not folds and not hooked(up):
            return block.finish(conv(x.upsampled(up.weight, up.bias)), head)
        x = x.dense()
    if folds and parts_pay(x) and not _needs_modules(block, head):
        return block_in_parts(x, up, conv, block.norm1, block.conv2, block.norm2, head)
    if folds and not hooked(up, conv):
        return block.finish(folded_upsample_conv(x, up.weight, up.bias, conv.weight), head)
    return block.plain(x, head)


def hooked(*modules: nn.Module) -> bool:
    """Whether these modules have hooks, which do not run where a shortcut reads their weights."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def _needs_modules(block: Any, head: nn.Conv2d | None) -> bool:
    """Whether layers of a block were replaced or frozen, have hooks, or exchange statistics with other processes."""
    stock = isinstance(block.act, nn.ReLU6) and (head is None or head.bias is not None)
    stock = stock and all(_in_training_alone(norm) for norm in (block.norm1, block.norm2))
    return not stock or hooked(*block.children(), *([] if head is None else [head]))


def _in_training_alone(norm: nn.Module) -> bool:
    """Whether it normalises by the statistics of this process's batch, and follows them at a steady pace."""
    if not isinstance(norm, SyncBatchNorm2d) or not norm.affine or not norm.track_running_stats:
        return False
    return norm.training and norm.momentum is not None and not (norm.sync and world_size() > 1)


# --- folding


def folding_pays(x: Tensor | SparseTensor) -> bool:
    """Whether composing the weights costs less than it saves, for as many channels as x [B, c, h, w] has.

    It costs about 1,000 c^3 multiplications forwards and backwards, half as much again to be worth while, and saves
    48 B h w c^2. On a GPU memory sets the pace of both, and neither was measured there. `torch.compile` cannot trace
    its backward pass.
    """
    if torch.compiler.is_compiling():
        return False
    b, c, h, w = x.shape
    return x.device.type == "cpu" and min(h, w) > 1 and 48 * b * h * w > 1500 * c


def folded_upsample_conv(x: Tensor, up: Tensor, up_bias: Tensor, conv: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, o, 2h, 2w], by one convolution c -> 4 o and a pixel shuffle, in channels_last memory.

    At the image's border the composed convolution goes wrong: it sees the upsampled map continued by one pixel, where
    the plain one sees zeros. What that pixel contributes is computed by convolutions along the border and taken off.
    Height and width must be 2 or more.
    """
    device = x.device.type
    casts = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # autocast leaves fp64 alone
    with torch.autocast(device, enabled=False):
        tensors = (x, *folded_weights(up, up_bias, conv))
        if casts:
            tensors = (t.to(torch.get_autocast_dtype(device)) for t in tensors)
        return _Folded.apply(*tensors)  # type: ignore[return-value]


def folded_weights(up: Tensor, up_bias: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
    """What `Fold` works with: composed weight and bias, and the parts they are composed of."""
    return compose(up, conv), conv.sum((2, 3)) @ up_bias, up, up_bias, conv


def compose(up: Tensor, conv: Tensor) -> Tensor:
    """Weights [4 o, c, 3, 3] of the composed convolution; output channels in the order (row, column, o) of the square.

    The response of the two convolutions to one pixel is 6x6, three squares by three: the convolution of the one's
    weights with the other's.
    """
    c, o = len(up), len(conv)
    response = F.conv2d(up, conv, padding=2).reshape(c, o, 3, 2, 3, 2)  # c, o, tap, row, tap, column
    weight = response.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(4 * o, c, 3, 3)
    return weight.contiguous(memory_format=torch.channels_last)


class Fold:
    """The composed convolution of maps [B, c, h, w]; its results are squares [B, h, w, 2, 2, o], not yet an image.

    Args:
        weights: as of `folded_weights`.
    """

    def __init__(self, *weights: Tensor):
        self.weight, self.bias, *self.parts = weights

    def beyond(self, x: Tensor) -> tuple[Tensor, ...]:
        """What to take off at the border of the image that the squares of x form, see `_border`."""
        return _beyond(_border(x), *self.parts)

    def squares(self, x: Tensor, beyond: Sequence[Tensor]) -> Tensor:
        """The convolution."""
        b, _, h, w = x.shape
        flat = F.conv2d(x, self.weight, self.bias.repeat(4), padding=1).permute(0, 2, 3, 1)
        squares = flat.view(b, h, w, 2, 2, -1)
        for place, less in zip(_border_of_squares(squares), beyond, strict=True):
            place -= less.permute(0, *range(2, less.ndim), 1).reshape(place.shape)
        return squares

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of x (without what the border contributes) and of the composed weight, from that of the squares."""
        b, _, h, w = x.shape
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(grad.view(b, h, w, -1).permute(0, 3, 1, 2), x, self.weight, None),
            *([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]),
        )
        return grad_x, grad_weight

    def border_gradients(self, grads: Sequence[Tensor], x: Tensor, grad_x: Tensor) -> tuple[Tensor, ...]:
        """Add the border's contribution to the gradient of x, in place; gradients of the parts.

        The corrections are small: they are computed again.

        Args:
            grads: of the border of the image, as `border_of` reads them.
        """
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (*_border(x), *self.parts)]
            beyond = _beyond(inputs[:5], *inputs[5:])
        found = torch.autograd.grad(beyond, inputs, [-grad for grad in grads])
        for place, more in zip(_border(grad_x), found, strict=False):
            place += more
        return found[5:]


def border_of(squares: Tensor) -> list[Tensor]:
    """Border of the image that squares [B, h, w, 2, 2, o] form, in the shapes of `_border`."""
    *lines, corners = _border_of_squares(squares)
    return [*(line.flatten(1, 2).transpose(1, 2) for line in lines), corners.permute(0, 3, 1, 2)]


class _Folded(torch.autograd.Function):
    """The composed convolution, its squares unfolded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        fold = Fold(*weights)
        b, _, h, w = x.shape
        pixels = fold.squares(x, fold.beyond(x)).transpose(2, 3).reshape(b, 2 * h, 2 * w, -1)
        return pixels.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        fold = Fold(*weights)
        b, o, h, w = grad.shape
        pixels = grad.permute(0, 2, 3, 1)
        squares = pixels.reshape(b, h // 2, 2, w // 2, 2, o).transpose(2, 3).contiguous()
        grad_x, grad_weight = fold.gradients(squares, x)
        grad_parts = fold.border_gradients(border_of(squares), x, grad_x)
        return grad_x, grad_weight, pixels.sum((0, 1, 2)), *grad_parts


def _border(image: Tensor) -> tuple[Tensor, ...]:
    """Views of [B, C, h, w]: top and bottom row [B, C, w], left and right column [B, C, h], corners [B, C, 2, 2]."""
    h, w = image.shape[2:]
    rows, columns = (image[:, :, 0], image[:, :, -1]), (image[..., 0], image[..., -1])
    return *rows, *columns, image[:, :, :: h - 1, :: w - 1]


def _border_of_squares(squares: Tensor) -> tuple[Tensor, ...]:
    """The same of squares [B, h, w, 2, 2, o]: views [B, w, 2, o] (two), [B, h, 2, o] (two), [B, 2, 2, o]."""
    b, h, w, _, _, o = squares.shape
    rows, columns = (
        (squares[:, 0, :, 0], squares[:, -1, :, 1]),
        (squares[:, :, 0, :, 0], squares[:, :, -1, :, 1]),
    )
    (image, y, x, row, column, channel), start = squares.stride(), squares.storage_offset()
    # From corner to corner: to the last square, and there to the last row or column.
    steps = (image, (h - 1) * y + row, (w - 1) * x + column, channel)
    return *rows, *columns, squares.as_strided((b, 2, 2, o), steps, start)


def _beyond(border: Sequence[Tensor], up: Tensor, up_bias: Tensor, conv: Tensor) -> tuple[Tensor, ...]:
    """What the pixels beyond the border of the upsampled map contribute to the places that `_border` lists.

    A corner beyond the corner is counted by a row and by a column: once too often, hence the sign.
    """
    top, bottom, left, right, corners = border
    rows = (
        F.conv1d(F.conv_transpose1d(x, up[:, :, tap], up_bias, stride=2), conv[:, :, end])
        for x, (tap, end) in zip((top, bottom), _ENDS, strict=True)
    )
    columns = (
        F.conv1d(F.conv_transpose1d(x, up[..., tap], up_bias, stride=2), conv[..., end])
        for x, (tap, end) in zip((left, right), _ENDS, strict=True)
    )
    far = torch.einsum("bcyx,cmyx->bmyx", corners, up[:, :, ::3, ::3]) + up_bias[:, None, None]
    return *rows, *columns, -torch.einsum("bmyx,omyx->boyx", far, conv[:, :, ::2, ::2])


# --- parts


def parts_pay(x: Tensor) -> bool:
    """Whether a block works on x [B, c, h, w] in parts: on a CPU, in full precision, where it is trained."""
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def block_in_parts(
    x: Tensor,
    upsample: nn.ConvTranspose2d,
    conv1: nn.Conv2d,
    norm1: nn.BatchNorm2d,
    conv2: nn.Conv2d,
    norm2: nn.BatchNorm2d,
    head: nn.Conv2d | None = None,
) -> Tensor:
    """`norm2(conv2(relu6(norm1(conv1(upsample(x))))))` in training, then the head, a 1x1 convolution, if there is one.

    Running statistics move as the modules would move them.
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
        assert norm.momentum is not None
        call = BatchNormCall(norm.running_mean, norm.running_var, momentum=norm.momentum)
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


class _InParts(torch.autograd.Function):
    """See `block_in_parts`. Keeps squares and results of the second convolution, part by part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Any:
        *weights, weight1, bias1, conv2, weight2, bias2, head, head_bias, eps = args
        fold = Fold(*weights)
        size = ctx.size = _images_per_part(x, len(bias1))
        beyond = zip(*(t.split(size) for t in fold.beyond(x)), strict=True)
        squares = [fold.squares(part, less) for part, less in zip(x.split(size), beyond, strict=True)]
        mean1, var1 = _statistics([_rows(s) for s in squares])
        norm1 = _Normed(mean1, (var1 + eps[0]).rsqrt(), weight1, bias1)
        image = _image_of(squares[0])
        results = [as_rows(F.conv2d(_activated(s, norm1, image), conv2, padding=1)) for s in squares]
        mean2, var2 = _statistics(results)
        norm2 = _Normed(mean2, (var2 + eps[1]).rsqrt(), weight2, bias2)
        b, _, h, w = x.shape
        out = x.new_empty(b, 2 * h, 2 * w, len(bias2) if head is None else len(head))
        for part, rows in zip(out.split(size), results, strict=True):
            if head is None:
                _on_line(rows, norm2.line, _rows(part))
            else:
                _predict(rows, norm2, head, head_bias, _rows(part))
        ctx.parts = len(squares)
        ctx.save_for_backward(x, *norm1, *norm2, *weights, conv2, head, *squares, *results)
        ctx.mark_non_differentiable(mean1, var1, mean2, var2)
        # A view is none to autograd once detached: who calls the block may work in place on its result.
        return out.permute(0, 3, 1, 2).detach(), mean1, var1, mean2, var2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:  # type: ignore[override]
        x, *saved = ctx.saved_tensors
        norm1, norm2 = _Normed(*saved[:4]), _Normed(*saved[4:8])
        fold, conv2, head = Fold(*saved[8:13]), saved[13], saved[14]
        squares, results = saved[15 : 15 + ctx.parts], saved[15 + ctx.parts :]
        grads = [as_rows(g) for g in grad.contiguous(memory_format=torch.channels_last).split(ctx.size)]
        count = 4 * x.numel() // x.shape[1]

        of_head = of_head_bias = None
        if head is None:
            sums2 = _sum(norm2.sums(g, rows) for g, rows in zip(grads, results, strict=True))
        else:
            sums2, of_head, of_head_bias = _head_sums(grads, results, norm2, head)
        plane = norm2.plane(sums2, count)

        # Back to the squares, whose batch norm needs the sums over all parts before it goes on.
        image, buffer = _image_of(squares[0]), torch.empty_like(results[0])
        sums1, of_conv2, of_squares = fold.bias.new_zeros(2, len(fold.bias)), torch.zeros_like(conv2), []
        for square, rows, g in zip(squares, results, grads, strict=True):
            of_result = buffer[: len(rows)]
            if head is None:
                _on_plane(g, rows, plane, of_result)
            else:
                _on_line(rows, plane[1:], of_result)
                of_result.addmm_(g, head.flatten(1) * plane[0])
            activated = _activated(square, norm1, image)
            n, (height, width) = len(activated), activated.shape[2:]
            of_image, of_weight = torch.ops.aten.convolution_backward(
                *(of_result.view(n, height, width, -1).permute(0, 3, 1, 2), activated, conv2, None),
                *([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]),
            )[:2]
            of_conv2 += of_weight
            of_squares.append(_through_relu6(of_image, activated, square))
            sums1 += norm1.sums(_rows(of_squares[-1]), _rows(square))

        plane1 = norm1.plane(sums1, count)
        of_x, of_fold, borders = torch.empty_like(x), torch.zeros_like(fold.weight), []
        parts = zip(x.split(ctx.size), of_x.split(ctx.size), squares, of_squares, strict=True)
        for part, of_part, square, of_square in parts:
            _on_plane(_rows(of_square), _rows(square), plane1, _rows(of_square))
            found, of_weight = fold.gradients(of_square, part)
            of_part.copy_(found)
            of_fold += of_weight
            borders.append(border_of(of_square))
        of_border = [torch.cat(same) for same in zip(*borders, strict=True)]
        of_composed = fold.border_gradients(of_border, x, of_x)
        # The composed bias is added to all sites alike, and batch norm takes it off again: its gradient is zero.
        return (
            *(of_x, of_fold, torch.zeros_like(fold.bias), *of_composed),
            *(*sums1.unbind(), of_conv2, *sums2.unbind(), of_head, of_head_bias, None),
        )


def _images_per_part(x: Tensor, channels: int) -> int:
    """Images whose upsampled maps of `channels` channels fit into a part, at least one."""
    one = 4 * x[0, 0].numel() * channels * x.element_size()
    return max(1, PART_BYTES // one)


def _rows(x: Tensor) -> Tensor:
    """View [..., C] as rows [N, C]."""
    return x.view(-1, x.shape[-1])


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, terms)


def _statistics(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of the channels of rows [N, C], those of the parts merged."""
    count = sum(len(part) for part in parts)
    shares = [len(part) / count for part in parts]
    found = [torch.ops.aten.batch_norm_update_stats(as_image(part), None, None, 0.0) for part in parts]
    mean = _sum(share * m for share, (m, _) in zip(shares, found, strict=True))
    var = _sum(share * (v + (m - mean).square()) for share, (m, v) in zip(shares, found, strict=True))
    return mean, var


def _image_of(squares: Tensor) -> Tensor:
    """Memory for the image of squares, [b, h, 2, w, 2 m]."""
    b, h, w, _, _, m = squares.shape
    return squares.new_empty(b, h, 2, w, 2 * m)


def _activated(squares: Tensor, norm: _Normed, image: Tensor) -> Tensor:
    """ReLU6 of the batch norm of squares, written into an image's memory: a view [b, m, 2h, 2w]."""
    b, h, w, _, _, m = squares.shape
    scale, shift = (t.repeat(2) for t in norm.line)
    for i in range(b):
        torch.addcmul(shift, squares[i].view(h, w, 2, 2 * m), scale, out=image[i].transpose(1, 2))
        image[i].clamp_(0, 6)
    return image[:b].view(b, 2 * h, 2 * w, m).permute(0, 3, 1, 2)


def _through_relu6(grad: Tensor, activated: Tensor, squares: Tensor) -> Tensor:
    """Gradient of squares from that of their activated image [b, m, 2h, 2w]."""
    b, h, w, _, _, m = squares.shape
    out = torch.empty_like(squares)
    lines = [t.permute(0, 2, 3, 1).reshape(b, h, 2, w, 2 * m).transpose(2, 3) for t in (grad, activated)]
    torch.ops.aten.hardtanh_backward.grad_input(*lines, 0, 6, grad_input=out.view(b, h, w, 2, 2 * m))
    return out


def _pieces(rows: Sequence[Tensor], vectors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Rows [N, C] in pieces of long lines, with vectors [C] as long: what is done to a piece is done in the cache."""
    channels = rows[0].shape[1]
    lines = max(1, _LINE // channels)
    while len(rows[0]) % lines:
        lines -= 1
    long = [vector.repeat(lines) for vector in vectors]
    height = max(1, _PIECE // (lines * channels))
    for pieces in zip(*(row.view(-1, lines * channels).split(height) for row in rows), strict=True):
        yield *pieces, *long


def _on_line(rows: Tensor, line: Sequence[Tensor], out: Tensor) -> None:
    """`scale x + shift` of rows, by channel."""
    for to, x, scale, shift in _pieces([out, rows], line):
        torch.addcmul(shift, x, scale, out=to)


def _predict(rows: Tensor, norm: _Normed, head: Tensor, bias: Tensor, out: Tensor) -> None:
    """Batch norm of rows and the head's 1x1 convolution, as one affine map."""
    scale, shift = norm.line
    flat = head.flatten(1)
    torch.addmm(bias + flat @ shift, rows, (flat * scale).t(), out=out)


def _head_sums(
    grads: Sequence[Tensor], results: Sequence[Tensor], norm: _Normed, head: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_Normed.sums` for the norm before the head, gradients of the head's weight and bias."""
    flat = head.flatten(1)
    of_bias = _sum(g.sum(0) for g in grads)
    products = _sum(g.t() @ rows for g, rows in zip(grads, results, strict=True))
    of_normed = (products - torch.outer(of_bias, norm.mean)) * norm.invstd
    sums = torch.stack([(flat * of_normed).sum(0), of_bias @ flat])
    of_head = of_normed * norm.weight + torch.outer(of_bias, norm.bias)
    return sums, of_head.view_as(head), of_bias


def _on_plane(grad: Tensor, rows: Tensor, plane: Sequence[Tensor], out: Tensor) -> None:
    """`a grad + b x + c` of rows, by channel; may be written over the gradient."""
    for to, g, x, a, b, c in _pieces([out, grad, rows], plane):
        torch.addcmul(torch.addcmul(c, x, b), g, a, out=to)
