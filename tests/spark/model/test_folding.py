"""The decoder's shortcuts against the operators that they replace, in outputs, gradients and running statistics."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spark import SparK
from spark.model.decoder import DecoderBlock
from spark.model.decoder_cpu import compose, folded_upsample_conv, folding_pays, parts_pay
from spark.model.masking import random_visible
from spark.sparse import SparseTensor, sparsify
from spark.sparse.filled_conv import Filled, constant_conv, filled_conv, filled_conv_pays


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


def _block(dtype: torch.dtype, has_head: bool) -> tuple[DecoderBlock, nn.Conv2d | None]:
    """4 -> 2 channels with norms that do something, and a head of 3."""
    torch.manual_seed(0)
    block = DecoderBlock(4, 2, sync_bn=False)
    for norm in (block.norm1, block.norm2):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.uniform_(norm.bias, -1, 3)
    return block.to(dtype), nn.Conv2d(2, 3, 1).to(dtype) if has_head else None


def _plain(block: DecoderBlock, x: Tensor, head: nn.Conv2d | None) -> Tensor:
    y = block.norm2(block.conv2(F.relu6(block.norm1(block.conv1(block.upsample(x))))))
    return y if head is None else head(y)


def _parts_of(
    images: int, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], dtype: torch.dtype
) -> None:
    one = 4 * size[0] * size[1] * 4 * dtype.itemsize  # four channels at twice the resolution
    monkeypatch.setattr("spark.model.decoder_cpu.PART_BYTES", images * one + 1)


@pytest.mark.parametrize("has_head", [False, True])
@pytest.mark.parametrize("images", [9, 2, 1, 0])  # of a part; five in all
@pytest.mark.parametrize("size", [(40, 3), (16, 16), (9, 14)])
def test_a_block_in_parts_equals_its_modules(
    size: tuple[int, int], images: int, has_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _parts_of(images, monkeypatch, size, torch.float64)
    block, head = _block(torch.float64, has_head)
    plain = copy.deepcopy(block)
    x = torch.randn(5, 4, *size, dtype=torch.float64, requires_grad=True)
    assert folding_pays(x)
    assert parts_pay(x)
    result, expected = block(x, head), _plain(plain, x, head)
    assert type(result.grad_fn).__name__ == "_InPartsBackward"
    cotangent = torch.randn_like(expected)
    ends = [] if head is None else list(head.parameters())
    found = torch.autograd.grad(result, [x, *block.parameters(), *ends], cotangent, retain_graph=True)
    wanted = torch.autograd.grad(expected, [x, *plain.parameters(), *ends], cotangent)
    for ours, theirs in zip([result, *found], [expected, *wanted], strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], value, rtol=1e-12, atol=1e-14)
    # Nothing that the backward pass needs was overwritten by it.
    again = torch.autograd.grad(result, [x, *block.parameters(), *ends], cotangent)
    assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_parts_in_fp32_are_as_exact_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    _parts_of(2, monkeypatch, (24, 24), torch.float32)
    x, cotangent = torch.randn(8, 4, 24, 24), torch.randn(8, 3, 48, 48)
    errors = []
    exact, head = _block(torch.float64, True)
    assert head is not None
    for parts in (True, False):
        block, ours = copy.deepcopy(exact).float(), copy.deepcopy(head).float()
        monkeypatch.setattr("spark.model.decoder_cpu.parts_pay", lambda x, parts=parts: parts)
        inputs = [x.requires_grad_(), *block.parameters(), *ours.parameters()]
        out = block(x, ours)
        results = [out, *torch.autograd.grad(out, inputs, cotangent), *(b.double() for b in block.buffers())]
        reference = copy.deepcopy(exact)
        wide = x.detach().double().requires_grad_()
        expected = _plain(reference, wide, head)
        inputs = [wide, *reference.parameters(), *head.parameters()]
        grads = torch.autograd.grad(expected, inputs, cotangent.double())
        truth = [expected, *grads, *(b.double() for b in reference.buffers())]
        errors.append([((a - b).norm() / b.norm()).item() for a, b in zip(results, truth, strict=True)])
    assert all(ours <= 1.5 * theirs + 2e-7 for ours, theirs in zip(*errors, strict=True))


def test_parts_keep_what_two_convolutions_made_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    _parts_of(2, monkeypatch, (16, 16), torch.float64)
    block, head = _block(torch.float64, True)
    x = torch.randn(4, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(x, head)
    # x of 4 channels; at twice the resolution its squares of 4 and what becomes of them, 2 channels.
    maps = 4 * 16 * 16 * (4 + 4 * 4 + 4 * 2)
    assert maps <= sum(kept) <= 1.2 * maps


def test_parts_are_for_training_in_full_precision_on_a_cpu() -> None:
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    block, _ = _block(torch.float32, False)
    assert type(block(x).grad_fn).__name__ == "_InPartsBackward"
    with torch.no_grad():
        assert not parts_pay(x)
    assert not parts_pay(x.bfloat16())
    assert not parts_pay(x.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not parts_pay(x)


def _cumulative(block: DecoderBlock) -> None:
    block.norm2.momentum = None


def _frozen(block: DecoderBlock) -> None:
    block.norm1.eval()


def _watched(block: DecoderBlock) -> None:
    block.act.register_forward_hook(lambda module, args, out: None)


def _other_activation(block: DecoderBlock) -> None:
    block.act = nn.GELU()  # type: ignore[assignment]


def _other_norm(block: DecoderBlock) -> None:
    block.norm1 = nn.BatchNorm2d(4)  # type: ignore[assignment]


def _without_affine(block: DecoderBlock) -> None:
    block.norm2.weight = block.norm2.bias = None  # type: ignore[assignment]
    block.norm2.affine = False


@pytest.mark.parametrize(
    "change", [_cumulative, _frozen, _watched, _other_activation, _other_norm, _without_affine]
)
def test_changed_blocks_run_their_own_modules(change: Callable[[DecoderBlock], None]) -> None:
    block, _ = _block(torch.float32, False)
    change(block)
    plain = copy.deepcopy(block)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    result = block(x)
    assert type(result.grad_fn).__name__ != "_InPartsBackward"
    expected = plain.norm2(plain.conv2(plain.act(plain.norm1(plain.conv1(plain.upsample(x))))))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(block.state_dict()[name], value, rtol=1e-4, atol=1e-4)


def test_a_block_s_result_may_be_changed_in_place() -> None:
    block, _ = _block(torch.float64, False)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    changed, plain = block(x).mul_(2), block(x) * 2
    _same(changed, plain, [x, *block.parameters()])


def test_parts_move_running_statistics_once_a_step_under_checkpointing() -> None:
    block, _ = _block(torch.float64, False)
    plain = copy.deepcopy(block)
    x = torch.randn(2, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    checkpoint(block, x, use_reentrant=False).sum().backward()  # type: ignore[union-attr]
    _plain(plain, x, None)
    for ours, theirs in zip((block.norm1, block.norm2), (plain.norm1, plain.norm2), strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("mkl", [True, False])
@pytest.mark.parametrize(("grid", "side"), [((3, 4), 1), ((1, 1), 1), ((2, 3), 2), ((1, 2), 3), ((7, 7), 1)])
def test_upsampled_rows_equal_the_transposed_convolution_of_the_filled_map(
    grid: tuple[int, int], side: int, mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spark.sparse.filled_conv.by_mkl", lambda x: mkl)
    visible = torch.rand(3, 1, *grid, generator=torch.Generator().manual_seed(2)) < 0.5
    visible[0, 0, 0, 0] = True
    size = (grid[0] * side, grid[1] * side)
    image, token, weight, bias = inputs = _parameters((3, 5, *size), (1, 5, 1, 1), (5, 4, 4, 4), (4,))
    filled = Filled(sparsify(image, visible, "packed"), token)
    _same(filled.upsampled(weight, bias), F.conv_transpose2d(filled.dense(), weight, bias, 2, 1), inputs)


def test_the_deepest_map_stays_rows_where_that_saves_work() -> None:
    torch.manual_seed(0)
    model = SparK("test_resnet", 64, 0.6, decoder_width=1024, sync_bn=False)
    features = sparsify(torch.randn(2, 96, 2, 2), random_visible(2, model.grid, 0.6), "packed")
    densify = model.densify[0]
    assert isinstance(densify(features), Tensor)
    filled = densify(features, dense=False)
    assert isinstance(filled, Filled)
    assert isinstance(filled.x, SparseTensor)
    assert model.decoder.takes_filled
    model.decoder.blocks[0].register_forward_pre_hook(lambda module, args: None)
    assert not model.decoder.takes_filled
    densify.register_forward_hook(lambda module, args, out: None)
    assert isinstance(densify(features, dense=False), Tensor)


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
            monkeypatch.setattr("spark.model.decoder_cpu.folding_pays", lambda x: False)
            monkeypatch.setattr("spark.model.decoder.filled_conv_pays", lambda x: False)
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
    seen: dict[nn.Module, Tensor] = {}
    last = model.decoder.blocks[-1]
    watched = [
        model.densify[0],
        model.densify[-1].projection,
        model.decoder.blocks[0].upsample,
        model.decoder.blocks[0],
        *last.children(),
        last,
        model.decoder.head,
    ]
    for module in watched:
        module.register_forward_hook(lambda module, args, out: seen.update({module: out}))
    hooked = model(images, visible)
    assert set(seen) == set(watched)
    torch.testing.assert_close(seen[last], seen[last.norm2])
    assert seen[model.densify[0]].shape == (4, 32, *model.grid)
    torch.testing.assert_close(hooked.prediction, short.prediction, rtol=1e-10, atol=1e-10)
