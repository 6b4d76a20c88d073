"""The depth model: shapes at any size, depth range, parameter counts, freezing, saving, and every wrong argument."""

import json
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from finetune import DepthModel, load_depth_model
from finetune.heads.output import DepthRange
from finetune.model.depth_model import open_encoder
from spark.errors import UserError
from spark.model.encoder import build_encoder, pyramid
from spark.weights.encoder import save_encoder

TINY = (16, 16, 8, 8, 8)


def tiny(encoder: str | nn.Module = "test_resnet", **options) -> DepthModel:
    torch.manual_seed(0)
    return DepthModel(encoder, decoder_channels=TINY, **options)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("encoder", "smp_encoder", "millions"),
    [
        ("resnet18", "resnet18", 15.97),
        ("resnet34", "resnet34", 26.08),
        ("resnet50", "resnet50", 48.99),
        ("resnext50_32x4d", "resnext50_32x4d", 48.46),
        ("convnext_tiny", "tu-convnext_tiny", 34.34),
    ],
)
def test_parameters_are_those_of_smp(encoder: str, smp_encoder: str, millions: float) -> None:
    with torch.device("meta"):
        stock = build_encoder(encoder)
        oracle = smp.UnetPlusPlus(smp_encoder, encoder_weights=None, classes=1)
    stock.to_empty(device="cpu")
    model = DepthModel(stock)
    assert round(trainable(model) / 1e6, 2) == millions
    assert trainable(model) == sum(p.numel() for p in oracle.parameters())


def test_decoder_computes_what_smp_computes() -> None:
    oracle: Any = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1, decoder_channels=TINY).eval()
    model = tiny("resnet18").eval()
    model.head.decoder.load_state_dict(oracle.decoder.state_dict())
    model.head.project.load_state_dict(oracle.segmentation_head[0].state_dict())
    model.encoder.load_state_dict(
        {k: v for k, v in oracle.encoder.state_dict().items() if not k.startswith("fc.")}
    )
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images).depth, model.depth_range(oracle(images)))


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext", "mobilenetv3_small_050"])
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 70)])
def test_any_size_in_metres(encoder: str, size: tuple[int, int]) -> None:
    model = tiny(encoder).eval()
    with torch.no_grad():
        depth = model(torch.randn(2, 3, *size)).depth
    assert depth.shape == (2, 1, *size)
    assert depth.dtype == torch.float32
    assert ((depth > 1e-3) & (depth < 10)).all()


def test_no_zero_channel_features() -> None:
    model = tiny("test_convnext")
    assert [level.stride for level in model.levels] == [4, 8, 16, 32]
    assert all(p.numel() > 0 for p in model.parameters())


def test_padding_does_not_touch_a_fitting_size() -> None:
    model = tiny().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = pyramid(model.encoder, images, model.levels)
        torch.testing.assert_close(
            model(images).depth,
            model.head(features, (images.shape[-2], images.shape[-1])).depth,
            rtol=0,
            atol=0,
        )


def test_untrained_depth_is_near_the_prior() -> None:
    for prior in (2.7, 7.0):
        model = tiny(initial_depth=prior).train()
        with torch.no_grad():
            depth = model(torch.randn(4, 3, 64, 64)).depth
        assert depth.median().item() == pytest.approx(prior, rel=0.15)


def test_depth_range_by_hand() -> None:
    depth_range = DepthRange(1.0, 9.0, 3.0)
    x = torch.tensor([-100.0, 0.0, depth_range.initial_logit, 100.0])
    torch.testing.assert_close(depth_range(x), torch.tensor([1.0, 5.0, 3.0, 9.0]))


def test_depth_is_fp32_inside_autocast() -> None:
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(torch.randn(2, 3, 64, 64)).depth.dtype == torch.float32


def test_every_trained_parameter_gets_a_gradient() -> None:
    for encoder in ("test_resnet", "test_convnext"):
        model = tiny(encoder).train()
        model(torch.randn(2, 3, 64, 64)).depth.mean().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_frozen_encoder_neither_learns_nor_moves_its_statistics() -> None:
    model = tiny().train()
    model.freeze_encoder()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    head = model.head.project.weight.detach().clone()
    model(torch.randn(2, 3, 64, 64)).depth.mean().backward()
    optimizer.step()
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(model.head.project.weight, head)
    assert model.train().head.training
    assert not model.encoder.training
    model.freeze_encoder(False)
    assert model.encoder.training
    model(torch.randn(2, 3, 64, 64)).depth.mean().backward()
    assert next(model.encoder.parameters()).grad is not None


@pytest.mark.parametrize("encoder", ["test_resnet", "test_convnext"])
def test_save_and_load(tmp_path: Path, encoder: str) -> None:
    options = {
        "max_depth": 8.0,
        "min_depth": 0.1,
        "initial_depth": 2.0,
        "image_size": (72, 96),
        "mean": (0.4, 0.5, 0.6),
    }
    model = tiny(encoder, **options).eval()
    folder = model.save(tmp_path / "run" / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    loaded = load_depth_model(folder)
    assert not loaded.training
    assert (loaded.image_size, loaded.mean, loaded.std) == ((72, 96), (0.4, 0.5, 0.6), model.std)
    assert (loaded.depth_range.min_depth, loaded.depth_range.max_depth) == (0.1, 8.0)
    images = torch.randn(1, 3, 50, 60)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).depth, model(images).depth, rtol=0, atol=0)
    model.save(folder)  # a second save replaces the first
    load_depth_model(folder).save(tmp_path / "again")


