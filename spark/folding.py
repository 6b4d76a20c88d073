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

# At both ends of a line of pixels: the taps of the two convolutions that reach the pixel beyond it, and use it.
_ENDS = ((0, 0), (3, 2))


def folding_pays(x: Tensor) -> bool:
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
        weight, bias = compose(up, conv), conv.sum((2, 3)) @ up_bias
        tensors = (x, weight, bias, up, up_bias, conv)
        if casts:
            tensors = (t.to(torch.get_autocast_dtype(device)) for t in tensors)
        return _Folded.apply(*tensors)  # type: ignore[return-value]


def compose(up: Tensor, conv: Tensor) -> Tensor:
    """Weights [4 o, c, 3, 3] of the composed convolution; output channels in the order (row, column, o) of the square.

    The response of the two convolutions to one pixel is 6x6, three squares by three: the convolution of the one's
    weights with the other's.
    """
    c, o = len(up), len(conv)
    response = F.conv2d(up, conv, padding=2).reshape(c, o, 3, 2, 3, 2)  # c, o, tap, row, tap, column
    weight = response.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(4 * o, c, 3, 3)
    return weight.contiguous(memory_format=torch.channels_last)


class _Folded(torch.autograd.Function):
    """The composed convolution (weight, and bias [o]), its squares unfolded, the border corrected.

    The corrections are small: the backward pass computes them again, and adds their gradient to x's in place.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, up: Tensor, up_bias: Tensor, conv: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, up, up_bias, conv)
        b, _, h, w = x.shape
        squares = F.conv2d(x, weight, bias.repeat(4), padding=1).permute(0, 2, 3, 1)
        pixels = squares.reshape(b, h, w, 2, -1).transpose(2, 3).reshape(b, 2 * h, 2 * w, -1)
        out = pixels.permute(0, 3, 1, 2)
        for place, beyond in zip(_border(out), _beyond(_border(x), up, up_bias, conv), strict=True):
            place -= beyond
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, *parts = ctx.saved_tensors
        b, o, h, w = grad.shape
        pixels = grad.permute(0, 2, 3, 1)
        squares = (
            pixels.reshape(b, h // 2, 2, w // 2, 2 * o).transpose(2, 3).reshape(b, h // 2, w // 2, 4 * o)
        )
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            *(squares.permute(0, 3, 1, 2), x, weight, None),
            *([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]),
        )
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in (*_border(x), *parts)]
            beyond = _beyond(inputs[:5], *inputs[5:])
        grads = torch.autograd.grad(beyond, inputs, [-place for place in _border(grad)])
        for place, more in zip(_border(grad_x), grads, strict=False):
            place += more
        return grad_x, grad_weight, pixels.sum((0, 1, 2)), *grads[5:]


def _border(image: Tensor) -> tuple[Tensor, ...]:
    """Views of [B, C, h, w]: top and bottom row [B, C, w], left and right column [B, C, h], corners [B, C, 2, 2]."""
    h, w = image.shape[2:]
    rows, columns = (image[:, :, 0], image[:, :, -1]), (image[..., 0], image[..., -1])
    return *rows, *columns, image[:, :, :: h - 1, :: w - 1]


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
