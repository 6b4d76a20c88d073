"""Every depth head: parameters, shapes, gradients, saving; and the layers of ZoeDepth against transformers'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large
from transformers import Swinv2Config, ZoeDepthConfig, ZoeDepthForDepthEstimation
from transformers.models.zoedepth import modeling_zoedepth as zoedepth

from finetune import DepthModel, load_depth_model
from finetune.heads import HEADS
from finetune.heads.fusion import Fusion, FusionCore
from finetune.heads.metric_bins import Attractor, LogBinomial, MetricBins
from spark.model.encoder import PyramidLevel, build_encoder
from spark.weights.encoder import save_encoder

SMALL: dict[str, dict[str, Any]] = {
    "unetpp": {"decoder_channels": (16, 16, 8, 8, 8)},
    "fusion": {"width": 16},
    "metric_bins": {"width": 16, "bins": 8, "embedding": 8, "attractors": (4, 2, 2, 1)},
    "lraspp": {"width": 16, "maps": 5},
    "linear": {},
    "linear_bins": {"maps": 2, "bins": 8, "layer_norm": True},
    "fcrn": {"widths": (16, 16, 8, 8, 8), "dropout": 0.0},
    "dorn": {"bins": 12, "width": 16, "fused": 32, "dilations": (1, 2), "dropout": 0.0},
}
TINY_SWIN = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)}


def small(head: str, encoder: str | Path | nn.Module = "test_resnet", **options: Any) -> DepthModel:
    torch.manual_seed(0)
    return DepthModel(encoder, head=head, **{**SMALL[head], **options})


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def on_meta(name: str, **options: Any) -> nn.Module:
    """An encoder of which only shapes exist yet, as one on the CPU with weights of any value."""
    with torch.device("meta"):
        encoder = build_encoder(name, **options)
    return encoder.to_empty(device="cpu")


def test_every_head_has_small_options_here() -> None:
    assert set(SMALL) == set(HEADS)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "mobilenetv3_small_050"])
def test_maps_have_the_size_of_the_images(head: str, encoder: str) -> None:
    model = small(head, encoder).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 3, 33, 70))
    given = {name for name in ("depth", "disparity_affine") if output.get(name) is not None}
    assert given == set(model.head.outputs)
    for name in given:
        value = getattr(output, name)
        assert value.shape == (2, 1, 33, 70), name
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert (value >= 0).all()
    disparity = output.disparity()
    assert disparity is not None
    assert disparity.shape == (2, 1, 33, 70)


@pytest.mark.parametrize("head", HEADS)
def test_every_trained_parameter_gets_a_gradient(head: str) -> None:
    model = small(head).train()
    output = model(torch.rand(2, 3, 64, 64))
    assert {name: m.shape[1] for name, m in output.extras.items()} == dict(model.head.extras)
    trained = [*model.head.outputs, *(name for name in output.extras if not name.startswith("scale_"))]
    sum(output.get(name).mean() for name in trained if name not in model.head.counted).backward()  # type: ignore[union-attr]
    named = dict(model.named_parameters())
    assert [name for name, p in named.items() if (p.grad is not None) != p.requires_grad] == []
    if not model.head.frozen_encoder:
        assert any(name.startswith("encoder.") and p.requires_grad for name, p in named.items())


@pytest.mark.parametrize("head", HEADS)
def test_fp32_inside_autocast(head: str) -> None:
    model = small(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(torch.randn(2, 3, 64, 64))
    for name in model.head.outputs:
        assert getattr(output, name).dtype == torch.float32


@pytest.mark.parametrize("head", HEADS)
def test_save_and_load(head: str, tmp_path: Path) -> None:
    model = small(head).eval()
    loaded = load_depth_model(model.save(tmp_path / "model"))
    assert (loaded.head_name, loaded.mean, loaded.std) == (head, model.mean, model.std)
    images = torch.randn(1, 3, 50, 60)
    with torch.no_grad():
        one, other = loaded(images), model(images)
    for name in (*model.head.outputs, *other.extras):
        torch.testing.assert_close(one.get(name), other.get(name), rtol=0, atol=0)


@pytest.mark.parametrize("head", ["fusion", "metric_bins"])
def test_normalisation_is_the_encoders_unless_given(head: str, tmp_path: Path) -> None:
    save_encoder(
        build_encoder("test_resnet"), tmp_path / "encoder", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)
    )
    model = small(head, tmp_path / "encoder")
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = small(head, tmp_path / "encoder", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert (model.mean, model.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


# --- linear


def test_linear_probe_learns_one_convolution() -> None:
    model = small("linear").train()
    assert trainable(model) == 32 + 48 + 192 + 96 + 1  # channels at strides 4 to 32, and a bias
    assert not model.encoder.training
    model.freeze_encoder(False)  # what a run does after its frozen epochs
    assert model.encoder_frozen
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    depth = model(torch.randn(2, 3, 64, 64)).depth
    (depth * torch.rand_like(depth)).mean().backward()  # the mean of standardised features is zero
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert (model.head.project.weight != 0).any()  # not all: some channels behind a ReLU are constant


def test_linear_head_is_linear_in_standardised_features() -> None:
    model = small("linear").eval()
    nn.init.normal_(model.head.project.weight)
    one, other = (
        [torch.randn(1, level.channels, 64 // level.stride, 64 // level.stride) for level in model.levels]
        for _ in range(2)
    )
    size = (64, 64)
    model.head.depth_range = nn.Identity()
    mean = model.head([(a + b) / 2 for a, b in zip(one, other, strict=True)], size).depth
    torch.testing.assert_close(mean, (model.head(one, size).depth + model.head(other, size).depth) / 2)


def dinov3_depth(features: list[torch.Tensor], head: nn.Module, bins: int) -> torch.Tensor:
    """DINOv3's linear depth, restated position by position: LayerNorm, BatchNorm2d, 1x1 convolution, mean over bins."""
    *shallower, deepest = features
    channels = deepest.shape[1]
    deepest = nn.LayerNorm(channels, eps=1e-6).to(deepest)(deepest.flatten(2).mT).mT.reshape(deepest.shape)
    size = features[0].shape[-2:]
    maps = [nn.functional.interpolate(x, size=size, mode="bilinear") for x in (*shallower, deepest)]
    x = torch.cat(maps, 1)
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt()
    weight, bias = head.get_parameter("project.weight"), head.get_parameter("project.bias")
    logits = torch.einsum("bchw,kc->bkhw", x, weight[:, :, 0, 0]) + bias[:, None, None]
    share = torch.relu(logits) + 0.1
    share = share / share.sum(1, keepdim=True)
    return sum(share[:, k] * (1e-3 + (10 - 1e-3) * k / (bins - 1)) for k in range(bins))[:, None]  # type: ignore[return-value]


