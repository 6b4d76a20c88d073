"""The Triton kernels against dense arithmetic, on a GPU, or on a CPU in Triton's interpreter."""

import ast
import copy
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from spark.model.encoder import build_encoder, pyramid
from spark.sparse import PACKED, Sites, SparseTensor
from spark.sparse.kernels.triton_ops import triton_layout
from tests.spark.model.test_model import lively
from tests.spark.sparse.test_sparse import assert_same_grads, grads_of, images_and_mask

triton = pytest.importorskip("triton")
tl = importlib.import_module("triton.language")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def import_kernels():
    """The kernels, interpreted where there is no GPU: decorators look at the environment when a module is executed."""
    kernels = importlib.import_module("spark.sparse.kernels.triton_kernels")
    if DEVICE == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.reload(kernels)
        # A call of an interpreted helper prepares Triton's language anew, which its kernel has done: most of the time.
        for name in ("_places", "_neighbours", "_load_rows", "_store_rows", "_per_channel", "_gated"):
            setattr(kernels, name, getattr(kernels, name).rewrite())
    return kernels


kernels = import_kernels()
triton_conv = importlib.import_module("spark.sparse.kernels.triton_conv")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """What the kernels call must be interpreted, too: PyTorch has imported Triton's library without the variable."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        if isinstance(tl.sum, triton.JITFunction):
            monkeypatch.setattr(tl, "sum", tl.sum.fn)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def uneven_sites():
    """3 images of 3 x 4 patches: 5 visible, none, and 2."""
    visible = torch.zeros(3, 1, 3, 4, dtype=torch.bool)
    visible[0, 0, [0, 0, 1, 2, 2], [0, 1, 1, 0, 3]] = True
    visible[2, 0, 1, 2:] = True
    return Sites(visible.to(DEVICE))


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def dense_conv(rows, weight, bias, sites, h, w, groups):
    """The reference: the zero-filled map, convolved, read at the visible sites."""
    dense = PACKED.to_dense(rows, sites, (sites.batch, rows.shape[1], h, w), None)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    return PACKED.from_dense(F.conv2d(dense, weight, bias, padding=padding, groups=groups), sites)


def with_gradients(function, inputs, grad, dtype):
    """Output and gradients of all inputs, computed in this type: a list."""
    inputs = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def assert_as_exact(ours, reference, exact, floor=4 * 2**-24):
    """Each at most 1.5 times as far from fp64 as the reference, or within `floor` of it, relative."""
    for a, b, c in zip(ours, reference, exact, strict=True):
        assert a.shape == c.shape
        error, of_reference = (a.double() - c).norm(), (b.double() - c).norm()
        assert error <= max(1.5 * of_reference, floor * c.norm())


def check_conv(shapes, sides, groups, dtype=torch.float32, floor=4 * 2**-24):
    sites = uneven_sites()
    h, w = 3 * sides[0], 4 * sides[1]
    o, _, kh, kw = shapes
    c = shapes[1] * groups
    rows = random(sites.num_rows(h, w), c, dtype=dtype)
    weight = random(*shapes, seed=1, dtype=dtype) / (shapes[1] * kh * kw) ** 0.5
    inputs = (rows, weight, random(o, seed=2, dtype=dtype))
    grad = random(len(rows), o, seed=3, dtype=dtype)
    ours = with_gradients(
        lambda *args: triton_conv.submanifold_conv(*args, sites, h, w, groups), inputs, grad, dtype
    )
    assert all(t.dtype == dtype for t in ours)
    reference, exact = (
        with_gradients(lambda *args: dense_conv(*args, sites, h, w, groups), inputs, grad, kind)
        for kind in (dtype, torch.float64)
    )
    assert_as_exact(ours, reference, exact, floor)


# --- convolution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sides", "shape"),
    [
        ((1, 1), (20, 33, 3, 3)),
        ((2, 2), (33, 20, 3, 3)),
        ((4, 4), (3, 3, 3, 3)),
        ((8, 8), (20, 3, 3, 3)),  # the rows of the weight gradient in more than one split
        ((2, 2), (70, 40, 3, 3)),  # more than one block of either
        ((1, 1), (4, 3, 7, 7)),  # reaches over three patches
        ((4, 2), (5, 20, 5, 3)),
        ((1, 3), (5, 3, 1, 7)),
    ],
    ids=str,
)
def test_convolution(sides, shape):
    check_conv(shape, sides, 1)


def test_convolution_in_fp64():
    check_conv((5, 20, 3, 3), (2, 2), 1, torch.float64, floor=1e-14)


def test_convolution_in_half_precision_accumulates_in_fp32():
    check_conv((20, 33, 3, 3), (2, 2), 1, torch.float16, floor=5e-4)


def test_convolution_under_autocast():
    sites = uneven_sites()
    inputs = [random(sites.num_rows(6, 8), 20), random(5, 20, 3, 3, seed=1), random(5, seed=2)]
    grad = random(len(inputs[0]), 5, seed=3)

    def half(*args):
        with torch.autocast(DEVICE, torch.float16):
            out = triton_conv.submanifold_conv(*args, sites, 6, 8)
        assert out.dtype == torch.float16
        return out.float()

    ours = with_gradients(half, inputs, grad, torch.float32)
    exact = with_gradients(lambda *args: dense_conv(*args, sites, 6, 8, 1), inputs, grad, torch.float32)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 2e-3 * b.norm()


def test_convolution_of_weights_in_any_memory_and_without_bias():
    sites = uneven_sites()
    rows, weight = random(sites.num_rows(6, 8), 20), random(5, 20, 3, 3, seed=1)
    expected = dense_conv(rows, weight, None, sites, 6, 8, 1)
    for same in (weight, weight.contiguous(memory_format=torch.channels_last)):
        out = triton_conv.submanifold_conv(rows, same, None, sites, 6, 8)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sides", "shape"),
    [
        ((1, 1), (20, 1, 7, 7)),
        ((2, 2), (33, 1, 7, 7)),
        ((4, 4), (3, 1, 5, 5)),
        ((8, 8), (80, 1, 3, 3)),
        ((4, 2), (20, 1, 3, 7)),
    ],
    ids=str,
)
def test_depthwise_convolution(sides, shape):
    check_conv(shape, sides, shape[0])


def test_depthwise_convolution_in_fp64():
    check_conv((20, 1, 3, 3), (2, 2), 20, torch.float64, floor=1e-14)


def test_results_repeat_bit_by_bit():
    sites = uneven_sites()
    inputs = random(sites.num_rows(24, 32), 3), random(4, 3, 3, 3, seed=1), random(4, seed=2)
    grad = random(sites.num_rows(24, 32), 4, seed=3)
    runs = [
        with_gradients(
            lambda *args: triton_conv.submanifold_conv(*args, sites, 24, 32), inputs, grad, torch.float32
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_visible_patch_at_all():
    sites = Sites(torch.zeros(2, 1, 2, 2, dtype=torch.bool, device=DEVICE))
    inputs = random(0, 3), random(4, 3, 3, 3), random(4)
    out, *grads = with_gradients(
        lambda *args: triton_conv.submanifold_conv(*args, sites, 4, 4), inputs, random(0, 4), torch.float32
    )
    assert out.shape == (0, 4)
    assert all((grad == 0).all() for grad in grads)


def test_windows_that_the_kernels_do_not_serve_are_refused():
    sites, rows = uneven_sites(), random(7, 3)
    for kernel in ((2, 2), (9, 9)):
        with pytest.raises(ValueError, match="sides must be odd and reach over at most 3 patches"):
            triton_conv.submanifold_conv(rows, random(4, 3, *kernel), None, sites, 3, 4)
    with pytest.raises(ValueError, match="convert one, or use autocast"):
        triton_conv.submanifold_conv(rows, random(4, 3, 3, 3).double(), None, sites, 3, 4)


# --- batch norm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3), (300, 33), (1100, 20), (70, 300)], ids=str)
@pytest.mark.parametrize("blocks", [1, 4])
def test_statistics(blocks, shape, monkeypatch):
    monkeypatch.setattr(kernels, "LEAST_BLOCKS", blocks)  # merged among splits, or also within them
    rows = 1000 + random(*shape)  # mean of squares minus square of mean would leave nothing of the variance
    mean, var, invstd = kernels.batch_norm_statistics(rows, 1e-5)
    exact = rows.double()
    torch.testing.assert_close(mean.double(), exact.mean(0), rtol=1e-6, atol=0)
    exact_var = exact.var(0, unbiased=False)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(invstd, (var + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("sides", "channels"), [((2, 2), 20), ((8, 8), 33)])
def test_batch_norm_rule(sides, channels, relu, affine):
    """Against `nn.BatchNorm1d` of the rows: outputs, gradients and running statistics."""
    sites = uneven_sites()
    h, w = 3 * sides[0], 4 * sides[1]
    rows, grad = 3 + 2 * random(sites.num_rows(h, w), channels), random(sites.num_rows(h, w), channels)
    stock = nn.BatchNorm2d(channels, affine=affine).to(DEVICE)
    if affine:
        nn.init.normal_(stock.weight), nn.init.normal_(stock.bias)
    results = []
    for dtype, sparse in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        norm = (stock if sparse else nn.BatchNorm1d(channels, affine=affine)).to(DEVICE, dtype)
        norm.load_state_dict(copy.deepcopy(stock.state_dict())) if norm is not stock else None
        leaf = rows.detach().to(dtype).requires_grad_()
        if sparse:
            norm = copy.deepcopy(stock)
            x = norm(SparseTensor(leaf, sites, triton_layout(), (sites.batch, channels, h, w)))
            out = (F.relu(x, inplace=True) if relu else x).data
        else:
            out = norm(leaf).relu() if relu else norm(leaf)
        grads = torch.autograd.grad(out, [leaf, *norm.parameters()], grad.to(dtype))
        results.append([out.detach(), *grads, norm.running_mean, norm.running_var])
    assert_as_exact(*results)


def test_what_reads_a_norm_before_and_after_relu_gets_both_gradients():
    sites, channels = uneven_sites(), 5
    norm = nn.BatchNorm2d(channels).to(DEVICE)
    results = []
    for layout in (triton_layout(), PACKED):
        leaf = random(sites.num_rows(6, 8), channels).requires_grad_()
        x = copy.deepcopy(norm)(SparseTensor(leaf, sites, layout, (sites.batch, channels, 6, 8)))
        out = (F.relu(x) * 2 + x).data.square().sum()
        results.append(torch.autograd.grad(out, leaf)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_checkpointing_moves_running_statistics_once():
    sites, results = uneven_sites(), []
    for recompute in (False, True):
        norm = nn.BatchNorm2d(5).to(DEVICE)
        x = SparseTensor(random(28, 5).requires_grad_(), sites, triton_layout(), (3, 5, 6, 8))
        out = checkpoint(norm, x, use_reentrant=False) if recompute else norm(x)
        out.data.square().sum().backward()
        results.append((norm.running_mean, norm.running_var))
    torch.testing.assert_close(*results)
    assert (results[0][0] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_in_half_precision_has_statistics_in_fp32(dtype):
    rows, grad = 3 + random(300, 20, dtype=dtype), random(300, 20, seed=1, dtype=dtype)
    weight, bias = random(20, seed=2), random(20, seed=3)
    mean, var, invstd = kernels.batch_norm_statistics(rows, 1e-5)
    torch.testing.assert_close(mean, rows.float().mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var, rows.float().var(0, unbiased=False), rtol=1e-5, atol=0)
    out = kernels.normalise(rows, mean, invstd, weight, bias, relu=True)
    of_rows, of_weight, of_bias = kernels.normalise_backward(
        grad, rows, mean, invstd, weight, bias, relu=True
    )
    inputs = (rows, weight, bias)
    exact = with_gradients(
        lambda x, w, b: F.batch_norm(x, None, None, w, b, True).relu(), inputs, grad, torch.float32
    )
    assert (out.dtype, of_rows.dtype, of_weight.dtype) == (dtype, dtype, torch.float32)
    for a, b in zip((out, of_rows, of_weight, of_bias), exact, strict=True):
        assert (a.float() - b).norm() < 5e-3 * b.norm()


def test_one_visible_site_has_no_statistics():
    visible = torch.zeros(1, 1, 2, 2, dtype=torch.bool, device=DEVICE)
    visible[0, 0, 0, 0] = True
    x = SparseTensor(random(1, 3), Sites(visible), triton_layout(), (1, 3, 2, 2))
    with pytest.raises(ValueError, match="more than one visible site"):
        nn.BatchNorm2d(3).to(DEVICE)(x)


# --- the layout --------------------------------------------------------------------------------------------------


def features_of(encoder, images, visible, layout):
    sites = Sites(visible)
    x = SparseTensor(layout.from_dense(images, sites), sites, layout, tuple(images.shape))
    return [f.to_dense() for f in pyramid(encoder, x)]


SHORT = {"test_resnet": {"layers": (1, 1, 1, 1)}, "test_convnext": {"depths": (1, 1, 1, 1)}}


def case(name):
    """A short encoder in fp64, images, and a mask with uneven numbers of visible patches."""
    torch.manual_seed(0)
    encoder = lively(build_encoder(name, **SHORT[name])).to(DEVICE, torch.float64)
    images, visible = images_and_mask(h=32)
    visible[0] = torch.tensor([[[True, False, False]]])
    return encoder, images.to(DEVICE), visible.to(DEVICE)


@pytest.mark.parametrize("name", SHORT)
def test_layout_equals_packed(name, monkeypatch):
    calls = []
    for function in ("convolution", "depthwise_convolution", "batch_norm_statistics"):
        original = getattr(kernels, function)
        monkeypatch.setattr(
            kernels,
            function,
            lambda *args, o=original, **kwargs: calls.append(o.__name__) or o(*args, **kwargs),
        )
    encoder, images, visible = case(name)
    other = copy.deepcopy(encoder)
    a, b = features_of(encoder, images, visible, PACKED), features_of(other, images, visible, triton_layout())
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    grads = [
        {key: grad.cpu() for key, grad in grads_on_cpu(e, f).items()} for e, f in ((encoder, a), (other, b))
    ]
    assert_same_grads(*grads)
    for (key, x), y in zip(encoder.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-12, msg=key)
    expected = {"convolution", "batch_norm_statistics"} if "resnet" in name else {"depthwise_convolution"}
    assert set(calls) == expected


def grads_on_cpu(encoder, features):
    return grads_of(encoder, [f.cpu() for f in features])


def test_layout_in_evaluation_equals_packed():
    encoder, images, visible = case("test_resnet")
    encoder.eval()  # the norms take the packed rule, the convolutions Triton's
    with torch.no_grad():
        a, b = (features_of(encoder, images, visible, layout) for layout in (PACKED, triton_layout()))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SHORT)
def test_backward_keeps_no_more_than_packed(name):
    encoder, images, visible = case(name)
    parameters = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept = []
    for layout in (PACKED, triton_layout()):
        storages = {}

        def remember(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            features = features_of(encoder, images, visible, layout)
        values = [t for key, t in storages.items() if t.is_floating_point() and key not in parameters]
        kept.append(sum(t.untyped_storage().nbytes() for t in values))
        del features
    assert kept[1] <= kept[0]


def test_triton_is_imported_only_where_the_layout_is_asked_for(monkeypatch):
    needs = {"triton", "spark.sparse.kernels.triton_kernels", "spark.sparse.kernels.triton_conv"}
    for path in (Path(__file__).parents[3] / "spark").rglob("*.py"):
        tree = ast.parse(path.read_text())
        named = [n.name for node in tree.body if isinstance(node, ast.Import) for n in node.names]
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                named += [node.module, *(f"{node.module}.{n.name}" for n in node.names)]
        assert path.stem in ("triton_kernels", "triton_conv") or not needs & set(named), path
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match="layout 'triton' needs the package triton"):
        triton_layout.__wrapped__()


def test_rows_on_a_cpu_are_refused_without_the_interpreter(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_normalise_kernel", triton.JITFunction(kernels._normalise_kernel.fn))
    sites = Sites(torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="needs a CUDA device"):
        triton_conv.submanifold_conv(torch.zeros(4, 3), torch.zeros(4, 3, 3, 3), None, sites, 2, 2)


# Launches compile for a Hopper GPU that need not be there, and run nothing.
COMPILE = """
import sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

