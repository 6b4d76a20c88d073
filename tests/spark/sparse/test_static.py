"""A step on a GPU reads no value of the mask and of nothing else: shown without a GPU.

Two ways: the branch for GPUs, forced on the CPU, whose operators are looked at one by one, with numbers to compare; and
tensors that claim to lie on a GPU and have no values to read.
"""

import copy
import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spark.model.masking import random_visible
from spark.model.spark import SparK
from spark.sparse import Sites, sites, sparsify
from tests.spark.model.test_model import lively
from tests.spark.sparse.test_sparse import OPERATIONS

NAMES = ["resnet26", "resnet26d", "convnext_atto", "convnext_atto_ols"]
READS_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INDEXED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


class Waits(Exception):
    """This operator would wait for a GPU."""


class NothingWaits(TorchDispatchMode):
    """Refuses operators whose result, or its shape, the host must read off values, and copies from ordinary memory."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        waits = name == "lift_fresh"  # torch.tensor(...) and new_tensor: Python numbers go to the device
        if name in INDEXED:
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif READS_VALUES & set(func.tags):
            waits = True
        elif name in ("_to_copy", "copy_"):
            devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            devices |= {d.type for d in [kwargs.get("device")] if d is not None}
            waits = len(devices) > 1 and not (kwargs.get("non_blocking") or True in args[2:])
        if waits:
            raise Waits(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """A function: from here on, the branch for GPUs."""
    return lambda: monkeypatch.setattr(sites, "static_on", lambda device: True)


def case(uneven=True):
    """Images of 2 x 3 patches, and a mask."""
    generator = torch.Generator().manual_seed(1)
    visible = random_visible(3, (2, 3), 0.6, generator=generator)
    if uneven:
        visible[0] = torch.tensor([[[True, False, False], [False, False, False]]])
    return torch.randn(3, 3, 64, 96, dtype=torch.float64, generator=generator), visible


def step_of(model, *inputs):
    """Loss, prediction, gradients and buffers of one step."""
    out = model(*inputs)
    out.loss.backward()
    grads = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    return [out.loss.detach(), out.prediction.detach(), *grads.values(), *model.buffers()]


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_reads_no_values_and_gives_the_same(name, layout, as_on_a_gpu):
    torch.manual_seed(0)
    model = lively(SparK(name, (64, 96), layout=layout, decoder_width=64)).double()
    other = copy.deepcopy(model)
    images, visible = case()
    expected = step_of(model, images, visible)
    as_on_a_gpu()
    count = int(visible.sum())
    with NothingWaits():
        results = step_of(other, images, visible, count)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_mask_of_unknown_count_is_read_once(as_on_a_gpu):
    as_on_a_gpu()
    model = SparK("test_resnet", (64, 96), decoder_width=64).double()
    images, visible = case()
    with NothingWaits(), pytest.raises(Waits, match="nonzero"):
        model(images, visible)
    reads = []

    class Reads(NothingWaits):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            except Waits as wait:
                reads.append(str(wait))
                return func(*args, **(kwargs or {}))

    with Reads():
        step_of(model, images, visible)
    assert reads == ["aten.nonzero.default"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operators_read_no_values_and_give_the_same(operation, as_on_a_gpu):
    x = torch.randn(2, 6, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    visible = torch.tensor([[[[1, 0, 1], [0, 1, 0]]], [[[0, 1, 1], [0, 0, 0]]]]).bool()
    expected = [
        OPERATIONS[operation](sparsify(x, visible, layout)).to_dense() for layout in ("masked", "packed")
    ]
    as_on_a_gpu()
    for layout, dense in zip(("masked", "packed"), expected, strict=True):
        out = OPERATIONS[operation](sparsify(x, visible, layout, visible_count=5)).to_dense()
        torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("count", [1, 7, 23, 24])
def test_patches_and_cells_are_those_of_the_cpu(count, as_on_a_gpu):
    visible = (torch.rand(24, generator=torch.Generator().manual_seed(count)).argsort() < count).view(
        2, 1, 3, 4
    )
    plain = Sites(visible, visible_count=count)
    as_on_a_gpu()
    static = Sites(visible, visible_count=count)
    assert static.static
    assert not plain.static
    assert torch.equal(static.patches(), plain.patches())
    windows = ((1, 1), (1, 1), (3, 3), (2, 2), (1, 1))
    rows = torch.randn(plain.num_rows(6, 8), 5)
    for a, b in (
        (static.tiles(6, 8, (1, 1), (2, 0)), plain.tiles(6, 8, (1, 1), (2, 0))),
        (static.columns(6, 8, *windows), plain.columns(6, 8, *windows)),
        (static.tiles(6, 8, (0, 0), (0, 0)), plain.tiles(6, 8, (0, 0), (0, 0))),
    ):
        for outside in (0.0, float("-inf")):
            assert torch.equal(a.gather(rows, outside), b.gather(rows, outside))
        for nowhere in (-1, len(rows)):
            assert torch.equal(a.rows_or(nowhere), b.rows_or(nowhere))
        cells = torch.randn(*a.shape, 5)
        assert torch.equal(a.spread(cells), b.spread(cells))


def test_a_wrong_count_is_refused(as_on_a_gpu):
    images, visible = case()
    model = SparK("test_resnet", (64, 96), decoder_width=64).double()
    with pytest.raises(ValueError, match="visible_count is 4, but the mask has 5 visible patches"):
        model(images, visible, 4)
    with pytest.raises(ValueError, match="visible_count is 6, but"):
        sparsify(images, visible, visible_count=6)
    as_on_a_gpu()  # there the device asserts, a moment later
    with pytest.raises(RuntimeError, match="visible_count 4 is not the mask's number of visible patches"):
        sparsify(images, visible, visible_count=4)


# --- tensors without values --------------------------------------------------------------------------------------


def without_values(tensor):
    """A tensor that claims to lie on a GPU, within `FakeTensorMode`."""
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
    ).requires_grad_(tensor.requires_grad)


@pytest.fixture
def no_kernels(monkeypatch):
    """Functions that launch Triton's kernels return what nobody has computed."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("spark.sparse.kernels.triton_kernels")

    def convolution(rows, weight, *_):
        return rows.new_empty(len(rows), len(weight))

    def statistics(rows, eps):
        return kernels.Statistics(*(rows.new_empty(rows.shape[1]) for _ in range(3)))

    monkeypatch.setattr(kernels, "convolution", convolution)
    monkeypatch.setattr(kernels, "depthwise_convolution", convolution)
    monkeypatch.setattr(kernels, "batch_norm_statistics", statistics)
    monkeypatch.setattr(kernels, "normalise", lambda rows, *_, relu=False: torch.empty_like(rows))


@pytest.mark.parametrize("layout", ["masked", "packed", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_a_forward_on_a_gpu_needs_no_values(name, layout, request):
    if layout == "triton":
        request.getfixturevalue("no_kernels")
    model = SparK(name, (64, 96), layout=layout, decoder_width=64).double()
    images, visible = case()
    with FakeTensorMode():
        state = {k: without_values(v) for k, v in model.state_dict(keep_vars=True).items()}
        inputs = without_values(images), without_values(visible)
        with NothingWaits():
            out = torch.func.functional_call(model, state, (*inputs, 5))
            drawn = torch.func.functional_call(model, state, inputs[0])
        if layout != "masked":
            with pytest.raises(DynamicOutputShapeException):  # the count is missed
                torch.func.functional_call(model, state, inputs)
    assert (out.loss.device.type, drawn.visible.device.type) == ("cuda", "cuda")
    assert out.prediction.shape == images.shape
