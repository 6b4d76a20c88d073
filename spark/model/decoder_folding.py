"""A transposed convolution and the 3x3 convolution after it as one, at the lower resolution.

Nothing nonlinear stands between the two in a decoder block. So every 2x2 square of results is a 3x3 convolution of the
low-resolution map with weights composed of both: 9 c^2 multiplications a pixel of the result instead of 13 c^2, and the
upsampled map is never written. Composing costs a multiple of c^3, so this pays where maps are large and channels few.

Legend: x [B, c, h, w], upsampling weight [c, m, 4, 4] (stride 2, padding 1), convolution weight [o, m, 3, 3] (padding
1), result [B, o, 2h, 2w].
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spark.sparse import SparseTensor

# At both ends of a line of pixels: the taps of the two convolutions that reach the pixel beyond it, and use it.
_ENDS = ((0, 0), (3, 2))


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
