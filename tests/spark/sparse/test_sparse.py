"""The five properties of DESIGN.md for every encoder, and the rules one by one against dense arithmetic."""

import copy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from spark.model.encoder import build_encoder, pyramid
from spark.model.masking import random_visible, visible_at
from spark.sparse import MASKED, PACKED, Sites, SparseTensor, sparsify
from spark.sparse.batch_norm import SyncBatchNorm2d
from spark.sparse.tensor import MissingRuleError
from tests.spark.model.test_model import lively
from tests.together import together
from tools.encoders import CHECKS, Subject

SHORT = {
    "convnextv2_atto": {"depths": (1, 1, 1, 1)},  # global response normalisation
    "inception_next_atto": {"depths": (1, 1, 1, 1)},  # split into four branches of depthwise convolution
    "skresnet18": {"layers": (1, 1, 1, 1)},  # selective kernels: stacked paths
    "resnest14d": {},  # split attention: groups of channels
    "res2next50": {"layers": (1, 1, 1, 1)},  # branches that feed each other
    "ghostnet_050": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "dla46x_c": {"levels": (1, 1, 1, 1, 1, 1)},
    "hrnet_w18_small": {},  # branches of four resolutions, nearest upsampling
    "cs3darknet_focus_s": {},
    "dpn48b": {"k_sec": (1, 1, 1, 1)},  # slices
    "hgnetv2_b0": {},  # pooling after padding
    "mambaout_femto": {"depths": (1, 1, 1, 1)},  # split in the order [B, h, w, C]
    "rexnet_100": {"depth_mult": 0.3},
    "fasternet_t0": {"depths": (1, 1, 1, 1)},
    "nf_regnet_b0": {},  # no norm: standardised weights, and activations right behind convolutions
}
"""Further families: timm name -> options that make it shorter."""
ENCODERS = [
    *SHORT,
    "resnet18",
    "resnet26",
    "resnet10t",  # deep stem, average-pool shortcut, 3x3 stem tiers
    "resnet26d",
    "resnext26ts",
    "seresnet50",
    "ecaresnet26t",
    "resnetblur50",
    "resnetaa50",
    "resnet50_gn",
    "test_resnet",
    "convnext_atto",
    "convnext_atto_ols",  # overlapping stem
    "convnext_tiny_hnf",  # head norm first
    "convnext_zepto_rms",  # norm without mean
    "test_convnext",
]
LAYOUTS = ["masked", "packed"]


def encoder_of(name):
    torch.manual_seed(0)
    short = {"convnext": {"depths": (1, 1, 2, 1)}, "resnet": {"layers": (1, 1, 2, 1)}}
    families = ("convnext", "resnetblur", "resnetaa", "resnet50_gn", "seresnet")  # the long members
    options = short["convnext" if "convnext" in name else "resnet"] if name.startswith(families) else {}
    options = SHORT.get(name, options)
    return lively(build_encoder(name, **options)).double()


