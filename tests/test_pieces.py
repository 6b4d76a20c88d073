"""Two pointwise convolutions in pieces: the same as one after the other, and only where nothing else reads between."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from spark.encoder import build_encoder, pyramid
from spark.sparse import SparseTensor, pieces, sparsify
from tests.test_model import lively
from tests.test_sparse import assert_same_grads, features_of, grads_of, images_and_mask


@pytest.fixture
def tiny_pieces(monkeypatch):
    """Every product that widens is deferred, and pieces are of a few rows, the last one shorter."""
    monkeypatch.setattr(pieces, "PIECES_FROM", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 40_000)


def mlp(inner="linear", bias=True):
    torch.manual_seed(0)
    if inner == "linear":
        return nn.Sequential(nn.Linear(6, 24), nn.GELU(), nn.Linear(24, 6, bias=bias)).double()
    layers = (nn.Conv2d(6, 24, 1), nn.GELU("tanh"), nn.Conv2d(24, 5, 1, bias=bias))
    return nn.Sequential(*layers).double()


def value(inner="linear", seed=0):
    """A sparse map of 6 channels, its rows a leaf."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(2, 6, 8, 12, dtype=torch.float64, generator=generator)
    x = sparsify(dense, torch.rand(2, 1, 2, 3, generator=generator) < 0.6)
    x.data = x.data.detach().requires_grad_()
    return x.permute(0, 2, 3, 1) if inner == "linear" else x


