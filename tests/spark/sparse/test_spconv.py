"""The spconv layout against the packed and the masked one; without spconv, that nothing needs it."""

import copy
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F

from spark.model.encoder import pyramid
from spark.sparse import MASKED, PACKED, Sites, SparseTensor
from spark.sparse.kernels.spconv import DTYPES, _Table, spconv_layout
from spark.sparse.packed_conv import Window
from tests.spark.sparse.test_sparse import assert_same_grads, encoder_of, grads_of, images_and_mask
from tests.test_architecture import imports_of, modules


class Spy:
    """`spconv.pytorch.ops` that notes which of its functions were called."""

    def __init__(self, ops):
        self.ops, self.calls = ops, []

    def __getattr__(self, name):
        self.calls.append(name)
        return getattr(self.ops, name)


@pytest.fixture
def layout():
    """The layout, its `ops` spied on."""
    try:
        found = spconv_layout()
    except ValueError as error:
        pytest.skip(str(error))
    found.rules["conv2d"].ops = Spy(found.rules["conv2d"].ops)
    return found


def calls_of(layout):
    return layout.rules["conv2d"].ops.calls


def sparse(images, visible, layout):
    sites = Sites(visible)
    return SparseTensor(layout.from_dense(images, sites), sites, layout, tuple(images.shape))


def features_of(encoder, images, visible, layout):
    return [f.to_dense() for f in pyramid(encoder, sparse(images, visible, layout))]


# --- one convolution ---------------------------------------------------------------------------------------------

# kernel, stride, padding, dilation
WINDOWS = {
    "3x3": (3, 1, 1, 1),
    "3x3 stride 2": (3, 2, 1, 1),
    "7x7 stride 2": (7, 2, 3, 1),
    "1x1 stride 2": (1, 2, 0, 1),
    "2x2 stride 2": (2, 2, 0, 1),
    "4x4 stride 4": (4, 4, 0, 1),
    "dilated 3x3": (3, 1, 2, 2),
    "5x3 by name": ((5, 3), 1, "same", 1),
    "1x3 stride (1, 2)": ((1, 3), (1, 2), (0, 1), 1),
    "3x3 reaching over a patch": (3, 1, 6, 6),
}
# Uneven counts, and an image that shows nothing; patches of 8 x 4 sites on a map of 16 x 12.
VISIBLE = torch.tensor(
    [[1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]]
).bool()
VISIBLE = VISIBLE.view(4, 1, 2, 3)