def images_and_mask(seed=0, h=64, w=96, batch=2):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, h, w, dtype=torch.float64, generator=generator)
    return images, random_visible(batch, (h // 32, w // 32), 0.5, generator=generator)


def features_of(encoder, images, visible, layout):
    return [f.to_dense() for f in pyramid(encoder, sparsify(images, visible, layout))]


def grads_of(encoder, features):
    encoder.zero_grad()
    # A fixed projection of every feature: a plain sum of normalised features has no gradient.
    weights = [
        torch.randn(f.shape, generator=torch.Generator().manual_seed(i)) for i, f in enumerate(features)
    ]
    sum((f * w).sum() for f, w in zip(features, weights, strict=True)).backward()
    return {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}


def assert_same_grads(a, b, rel=1e-9):
    """Equal up to rounding; a parameter whose true gradient is 0 (a bias before a norm) is held to the largest one."""
    assert a.keys() == b.keys()
    largest = max(g.abs().max() for g in a.values())
    for key in a:
        assert (a[key] - b[key]).abs().max() <= rel * a[key].abs().max() + 1e-12 * largest, key


@pytest.mark.parametrize("what", [what for what in CHECKS if what != "trains"])
@pytest.mark.parametrize("name", ENCODERS)
def test_properties(name, what):
    CHECKS[what](Subject.of(encoder_of(name)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_checkpointing_changes_nothing(name, layout):
    options = {"drop_path_rate": 0.5}
    torch.manual_seed(0)
    plain = lively(timm.create_model(name, num_classes=0, **options)).double()
    recomputing = copy.deepcopy(plain)
    recomputing.set_grad_checkpointing(True)
    images, visible = images_and_mask(batch=4)
    results = []
    for encoder in (plain, recomputing):
        torch.manual_seed(3)  # drop path draws the same, and draws it again when recomputing
        features = features_of(encoder, images, visible, layout)
        results.append((features, grads_of(encoder, features)))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert torch.equal(a, b)
    assert_same_grads(results[0][1], results[1][1], rel=1e-12)
    for (key, a), b in zip(plain.named_buffers(), recomputing.buffers(), strict=True):
        if not key.endswith("num_batches_tracked"):  # timm's module counts its calls itself
            assert torch.equal(a, b), key


def test_checkpointing_really_recomputes():
    from torch.utils.flop_counter import FlopCounterMode

    flops = []
    for enabled in (False, True):
        encoder = encoder_of("convnext_atto")
        encoder.set_grad_checkpointing(enabled)
        images, visible = images_and_mask()
        with FlopCounterMode(display=False) as counter:
            features_of(encoder, images, visible, "packed")[-1].sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] > flops[0]


def test_a_recipe_outlives_a_change_of_order():
    """ConvNeXt keeps as many bytes with 1x1 convolutions, around which layer norm permutes, as with linear layers."""

    def saved(conv_mlp):
        options = {"depths": (1, 1, 1, 1), "dims": (12, 20, 36, 44), "conv_mlp": conv_mlp}
        encoder = build_encoder("convnext_tiny", **options).double()
        own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pyramid(encoder, sparsify(*images_and_mask()))
        return sum(storage.nbytes() for storage in kept.values())

    assert saved(True) == saved(False) > 0


@pytest.mark.parametrize("frozen", [(), ("weight", "bias"), ("scale",), ("x",)])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_scale_joins_the_product_before_it(frozen, channels_last, reverse):
    """Gradients are those of the dense modules, of a factor of 0, too; the product's result is not kept."""
    _, packed, _ = sparse_pair(6)
    generator = torch.Generator().manual_seed(1)
    shapes = {"weight": (5, 6), "bias": (5,), "scale": (5,), "x": packed.data.shape}
    values = {
        key: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(key not in frozen)
        for key, shape in shapes.items()
    }
    with torch.no_grad():
        values["scale"][2] = 0
    weight, bias, scale, rows = values.values()

    x = F.gelu(packed.like(rows))
    if channels_last:
        y, factor = F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2), scale.view(-1, 1, 1)
    else:
        y, factor = F.conv2d(x, weight[..., None, None], bias), scale.view(1, -1, 1, 1)
    out = (factor * y if reverse else y * factor).data
    assert type(out.grad_fn).__name__ == "_ScaledProductBackward"
    dense = F.linear(F.gelu(rows), weight, bias) * scale
    torch.testing.assert_close(out, dense, rtol=1e-12, atol=1e-12)

    wanted = [v for v in values.values() if v.requires_grad]
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(o, wanted, cotangent) for o in (out, dense))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_product_that_was_changed_or_is_used_twice():
    _, packed, _ = sparse_pair(6)
    weight, bias = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((6, 6, 1, 1), (6,)))
    scale = torch.randn(1, 6, 1, 1, dtype=torch.float64)

    changed = F.conv2d(packed, weight, bias)
    changed.data.mul_(2)
    plain = F.conv2d(packed, weight, bias)
    torch.testing.assert_close((changed * scale).data, 2 * (plain * scale).data)

    for of in ("input", "weight"):  # found by autograd, as without a layer scale
        x = packed.like(packed.data.clone())
        turned = weight * 1
        product = F.conv2d(x, turned, bias)
        with torch.no_grad():
            (x.data if of == "input" else turned).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (product * scale).data.sum().backward()

    twice = (plain * scale + plain).data.square().sum()
    dense = (F.linear(packed.data, weight.flatten(1), bias) * (1 + scale.flatten())).square().sum()
    for a, b in zip(*(torch.autograd.grad(o, (weight, bias)) for o in (twice, dense)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_bf16_autocast_is_close_to_fp64(name, layout):
    encoder = encoder_of(name)
    images, visible = images_and_mask()
    exact = features_of(copy.deepcopy(encoder), images, visible, layout)
    encoder.float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = features_of(encoder, images.float(), visible, layout)
        reference = features_of(copy.deepcopy(encoder), images.float(), visible, "masked")
    sum(f.float().square().mean() for f in rough).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    for a, b, c in zip(exact, rough, reference, strict=True):
        error, of_reference = (a - b.double()).norm() / a.norm(), (a - c.double()).norm() / a.norm()
        assert error < 0.05
        assert error < 1.5 * of_reference + 1e-6


def test_pointwise_work_is_done_on_visible_sites_only():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(layout):
        encoder = build_encoder("convnext_atto")
        images, visible = torch.randn(1, 3, 128, 128), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        visible[0, 0, 0, 0] = True
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pyramid(encoder, sparsify(images, visible, layout))
        return counter.get_total_flops()

    assert flops("packed") < 0.3 * flops("masked")


# --- rules, one by one -------------------------------------------------------------------------------------------


def sparse_pair(channels=6, seed=0):
    """The same random map in both layouts, at 8 x 12 on 2 x 3 patches, and its mask [2, 1, 8, 12]."""
    x = torch.randn(2, channels, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    visible = torch.tensor([[[[1, 0, 1], [0, 1, 0]]], [[[0, 1, 1], [0, 0, 0]]]]).bool()
    return sparsify(x, visible, "masked"), sparsify(x, visible, "packed"), Sites(visible).mask(8, 12)


def norm_of_visible(x, groups, weight):
    """`F.group_norm` of the visible sites of each image of `sparse_pair`, laid out as an image of their own."""
    out = torch.zeros_like(x)
    for image, mask in zip(range(2), sparse_pair()[2][:, 0], strict=True):
        visible = F.group_norm(x[image][:, mask][None], groups, weight, torch.ones(6).double())
        out[image][:, mask] = visible[0]
    return out


OPERATIONS = {
    "conv3x3": lambda x: F.conv2d(x, torch.ones(4, 6, 3, 3).double(), torch.ones(4).double(), padding=1),
    "conv3x3 stride 2": lambda x: F.conv2d(x, torch.ones(4, 6, 3, 3).double(), None, 2, 1),
    "conv1x1 with bias": lambda x: F.conv2d(x, torch.ones(4, 6, 1, 1).double(), torch.ones(4).double()),
    "conv1x1 stride 2": lambda x: F.conv2d(x, torch.ones(4, 6, 1, 1).double(), None, 2),
    "conv1x1 grouped": lambda x: F.conv2d(x, torch.ones(6, 3, 1, 1).double(), None, groups=2),
    "depthwise 7x7": lambda x: F.conv2d(x, torch.ones(6, 1, 7, 7).double(), None, 1, 3, 1, 6),
    "dilated 3x3": lambda x: F.conv2d(x, torch.ones(4, 6, 3, 3).double(), None, 1, 2, 2),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "avg pool": lambda x: F.avg_pool2d(x, 2, 2),
    "avg pool, border not counted": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "pad then conv": lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1)), torch.ones(4, 6, 3, 3).double()),
    "reflect pad then blur": lambda x: F.conv2d(
        F.pad(x, (1, 1, 1, 1), mode="reflect"), torch.ones(6, 1, 3, 3).double(), stride=2, groups=6
    ),
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "add a number": lambda x: x + 1.5,
    "number minus x": lambda x: torch.sub(1.5, x) if not isinstance(x, torch.Tensor) else 1.5 - x,
    "number minus x, as an operator": lambda x: 1.5 - x,
    "number over x": lambda x: 2 / (x.square() + 0.5),
    "absolute value": lambda x: abs(x - 0.5),
    "times per channel": lambda x: x * torch.arange(6.0).double().view(1, 6, 1, 1),
    "plus per channel": lambda x: x + torch.arange(6.0).double().view(6, 1, 1),
    "per channel on the left": lambda x: torch.arange(6.0).double().view(6, 1, 1) + x,
    "times per image": lambda x: x * torch.tensor([2.0, 3.0]).double().view(2, 1, 1, 1),
    "times per site": lambda x: x * torch.arange(96.0).double().view(1, 1, 8, 12),
    "divided": lambda x: x / 3,
    "negative": lambda x: -x,
    "sum of two": lambda x: x + F.relu(x),
    "product of two": lambda x: x * F.relu(x),
    "layer norm": lambda x: F.layer_norm(
        x.permute(0, 2, 3, 1), (6,), torch.ones(6).double(), torch.ones(6).double()
    ).permute(0, 3, 1, 2),
    "linear": lambda x: F.linear(
        x.permute(0, 2, 3, 1), torch.ones(4, 6).double(), torch.ones(4).double()
    ).permute(0, 3, 1, 2),
    "group norm": lambda x: (
        F.group_norm(x, 2, torch.ones(6).double(), torch.ones(6).double())
        if isinstance(x, SparseTensor)
        else norm_of_visible(x, 2, torch.ones(6).double())
    ),
    "per-site mean": lambda x: x * x.pow(2).mean(dim=1, keepdim=True),
    "per-site variance": lambda x: x * torch.rsqrt(x.var(dim=1, keepdim=True) + 0.5),
    "gamma in the order BHWC": lambda x: (x.permute(0, 2, 3, 1) * torch.arange(6.0).double()).permute(
        0, 3, 1, 2
    ),
    "in place": lambda x: F.relu((x + 0.5).mul_(2), inplace=True),
    "concatenation": lambda x: torch.cat([x, 2 * x, F.relu(x)], 1),
    "concatenation in the order BHWC": lambda x: torch.cat(
        [x.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1).square()], -1
    ).permute(0, 3, 1, 2),
    "split": lambda x: torch.cat(list(reversed(torch.split(x, [1, 2, 3], dim=1))), 1),
    "split into twos": lambda x: x.split(2, 1)[1],
    "chunk": lambda x: torch.mul(*x.chunk(2, dim=1)),
    "chunk in the order BHWC": lambda x: torch.mul(*x.permute(0, 2, 3, 1).chunk(2, -1)).permute(0, 3, 1, 2),
    "slice": lambda x: x[:, 1:4] - x[:, 2:5, :, :],
    "slice in the order BHWC": lambda x: x.permute(0, 2, 3, 1)[..., ::2].permute(0, 3, 1, 2),
    "shuffle": lambda x: F.channel_shuffle(x, 3),
    "shuffle by hand": lambda x: x.view(2, 3, 2, 8, 12).transpose(1, 2).contiguous().view(2, -1, 8, 12),
    "groups weighed and summed": lambda x: (
        x.reshape(2, 3, 2, 8, 12) * torch.arange(12.0).double().view(2, 3, 2, 1, 1)
    ).sum(dim=1),
    "paths stacked and summed": lambda x: (
        torch.stack([x, x.square()], dim=1) * torch.arange(4.0).double().view(2, 2, 1, 1, 1)
    ).sum(1),
    "gate of a site times what a channel gets": lambda x: x[:, :1] * torch.arange(6.0).double().view(6, 1, 1),
    "gate of a site times channels": lambda x: x[:, :1] * x,
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "nearest to a size": lambda x: F.interpolate(F.avg_pool2d(x, 2), size=x.shape[-2:], mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "power": lambda x: (x + 0.1) ** 2,
    "negative power": lambda x: (x.square() + 0.5) ** -0.5,
    "power 0": lambda x: x + x**0,
    "limits that leave 0 out": lambda x: x + F.hardtanh(x, 0.5, 2.0),
    "addcmul": lambda x: torch.addcmul(
        torch.arange(6.0).double().view(6, 1, 1), torch.arange(6.0).double().view(6, 1, 1), x, value=0.5
    ),
    "instance norm": lambda x: (
        F.instance_norm(x, weight=torch.arange(6.0).double(), bias=torch.ones(6).double())
        if isinstance(x, SparseTensor)
        else norm_of_visible(x, 6, torch.arange(6.0).double())
    ),
    "convert": lambda x: x.float().to(torch.float64).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_rule_is_the_dense_operator_then_the_mask(operation):
    masked, packed, mask = sparse_pair()
    dense = masked.to_dense().clone()
    expected = OPERATIONS[operation](dense)
    expected = expected * F.interpolate(mask.double(), size=expected.shape[2:])
    for x in (masked, packed):
        out = OPERATIONS[operation](x)
        assert out.shape == expected.shape
        torch.testing.assert_close(out.to_dense(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradient_of_a_rule(operation):
    """Of images and back, by the dense operator between two masks."""
    visible, mask = sparse_pair()[0].sites.visible, sparse_pair()[2]
    images = torch.randn(2, 6, 8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(run):
        x = images.clone().requires_grad_()
        out = run(x)
        weights = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
        (out * weights).sum().backward()
        return x.grad

    def dense(x):
        out = OPERATIONS[operation](x * mask)
        return out * F.interpolate(mask.double(), size=out.shape[2:])

    expected = gradient(dense)
    assert expected.abs().max() > 0
    for layout in LAYOUTS:
        grad = gradient(lambda x, on=layout: OPERATIONS[operation](sparsify(x, visible, on)).to_dense())
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_piece_changed_in_place_changes_the_whole(layout):
    def run(x):
        whole = x * 2
        piece = whole[:, :3]
        piece += 0.5
        piece.sigmoid_()
        F.relu(piece.sub_(0.6), inplace=True)
        return whole

    x = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    visible, mask = sparse_pair()[0].sites.visible, sparse_pair()[2]
    torch.testing.assert_close(run(sparsify(x, visible, layout)).to_dense(), run(x * mask) * mask)


def test_spatial_norm_and_maximum_are_over_the_visible_sites_of_each_image():
    masked, packed, mask = sparse_pair()
    dense = masked.to_dense() - 5 * mask  # all below 0: masked sites would be the largest
    norm = torch.stack([dense[i][:, mask[i, 0]].norm(dim=1) for i in range(2)])
    largest = torch.stack([dense[i][:, mask[i, 0]].amax(1) for i in range(2)])
    for x in (masked - 5, packed - 5):
        torch.testing.assert_close(x.norm(p=2, dim=(2, 3), keepdim=True), norm[:, :, None, None])
        torch.testing.assert_close(
            x.permute(0, 2, 3, 1).norm(p=2, dim=(1, 2), keepdim=True), norm[:, None, None]
        )
        torch.testing.assert_close(x.amax((2, 3)), largest)
        torch.testing.assert_close(F.adaptive_max_pool2d(x, 1), largest[:, :, None, None])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_spatial_norm_of_nothing_has_a_gradient(layout):
    x = torch.zeros(1, 6, 8, 12, dtype=torch.float64, requires_grad=True)
    sparse = sparsify(x, torch.ones(1, 1, 2, 3, dtype=torch.bool), layout)
    sparse.norm(p=2, dim=(2, 3), keepdim=True).sum().backward()
    assert (x.grad == 0).all()


def test_spatial_mean_is_over_the_visible_sites_of_each_image():
    masked, packed, mask = sparse_pair()
    dense = masked.to_dense()
    expected = torch.stack([dense[i][:, mask[i, 0]].mean(1) for i in range(2)])
    for x in (masked, packed):
        torch.testing.assert_close(x.mean((2, 3)), expected)
        torch.testing.assert_close(x.mean((2, 3), keepdim=True), expected[:, :, None, None])
        torch.testing.assert_close(F.adaptive_avg_pool2d(x, 1), expected[:, :, None, None])


def test_batch_norm_is_batch_norm_of_the_visible_rows():
    masked, packed, mask = sparse_pair()
    rows = masked.to_dense().permute(0, 2, 3, 1)[mask[:, 0]]
    for x in (masked, packed):
        layer, oracle = nn.BatchNorm2d(6).double(), nn.BatchNorm1d(6).double()
        out, expected = layer(x), oracle(rows)
        torch.testing.assert_close(out.to_dense().permute(0, 2, 3, 1)[mask[:, 0]], expected)
        torch.testing.assert_close(layer.running_mean, oracle.running_mean)
        torch.testing.assert_close(layer.running_var, oracle.running_var)


def test_densify_fills_masked_sites_and_only_their_gradient_reaches_the_token():
    for x in sparse_pair()[:2]:
        token = torch.full((1, 6, 1, 1), 7.0, dtype=torch.float64, requires_grad=True)
        dense = x.to_dense(token)
        mask = x.sites.mask(8, 12)
        assert (dense.permute(0, 2, 3, 1)[~mask[:, 0]] == 7).all()
        dense.sum().backward()
        assert (token.grad == (~mask).sum()).all()


def test_rows_are_patch_major():
    visible = torch.tensor([[[[0, 1], [1, 0]]]]).bool()
    sites = Sites(visible)
    # a 4x4 map: patch (0, 1) then patch (1, 0), each row by row
    assert sites.rows(4, 4).tolist() == [2, 3, 6, 7, 8, 9, 12, 13]
    assert sites.rows(4, 4) is sites.rows(4, 4)


def test_alias_sees_in_place_change():
    for x in sparse_pair()[:2]:
        alias = x
        x += x
        assert alias is x
        F.relu(x, inplace=True)
        assert (alias.to_dense() >= 0).all()


class TestRefusals:
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Identity(), nn.Softmax2d())

        def forward(self, x):
            return self.block(x)

    def test_missing_rule_names_operator_and_module(self):
        for x in sparse_pair()[:2]:
            with pytest.raises(MissingRuleError, match=r"'softmax' in module 'block.1' \(Softmax2d\)"):
                self.Odd()(x)

    def test_arguments_that_a_rule_does_not_take_are_refused_by_name(self):
        for x in sparse_pair()[:2]:
            with pytest.raises(
                MissingRuleError, match="'chunk' with the named arguments chunks, dim outside"
            ):
                x.chunk(chunks=2, dim=1)

    def test_dropout_to_another_value_does_not_reach_masked_sites(self):
        masked, _, mask = sparse_pair()
        out = F.alpha_dropout(masked, 0.5, training=True).to_dense()
        assert (out[~mask.expand_as(out)] == 0).all()
        assert (out[mask.expand_as(out)] != 0).all()

    @pytest.mark.parametrize(
        "call",
        [
            lambda x: x == x,
            lambda x: x != 0,
            lambda x: x > 0,
            lambda x: x <= 0,
            lambda x: 2**x,
            lambda x: x @ torch.ones(12, 12).double(),
            len,
            lambda x: x.chunk(chunks=2, dim=1),
            lambda x: F.conv2d(input=x, weight=torch.ones(1, 6, 1, 1).double()),
            lambda x: x.mean(1),
            lambda x: x.var(dim=2, keepdim=True),
            lambda x: x.permute(0, 3, 2, 1),
            lambda x: F.linear(x, torch.ones(2, 12).double()),
            lambda x: F.layer_norm(x, (12,)),
            lambda x: F.adaptive_avg_pool2d(x, 2),
            lambda x: x + torch.ones(3, 2, 6, 8, 12).double(),
            lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.ones(1, 8, 1, 1).double()),
            lambda x: x.flatten(1),
            lambda x: torch.cat([x, x], 2),
            lambda x: torch.cat([x, torch.zeros(2, 1, 8, 12).double()], 1),
            lambda x: torch.cat([x, F.max_pool2d(x, 2)], 1),
            lambda x: x.chunk(2, 2),
            lambda x: x[:1],
            lambda x: x[:, 0],
            lambda x: x[..., ::2],
            lambda x: x[:, [0, 1]],
            lambda x: x.reshape(2, 6, 96),
            lambda x: x.reshape(2, 6, 4, 2, 12),
            lambda x: x.reshape(2, 3, 2, 8, 12).sum(2),
            lambda x: x.reshape(2, 3, 2, 8, 12) + 1,
            lambda x: x.reshape(2, 3, 2, 8, 12).transpose(2, 3),
            lambda x: torch.stack([x, x], 0),
            lambda x: x.norm(p=1, dim=(2, 3), keepdim=True),
            lambda x: x.norm(p=2, dim=1, keepdim=True),
            lambda x: x.amax(1),
            lambda x: F.adaptive_max_pool2d(x, (2, 3)),
            lambda x: F.instance_norm(x, torch.zeros(6), torch.ones(6), use_input_stats=False),
            lambda x: x[:, :1].mul_(torch.ones(1, 6, 1, 1).double()),
            lambda x: F.pad(x, (1, 1, 1, 1)) + 1,
        ],
    )
    def test_nothing_falls_back(self, call):
        for x in sparse_pair()[:2]:
            with pytest.raises((MissingRuleError, RuntimeError)):
                call(x)

    def test_two_masks_do_not_mix(self):
        (a, b, _), (c, _, _) = sparse_pair(), sparse_pair()
        with pytest.raises(ValueError, match="different masks"):
            a + c
        with pytest.raises(ValueError, match="different masks"):
            a + b

    def test_sizes_that_do_not_line_up(self):
        with pytest.raises(ValueError, match="does not line up"):
            sparsify(torch.zeros(1, 3, 30, 32), torch.ones(1, 1, 4, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="bool tensor"):
            sparsify(torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 4, 4))
        with pytest.raises(ValueError, match="batch size"):
            sparsify(torch.zeros(2, 3, 32, 32), torch.ones(1, 1, 4, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="'masked', 'packed'"):
            sparsify(torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 4, 4, dtype=torch.bool), "fast")


def test_layout_names():
    assert (MASKED.name, PACKED.name) == ("masked", "packed")
    assert MASKED.rules.keys() == PACKED.rules.keys()


# --- masks -------------------------------------------------------------------------------------------------------


def test_masks_of_positions_do_not_depend_on_the_batch():
    whole = visible_at(range(8), (3, 4), 0.6, seed=5)
    assert whole.flatten(1).sum(1).tolist() == [5] * 8
    assert torch.equal(
        torch.cat([visible_at([0, 1, 2], (3, 4), 0.6, 5), visible_at(range(3, 8), (3, 4), 0.6, 5)]), whole
    )
    assert not torch.equal(visible_at(range(8), (3, 4), 0.6, seed=6), whole)
    # every patch is kept about equally often
    share = visible_at(range(2000), (3, 4), 0.6, seed=0).double().mean((0, 1))
    assert (share - 5 / 12).abs().max() < 0.05


# --- statistics over processes -----------------------------------------------------------------------------------


def _sync_worker(rank, backend, folder):
    dist.init_process_group(backend)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    x, visible, layer, weights = (part.to(device) for part in _sync_case())
    mine = slice(0, 1) if rank == 0 else slice(1, 3)  # uneven on purpose
    report = {}
    for kind in ("masked", "packed", "dense"):
        norm = copy.deepcopy(layer)
        leaf = x[mine].clone().requires_grad_()
        if kind == "dense":
            out = norm(leaf)
        else:
            stock = nn.BatchNorm2d(4).double().to(device)
            stock.load_state_dict(norm.state_dict())
            norm = stock
            out = norm(sparsify(leaf, visible[mine], kind, sync=True)).to_dense()
        (out * weights[mine]).sum().backward()
        grads = [p.grad.clone() for p in norm.parameters()]
        for g in grads:
            dist.all_reduce(g)
        assert leaf.grad is not None
        tensors = (out.detach(), leaf.grad, *grads, *norm.buffers())
        report[kind] = [tensor.cpu() for tensor in tensors]
    torch.save(report, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _sync_case():
    generator = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(3, 4, 8, 8, dtype=torch.float64, generator=generator)
    visible = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]]).bool().view(3, 1, 2, 2)
    layer = SyncBatchNorm2d(4).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0, -1.0]))
        layer.bias.fill_(0.3)
    return x, visible, layer, torch.randn(x.shape, dtype=torch.float64, generator=generator)


