"""Decoders of fewer stages, other widths and pointwise projections, against a plain restatement and plain timm."""

import copy
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from spark import pretrain
from spark.config import PretrainConfig
from spark.model.decoder import Densify, LightDecoder
from spark.model.masking import random_visible
from spark.model.spark import SparK
from spark.sparse import sparsify
from spark.training.cli import parse_config
from spark.weights.encoder import save_encoder
from tests import oracle
from tests.spark.model.test_model import lively

STRIDE = 32
# Name of the encoder, its shape, the norm of densify, and its features as plain arithmetic.
ENCODERS = {
    "resnet18": (
        {"layers": (1, 1, 1, 1), "channels": (6, 10, 12, 32)},
        "bn",
        lambda p, x, v, s: oracle.resnet(p, x, v, s, [1, 1, 1, 1], bottleneck=False),
    ),
    "convnext_atto": (
        {"depths": (1, 1, 1, 1), "dims": (6, 10, 12, 32)},
        "ln",
        lambda p, x, v, s: oracle.convnext(p, x, v, [1, 1, 1, 1]),
    ),
}


def plain_block(p: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = F.conv_transpose2d(x, p[f"{name}.upsample.weight"], p[f"{name}.upsample.bias"], stride=2, padding=1)
    for number in (1, 2):
        x = F.conv2d(x, p[f"{name}.conv{number}.weight"], padding=1)
        norm = p[f"{name}.norm{number}.weight"], p[f"{name}.norm{number}.bias"]
        x = F.batch_norm(x, None, None, *norm, training=True)
        x = F.relu6(x) if number == 1 else x
    return x


def plain_decoder(p: Mapping[str, Tensor], maps: list[Tensor], stages: int, prefix: str = "") -> Tensor:
    """Deepest map first: one more than blocks where there are as many, else added to the first blocks' inputs."""
    x = maps[0]
    for number in range(stages):
        x = plain_block(p, f"{prefix}blocks.{number}", x)
        if number + 1 < len(maps):
            x = x + maps[number + 1]
    x = F.conv2d(x, p[f"{prefix}head.weight"], p[f"{prefix}head.bias"])
    side = STRIDE // 2**stages
    return rearrange(x, "b (c dy dx) h w -> b c (h dy) (w dx)", dy=side, dx=side)


def plain_densify(
    p: Mapping[str, Tensor], name: str, x: Tensor, visible: Tensor, norm: str, stats: dict
) -> Tensor:
    """The token at masked sites, then the projection of the dense map."""
    normed = (
        oracle.layer_norm(p, f"{name}.norm", x, visible)
        if norm == "ln"
        else oracle.batch_norm(p, f"{name}.norm", x, visible, stats)
    )
    mask = oracle.mask_at(visible, *x.shape[2:])
    filled = torch.where(mask, normed, p[f"{name}.token"])
    weight = p.get(f"{name}.projection.weight")
    if weight is None:
        return filled
    return F.conv2d(filled, weight, p[f"{name}.projection.bias"], padding=weight.shape[-1] // 2)


def leaves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in state.items()}


def small(name: str = "resnet18", **options) -> SparK:
    shape = ENCODERS[name][0]
    torch.manual_seed(0)
    return lively(SparK(name, **{"input_size": 64, "decoder_width": 64, **options}, **shape))  # type: ignore[return-value]


# --- values ------------------------------------------------------------------------------------------------------


# The deepest map has 32 channels: with a width of 32 its projection is the identity.
@pytest.mark.parametrize(("width", "kernel"), [(64, 3), (64, 1), (32, 1)])
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ENCODERS)
def test_equals_plain_restatement_in_fp64(name, stages, width, kernel):
    _, norm, encode = ENCODERS[name]
    model = small(name, decoder_width=width, decoder_stages=stages, densify_kernel=kernel).double()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    visible = random_visible(2, (2, 3), 0.5, generator=torch.Generator().manual_seed(1))
    p = leaves(model.state_dict())

    stats: dict[str, Tensor] = {}
    encoder = {k.removeprefix("encoder."): v for k, v in p.items() if k.startswith("encoder.")}
    features = encode(encoder, oracle.times_mask(images, visible), visible, {})
    read = features[::-1][: stages + 1]  # strides 32, 16, ... down to that of the last block's result
    assert [k for k in p if k.endswith("token")] == [f"densify.{i}.token" for i in range(len(read))]
    sides = {k: v.shape[-1] for k, v in p.items() if k.endswith("projection.weight")}
    deepest = {} if width == 32 else {"densify.0.projection.weight": 1}
    assert sides == {**deepest, **{f"densify.{i}.projection.weight": kernel for i in range(1, len(read))}}
    maps = [plain_densify(p, f"densify.{i}", x, visible, norm, stats) for i, x in enumerate(read)]
    prediction = plain_decoder(p, maps, stages, "decoder.")
    target = oracle.patchify(images, STRIDE)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = (oracle.patchify(prediction, STRIDE) - target).square().mean(-1)
    hidden = errors[~visible.flatten(1)]
    loss = hidden.sum() / (len(hidden) + 1e-8)  # the official form
    loss.backward()

    out = model(images, visible)
    out.loss.backward()
    assert out.prediction.shape == images.shape
    torch.testing.assert_close(out.prediction, prediction, rtol=1e-9, atol=1e-9)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    trained = {k: parameter for k, parameter in model.named_parameters() if parameter.requires_grad}
    expected = {k: v.grad for k, v in p.items() if v.grad is not None}
    assert trained.keys() == expected.keys()  # and so DDP waits for nothing
    largest = max(g.norm() for g in expected.values())
    for key, parameter in trained.items():
        # The bias of an upsampling has almost no gradient, a norm being behind it: the rounding of large terms is left.
        assert parameter.grad is not None
        difference = (parameter.grad - expected[key]).norm()
        assert difference <= 1e-8 * expected[key].norm() + 1e-12 * largest, key
    for key, value in stats.items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("norm", ["bn", "ln"])
