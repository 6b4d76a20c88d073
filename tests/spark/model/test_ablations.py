"""Each ablation switch of SparK against a plain restatement, and HOG against a loop over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from spark.model.ablations import dense_pyramid, fill_masked
from spark.model.hog import draw_hog, hog
from spark.model.masking import random_visible
from spark.model.spark import SparK
from spark.monitor.panels import reconstruction_panels
from tests import oracle
from tests.spark.model.test_model import lively
from tests.together import together


def plain_hog(images):
    """Pixel by pixel, from the definition in the paper's code: [B, C, H, W] -> [B, C * 9, H / 8, W / 8]."""
    padded = np.pad(np.asarray(images, dtype=np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    b, c, h, w = images.shape
    sides = np.array(
        [1, 2, 1]
    )  # Sobel; differences first, so that what is equal on both sides gives 0 and not rounding
    votes = np.zeros((b, c, 9, h // 8, w // 8))
    for n, k, y, x in np.ndindex(b, c, h, w):
        window = padded[n, k, y : y + 3, x : x + 3]
        gx, gy = ((window[:, 0] - window[:, 2]) * sides).sum(), ((window[0] - window[2]) * sides).sum()
        degrees = math.degrees(math.atan2(gx, gy)) % 180
        votes[n, k, int(degrees // 20) % 9, y // 8, x // 8] += math.hypot(gx, gy)
    length = np.sqrt((votes**2).sum(2, keepdims=True))
    return (votes / np.where(length == 0, 1, length)).reshape(b, c * 9, h // 8, w // 8)


def restated(p, images, visible, masked_pixels, maps, target, loss_on):
    """A small ResNet with these switches -> (loss, prediction)."""
    everything = torch.ones_like(visible)
    encoder = {k.removeprefix("encoder."): v for k, v in p.items() if k.startswith("encoder.")}
    mask = oracle.mask_at(visible, *images.shape[2:])
    filled, seen = images * mask, everything
    if masked_pixels == "absent":
        seen = visible
    elif masked_pixels == "token":
        filled = filled + p["token"] * ~mask
    features = oracle.resnet(encoder, filled, seen, {}, [1, 1, 1, 1], bottleneck=False)[::-1]
    if masked_pixels != "token":
        seen = visible
    x, block = 0, 0
    while f"decoder.blocks.{block}.upsample.weight" in p:
        if block < maps:
            y = oracle.batch_norm(p, f"densify.{block}.norm", features[block], seen, {})
            if masked_pixels != "token":
                y = torch.where(oracle.mask_at(seen, *y.shape[2:]), y, p[f"densify.{block}.token"])
            weight = p[f"densify.{block}.projection.weight"]
            y = F.conv2d(y, weight, p[f"densify.{block}.projection.bias"], padding=weight.shape[-1] // 2)
            x = x + y
        x = oracle.decoder_block(p, f"decoder.blocks.{block}", x)
        block += 1
    if block < maps:  # the map of the last block's own resolution
        y = oracle.batch_norm(p, f"densify.{block}.norm", features[block], seen, {})
        if masked_pixels != "token":
            y = torch.where(oracle.mask_at(seen, *y.shape[2:]), y, p[f"densify.{block}.token"])
        x = x + F.conv2d(
            y, p[f"densify.{block}.projection.weight"], p[f"densify.{block}.projection.bias"], padding=1
        )
    prediction = F.conv2d(x, p["decoder.head.weight"], p["decoder.head.bias"])

    patch = 32
    if target == "hog":
        wanted, patch = torch.from_numpy(plain_hog(images)), 4
    else:
        wanted = images
    wanted, got = oracle.patchify(wanted, patch), oracle.patchify(prediction, patch)
    if target == "normalised":
        wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6) ** 0.5
    error = ((got - wanted) ** 2).mean(2)
    counted = torch.ones_like(error) if loss_on == "all" else visible.logical_not().flatten(1).to(error.dtype)
    return (error * counted).sum() / counted.sum(), prediction


SMALL = {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)}
SPARK = {"masked_pixels": "absent", "decoder_maps": 4, "target": "normalised", "loss_on": "masked"}


@pytest.mark.parametrize("layout", ["masked", "packed"])
@pytest.mark.parametrize(
    "switches",
    [
        {"masked_pixels": "zero"},
        {"masked_pixels": "token"},
        {"decoder_maps": 1},
        {"loss_on": "all"},
        {"target": "pixels"},
        {"target": "hog"},
        {"masked_pixels": "token", "decoder_maps": 1, "target": "pixels", "loss_on": "all"},
    ],
    ids=lambda switches: "-".join(map(str, switches.values())),
)
def test_every_switch_equals_its_restatement_in_fp64(switches, layout):
    options = {**SPARK, **switches}
    torch.manual_seed(0)
    model = lively(SparK("resnet18", (64, 96), layout=layout, decoder_width=64, **options, **SMALL)).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    visible = random_visible(2, (2, 3), 0.6, generator=torch.Generator().manual_seed(1))
    state = {
        k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in model.state_dict().items()
    }
    maps = 3 if options["target"] == "hog" else options["decoder_maps"]
    loss, prediction = restated(
        state, images, visible, options["masked_pixels"], maps, options["target"], options["loss_on"]
    )
    loss.backward()
    out = model(images, visible)
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-8)
    torch.testing.assert_close(out.prediction, prediction, rtol=1e-6, atol=1e-9)
    for key, p in model.named_parameters():
        scale = state[key].grad.abs().max()
        assert scale > 0, f"{key} takes no part"
        assert (p.grad - state[key].grad).abs().max() <= 1e-6 * scale + 1e-12, key
    plain = SparK("resnet18", (64, 96), decoder_width=64, **SMALL)
    assert ("token" in state) == (options["masked_pixels"] == "token")
    encoder = {k for k in state if k.startswith("encoder.")}
    assert encoder == {k for k in plain.state_dict() if k.startswith("encoder.")}, "the encoder stays timm's"


def test_zero_out_shows_what_sparse_encoding_avoids():
    """The dense network mixes filled sites into its statistics; without masks both are the same network."""
    torch.manual_seed(0)
    sparse, dense = (
        SparK("test_resnet", 64, decoder_width=32, masked_pixels=kind) for kind in ("absent", "zero")
    )
    dense.load_state_dict(sparse.state_dict())
    images = torch.randn(2, 3, 64, 64)
    visible = random_visible(2, (2, 2), 0.5)
    assert not torch.allclose(sparse(images, visible).prediction, dense(images, visible).prediction)
    everything = torch.ones_like(visible)
    torch.testing.assert_close(sparse(images, everything).prediction, dense(images, everything).prediction)


@pytest.mark.parametrize("kind", ["absent", "zero", "token"])
def test_masked_pixels_never_reach_the_prediction(kind):
    torch.manual_seed(0)
    model = SparK("test_resnet", 64, decoder_width=32, masked_pixels=kind)
    visible = random_visible(2, (2, 2), 0.5)
    images = torch.randn(2, 3, 64, 64)
    other = torch.where(oracle.mask_at(visible, 64, 64), images, torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(model(images, visible).prediction, model(other, visible).prediction)


def _dense_worker(rank, folder):
    dist.init_process_group("gloo")
    model, images, visible = _dense_case()
    mine = slice(0, 1) if rank == 0 else slice(1, 4)
    features = dense_pyramid(model.encoder, fill_masked(images, visible, 0.0)[mine], model.levels, True)
    torch.save(([f.detach() for f in features], list(model.encoder.buffers())), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _dense_case():
    torch.manual_seed(0)
    model = SparK("test_resnet", 64, decoder_width=32, masked_pixels="zero").double()
    return model, torch.randn(4, 3, 64, 64).double(), random_visible(4, (2, 2), 0.5)


def test_dense_batch_statistics_cover_all_processes(tmp_path):
    done = together(_dense_worker, tmp_path, folder=tmp_path)
    assert done.codes == [0, 0], done.stderr
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    (first, one), (second, two) = results
    model, images, visible = _dense_case()
    features = model.encoder.forward_intermediates(fill_masked(images, visible, 0.0), intermediates_only=True)
    for level, a, b in zip(model.levels, first, second, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), features[level.index])
    for a, b, whole in zip(one, two, model.encoder.buffers(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, whole)


def test_hog_equals_a_loop_over_pixels():
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images[0, 0, :8, :8] = 3.0
    np.testing.assert_allclose(hog(images).numpy(), plain_hog(images.numpy()), atol=1e-12)
    flat = hog(torch.ones(1, 1, 8, 16))
    assert flat.shape == (1, 9, 1, 2)
    assert flat.abs().max() == 0, "no gradient, no vote"
    scaled = images * torch.tensor([2.0, 0.5, 7.0], dtype=torch.float64)[:, None, None] - 1
    torch.testing.assert_close(hog(scaled), hog(images))


def test_hog_of_half_precision_is_computed_in_fp32():
    images = torch.rand(1, 3, 16, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert hog(images).dtype == torch.float32
        torch.testing.assert_close(hog(images), hog(images.float()))


@pytest.mark.parametrize(("turn", "along"), [(0, 3), (1, 2)])
def test_drawn_histograms_run_along_edges(turn, along):
    """A vertical edge is drawn as a vertical stroke, a horizontal one as a horizontal one."""
    images = torch.zeros(1, 1, 16, 16)
    images[..., 4:] = 1.0
    images = images.rot90(turn, (2, 3))
    drawn = draw_hog(hog(images))
    assert drawn.shape == (1, 1, 16, 16)
    assert 0 <= drawn.min() <= drawn.max() <= 1
    cell = drawn[0, 0, :8, :8] if turn == 0 else drawn[0, 0, 8:, :8]
    spread = [cell.sum(dim).ne(0).sum().item() for dim in (0, 1)]
    assert (spread[0] < spread[1]) == (along == 3), (
        "columns that a vertical stroke covers are fewer than rows"
    )


@pytest.mark.parametrize("target", ["pixels", "hog"])
def test_reconstruction_and_panels(target):
    torch.manual_seed(0)
    model = SparK("test_resnet", 64, decoder_width=32, target=target)
    images = torch.rand(2, 3, 64, 64)
    visible = random_visible(2, (2, 2), 0.5)
    out = model(images, visible)
    picture = reconstruction_panels(model, images, visible, [0, 0, 0], [1, 1, 1])
    if target == "hog":
        assert out.prediction.shape == out.target.shape == (2, 27, 8, 8)
        assert picture.width == 4 * 128 + 5 * 2
        pixels = torch.from_numpy(np.asarray(picture)[18 : 18 + 128].copy())
        true, predicted = (pixels[:, 2 + i * 130 :][:, :128] for i in (2, 3))
        seen = oracle.mask_at(visible, 128, 128)[0, 0]
        assert torch.equal(true[seen], predicted[seen])
        assert not torch.equal(true[~seen], predicted[~seen])
        drawn = (draw_hog(hog(images))[0, 0] * 255).round()
        assert (true[::2, ::2, 0] - drawn).abs().max() <= 1
        with pytest.raises(ValueError, match=r"no image can be made of target 'hog'.*draw_hog"):
            model.reconstruct(images, out)
    else:
        assert torch.equal(out.target, images)
        restored = model.reconstruct(images, out._replace(prediction=images + 1))
        torch.testing.assert_close(
            restored - images, (~oracle.mask_at(visible, 64, 64)).float().expand(2, 3, 64, 64)
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"masked_pixels": "none"},
            "masked_pixels 'none' does not exist: use one of 'absent', 'zero', 'token'",
        ),
        ({"target": "hogs"}, "target 'hogs' does not exist: use one of 'normalised', 'pixels', 'hog'"),
        ({"loss_on": "visible"}, "loss_on 'visible' does not exist: use one of 'masked', 'all'"),
        ({"decoder_maps": 0}, "decoder_maps 0 must be at least 1"),
        (
            {"target": "hog", "decoder_stages": 3},
            "must be 1 to 2, log2 of the encoder's stride over that of the target, 8",
        ),
    ],
)
def test_refuses_with_advice(options, message):
    with pytest.raises(ValueError, match=message):
        SparK(**{"encoder": "test_resnet", "input_size": 64, "decoder_width": 64, **options})
