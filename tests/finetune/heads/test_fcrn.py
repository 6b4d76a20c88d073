"""FCRN: the fast up-convolution is the slow one, on both sides of padding; the published number of parameters."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune import DepthModel
from finetune.heads.fcrn import Padding, UpConvolution, UpProjection
from tests.finetune.heads.test_heads import on_meta, trainable


def slow(layer: UpConvolution, x: Tensor, padding: Padding) -> Tensor:
    """Unpooling by zeros right of and below each value, and one 5x5 convolution."""
    batch, channels, height, width = x.shape
    unpooled = x.new_zeros(batch, channels, 2 * height, 2 * width)
    unpooled[..., ::2, ::2] = x
    if padding == "bottom_right":
        return F.conv2d(unpooled, layer.weight, layer.bias, padding=2)
    # Odd rows and columns come from two pixels before: computed from row -2 on, and taken from there.
    wider = F.conv2d(F.pad(unpooled, (4, 2, 4, 2)), layer.weight, layer.bias)
    rows, columns = (
        torch.arange(2 * side) + 2 - 2 * (torch.arange(2 * side) % 2) for side in (height, width)
    )
    return wider[..., rows, :][..., columns]


@pytest.mark.parametrize("padding", ["bottom_right", "top_left"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 2)])
def test_fast_equals_slow_in_values_and_gradients(padding: Padding, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = UpConvolution(3, 4, padding).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4, 2 * size[0], 2 * size[1], dtype=torch.float64)
    wanted = (x, layer.weight, layer.bias)
    fast_value, slow_value = layer(x), slow(layer, x, padding)
    torch.testing.assert_close(fast_value, slow_value, rtol=0, atol=1e-13)
    for one, other in zip(
        torch.autograd.grad((fast_value * weights).sum(), wanted),  # type: ignore[arg-type]
        torch.autograd.grad((slow_value * weights).sum(), wanted),  # type: ignore[arg-type]
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_sides_of_padding_differ() -> None:
    """By hand: a row of taps 1 to 5 on the values 1 and 10, in between zeros."""
    sides: tuple[Padding, ...] = ("bottom_right", "top_left")
    for padding in sides:
        layer = UpConvolution(1, 1, padding)
        torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        torch.nn.init.zeros_(layer.weight)
        layer.weight.data[0, 0, 2] = torch.arange(1.0, 6.0)
        values = layer(torch.tensor([1.0, 10.0]).reshape(1, 1, 1, 2))
        # even: 3 x[i] + 1 x[i-1] + 5 x[i+1]; odd: 2 x[i] + 4 x[i+1], or one block earlier
        even = [3 * 1 + 5 * 10, 1 * 1 + 3 * 10]
        odd = {"bottom_right": [2 * 1 + 4 * 10, 2 * 10], "top_left": [4 * 1, 2 * 1 + 4 * 10]}[padding]
        assert values[0, 0, 0].tolist() == [even[0], odd[0], even[1], odd[1]]
        assert values[0, 0, 1].tolist() == [0, 0, 0, 0]


def test_an_up_projection_doubles_the_size() -> None:
    block = UpProjection(6, 4).eval()
    value = block(torch.randn(1, 6, 3, 5))
    assert value.shape == (1, 4, 6, 10)
    assert (value >= 0).all()


def test_published_parameters_with_resnet50() -> None:
    model = DepthModel(on_meta("resnet50"), head="fcrn")
    assert round(trainable(model) / 1e6, 1) == 63.6
    assert [level.stride for level in model.levels] == [32]
