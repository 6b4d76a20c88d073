"""Convolutions of packed rows, each way of computing them, against `F.conv2d` of the zero-filled map."""

import pytest
import torch
import torch.nn.functional as F

from spark.sparse import Sites, packed_conv, processor
from spark.sparse.filled_conv import filled_conv
from spark.sparse.packed_conv import (
    Window,
    correlation,
    depthwise_products,
    plan_of,
    transposed,
)
from spark.sparse.packed_ops import PACKED
from spark.sparse.tensor import SparseTensor

GRID = (3, 4)


@pytest.fixture(params=[True, False], ids=["MKL", "oneDNN"])
def library(request, monkeypatch):
    """Matrix products of either library, whatever processor this is."""
    monkeypatch.setattr(packed_conv, "by_mkl", lambda x: request.param)
    monkeypatch.setattr("spark.sparse.filled_conv.by_mkl", lambda x: request.param)


def sites_and_rows(sides, channels):
    """An uneven mask (one image without visible patch), and rows of patches of these sides."""
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(4, 1, *GRID, generator=generator) < 0.5
    visible[1] = False
    sites = Sites(visible)
    h, w = GRID[0] * sides[0], GRID[1] * sides[1]
    rows = torch.randn(sites.num_rows(h, w), channels, generator=generator, dtype=torch.float64)
    return sites, h, w, rows


def dense(sites, h, w, rows, outside=None):
    """The map [B, C, h, w] of these rows, elsewhere zero or [C]."""
    image = rows.new_zeros(sites.batch * h * w, rows.shape[1])
    if outside is not None:
        image = image + outside
    image = image.index_copy(0, sites.rows(h, w), rows)
    return image.view(sites.batch, h, w, -1).permute(0, 3, 1, 2)