NCCL = pytest.param(
    "nccl",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    ],
)


@pytest.mark.parametrize("backend", ["gloo", NCCL])
def test_statistics_over_two_processes_equal_one_process(tmp_path, backend):
    done = together(_sync_worker, backend, tmp_path, folder=tmp_path)
    assert done.codes == [0, 0], done.stderr
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    x, visible, layer, weights = _sync_case()
    for kind in ("masked", "packed", "dense"):
        norm = nn.BatchNorm2d(4).double()
        norm.load_state_dict(layer.state_dict())
        leaf = x.clone().requires_grad_()
        out = norm(leaf) if kind == "dense" else norm(sparsify(leaf, visible, kind)).to_dense()
        (out * weights).sum().backward()
        both = [results[0][kind], results[1][kind]]
        torch.testing.assert_close(torch.cat([r[0] for r in both]), out.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([r[1] for r in both]), leaf.grad, rtol=1e-10, atol=1e-12)
        for r in both:
            weight_grad, bias_grad, running_mean, running_var, batches = r[2:]
            torch.testing.assert_close(weight_grad, norm.weight.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(bias_grad, norm.bias.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(running_mean, norm.running_mean)
            torch.testing.assert_close(running_var, norm.running_var)
            assert batches == 1


def test_gradients_where_relus_share_what_was_computed_again() -> None:
    """A sum writes into what a ReLU computed again for it; other consumers of that ReLU must not take it for theirs."""
    torch.manual_seed(0)
    visible = torch.zeros(2, 1, 2, 2, dtype=torch.bool)
    visible[:, 0, 0, 0] = True
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    layers = [nn.Conv2d(4, 4, 3, padding=1), *(nn.BatchNorm2d(4) for _ in range(3)), nn.Conv2d(4, 4, 1)]
    first, *norms, last = [layer.double() for layer in layers]
    parameters = [p for layer in layers for p in layer.parameters()]

    def gradients(layout: str) -> tuple[torch.Tensor, ...]:
        y = first(sparsify(x, visible, layout))
        a, b = F.relu(norms[0](y)), F.relu(norms[1](y))
        results = [last(a + b), last(F.relu(F.relu(norms[2](y)))), last(a)]
        total = sum((r.to_dense() ** n).sum() for n, r in enumerate(results, start=2))
        return torch.autograd.grad(total, parameters)

    for ours, theirs in zip(gradients("packed"), gradients("masked"), strict=True):
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-12