@pytest.mark.parametrize("layout", ["masked", "packed"])
def test_pointwise_densify_equals_projecting_the_dense_map(norm, layout):
    densify = lively(Densify(5, 7, norm=norm, kernel_size=1, identity_if_equal=False, sync_bn=False)).double()
    x = torch.randn(2, 5, 6, 10, dtype=torch.float64)
    visible = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    visible[0, 0, [0, 1, 2], [4, 0, 2]] = visible[1, 0, 1, 1] = True
    weight = torch.randn(2, 7, 6, 10, dtype=torch.float64)
    p = leaves(densify.state_dict())
    inside, outside = (x.clone().requires_grad_() for _ in range(2))

    out = densify(sparsify(inside, visible, layout))
    expected = plain_densify(
        {f"d.{k}": v for k, v in p.items()}, "d", oracle.times_mask(outside, visible), visible, norm, {}
    )
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(inside.grad, outside.grad, rtol=1e-10, atol=1e-12)
    for key, parameter in densify.named_parameters():
        torch.testing.assert_close(parameter.grad, p[key].grad, rtol=1e-10, atol=1e-12, msg=key)


@pytest.mark.parametrize(
    ("width", "stages", "precision"),
    [
        (64, 5, "fp32"),
        (32, 3, "fp32"),
        (128, 2, "fp32"),
        (64, 5, "bf16"),
        (32, 3, "bf16"),
    ],
)
def test_as_exact_as_plain_layers(width, stages, precision):
    """Error against fp64 at most 1.5 times that of layer after layer, however blocks are computed.

    2.5 times in fp32, where folded blocks round the composed weights besides: of an error of 1e-7 in the prediction.

    Least error of a few inputs in fp32: where rounding moves a value across a bend of ReLU6, that is all one sees.
    """
    bf16 = precision == "bf16"
    torch.manual_seed(0)
    decoder = lively(LightDecoder(width, stages, sync_bn=False, upscale=STRIDE // 2**stages))
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in range(2 if bf16 else 3):
        generator = torch.Generator().manual_seed(seed)
        maps = [
            torch.randn(2, width // 2**i, 3 * 2**i, 5 * 2**i, generator=generator)
            for i in range(min(4, stages + 1))
        ]
        grad = torch.randn(2, 3, 96, 160, generator=generator)

        def results(dtype: torch.dtype, ours: bool, maps: list[Tensor] = maps, grad: Tensor = grad) -> dict:
            module = copy.deepcopy(decoder).to(dtype)
            inputs = [m.to(dtype, copy=True).requires_grad_() for m in maps]
            p = dict(module.named_parameters())
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16 and dtype == torch.float32):
                out = module(inputs) if ours else plain_decoder(p, inputs, stages)
            out.backward(grad.to(out.dtype))
            tensors = [t.grad for t in (*inputs, *p.values()) if t.grad is not None]
            assert len(tensors) == len(inputs) + len(p)
            return {"prediction": [out.detach()], "gradients": tensors}

        exact = results(torch.float64, ours=False)
        for kind, layout in itertools.product(exact, ("plain", "ours")):
            found = results(torch.float32, ours=layout == "ours")[kind]
            squares = [
                ((a.double() - b).square().sum(), b.square().sum())
                for a, b in zip(found, exact[kind], strict=True)
            ]
            error, size = (float(sum(part)) for part in zip(*squares, strict=True))
            errors.setdefault((kind, layout), []).append((error / size) ** 0.5)
    for kind in ("prediction", "gradients"):
        theirs, ours = (
            sum(values) / len(values) if bf16 else min(values)
            for values in (errors[kind, "plain"], errors[kind, "ours"])
        )
        assert theirs <= (0.2 if bf16 else 1e-5), (kind, theirs)  # a case that rounding does not drown
        assert 0 < ours <= max((1.5 if bf16 else 2.5) * theirs, 4 * 2**-24), (
            kind,
            ours,
            theirs,
        )  # or a few units in the last place


# --- which parameters take part ----------------------------------------------------------------------------------


class Branching(nn.Module):
    """Every feature map leaves through a convolution of its own, and no later one depends on that."""

    def __init__(self, maps: int = 5):
        super().__init__()
        channels = [3, 4, 6, 8, 10, 12][: maps + 1]
        self.trunk = nn.ModuleList(nn.Conv2d(a, b, 2, 2) for a, b in itertools.pairwise(channels))
        self.exits = nn.ModuleDict(
            {f"stride{2**i}": nn.Conv2d(channels[i], 5, 1) for i in range(1, maps + 1)}
        )
        self.feature_info = [{"num_chs": 5, "reduction": 2**i} for i in range(1, maps + 1)]

    def forward(self, x):
        maps = []
        for convolution, leave in zip(self.trunk, self.exits.values(), strict=True):
            x = convolution(x)
            maps.append(leave(x))
        return maps


@pytest.mark.parametrize(
    ("stages", "unread"), [(1, (2, 4, 8)), (2, (2, 4)), (3, (2,)), (4, (2,)), (5, (2,)), (None, (2,))]
)
def test_what_only_unread_maps_need_is_frozen(stages, unread):
    """A trainable parameter without a gradient would stop DistributedDataParallel."""
    model = SparK(Branching(), 64, decoder_width=32, decoder_stages=stages, densify_norm="bn")
    frozen = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {f"encoder.exits.stride{s}.{leaf}" for s in unread for leaf in ("weight", "bias")}
    model(torch.randn(2, 3, 64, 96)).loss.backward()
    assert {k for k, p in model.named_parameters() if p.grad is None} == frozen


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_no_state_depends_on_the_image_size(stages):
    """Rectangles, larger patches and other channel counts come out in the image's own shape."""
    model = small(decoder_stages=stages, densify_kernel=1, patch_size=64, in_chans=2, input_size=(64, 192))
    for height, width in [(64, 192), (128, 64)]:
        out = model(torch.randn(2, 2, height, width))
        assert out.prediction.shape == out.target.shape == (2, 2, height, width)
    kernels = [d.projection.kernel_size for d in model.densify]  # type: ignore[union-attr]
    assert kernels == [(1, 1)] * min(stages + 1, 4)
    assert len(model.decoder.blocks) == stages
    assert model.decoder.head.out_channels == 2 * (STRIDE // 2**stages) ** 2


# --- after pretraining -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_exported_encoder_is_plain_timm(name, tmp_path):
    model = small(name, decoder_stages=2, densify_kernel=1)
    before = copy.deepcopy(model.encoder.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(torch.randn(2, 3, 64, 64)).loss.backward()
    optimizer.step()
    save_encoder(model.encoder, tmp_path / "encoder")
    plain = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0)
    assert type(plain) is type(model.encoder)
    after = plain.state_dict()
    assert after.keys() == before.keys()
    # Also the stages whose maps the decoder did not read have learnt.
    assert not any(torch.equal(after[k], v) for k, v in before.items() if k.endswith("conv1.weight"))
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(plain.eval()(images), model.encoder.eval()(images))


@pytest.fixture
def photos(tmp_path) -> Iterator[Path]:
    """A folder of 4 images of noise; accelerate forgets the run afterwards."""
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)


def test_run_writes_its_options_and_goes_on_from_its_checkpoint(photos, tmp_path):
    lean = {"decoder_width": 48, "decoder_stages": 2, "densify_kernel": 1}
    run = tmp_path / "run"
    arguments = [
        *(f"--model.{k}={v}" for k, v in {"name": "test_resnet", "input_size": 64, **lean}.items()),
        *(f"--data.train={photos}", "--data.workers=0", "--optim.batch_size=4", "--optim.warmup_steps=1"),
        *("--checkpoint_every=1", f"--output_dir={run}"),
    ]
    pretrain.main([*arguments, "--max_steps=1"])
    config = parse_config(PretrainConfig, [f"--config={run / 'config.yaml'}"], "")
    assert {k: getattr(config.model, k) for k in lean} == lean
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain.main([*arguments, "--max_steps=2", "--resume=true"])
    first, second = (
        load_file(next((run / "checkpoints" / f"step_{n:07d}").glob("model*.safetensors"))) for n in (1, 2)
    )
    options = {k: getattr(config.model, k) for k in lean}
    SparK("test_resnet", 64, **options).load_state_dict(second)
    assert not torch.equal(first["decoder.head.weight"], second["decoder.head.weight"])
    with pytest.raises(RuntimeError, match=r"decoder\.blocks\.2"):
        SparK("test_resnet", 64, decoder_width=48 * 2).load_state_dict(second)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_stages": 0}, "decoder_stages 0 must be 1 to 5"),
        ({"decoder_stages": 6}, "decoder_stages 6 must be 1 to 5"),
        ({"decoder_stages": -1}, "decoder_stages -1 must be 1 to 5"),
        ({"densify_kernel": 2}, "densify_kernel 2 must be 1 or 3"),
        ({"densify_kernel": 5}, "densify_kernel 5 must be 1 or 3"),
        (
            {"decoder_width": 36, "decoder_stages": 3},
            "decoder_width 36 is halved 3 times: use a multiple of 8",
        ),
        (
            {"decoder_width": 33, "decoder_stages": 1},
            "decoder_width 33 is halved 1 times: use a multiple of 2",
        ),
    ],
)
def test_refuses_with_advice(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_a_width_need_only_be_divisible_by_the_stages_there_are():
    assert small(decoder_width=36, decoder_stages=2).decoder.widths == [36, 18, 9]


def test_the_encoders_stride_bounds_the_stages():
    with pytest.raises(ValueError, match="decoder_stages 5 must be 1 to 4"):
        SparK(Branching(maps=4), 64, decoder_width=32, decoder_stages=5, densify_norm="bn")
    model = SparK(Branching(maps=4), 64, decoder_width=32, decoder_stages=1, densify_norm="bn")
    assert model(torch.randn(2, 3, 48, 80)).prediction.shape == (2, 3, 48, 80)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.densify_kernel=2", "model.densify_kernel"),
        ("--model.decoder_stages=two", "model.decoder_stages"),
    ],
)
def test_command_line_refuses_in_one_line(argument, message, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--model.name=test_resnet", "--data.train=.", "--output_dir=x", argument])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