def assert_same(out, expected, inputs):
    """Equal results, and gradients of all inputs."""
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(expected)
    gradients = (torch.autograd.grad(result, inputs, grad) for result in (out, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


CASES = {
    "pointwise": (Window((1, 1), (1, 1), (0, 0)), 1, (2, 3), "Plan"),
    "1x1 stride 2": (Window((1, 1), (2, 2), (0, 0)), 1, (4, 2), "_Blocks"),
    "2x2 stride 2": (Window((2, 2), (2, 2), (0, 0)), 1, (8, 4), "_Blocks"),
    "2x1 stride 4x2": (Window((2, 1), (4, 2), (0, 0)), 1, (4, 4), "_Blocks"),
    "3x3, patches of 1": (Window((3, 3), (1, 1), (1, 1)), 1, (1, 1), "_SymmetricColumns"),
    "3x5, patches of 2": (Window((3, 5), (1, 1), (1, 2)), 1, (2, 3), "_SymmetricColumns"),
    "3x3 stride 2 to patches of 2": (Window((3, 3), (2, 2), (1, 1)), 1, (4, 4), "_Columns"),
    "3x3 stride 2 to patches of 4": (Window((3, 3), (2, 2), (1, 1)), 1, (8, 8), "_Tiles"),
    "3x3, patches of 4": (Window((3, 3), (1, 1), (1, 1)), 1, (4, 5), "_Tiles"),
    "depthwise 7x7, patches of 2": (Window((7, 7), (1, 1), (3, 3)), 6, (2, 2), "_Dense"),
    "depthwise 7x7, patches of 4": (Window((7, 7), (1, 1), (3, 3)), 6, (4, 4), "_Dense by products"),
    "depthwise 7x5, patches of 5x4": (Window((7, 5), (1, 1), (3, 2)), 6, (5, 4), "_Dense by products"),
    "depthwise 7x7, patches of 8": (Window((7, 7), (1, 1), (3, 3)), 6, (8, 8), "_Tiles by products"),
    "depthwise 3x3, patches of 8": (Window((3, 3), (1, 1), (1, 1)), 6, (8, 8), "_Tiles"),
    "depthwise 15x15, patches of 4": (Window((15, 15), (1, 1), (7, 7)), 6, (4, 4), "_Dense"),
    "depthwise 13x13, patches of 6 to 2x3": (Window((13, 13), (1, 1), (0, 0)), 6, (6, 6), "_Dense"),
    "depthwise 9x9, patches of 9": (Window((9, 9), (1, 1), (4, 4)), 6, (9, 9), "_Tiles"),
    "grouped 3x3, patches of 4": (Window((3, 3), (1, 1), (1, 1)), 2, (4, 4), "_Dense by products"),
}
"""Name -> window, groups, sides of a patch, and the way that is taken."""


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_dense_convolution(name, with_bias):
    window, groups, sides, way = CASES[name]
    sites, h, w, rows = sites_and_rows(sides, 6)
    plan = plan_of(sites, h, w, window, groups)
    assert type(plan).__name__ + (" by products" if plan.surroundings else "") == way

    weight = torch.randn(6, 6 // groups, *window.kernel, dtype=torch.float64)
    weight = weight.to(memory_format=torch.channels_last)
    bias = torch.randn(6, dtype=torch.float64) if with_bias else None
    inputs = [t.requires_grad_() for t in (rows, weight, bias) if t is not None]
    out = packed_conv.packed_conv(rows, sites, h, w, window, weight, bias, groups)
    full = F.conv2d(dense(sites, h, w, rows), weight, bias, window.stride, window.padding, 1, groups)
    expected = full.permute(0, 2, 3, 1).reshape(-1, 6)[sites.rows(*full.shape[2:])]
    assert_same(out, expected, inputs)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (4, 5)], ids=str)
def test_filled_convolution_equals_the_dense_one(sides):
    sites, h, w, rows = sites_and_rows(sides, 6)
    token, bias = torch.randn(1, 6, 1, 1, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    weight = torch.randn(5, 6, 3, 3, dtype=torch.float64).to(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (rows, token, weight, bias)]
    out = filled_conv(SparseTensor(rows, sites, PACKED, (sites.batch, 6, h, w)), token, weight, bias)
    expected = F.conv2d(dense(sites, h, w, rows, token.flatten()), weight, bias, padding=1)
    assert_same(out, expected, inputs)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("stride", [1, 2])
def test_one_channel_is_not_depthwise(stride):
    sites, h, w, rows = sites_and_rows((2, 2), 1)
    k = 3 if stride == 1 else 2
    window = Window((k, k), (stride, stride), (k // 3, k // 3))
    weight = torch.randn(1, 1, k, k, dtype=torch.float64, requires_grad=True)
    full = F.conv2d(dense(sites, h, w, rows), weight, None, stride, k // 3)
    expected = full.permute(0, 2, 3, 1).reshape(-1, 1)[sites.rows(*full.shape[2:])]
    out = packed_conv.packed_conv(rows, sites, h, w, window, weight)
    (ours,), (theirs,) = (torch.autograd.grad(x.square().sum(), weight) for x in (out, expected))
    torch.testing.assert_close(ours, theirs)


def test_rows_may_be_a_slice_of_wider_ones():
    """As networks that split their channels hand them on."""
    sites, h, w, wide = sites_and_rows((4, 4), 10)
    weight = torch.randn(6, 6, 2, 2, dtype=torch.float64)
    window = Window((2, 2), (2, 2), (0, 0))
    out = packed_conv.packed_conv(wide[:, 2:8], sites, h, w, window, weight)
    expected = packed_conv.packed_conv(wide[:, 2:8].contiguous(), sites, h, w, window, weight)
    assert torch.equal(out, expected)


def test_depthwise_weight_gradients_agree_and_are_those_of_autograd():
    sites, h, w, rows = sites_and_rows((4, 6), 5)
    grad = torch.randn_like(rows)
    tiles = sites.tiles(h, w, (2, 3), (2, 3))
    weight = torch.zeros(5, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    images = dense(sites, h, w, rows), dense(sites, h, w, grad)
    (expected,) = torch.autograd.grad(
        F.conv2d(images[0], weight, padding=(2, 3), groups=5), weight, images[1]
    )
    planes = [image.permute(2, 3, 0, 1).flatten(2) for image in images]
    torch.testing.assert_close(correlation(*planes, (2, 3), 5), expected)
    torch.testing.assert_close(depthwise_products(rows, grad, tiles, (5, 7)), expected)


@pytest.mark.parametrize("groups", [1, 3])
def test_transposed_weights(groups):
    weight = torch.randn(6, 12 // groups, 3, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    expected = F.conv_transpose2d(x, weight, padding=(1, 2), groups=groups)
    got = transposed(weight, groups)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(F.conv2d(x, got, padding=(1, 2), groups=groups), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", torch.float32, True),
        ("Intel(R) Xeon(R) Processor", torch.bfloat16, False),
        ("AMD EPYC", torch.float32, False),
    ],
)
def test_library_of_matrix_products(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(packed_conv, "cpu_name", lambda: name)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert packed_conv.by_mkl(torch.zeros(1, dtype=dtype)) is expected


def test_name_of_the_processor(monkeypatch):
    processor.cpu_name.cache_clear()
    monkeypatch.setattr(processor.Path, "exists", lambda self: True)
    monkeypatch.setattr(
        processor.Path, "read_text", lambda self: "processor: 0\nmodel name\t: Some CPU @ 2 GHz\n"
    )
    assert processor.cpu_name() == "Some CPU @ 2 GHz"
    processor.cpu_name.cache_clear()
    monkeypatch.setattr(processor.Path, "exists", lambda self: False)
    monkeypatch.setattr(processor.platform, "machine", lambda: "arm64")
    assert processor.cpu_name() == "arm64"
    processor.cpu_name.cache_clear()
