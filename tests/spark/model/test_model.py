"""SparK against a plain restatement of the official semantics, and against what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from spark.model.encoder import build_encoder, pyramid_info
from spark.model.masking import num_visible, random_visible
from spark.model.spark import SparK
from tests import oracle

CASES = {
    "resnet18": ("bn", lambda p, x, v, s: oracle.resnet(p, x, v, s, [2, 2, 2, 2], bottleneck=False), {}),
    "resnet26": ("bn", lambda p, x, v, s: oracle.resnet(p, x, v, s, [2, 2, 2, 2], bottleneck=True), {}),
    "convnext_atto": ("ln", lambda p, x, v, s: oracle.convnext(p, x, v, [2, 2, 6, 2]), {}),
    "convnext_tiny": (
        "ln",
        lambda p, x, v, s: oracle.convnext(p, x, v, [1, 1, 1, 1]),
        {"depths": (1, 1, 1, 1)},
    ),
}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Give every parameter a value that matters: timm starts with zero gammas, which hide half of each block."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.endswith("token"):
                p.copy_(
                    (0.5 if name.endswith("weight") or name.endswith("gamma") else 0.0)
                    + 0.3 * torch.randn(p.shape, generator=generator)
                )
    return model


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize("name", CASES)
def test_equals_official_semantics_in_fp64(name, layout):
    norm, encode, options = CASES[name]
    torch.manual_seed(0)
    width = 768 if name == "convnext_tiny" else 64  # 768 = the deepest width: the identity projection
    model = SparK(name, (64, 96), layout=layout, decoder_width=width, **options)
    model = lively(model).double()
    images = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    visible = random_visible(3, (2, 3), 0.6, generator=torch.Generator().manual_seed(1))

    state = {
        k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in model.state_dict().items()
    }
    loss, prediction, stats = oracle.spark(state, images, visible, encode, norm)
    loss.backward()
    out = model(images, visible)
    out.loss.backward()

    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    torch.testing.assert_close(out.prediction, prediction, rtol=1e-6, atol=1e-9)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    assert len(trained) > 40
    for key, p in trained.items():
        scale = state[key].grad.abs().max()
        assert scale > 0, f"the oracle gives {key} no gradient: this case tests nothing there"
        # A bias before a batch norm has no true gradient; what both sides hold there is rounding.
        before_norm = key.endswith("upsample.bias")
        assert (p.grad - state[key].grad).abs().max() <= 1e-6 * scale + (1e-12 if before_norm else 0), key
    assert len(stats) == (
        2 * sum(k.startswith(("encoder", "densify")) and k.endswith("running_mean") for k in state)
    )
    for key, value in stats.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-9, atol=1e-12)


def test_black_visible_pixels_are_visible():
    torch.manual_seed(0)
    model = lively(SparK("test_resnet", 64, layout="packed", decoder_width=64)).double()
    reference = SparK("test_resnet", 64, layout="masked", decoder_width=64).double()
    reference.load_state_dict(model.state_dict())
    visible = torch.tensor([[[[True, False], [True, True]]]])
    images = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    images[:, :, 32:, 32:] = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images, visible).prediction, reference(images, visible).prediction)
    black_hidden = visible.clone()
    black_hidden[0, 0, 0, 0] = False
    assert not torch.allclose(model(images, visible).prediction, model(images, black_hidden).prediction)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_any_size_and_channels_without_state(in_chans):
    model = SparK("test_resnet", 64, in_chans=in_chans, decoder_width=64)
    assert all("64" not in str(tuple(b.shape)) or b.ndim == 1 for b in model.buffers())
    for h, w in [(64, 64), (96, 64), (32, 160)]:
        out = model(torch.randn(2, in_chans, h, w))
        assert out.prediction.shape == out.target.shape == (2, in_chans, h, w)
        assert out.visible.flatten(1).sum(1).tolist() == [num_visible((h // 32, w // 32), 0.6)] * 2
    other = SparK("test_resnet", (96, 160), in_chans=in_chans, decoder_width=64)
    other.load_state_dict(model.state_dict())


def test_patches_larger_than_the_stride():
    model = SparK("test_resnet", 128, patch_size=64, decoder_width=64).double()
    reference = SparK("test_resnet", 128, patch_size=64, decoder_width=64, layout="masked").double()
    reference.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    visible = random_visible(2, (2, 3), 0.5)
    a, b = model(images, visible), reference(images, visible)
    assert a.visible.shape == (2, 1, 2, 3)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(
        a.target[0, :, :64, :64],
        (images[0, :, :64, :64] - images[0, :, :64, :64].mean())
        / (images[0, :, :64, :64].var() + 1e-6).sqrt(),
    )


def test_encoder_runs_unmasked_and_is_stock_timm():
    import timm

    model = SparK("resnet18", 64, decoder_width=64)
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    stock = timm.create_model("resnet18", num_classes=0)
    assert type(model.encoder) is type(stock)
    stock.load_state_dict(model.encoder.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.encoder.eval()(images), stock.eval()(images))


def test_all_gradients_flow_and_unreached_parameters_are_frozen():
    model = SparK("convnext_atto", 64, decoder_width=64)
    frozen = [k for k, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["encoder.head.norm.weight", "encoder.head.norm.bias"]
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_initial_loss_is_about_one():
    torch.manual_seed(0)
    out = SparK("resnet18", 128, decoder_width=256)(torch.randn(4, 3, 128, 128))
    assert out.loss.item() == pytest.approx(1.0, abs=0.05)


def test_parameter_counts_are_the_official_ones():
    model = SparK("resnet50", 224)
    count = {k: sum(p.numel() for p in m.parameters()) / 1e6 for k, m in model.named_children()}
    assert count["encoder"] == pytest.approx(23.51, abs=0.005)
    assert count["decoder"] == pytest.approx(23.18, abs=0.005)
    assert sum(count.values()) == pytest.approx(52.92, abs=0.005)
    assert model.grid == (7, 7)


def test_reconstruction_keeps_visible_patches_and_restores_masked_ones():
    model = SparK("test_resnet", 64, decoder_width=64)
    images = torch.rand(2, 3, 64, 64)
    visible = torch.tensor([[[[True, False], [False, True]]]]).expand(2, 1, 2, 2)
    out = model(images, visible)
    perfect = out._replace(prediction=out.target)
    torch.testing.assert_close(model.reconstruct(images, perfect), images, rtol=0, atol=1e-5)
    flat = out._replace(prediction=torch.zeros_like(images))
    picture = model.reconstruct(images, flat)
    torch.testing.assert_close(picture[:, :, :32, :32], images[:, :, :32, :32])
    torch.testing.assert_close(picture[0, :, :32, 32:], images[0, :, :32, 32:].mean().expand(3, 32, 32))


def test_trains_under_autocast_and_learns():
    torch.manual_seed(0)
    model = SparK("test_convnext", 64, decoder_width=64)
    images = F.interpolate(torch.randn(8, 3, 8, 8), size=64, mode="bilinear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for step in range(30):
        visible = random_visible(8, (2, 2), 0.5, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, visible).loss
        assert loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet5O"}, "nearest: resnet50"),
        ({"encoder": "vit_tiny_patch16_224"}, "no feature pyramid"),
        (
            {"encoder": "swin_tiny_patch4_window7_224"},
            r"does not run on an image of 64x64 px, 3 channels \(.*in module patch_embed \(PatchEmbed\)",
        ),
        ({"encoder": "botnet26t_256"}, r"\(AssertionError in module stages\.2\.\S+ \(BottleneckAttn\)\)"),
        ({"input_size": 100}, "use 96x96 or 128x128"),
        ({"input_size": (64, 90)}, "use 64x64 or 64x96"),
        ({"mask_ratio": 0.99}, "0 of 4 visible"),
        ({"layout": "dense"}, "'masked', 'packed'"),
        ({"decoder_width": 100}, "multiple of 32"),
        ({"patch_size": 48}, "multiple of the encoder's stride 32; or use the encoder at stride 16 "),
        ({"patch_size": -32}, "multiple of the encoder's stride 32$"),
        ({"densify_norm": "gn"}, "'bn' or 'ln'"),
        ({"no_such_option": 3}, "does not accept these options"),
    ],
)
def test_refuses_with_advice(options, message):
    with pytest.raises(ValueError, match=message):
        SparK(**{"encoder": "test_resnet", "input_size": 64, "decoder_width": 64, **options})


def test_forward_refuses_what_does_not_fit():
    model = SparK("test_resnet", 64, decoder_width=64)
    with pytest.raises(ValueError, match="no multiple of the patch size 32"):
        model(torch.zeros(1, 3, 64, 70))
    with pytest.raises(ValueError, match="1 channels"):
        model(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match=r"visible must be \[1, 1, 2, 2\]"):
        model(torch.zeros(1, 3, 64, 64), torch.ones(1, 1, 3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="visible hides every patch of every image"):
        model(torch.zeros(1, 3, 64, 64), torch.zeros(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="images are uint8: give floating-point numbers, divided by 255"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"image size 0x0 .*: use 32x32, for example"):
        model.grid_of(0, 0)


def test_pyramid_levels():
    levels = pyramid_info(build_encoder("resnet18"))
    assert [(level.stride, level.channels) for level in levels] == [
        (2, 64),
        (4, 64),
        (8, 128),
        (16, 256),
        (32, 512),
    ]
    levels = pyramid_info(build_encoder("convnext_atto"))
    assert [(level.stride, level.channels) for level in levels] == [(4, 40), (8, 80), (16, 160), (32, 320)]