def test_linear_bins_computes_what_dinov3_computes() -> None:
    model = small("linear_bins", "test_convnext").double().train()
    nn.init.normal_(model.head.project.weight)
    assert trainable(model) == sum(level.channels for level in model.levels) * (2 + 8) + 8
    features = [
        torch.randn(2, level.channels, 64 // level.stride, 96 // level.stride, dtype=torch.float64)
        for level in model.levels
    ]
    depth = model.head(features, (64, 96)).depth
    torch.testing.assert_close(depth, dinov3_depth(features, model.head, 8), rtol=1e-6, atol=1e-6)
    assert depth.min() > 1e-3
    assert depth.max() < 10
    # All logits at or below zero: every bin counts alike, and depth is the middle of the range.
    nn.init.zeros_(model.head.project.weight)
    middle = model.head(features, (64, 96)).depth
    torch.testing.assert_close(middle, torch.full_like(middle, (1e-3 + 10) / 2))


# --- LR-ASPP


def test_lraspp_has_the_parameters_of_torchvision_and_22_more() -> None:
    oracle = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21)
    model = DepthModel(on_meta("mobilenetv3_large_100"), head="lraspp")
    assert trainable(model) == sum(p.numel() for p in oracle.parameters()) + 22
    assert round(trainable(model) / 1e6, 2) == 3.22
    assert [level.stride for level in model.levels] == [8, 32]


def test_lraspp_computes_what_torchvision_computes() -> None:
    oracle: Any = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    model = DepthModel(on_meta("mobilenetv3_large_100"), head="lraspp").eval()
    model.head.decoder.load_state_dict(oracle.classifier.state_dict())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features = oracle.backbone(images)
        combined = model.head.project(oracle(images)["out"])
        depth = model.head([features["low"], features["high"]], (64, 96)).depth
    torch.testing.assert_close(depth, model.depth_range(combined))


# --- fusion and metric bins, against transformers


def tiny_zoedepth() -> ZoeDepthForDepthEstimation:
    torch.manual_seed(0)
    backbone = Swinv2Config(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[8, 16, 32, 64],
        fusion_hidden_size=16,
        bottleneck_features=16,
        bin_embedding_dim=8,
        num_attractors=[4, 3, 2, 1],
        bin_configurations=[{"n_bins": 12, "min_depth": 0.001, "max_depth": 10.0}],
    )
    model = ZoeDepthForDepthEstimation(config).eval()
    with (
        torch.no_grad()
    ):  # transformers starts with weights so small that hardly anything depends on anything
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter)
    return model