def one_convolution(window, layout, bias=True, c=5, o=7, visible=VISIBLE, dtype=torch.float64, device="cpu"):
    """Output [4, o, ...] and the gradients of x, weight and bias, on the CPU."""
    kernel, stride, padding, dilation = window
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        values = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return values.to(device, dtype).requires_grad_()

    x, weight = leaf(4, c, 16, 12), leaf(o, c, *kernel)
    leaves = [x, weight, leaf(o)] if bias else [x, weight]
    value = sparse(x, visible.to(device), layout)
    out = F.conv2d(value, weight, leaves[2] if bias else None, stride, padding, dilation).to_dense()
    assert out.dtype == dtype
    (
        out * torch.randn(out.shape, dtype=torch.float64, generator=generator).to(device, dtype)
    ).sum().backward()
    return [t.detach().cpu() for t in (out, *(leaf.grad for leaf in leaves))]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_convolution_equals_masked_and_packed(layout, window, bias):
    ours = one_convolution(window, layout, bias)
    assert calls_of(layout) == ["indice_conv", "indice_conv_backward"]
    for reference in (MASKED, PACKED):
        for a, b in zip(ours, one_convolution(window, reference, bias), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels", [(1, 1), (3, 16), (16, 1)])
def test_channel_counts(layout, channels):
    ours = one_convolution(WINDOWS["3x3"], layout, c=channels[0], o=channels[1])
    for a, b in zip(ours, one_convolution(WINDOWS["3x3"], MASKED, c=channels[0], o=channels[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_fp32_is_as_exact_as_the_reference(layout, window):
    """At channel counts of a network: below, PyTorch computes a few dense weight gradients by other ways of summing,
    some of them more exact than either sparse layout."""
    exact = one_convolution(window, MASKED, c=32, o=48)
    ours = one_convolution(window, layout, c=32, o=48, dtype=torch.float32)
    theirs = one_convolution(window, MASKED, c=32, o=48, dtype=torch.float32)
    for a, b, c in zip(exact, ours, theirs, strict=True):
        error, of_reference = (a - b.double()).norm() / a.norm(), (a - c.double()).norm() / a.norm()
        assert error <= 1.5 * of_reference + 2**-24  # half a unit in the last place


def test_outputs_that_read_nothing(layout):
    """Every tap reads a site in another patch: a lonely patch has outputs and not one pair."""
    lonely, window = torch.zeros_like(VISIBLE), (2, 1, 4, 8)
    lonely[0, 0, 0, 1] = True
    for a, b in zip(*(one_convolution(window, k, visible=lonely) for k in (layout, MASKED)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert calls_of(layout) == []


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_are_shared(layout, channels_last):
    """A view where memory allows; the gradient arrives in the module's own order."""
    conv = torch.nn.Conv2d(5, 7, 3, padding=1)
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    seen = []
    rule = layout.rules["conv2d"]
    inner = rule.ops.indice_conv
    rule.ops.indice_conv = lambda rows, filters, *rest: seen.append(filters) or inner(rows, filters, *rest)
    conv(sparse(torch.randn(4, 5, 16, 12), VISIBLE, layout)).to_dense().sum().backward()
    assert (seen[0].data_ptr() == conv.weight.data_ptr()) == channels_last
    assert conv.weight.grad.shape == conv.weight.shape
    assert conv.weight.grad.stride() == conv.weight.stride()


FALLBACKS = {
    "pointwise": lambda x: F.conv2d(x, torch.ones(4, 6, 1, 1).double()),
    "grouped": lambda x: F.conv2d(x, torch.ones(6, 3, 3, 3).double(), padding=1, groups=2),
    "depthwise": lambda x: F.conv2d(x, torch.ones(6, 1, 7, 7).double(), padding=3, groups=6),
    "even kernel by name": lambda x: F.conv2d(x, torch.ones(4, 6, 2, 2).double(), padding="same"),
    "half precision": lambda x: F.conv2d(x.to(torch.bfloat16), torch.ones(4, 6, 3, 3).bfloat16(), padding=1),
}


@pytest.mark.parametrize("call", FALLBACKS.values(), ids=FALLBACKS)
def test_the_packed_rule_does_the_rest(layout, call):
    x = torch.randn(4, 6, 16, 12, dtype=torch.float64)
    ours, theirs = (call(sparse(x, VISIBLE, kind)) for kind in (layout, PACKED))
    assert calls_of(layout) == []
    assert ours.layout is layout
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.to_dense(), theirs.to_dense())


def test_autocast_to_a_type_that_spconv_lacks(layout):
    x, conv = torch.randn(4, 6, 16, 12), torch.nn.Conv2d(6, 4, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (conv(sparse(x, VISIBLE, kind)) for kind in (layout, PACKED))
    assert calls_of(layout) == []
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours.to_dense(), theirs.to_dense())


# --- whole encoders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name", ["seresnet50", "resnet10t", "resnext26ts", "convnext_atto", "convnext_atto_ols"]
)
def test_encoders_equal_masked_and_packed(layout, name, training):
    encoder = encoder_of(name).train(training)
    images, visible = images_and_mask()
    visible[0] = torch.tensor([[[True, False, False], [False, False, False]]])
    results = {}
    for kind in (MASKED, PACKED, layout):
        ours = copy.deepcopy(encoder)
        features = features_of(ours, images, visible, kind)
        results[kind.name] = features, grads_of(ours, features), dict(ours.named_buffers())
    assert calls_of(layout).count("indice_conv") == calls_of(layout).count("indice_conv_backward") > 1
    features, grads, buffers = results.pop("spconv")
    for others, their_grads, their_buffers in results.values():
        for a, b in zip(features, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        assert_same_grads(grads, their_grads)
        for key, value in buffers.items():
            torch.testing.assert_close(value, their_buffers[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_fp32_encoders_are_as_exact_as_the_reference(layout, name):
    exact_encoder = encoder_of(name)
    images, visible = images_and_mask()
    errors = {}
    exact = features_of(exact_encoder, images, visible, MASKED)
    exact_grads = grads_of(exact_encoder, exact)
    for kind in (MASKED, layout):
        encoder = encoder_of(name).float()
        features = features_of(encoder, images.float(), visible, kind)
        grads = grads_of(encoder, features)
        pairs = [*zip(exact, features, strict=True), *((exact_grads[k], g) for k, g in grads.items())]
        squares = torch.stack(
            [torch.stack([(a - b.double()).square().sum(), a.square().sum()]).detach() for a, b in pairs]
        )
        split = squares[: len(exact)].sum(0), squares[len(exact) :].sum(0)
        errors[kind.name] = [(error / size).sqrt().item() for error, size in split]
    for ours, theirs in zip(errors["spconv"], errors["masked"], strict=True):
        assert ours <= 1.5 * theirs


def test_state_dict_stays_the_encoders_own(layout):
    encoder = encoder_of("resnet18").to(memory_format=torch.channels_last)
    before = {k: (v.data_ptr(), v.stride()) for k, v in encoder.state_dict().items()}
    images, visible = images_and_mask()
    grads_of(encoder, features_of(encoder, images, visible, layout))
    assert {k: (v.data_ptr(), v.stride()) for k, v in encoder.state_dict().items()} == before


def test_checkpointing_changes_nothing(layout):
    plain = encoder_of("resnet18")
    recomputing = copy.deepcopy(plain)
    recomputing.set_grad_checkpointing(True)
    images, visible = images_and_mask()
    grads = [grads_of(e, features_of(e, images, visible, layout)) for e in (plain, recomputing)]
    assert_same_grads(*grads, rel=1e-12)


def test_keeps_no_more_than_the_packed_layout(layout):
    """Rows that a recipe computes again are not kept for the backward pass."""
    encoder = encoder_of("seresnet50")
    images, visible = images_and_mask()
    kept = {}
    for kind in (PACKED, layout):
        storages = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, into=storages: into.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        ):
            features_of(encoder, images, visible, kind)
        kept[kind.name] = sum(t.untyped_storage().nbytes() for t in storages.values())
    assert kept["spconv"] <= kept["packed"]


# --- tables ------------------------------------------------------------------------------------------------------


def test_a_table_is_made_once_for_a_mask(layout, monkeypatch):
    made = []
    monkeypatch.setattr(
        "spark.sparse.kernels.spconv._Table", lambda *args: made.append(args) or _Table(*args)
    )
    x = sparse(torch.randn(4, 5, 16, 12), VISIBLE, layout)
    for _ in range(2):
        F.conv2d(x, torch.randn(5, 5, 3, 3), padding=1)
    assert len(made) == 1
    F.conv2d(x, torch.randn(5, 5, 3, 3), padding=2, dilation=2)
    assert len(made) == 2


@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "1x1 stride 2", "2x2 stride 2", "dilated 3x3"])
def test_tables_of_the_implicit_algorithm(name):
    """What its kernels make of them, spelled out: they run on CUDA only."""
    table = _Table(Sites(VISIBLE), 16, 12, Window(*((side, side) for side in WINDOWS[name])))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(table.num_inputs, 5, generator=generator)
    grad = torch.randn(table.num_outputs, 7, generator=generator)
    filters = torch.randn(7, len(table.reads), 5, generator=generator)
    pairs, count = table.pairs
    out, of_rows = torch.zeros_like(grad), torch.zeros_like(rows)
    for tap, number in enumerate(count.tolist()):
        reads, writes = pairs[:, tap, :number].long()
        assert torch.equal(table.reads[tap, writes].long(), reads)
        out.index_add_(0, writes, rows[reads] @ filters[:, tap].T)
        of_rows.index_add_(0, reads, grad[writes] @ filters[:, tap])

    def implicit(order, partners, values, weights):
        result = torch.zeros(partners.shape[1], weights.shape[2])
        for bits, row in zip(order.taps[:, 0].tolist(), order.row.tolist(), strict=True):
            for tap in range(len(partners)):
                assert (bits >> tap & 1) == (partners[tap, row] >= 0)
                if bits >> tap & 1:
                    result[row] += values[partners[tap, row]] @ weights[tap]
        return result

    outputs, inputs = table.orders
    taps_first = filters.transpose(0, 1)  # [K, O, C]
    torch.testing.assert_close(implicit(outputs, table.reads, rows, taps_first.transpose(1, 2)), out)
    torch.testing.assert_close(implicit(inputs, table.read_by, grad, taps_first), of_rows)
    for order in (outputs, inputs):
        assert order.taps.dtype == order.row.dtype == torch.int32
        assert (order.taps.diff(dim=0) >= 0).all()


# --- without spconv ----------------------------------------------------------------------------------------------


def test_no_module_imports_spconv():
    """Only the layout does, by name, when it is asked for."""
    for module, path in modules():
        assert not any(name.split(".")[0] == "spconv" for name in imports_of(path)), module


def test_missing_spconv_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.delitem(sys.modules, "spconv.pytorch.ops", raising=False)
    with pytest.raises(ValueError, match=r"'spconv' needs the package spconv, .* or use layout 'packed'"):
        spconv_layout.__wrapped__()


def test_broken_spconv_is_one_sentence(monkeypatch):
    def broken(name):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(ValueError, match="OSError: libcudart"):
        spconv_layout.__wrapped__()


# --- CUDA --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    @pytest.mark.parametrize("dtype", DTYPES["cuda"])
    @pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
    def test_convolution(self, layout, window, dtype):
        exact = one_convolution(window, MASKED, c=16, o=32)
        ours = one_convolution(window, layout, c=16, o=32, dtype=dtype, device="cuda")
        taps = exact[2][0, 0].numel()
        algorithm = "implicit_gemm" if taps < 32 else "indice_conv"
        assert calls_of(layout) == [algorithm, algorithm + "_backward"]
        for a, b in zip(exact, ours, strict=True):
            assert (a - b.double()).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * a.norm()

    @pytest.mark.parametrize("channels", [(3, 16), (5, 7), (1, 1)])
    @pytest.mark.parametrize("dtype", DTYPES["cuda"])
    def test_channel_counts(self, layout, channels, dtype):
        c, o = channels
        exact = one_convolution(WINDOWS["3x3 stride 2"], MASKED, c=c, o=o)
        ours = one_convolution(WINDOWS["3x3 stride 2"], layout, c=c, o=o, dtype=dtype, device="cuda")
        for a, b in zip(exact, ours, strict=True):
            assert (a - b.double()).norm() <= (1e-5 if dtype == torch.float32 else 5e-3) * a.norm()

    @pytest.mark.parametrize("name", ["resnet26", "convnext_atto"])
    def test_fp16_autocast_of_an_encoder(self, layout, name):
        encoder = encoder_of(name).float().cuda().to(memory_format=torch.channels_last)
        images, visible = images_and_mask(h=128, w=192, batch=4)
        images, visible = images.float().cuda(), visible.cuda()
        exact = features_of(copy.deepcopy(encoder), images, visible, MASKED)
        with torch.autocast("cuda", torch.float16):
            ours = features_of(encoder, images, visible, layout)
        sum(f.float().square().mean() for f in ours).backward()
        assert "implicit_gemm_backward" in calls_of(layout)
        assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
        for a, b in zip(exact, ours, strict=True):
            assert (a - b.float()).norm() < 0.02 * a.norm()