def compile(self, *args, grid, warmup, **kwargs):
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    compiled[self.__name__] = kernel.asm["ptx"]
    assert kernel.metadata.shared <= 227 * 1024

compiled = {}
run, JITFunction.run = JITFunction.run, compile
driver.set_active(Hopper())
sys.path.insert(0, "spark/sparse/kernels")  # spark itself takes seconds to import
import triton_kernels as kernels

rows, grad = torch.empty(80, 64, dtype=torch.bfloat16), torch.empty(80, 128, dtype=torch.bfloat16)
table, corners = torch.zeros(1, 9, 9, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
geometry = kernels.Geometry(table, corners, (2, 2))
kernels.convolution(rows, grad.new_empty(128, 64, 3, 3), grad[0], geometry)
kernels.weight_gradient(grad, rows, geometry, (3, 3))
kernels.depthwise_convolution(rows, rows.new_empty(64, 1, 7, 7), None, geometry, reverse=True)
kernels.depthwise_weight_gradient(rows, rows, geometry, (7, 7))
vector = torch.empty(64)
kernels.batch_norm_statistics(rows, 1e-5)
kernels.normalise(rows, vector, vector, vector, vector)
kernels.normalise_backward(rows, rows, vector, vector, vector, vector, relu=True)
assert compiled.keys() == {
    name for name, kernel in vars(kernels).items() if isinstance(kernel, JITFunction) and name.endswith("_kernel")
}
for name in ("_convolution_kernel", "_weight_gradient_kernel"):
    assert "wgmma" in compiled[name], f"{name} does not use Hopper's tensor cores"
"""


@pytest.mark.skipif(
    not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists(), reason="needs CUDA's assembler"
)
def test_kernels_compile_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(
        [sys.executable, "-c", COMPILE], check=True, cwd=Path(__file__).parents[3], env=environment
    )