NAMES = {
    "neck.convs.": "core.project.",
    "neck.fusion_stage.layers.": "core.fuse.",
    ".residual_layer1.": ".refine_skip.",
    ".residual_layer2.": ".refine.",
    ".convolution1.": ".first.",
    ".convolution2.": ".second.",
    ".projection.": ".project.",
    "relative_head.conv1.": "core.reduce.",
    "relative_head.conv2.": "core.feature.",
    "relative_head.conv3.": "core.relative.",
    "metric_head.conv2.": "bottleneck.",
    "metric_head.seed_bin_regressor.conv1.": "seed_bins.0.",
    "metric_head.seed_bin_regressor.conv2.": "seed_bins.2.",
    "metric_head.seed_projector.conv1.": "seed_embedding.0.",
    "metric_head.seed_projector.conv2.": "seed_embedding.2.",
    "metric_head.projectors.": "embeddings.",
    "metric_head.attractors.": "attractors.",
    "metric_head.conditional_log_binomial.": "distribution.",
}


def renamed(oracle: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of transformers' ZoeDepth under the names of the head; its backbone and its dead unit left out."""
    state = {}
    for key, value in oracle.state_dict().items():
        if key.startswith("backbone.") or key.startswith("neck.fusion_stage.layers.0.residual_layer1"):
            continue
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        kind = {"embeddings": "", "attractors": "points."}.get(key.split(".")[0])
        if kind is not None:
            key = key.replace(".conv1.", f".{kind}0.").replace(".conv2.", f".{kind}2.")
        state[key] = value
    return state


def head_like(oracle: ZoeDepthForDepthEstimation) -> MetricBins:
    config: Any = oracle.config
    levels = [PyramidLevel(i, c, 4 * 2**i) for i, c in enumerate(config.neck_hidden_sizes)]
    bins = config.bin_configurations[0]["n_bins"]
    head = MetricBins(
        levels,
        None,  # type: ignore[arg-type]
        width=config.fusion_hidden_size,
        bins=bins,
        embedding=config.bin_embedding_dim,
        attractors=config.num_attractors,
    )
    head.load_state_dict(renamed(oracle))
    return head.eval()


def test_a_whole_zoedepth_agrees_with_transformers() -> None:
    oracle = tiny_zoedepth()
    head = head_like(oracle)
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected: Any = oracle(images)
        features = list(oracle.backbone(images).feature_maps)
        output = head(features, (64, 96))
        fused, _ = oracle.neck(features, 1, 1)
        relative, _ = oracle.relative_head(fused)
    assert expected.predicted_depth.std() > 1e-3  # not a constant that anything would agree with
    assert relative.std() > 1e-3
    torch.testing.assert_close(output.disparity_affine[:, 0], relative, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.depth[:, 0], expected.predicted_depth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("number", [1, 16])
def test_attractors_agree_with_transformers(number: int) -> None:
    torch.manual_seed(1)
    theirs = zoedepth.ZoeDepthAttractorLayerUnnormed(ZoeDepthConfig(bin_embedding_dim=8), 6, number)
    ours = Attractor(8, number)
    ours.points[0].load_state_dict(theirs.conv1.state_dict())
    ours.points[2].load_state_dict(theirs.conv2.state_dict())
    x, above = torch.randn(2, 8, 6, 10), torch.randn(2, 8, 3, 5)
    centres = 5 * torch.rand(2, 6, 3, 5)
    expected, _ = theirs(x, centres, above)
    embedding = x + nn.functional.interpolate(above, (6, 10), mode="bilinear", align_corners=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(embedding, centres), expected, rtol=0, atol=1e-6)


def test_attractors_by_hand() -> None:
    attractor = Attractor(1, 2)
    nn.init.zeros_(attractor.points[2].weight)
    attractor.points[2].bias.data = (
        torch.tensor([2.0, 3.0]).expm1().log()
    )  # softplus gives points at 2 m and 3 m
    centres = torch.tensor([1.0, 2.9]).reshape(1, 2, 1, 1)
    moved = attractor(torch.zeros(1, 1, 1, 1), centres).flatten()

    def pull(distance: float) -> float:
        return distance / (1 + 300 * distance**2)

    expected = torch.tensor([1 + (pull(1) + pull(2)) / 2, 2.9 + (pull(-0.9) + pull(0.1)) / 2])
    torch.testing.assert_close(moved, expected)


def test_log_binomial_agrees_with_transformers() -> None:
    torch.manual_seed(2)
    theirs = zoedepth.ZoeDepthConditionalLogBinomialSoftmax(ZoeDepthConfig(), 5, 8, n_classes=64)
    ours = LogBinomial(5, 8, 64, 0.0212, 50.0)
    ours.load_state_dict(theirs.state_dict())
    main, condition = 3 * torch.randn(2, 5, 4, 6), 3 * torch.randn(2, 8, 4, 6)
    with torch.no_grad():
        weights = ours(main, condition)
        torch.testing.assert_close(weights, theirs(main, condition), rtol=0, atol=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 4, 6))


def test_zoedepth_with_swinv2_has_the_published_parameters() -> None:
    encoder = on_meta("swinv2_base_window12to24_192to384", strict_img_size=False)
    levels = [PyramidLevel(i, f["num_chs"], f["reduction"]) for i, f in enumerate(encoder.feature_info)]  # type: ignore[arg-type]
    head = MetricBins(levels, None)  # type: ignore[arg-type]
    total = sum(p.numel() for p in (*encoder.parameters(), *head.parameters()))
    # 102M published. The original carries a unit of the deepest fusion block that never runs, 1.18M of them.
    unused = 2 * (256 * 256 * 9 + 256)
    assert round((total + unused) / 1e6) == 102
    with torch.device("meta"):
        config = ZoeDepthConfig(
            backbone_config=Swinv2Config(
                embed_dim=128,
                depths=[1, 1, 1, 1],
                num_heads=[4, 8, 16, 32],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            neck_hidden_sizes=[128, 256, 512, 1024],
        )
        oracle = ZoeDepthForDepthEstimation(config)
    theirs = sum(p.numel() for name, p in oracle.named_parameters() if not name.startswith("backbone."))
    assert sum(p.numel() for p in head.parameters()) == theirs - unused
    core = sum(
        p.numel() for name, p in oracle.named_parameters() if name.startswith(("neck.", "relative_head."))
    )
    fusion = Fusion(levels, None)  # type: ignore[arg-type]
    assert sum(p.numel() for p in fusion.parameters()) == core - unused


def test_the_core_starts_alive() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        core = FusionCore([PyramidLevel(i, 8, 4 * 2**i) for i in range(4)], 16)
        relative = core([torch.randn(1, 8, 16 // 2**i, 16 // 2**i) for i in range(4)]).relative
        assert (relative > 0).float().mean() > 0.9


@pytest.mark.parametrize("head", ["metric_bins", "unetpp"])
def test_swin_takes_any_size(head: str, tmp_path: Path) -> None:
    encoder = build_encoder("swinv2_tiny_window8_256", strict_img_size=False, **TINY_SWIN)
    model = small(head, encoder).eval()
    folder = model.save(tmp_path / "model")
    assert (
        json.loads((folder / "config.json").read_text())["encoder"]["model_args"]["strict_img_size"] is False
    )
    images = torch.randn(1, 3, 40, 72)
    with torch.no_grad():
        depth = model(images).depth
        torch.testing.assert_close(load_depth_model(folder)(images).depth, depth, rtol=0, atol=0)
    assert depth.shape == (1, 1, 40, 72)


@pytest.mark.parametrize("head", ["fusion", "metric_bins", "lraspp", "fcrn"])
def test_an_encoder_that_does_not_fit_is_told_what_is_needed(head: str) -> None:
    class Shallow(nn.Module):
        feature_info = ({"num_chs": 4, "reduction": 2}, {"num_chs": 8, "reduction": 4})

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 8, 2, 2)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.a(x), self.b(self.a(x))]

    with pytest.raises(ValueError, match=rf"head '{head}' needs feature maps at strides .*has them at 2, 4"):
        DepthModel(Shallow(), head=head, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("head", "options", "message"),
    [
        ("fusion", {"width": 15}, "even"),
        ("metric_bins", {"bins": 1}, "at least 2"),
        ("metric_bins", {"attractors": (4, 2)}, "4 positive numbers"),
        ("metric_bins", {"max_temperature": 0.01}, "min_temperature < max_temperature"),
        ("lraspp", {"maps": 0}, "at least 1"),
        ("linear", {"width": 8}, "has no option 'width'"),
        ("lraspp", {"width": "wide"}, "cannot take the options .*'width': 'wide'"),
        ("fcrn", {"widths": (8, 8)}, "5 positive numbers"),
        ("fcrn", {"padding": "same"}, "bottom_right or top_left"),
        ("dorn", {"bins": 1}, "bins must be at least 2"),
        ("dorn", {"alpha": 0.0}, "0 < alpha < beta"),
        ("dorn", {"alpha": 5.0, "beta": 2.0}, "0 < alpha < beta"),
        ("dorn", {"xi": -1.0}, "xi must be 0 or more"),
        ("dorn", {"max_depth": 80.0}, "end at beta=10.591 m, and max_depth is 80 m: raise"),
    ],
)
def test_wrong_options_say_what_to_do(head: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(head, **options)