def test_encoder_from_an_exported_folder(tmp_path: Path) -> None:
    torch.manual_seed(3)
    encoder = build_encoder("test_resnet")
    save_encoder(encoder, tmp_path / "encoder", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    model = DepthModel(tmp_path / "encoder", head="unetpp", max_depth=10.0, decoder_channels=TINY)
    assert (model.mean, model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name])


def test_encoder_that_is_already_made_is_used() -> None:
    encoder = build_encoder("test_resnet")
    assert tiny(encoder).encoder is encoder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "resnet5O"}, "resnet50"),
        ({"encoder": "vit_tiny_patch16_224"}, "pyramid"),
        ({"encoder": nn.Linear(1, 1)}, "pyramid"),
        ({"encoder": "no/such/folder"}, "no encoder at"),
        ({"head": "unetp"}, "did you mean 'unetpp'"),
        ({"decoder_chanels": TINY}, "did you mean 'decoder_channels'"),
        ({"decoder_channels": (16, 8)}, "5 positive numbers"),
        ({"min_depth": 3.0}, "min_depth < initial_depth"),
        ({"max_depth": 2.0}, "initial_depth < max_depth"),
        ({"mean": (0.5,)}, "three numbers"),
        (
            {"encoder_options": {"drop_path_rate": 0.1}},
            "encoder_options cannot set drop_path_rate: set drop_path",
        ),
        ({"encoder_options": {"in_chans": 1}}, "cannot set in_chans: images are of three colours"),
        (
            {"encoder_options": {"zero_init": False}},
            "does not accept these options: .*zero_init.*'{}' gives none",
        ),
        ({"encoder_options": {"act_layer": "gelux"}}, "does not accept these options: .*gelux"),
        ({"encoder_options": {"checkpoint_path": "a.pth"}}, "cannot set checkpoint_path: set encoder"),
        ({"encoder_options": {"pretrained_strict": False}}, "weights are loaded whole or not at all"),
    ],
)
def test_wrong_arguments_say_what_to_do(options: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DepthModel(**{"encoder": "test_resnet", "decoder_channels": TINY, **options})


def test_made_encoder_refuses_what_shapes_a_named_one() -> None:
    with pytest.raises(ValueError, match="already made"):
        DepthModel(build_encoder("test_resnet"), pretrained=True)
    with pytest.raises(ValueError, match="already made"):
        DepthModel(build_encoder("test_resnet"), encoder_options={"zero_init_last": False})


def test_options_of_the_encoder_reach_timm_and_come_back_from_a_file(tmp_path: Path) -> None:
    encoder: Any = DepthModel("resnet18", encoder_options={"zero_init_last": False}).encoder
    assert torch.equal(encoder.layer1[0].bn2.weight, torch.ones(64))
    assert torch.equal(build_encoder("resnet18").layer1[0].bn2.weight, torch.zeros(64))  # type: ignore[union-attr]

    model = tiny(encoder_options={"replace_stem_pool": True}).eval()
    assert model.state_dict().keys() != tiny().state_dict().keys()
    again = load_depth_model(model.save(tmp_path / "model"))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images).depth, model(images).depth)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64), (1, 3, 0, 64)])
def test_wrong_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        tiny()(torch.zeros(shape))


def test_loading_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_depth_model(tmp_path / "nothing")
    folder = tiny().save(tmp_path / "model")
    with pytest.raises(ValueError, match="did you mean"):
        load_depth_model(tmp_path)

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="copy the folder again"):
        load_depth_model(folder)
    (folder / "model.safetensors").write_bytes(weights)

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "head_options": {"decoder_channels": [16, 16, 8, 8, 4]}})
    )
    with pytest.raises(ValueError, match="does not hold the weights"):
        load_depth_model(folder)
    (folder / "config.json").write_text(json.dumps({"head": "unetpp"}))
    with pytest.raises(ValueError, match="does not describe a depth model"):
        load_depth_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="does not describe a depth model"):
        load_depth_model(folder)


def test_an_exported_encoder_is_no_depth_model(tmp_path: Path) -> None:
    folder = save_encoder(build_encoder("test_resnet"), tmp_path / "encoder")
    with pytest.raises(ValueError, match=r"is an exported encoder.*spark-depth --encoder") as error:
        load_depth_model(folder)
    assert "copy the folder again" not in str(error.value)


def test_saving_never_replaces_something_else(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        tiny().save(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.tex").read_text() == "years of work"


def test_a_grey_encoder_learns_on_colours(tmp_path: Path) -> None:
    save_encoder(build_encoder("test_resnet", in_chans=1), tmp_path / "encoder", mean=(0.459,), std=(0.2,))
    model = DepthModel(tmp_path / "encoder", decoder_channels=TINY)
    assert (model.mean, model.std) == ((0.459,) * 3, (0.2,) * 3)
    assert model(torch.rand(2, 3, 32, 64)).depth.shape == (2, 1, 32, 64)
    with pytest.raises(ValueError, match="three numbers"):
        DepthModel(tmp_path / "encoder", decoder_channels=TINY, mean=(0.5,))


def test_an_encoder_of_one_channel_that_becomes_three_is_said(tmp_path: Path) -> None:
    grey = timm.create_model("test_resnet", in_chans=1, num_classes=0)
    save_encoder(grey, tmp_path / "grey", mean=(0.4,), std=(0.2,))
    _, report = open_encoder(tmp_path / "grey", None, False, 0.0, {})
    assert "(of 1 channel, made to read 3)" in str(report)


def test_a_folder_is_no_photo(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder, and this takes one photo; spark-predict --input"):
        tiny(image_size=(64, 64)).predict(tmp_path)