def gradients(module, x, y):
    weights = torch.randn(y.data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves = [x.data, *(p for p in module.parameters() if p.requires_grad)]
    return torch.autograd.grad((y.data * weights).sum(), [leaf for leaf in leaves if leaf.requires_grad])


def plain(module, rows):
    """The modules on plain rows."""
    first, act, second = module
    hidden = F.linear(rows, first.weight.flatten(1), first.bias)
    return F.linear(act(hidden), second.weight.flatten(1), second.bias)


def node_of(x):
    return x.data.grad_fn.name()


def in_pieces(y):
    return "_InPieces" in node_of(y)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", ["linear", "conv"])
@pytest.mark.parametrize("piece", [1, 1000, 10**6], ids=["rows", "pieces", "one"])
def test_equals_plain_rows(monkeypatch, inner, bias, piece):
    monkeypatch.setattr(pieces, "PIECES_FROM", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    module, x = mlp(inner, bias), value(inner)
    y = module(x)
    assert in_pieces(y)
    assert y.shape == ((2, 8, 12, 6) if inner == "linear" else (2, 5, 8, 12))
    expected = plain(module, x.data)
    torch.testing.assert_close(y.data, expected, rtol=1e-12, atol=1e-12)
    found = gradients(module, x, y)
    for a, b in zip(found, gradients(module, x, x.like(expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias", "rows"])
def test_what_is_frozen_gets_no_gradient(tiny_pieces, frozen):
    module, x = mlp(), value()
    if frozen == "rows":
        x.data = x.data.detach()
    else:
        module.get_parameter(frozen).requires_grad_(False)
    y = module(x)
    assert in_pieces(y)
    expected = gradients(module, x, x.like(plain(module, x.data)))
    assert len(expected) == 4
    for a, b in zip(gradients(module, x, y), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options", "nodes"),
    [
        ("convnext_atto", {"depths": (1, 1, 2, 1)}, 5),  # 1x1 convolutions, LayerNorm2d
        ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (12, 20, 36, 44)}, 4),  # linear layers
        ("poolformer_s12", {}, 12),
        ("inception_next_atto", {"depths": (1, 1, 1, 1)}, 4),  # batch norm before
        ("convnextv2_atto", {"depths": (1, 1, 1, 1)}, 0),  # global response normalisation in between
        ("resnet26", {"layers": (1, 1, 1, 1)}, 0),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_encoders(tiny_pieces, monkeypatch, name, options, nodes, checkpointing):
    torch.manual_seed(0)
    encoder = lively(build_encoder(name, **options)).double()
    masked = copy.deepcopy(encoder)
    if checkpointing:
        encoder.set_grad_checkpointing(True)
    calls = []
    forward = pieces._InPieces.forward
    monkeypatch.setattr(pieces._InPieces, "forward", lambda *args: calls.append(1) or forward(*args))
    images, visible = images_and_mask()
    found, expected = (
        features_of(encoder, images, visible, "packed"),
        features_of(masked, images, visible, "masked"),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    assert_same_grads(grads_of(encoder, found), grads_of(masked, expected))
    for (key, a), b in zip(encoder.named_buffers(), masked.buffers(), strict=True):
        if not key.endswith("num_batches_tracked"):  # timm's module counts its calls itself
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=key)
    assert len(calls) == (2 * nodes if checkpointing else nodes)


def test_error_in_fp32_is_that_of_one_product_after_the_other(monkeypatch):
    """Against fp64, at 8,000 rows; sums by pieces are not worse than sums over all rows."""
    module = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    x = value()
    rows = torch.randn(8000, 32, generator=torch.Generator().manual_seed(2))

    def errors():
        a = SparseTensor(rows.clone().requires_grad_(), x.sites, x.layout, (2, 32, 8, 12), channels_last=True)
        y = module(a)
        exact = copy.deepcopy(module).double()
        b = rows.double().requires_grad_()
        z = plain(exact, b)
        pairs = zip(
            (y.data, *torch.autograd.grad(y.data.square().sum(), [a.data, *module.parameters()])),
            (z, *torch.autograd.grad(z.square().sum(), [b, *exact.parameters()])),
            strict=True,
        )
        return in_pieces(y), [(p - q).norm() / q.norm() for p, q in pairs]

    monkeypatch.setattr(pieces, "PIECES_FROM", 10**12)
    whole, reference = errors()
    monkeypatch.setattr(pieces, "PIECES_FROM", 0)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2**18)
    parts, found = errors()
    assert parts
    assert not whole
    for a, b in zip(found, reference, strict=True):
        assert a <= 1.5 * b + 1e-7


class TestWhoElseReads:
    """The result of a product that waits is the usual one for everyone but GELU, and GELU's for all but a product."""

    def test_another_operator(self, tiny_pieces):
        module, x = mlp(), value()
        hidden = module[0](x)
        assert hidden.deferred is not None
        y = hidden + 1
        assert hidden.deferred is None
        assert "_PackedConv" in node_of(hidden)
        assert torch.equal(y.data, hidden.data + 1)

    def test_two_readers_share_one_result(self, tiny_pieces):
        module, x = mlp(), value()
        hidden = module[0](x)
        active = module[1](hidden)
        gate = active * hidden  # reads both: GELU is made of the very rows that the second operand has
        assert active.deferred is None
        assert hidden.deferred is None
        torch.testing.assert_close(gate.data, F.gelu(hidden.data) * hidden.data, rtol=1e-15, atol=0)
        graph = active.data.grad_fn.next_functions[0][0]
        assert graph is hidden.data.grad_fn

    def test_two_products_of_one_activation(self, tiny_pieces):
        module, x = mlp(), value()
        active = module[1](module[0](x))
        a, b = module[2](active), module[2](active)
        torch.testing.assert_close((a + b).data, 2 * plain(module, x.data), rtol=1e-12, atol=1e-12)

    def test_activation_twice(self, tiny_pieces):
        module, x = mlp(), value()
        y = module[1](module[1](module[0](x)))
        expected = F.gelu(F.gelu(F.linear(x.data, module[0].weight, module[0].bias)))
        torch.testing.assert_close(y.data, expected, rtol=1e-12, atol=1e-12)

    def test_a_product_without_activation(self, tiny_pieces):
        module, x = mlp(), value()
        y = module[2](module[0](x))
        torch.testing.assert_close(
            y.data, module[2](F.linear(x.data, module[0].weight, module[0].bias)), rtol=1e-12, atol=1e-12
        )

    def test_a_weight_that_does_not_fit(self, tiny_pieces):
        module, x = mlp(), value()
        with pytest.raises(RuntimeError, match=r"expected input|size|shape"):
            nn.Linear(23, 6).double()(module[1](module[0](x)))

    def test_recipe_comes_with_the_data(self, tiny_pieces):
        """A convolution of another kind behind the GELU keeps nothing of it."""
        module, x = mlp("conv"), value("conv")
        active = module[1](module[0](x))
        y = nn.Conv2d(24, 3, 3, padding=1).double()(active)
        saved = [t.data_ptr() for t in y.data.grad_fn.saved_tensors]
        assert active.data.data_ptr() not in saved
        assert active.recipe is not None

    def test_second_product_without_gradients_or_under_autocast(self, tiny_pieces):
        module, x = mlp().float(), value()
        x.data = x.data.detach().float().requires_grad_()
        active = module[1](module[0](x))
        with torch.no_grad():
            y = module[2](active)
        assert not y.requires_grad
        assert active.requires_grad
        torch.testing.assert_close(y.data, plain(module, x.data), rtol=1e-5, atol=1e-5)
        active = module[1](module[0](x))
        with torch.autocast("cpu", torch.bfloat16):
            y = module[2](active)
        assert y.dtype == torch.bfloat16
        assert active.dtype == torch.float32

    def test_rows_changed_in_place_before_the_result_is_read(self, tiny_pieces):
        module, x = mlp(), value()
        x.data = x.data * 1
        for step in (module[:1], module[:2]):
            hidden = step(x)
            x.mul_(2)
            with pytest.raises(RuntimeError, match="before its result was read"):
                hidden.permute(0, 3, 1, 2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                module[2](hidden)


def test_where_it_is_not_used(monkeypatch):
    module, x = mlp(), value()
    assert module[0](x).deferred is None  # few rows
    monkeypatch.setattr(pieces, "PIECES_FROM", 0)
    assert module[0](x).deferred is not None
    assert module[2](value_of_24()).deferred is None  # narrows
    assert nn.Linear(6, 24, bias=False).double()(x).deferred is None  # batch norm is likely to follow
    with torch.no_grad():
        assert module[0](x).deferred is None
    with torch.autocast("cpu", torch.bfloat16):
        assert module.float()[0](x.float()).deferred is None
    half = x.like(x.data.bfloat16())
    assert module.bfloat16()[0](half).deferred is None


def value_of_24():
    x = value()
    return x.like(torch.cat([x.data] * 4, 1), channels=24)


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_saves_what_is_saved_without(tiny_pieces, monkeypatch, conv_mlp):
    """Bytes kept for the backward pass; those of 1x1 convolutions are those of linear layers."""

    def saved():
        torch.manual_seed(0)
        options = {"depths": (1, 1, 1, 1), "dims": (12, 20, 36, 44), "conv_mlp": conv_mlp}
        encoder = build_encoder("convnext_tiny", **options).double()
        own, kept = {p.untyped_storage().data_ptr() for p in encoder.parameters()}, {}

        def keep(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            features = pyramid(encoder, sparsify(*images_and_mask()))
        assert all(f.requires_grad for f in features)
        return sum(size for size, _ in kept.values())

    inside = saved()
    monkeypatch.setattr(pieces, "PIECES_FROM", 10**12)
    outside = saved()
    assert inside <= outside
    monkeypatch.setattr(pieces, "PIECES_FROM", 0)
    if conv_mlp:
        conv_mlp = False
        assert inside == saved()
