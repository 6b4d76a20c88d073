"""The decoder's two shortcuts against the operators that they replace, in outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from spark import SparK
from spark.decoder import DecoderBlock
from spark.folding import compose, folded_upsample_conv, folding_pays
from spark.masking import random_visible
from spark.sparse import sparsify
from spark.sparse.filled_conv import constant_conv, filled_conv, filled_conv_pays


def upsample_then_conv(x: Tensor, up: Tensor, up_bias: Tensor, conv: Tensor) -> Tensor:
    """The two convolutions one after the other: [B, c, h, w] -> [B, o, 2h, 2w]."""
    return F.conv2d(F.conv_transpose2d(x, up, up_bias, stride=2, padding=1), conv, padding=1)


def _parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, dtype=dtype, generator=generator).requires_grad_() for s in shapes]


def _same(result: Tensor, expected: Tensor, inputs: list[Tensor], tolerance: float = 1e-12) -> None:
    cotangent = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(1))
    pairs = [
        (result, expected),
        *zip(
            torch.autograd.grad(result, inputs, cotangent, retain_graph=True),
            torch.autograd.grad(expected, inputs, cotangent, retain_graph=True),
            strict=True,
        ),
    ]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 2), (2, 3), (5, 4), (7, 9)])
def test_folding_equals_the_two_convolutions(size: tuple[int, int], memory: torch.memory_format) -> None:
    x, up, up_bias, conv = inputs = _parameters((2, 3, *size), (3, 5, 4, 4), (5,), (7, 5, 3, 3))
    result = folded_upsample_conv(x.to(memory_format=memory), up, up_bias, conv)
    assert result.shape == (2, 7, 2 * size[0], 2 * size[1])
    _same(result, upsample_then_conv(*inputs), inputs)


def test_composed_weights_are_the_response_to_a_pixel() -> None:
    up, conv = _parameters((1, 2, 4, 4), (3, 2, 3, 3))
    pixel = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    pixel[0, 0, 1, 1] = 1
    response = upsample_then_conv(pixel, up, torch.zeros(2, dtype=torch.float64), conv)  # [1, 3, 6, 6]
    weight = compose(up, conv).view(2, 2, 3, 3, 3)  # row, column, o, tap, tap
    for row, column in ((0, 0), (0, 5), (3, 2), (5, 1)):
        taps = weight[row % 2, column % 2, :, 2 - row // 2, 2 - column // 2]
        assert torch.allclose(response[0, :, row, column], taps, rtol=1e-12, atol=1e-12)


def test_folding_in_bf16_is_as_exact_as_the_two_convolutions() -> None:
    inputs = _parameters((4, 16, 12, 12), (16, 16, 4, 4), (16,), (16, 16, 3, 3), dtype=torch.float32)
    exact = upsample_then_conv(*(t.double() for t in inputs))
    with torch.autocast("cpu", torch.bfloat16):
        folded, plain = folded_upsample_conv(*inputs), upsample_then_conv(*inputs)
    assert folded.dtype == plain.dtype == torch.bfloat16
    assert (folded - exact).norm() <= 1.5 * (plain - exact).norm() < 0.02 * exact.norm()


def test_folding_refuses_and_keeps_types_as_convolutions_do() -> None:
    inputs = _parameters((2, 3, 4, 4), (3, 5, 4, 4), (5,), (7, 5, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert folded_upsample_conv(*inputs).dtype == upsample_then_conv(*inputs).dtype == torch.float64
    for apply in (folded_upsample_conv, upsample_then_conv):
        with pytest.raises(RuntimeError):
            apply(inputs[0].float(), *inputs[1:])


def test_folding_pays_on_large_maps_of_few_channels() -> None:
    assert folding_pays(torch.empty(16, 192, 28, 28))
    assert not folding_pays(torch.empty(16, 384, 14, 14))
    assert not folding_pays(torch.empty(4096, 2, 1, 7))  # too low for the border's corrections
    assert not folding_pays(torch.empty(16, 48, 112, 112, device="meta"))


def test_a_folded_block_equals_its_modules() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(4, 2, sync_bn=False).double()
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    assert folding_pays(x)
    inputs = [x, *block.parameters()]
    plain = block.norm2(block.conv2(F.relu6(block.norm1(block.conv1(block.upsample(x))))))
    _same(block(x), plain, inputs, 1e-9)


@pytest.mark.parametrize(
    ("grid", "side"), [((3, 4), 1), ((1, 1), 1), ((2, 3), 2), ((1, 2), 3), ((2, 2), 4), ((3, 2), 8)]
)
def test_filled_conv_equals_the_convolution_of_the_filled_map(grid: tuple[int, int], side: int) -> None:
    visible = torch.rand(3, 1, *grid, generator=torch.Generator().manual_seed(2)) < 0.5
    visible[0, 0, 0, 0] = True
    size = (grid[0] * side, grid[1] * side)
    image, token, weight, bias = inputs = _parameters((3, 5, *size), (1, 5, 1, 1), (4, 5, 3, 3), (4,))
    x = sparsify(image, visible, "packed")
    _same(filled_conv(x, token, weight, bias), F.conv2d(x.to_dense(token), weight, bias, padding=1), inputs)


def test_constant_map_has_nine_values() -> None:
    token, weight, bias = _parameters((1, 5, 1, 1), (4, 5, 3, 3), (4,))
    for h, w in ((1, 1), (1, 5), (2, 3), (6, 4)):
        expected = F.conv2d(token.expand(1, 5, h, w), weight, bias, padding=1)
        assert torch.allclose(constant_conv(token, weight, bias, h, w), expected, rtol=1e-12, atol=1e-12)


def test_filled_conv_pays_where_few_patches_are_seen() -> None:
    images = torch.randn(2, 3, 64, 64)
    few, many = (random_visible(2, (8, 8), ratio) for ratio in (0.6, 0.3))
    assert filled_conv_pays(sparsify(images, few, "packed"))
    assert not filled_conv_pays(sparsify(images, many, "packed"))
    assert not filled_conv_pays(sparsify(images, few, "masked"))
    assert not filled_conv_pays(sparsify(images.bfloat16(), few, "packed"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not filled_conv_pays(sparsify(images, few, "packed"))


@pytest.mark.parametrize("ratio", [0.6, 0.3])
def test_model_with_and_without_the_shortcuts(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = SparK("test_resnet", 96, ratio, decoder_width=64, sync_bn=False).double()
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    visible = random_visible(2, model.grid, ratio)
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for shortcuts in (True, False):
        if not shortcuts:
            monkeypatch.setattr("spark.decoder.folding_pays", lambda x: False)
            monkeypatch.setattr("spark.decoder.filled_conv_pays", lambda x: False)
        loss = model(images, visible).loss
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-14


def test_who_waits_for_a_convolution_sees_it_called() -> None:
    """The shortcuts read weights; a hook (activations looked at, weight norm) sends them back to the modules."""
    model = SparK("test_resnet", (64, 64), 0.75, decoder_width=32).double()
    images = torch.rand(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = random_visible(4, model.grid, 0.75, generator=torch.Generator().manual_seed(1))
    short = model(images, visible)
    seen = []
    watched = [
        model.decoder.blocks[-1].upsample,
        model.decoder.blocks[-1].conv1,
        model.densify[-1].projection,
    ]
    for module in watched:
        module.register_forward_hook(lambda module, args, out: seen.append(module))
    hooked = model(images, visible)
    assert [m for m in watched if m in seen] == watched
    assert len(seen) == 3
    torch.testing.assert_close(hooked.prediction, short.prediction, rtol=1e-10, atol=1e-10)
