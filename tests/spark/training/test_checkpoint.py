"""Run checkpoints, exported encoders, and the files of SparK's official code, rebuilt here from their description."""

import errno
import hashlib
import json
import logging
import os
import resource
import runpy
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from spark.errors import FileError
from spark.files import whole_folder, write_whole
from spark.model.encoder import build_encoder, pyramid, timm_config
from spark.model.spark import SparK
from spark.training.checkpoint import find_run, load_run, save_run, step_of
from spark.training.optim import build_optimizer, parameter_groups
from spark.weights.encoder import load_encoder, read_encoder, save_encoder
from spark.weights.official import Weights, encoder_name, load_official, read_torch_file

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


# ---------------------------------------------------------------------------------------------------------------
# Files of the official code, from its parameter names and shapes


def batch_norm(name, channels):
    return {
        f"{name}.weight": torch.rand(channels) + 0.5,
        f"{name}.bias": torch.randn(channels),
        f"{name}.running_mean": torch.randn(channels),
        f"{name}.running_var": torch.rand(channels) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def affine(name, *shape):
    return {f"{name}.weight": torch.randn(*shape) * 0.1, f"{name}.bias": torch.randn(shape[0]) * 0.1}


def original_convnext(dims, depths, in_chans=3):
    """State dict of the original ConvNeXt code, without classifier."""
    state = affine("downsample_layers.0.0", dims[0], in_chans, 4, 4)
    state |= affine("downsample_layers.0.1", dims[0])
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if i:
            state |= affine(f"downsample_layers.{i}.0", dims[i - 1])
            state |= affine(f"downsample_layers.{i}.1", dim, dims[i - 1], 2, 2)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            state[f"{block}.gamma"] = torch.randn(dim) * 0.3
            state |= affine(f"{block}.dwconv", dim, 1, 7, 7)
            state |= affine(f"{block}.norm", dim)
            state |= affine(f"{block}.pwconv1", 4 * dim, dim)
            state |= affine(f"{block}.pwconv2", dim, 4 * dim)
    return state


def original_convnext_features(state, x, depths):
    """Forward of the original code: the feature map of each stage."""

    def norm(x, name):
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], *weights(name), eps=1e-6)
        return x.permute(0, 3, 1, 2)

    def weights(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    features = []
    for i, depth in enumerate(depths):
        if i == 0:
            x = norm(F.conv2d(x, *weights("downsample_layers.0.0"), stride=4), "downsample_layers.0.1")
        else:
            x = F.conv2d(norm(x, f"downsample_layers.{i}.0"), *weights(f"downsample_layers.{i}.1"), stride=2)
        for j in range(depth):
            block = f"stages.{i}.{j}"
            y = norm(F.conv2d(x, *weights(f"{block}.dwconv"), padding=3, groups=x.shape[1]), f"{block}.norm")
            y = F.gelu(F.linear(y.permute(0, 2, 3, 1), *weights(f"{block}.pwconv1")))
            y = F.linear(y, *weights(f"{block}.pwconv2")) * state[f"{block}.gamma"]
            x = x + y.permute(0, 3, 1, 2)
        features.append(x)
    return features


def plain_resnet(depths, bottleneck=False, in_chans=3, width=64):
    """State dict of a ResNet, under torchvision's and timm's names, without classifier."""
    expansion = 4 if bottleneck else 1
    state = {"conv1.weight": torch.randn(width, in_chans, 7, 7) * 0.1} | batch_norm("bn1", width)
    inputs = width
    for i, depth in enumerate(depths):
        inner = width * 2**i
        for j in range(depth):
            block = f"layer{i + 1}.{j}"
            convs = [(inner, inputs, 1), (inner, inner, 3), (4 * inner, inner, 1)]
            if not bottleneck:
                convs = [(inner, inputs, 3), (inner, inner, 3)]
            for k, (cout, cin, kernel) in enumerate(convs, start=1):
                state[f"{block}.conv{k}.weight"] = torch.randn(cout, cin, kernel, kernel) * 0.1
                state |= batch_norm(f"{block}.bn{k}", cout)
            if j == 0 and inputs != inner * expansion:
                state[f"{block}.downsample.0.weight"] = torch.randn(inner * expansion, inputs, 1, 1) * 0.1
                state |= batch_norm(f"{block}.downsample.1", inner * expansion)
            inputs = inner * expansion
    return state


def spark_style(encoder, channels, width, norm, input_size=224):
    """State dict of the official SparK around an encoder with these stage channels (shallow first)."""
    state = {f"sparse_encoder.sp_cnn.{key}": value for key, value in encoder.items()}
    for i, c in enumerate(reversed(channels)):
        state[f"mask_tokens.{i}"] = torch.randn(1, c, 1, 1)
        state |= batch_norm(f"densify_norms.{i}", c) if norm == "bn" else affine(f"densify_norms.{i}", c)
        if i or c != width:
            kernel = 3 if i else 1
            state |= affine(f"densify_projs.{i}", width // 2**i, c, kernel, kernel)
    for i in range(5):
        cin, cout, block = width // 2**i, width // 2 ** (i + 1), f"dense_decoder.dec.{i}"
        state |= affine(f"{block}.up_sample", cin, cin, 4, 4)
        state[f"{block}.conv.0.weight"] = torch.randn(cin, cin, 3, 3) * 0.1
        state |= batch_norm(f"{block}.conv.1", cin)
        state[f"{block}.conv.3.weight"] = torch.randn(cout, cin, 3, 3) * 0.1
        state |= batch_norm(f"{block}.conv.4", cout)
    state |= affine("dense_decoder.proj", 3, width // 32, 1, 1)
    state["imn_m"] = torch.empty(1, 3, 1, 1)
    state["imn_s"] = torch.empty(1, 3, 1, 1)
    state["norm_black"] = torch.zeros(1, 3, input_size, input_size)
    state["config"] = {
        "mask_ratio": 0.75,
        "densify_norm_str": norm,
        "sbn": True,
        "hierarchy": len(channels),
        "sparse_encoder.input_size": input_size,
        "dense_decoder.width": width,
    }
    return state


def training_file(state, arch, input_size=224):
    return {
        "args": "{'model': ...}",
        "input_size": input_size,
        "arch": arch,
        "epoch": 1599,
        "performance_desc": "0.3 0.3",
        "module": state,
        "optimizer": {"state": {}, "param_groups": []},
        "is_pretrain": True,
    }


ATTO: dict[str, Any] = {"dims": (40, 80, 160, 320), "depths": (2, 2, 6, 2)}
NET18: dict[str, Any] = {"depths": (2, 2, 2, 2)}


def same(a, b):
    """State dicts with equal names and values, but for axes of length 1."""
    return a.keys() == b.keys() and all(torch.equal(a[key].flatten(), b[key].flatten()) for key in a)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def written(tmp_path):
    def write(content):
        torch.save(content, tmp_path / "weights.pth")
        return tmp_path / "weights.pth"

    return write


# ---------------------------------------------------------------------------------------------------------------
# Official encoders


@pytest.mark.parametrize("kind", ["training", "spark_style", "raw", "wrapped", "fine-tuned", "ddp"])
def test_official_convnext(written, kind):
    state = original_convnext(**ATTO)
    full = spark_style(state, ATTO["dims"], width=320, norm="ln")
    classifier = {"norm.weight": torch.rand(320), "norm.bias": torch.rand(320)} | affine("head", 1000, 320)
    content = {
        "training": training_file(full, "convnext_atto"),
        "spark_style": full,
        "raw": state,
        "wrapped": {"arch": "convnext_atto", "module": state, "is_pretrain": True},
        "fine-tuned": {
            "module": original_convnext(**ATTO) | classifier,
            "ema": state | classifier,
            "epoch": 9,
        },
        "ddp": {"module": {f"module.{key}": value for key, value in state.items()}, "arch": "convnext_atto"},
    }[kind]
    encoder, report = read_encoder(written(content), model_name="convnext_atto")
    images = torch.randn(2, 3, 64, 96)
    for ours, theirs in zip(
        pyramid(encoder.eval(), images),
        original_convnext_features(state, images, ATTO["depths"]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert len(report.loaded) == len(state) + 2 * (kind == "fine-tuned")
    assert report.unexpected == report.mismatched == []
    if kind == "fine-tuned":
        assert torch.equal(encoder.get_parameter("head.norm.weight"), classifier["norm.weight"])
        assert report.ignored == [("head.fc.weight", "classifier"), ("head.fc.bias", "classifier")]
        assert "[ema]" in report.source
    else:
        assert report.missing == ["head.norm.weight", "head.norm.bias"]
        assert torch.equal(encoder.get_parameter("head.norm.weight"), torch.ones(320))
    if kind in ("training", "spark_style"):
        assert {("config", "not a tensor"), ("imn_m", "unused buffer")} <= set(report.ignored)
        assert len(report.ignored) == len(full) - len(state)
    assert timm_config(encoder)["mean"] == IMAGENET[0]


def test_official_resnet_lands_under_the_same_names(written):
    state = plain_resnet(**NET18)
    encoder, report = read_encoder(written(training_file(state | affine("fc", 10, 512), "resnet18", 384)))
    assert same(encoder.state_dict(), state)
    assert report.missing == []
    assert timm_config(encoder)["input_size"] == (3, 384, 384)


def test_missing_keys_are_logged(written, caplog):
    load_encoder(written(original_convnext(**ATTO)), model_name="convnext_atto")
    assert "missing, left at their initial values (2): head.norm.weight, head.norm.bias" in caplog.text


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("resnet50", {"depths": (3, 4, 6, 3), "bottleneck": True}),
        ("resnet101", {"depths": (3, 4, 23, 3), "bottleneck": True}),
        ("convnext_tiny", {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3)}),
        ("convnext_small", {"dims": (96, 192, 384, 768), "depths": (3, 3, 27, 3)}),
        ("convnext_base", {"dims": (128, 256, 512, 1024), "depths": (3, 3, 27, 3), "in_chans": 1}),
    ],
)
def test_the_official_models_are_known_by_their_shapes(name, state):
    with torch.device("meta"):
        tensors = original_convnext(**state) if "dims" in state else plain_resnet(**state)
    assert encoder_name(Weights("file", tensors, {}, [], None, None, {})) == name


def test_an_encoder_nobody_names_is_asked_for(written):
    path = written(plain_resnet(**NET18))
    with pytest.raises(ValueError, match=r"does not say which encoder.*--model_name"):
        load_encoder(path)
    assert same(load_encoder(path, model_name="resnet18").state_dict(), torch.load(path))
    with pytest.raises(ValueError, match="no model named 'resnet118'"):
        load_encoder(path, model_name="resnet118")
    with pytest.raises(ValueError, match=r"'your_convnet', which timm does not have.*--model_name"):
        load_encoder(written(training_file(plain_resnet(**NET18), "your_convnet")))


@pytest.mark.parametrize(
    ("state", "name", "first"),
    [
        # too shallow: every tensor of the model is in the file, and more besides
        (plain_resnet((2, 2, 3, 2)), "resnet18", "layer3.2.conv1.weight"),
        (plain_resnet((2, 2, 2, 1)), "resnet18", "layer4.1.conv1.weight"),
        (
            plain_resnet(**NET18, width=32),
            "resnet18",
            r"conv1.weight: \[32, 3, 7, 7\] in the file, \[64, 3, 7, 7\]",
        ),
        (original_convnext((40, 80, 160, 320), (2, 2, 7, 2)), "convnext_atto", "stages.2.blocks.6.gamma"),
        (original_convnext(**ATTO), "resnet18", "missing"),
    ],
)
def test_another_architecture_is_refused(written, state, name, first):
    with pytest.raises(ValueError, match=first) as error:
        load_encoder(written(state), model_name=name)
    assert f"does not fit {name}" in str(error.value)
    assert "--model_name" in str(error.value)


@pytest.mark.parametrize("features_only", [False, True])
def test_official_encoder_with_other_channels(written, features_only):
    state = plain_resnet(**NET18)
    path = written({"arch": "resnet18", "module": state})
    encoder = load_encoder(path, in_chans=1, features_only=features_only)
    torch.testing.assert_close(
        encoder.state_dict()["conv1.weight"], state["conv1.weight"].sum(1, keepdim=True)
    )
    assert same({**encoder.state_dict(), "conv1.weight": state["conv1.weight"]}, state)
    assert "state_dict" not in timm_config(encoder)


def test_features_only_of_an_official_convnext(written):
    state = original_convnext(**ATTO)
    backbone = load_encoder(written({"arch": "convnext_atto", "module": state}), features_only=True).eval()
    images = torch.randn(1, 3, 32, 64)
    for ours, theirs in zip(
        backbone(images), original_convnext_features(state, images, ATTO["depths"]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# Files that must not be trusted


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_malicious_file_is_refused(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written({"arch": "resnet18", "module": {"conv1.weight": torch.zeros(1)}, "epoch": Malicious()})
    for load in (load_encoder, load_official):
        with pytest.raises(
            ValueError, match=r"was refused: it holds the Python object \w+\.system.*can run any code"
        ):
            load(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short or damaged"),
        (b"<html>404</html>", "not a checkpoint that torch.save wrote"),
        (b"hello", "not a checkpoint that torch.save wrote"),
        (b"]a.", "not a checkpoint that torch.save wrote"),
        (b"\x80\x02}q\x00(X", "not a checkpoint that torch.save wrote"),
        (None, "cut short or damaged"),
    ],
)
def test_damaged_files(written, content, message):
    path = written({"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    for load in (load_encoder, load_official):
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dict"),
        ({"epoch": 3, "note": "x"}, "holds no tensors; its entries are: epoch, note"),
    ],
)
def test_files_without_weights(written, content, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(written(content))


def test_paths_that_are_not_there(tmp_path):
    for source in (tmp_path / "no.pth", "no.pth", "no/folder"):
        with pytest.raises(FileError, match="exported folder, a checkpoint file or a timm model name"):
            load_encoder(source)
    with pytest.raises(ValueError, match=r"is not an exported encoder \(it has no config.json\)"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match=r"is a folder, not a checkpoint file: .*load_encoder"):
        load_official(tmp_path)


@pytest.mark.parametrize("features_only", [False, True])
def test_names_that_timm_does_not_have(written, features_only):
    with pytest.raises(ValueError, match=r"no model named 'resnet118'; nearest: .*resnet18"):
        load_encoder("resnet118", features_only=features_only)
    tags = r"no weights named 'resnet18\.foo': use resnet18 or one of resnet18\.a1_in1k, "
    with pytest.raises(ValueError, match=tags):
        load_encoder("resnet18.foo", features_only=features_only)
    with pytest.raises(ValueError, match=tags):
        load_encoder(written(plain_resnet(**NET18)), model_name="resnet18.foo", features_only=features_only)


@pytest.mark.parametrize("features_only", [False, True])
def test_weights_that_cannot_be_downloaded(monkeypatch, features_only):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("The file is not in the cache. Check your connection.")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(
        OSError,
        match=r"^timm's weights of resnet18 could not be downloaded \(The file .* connection\): connect to the network",
    ):
        load_encoder("resnet18", pretrained=True, features_only=features_only)


# ---------------------------------------------------------------------------------------------------------------
# Official SparK


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("layout", ["packed", "masked"])
def test_load_official_convnext_at_another_size(written, wrapped, layout):
    state = spark_style(original_convnext(**ATTO), ATTO["dims"], width=320, norm="ln")
    content = training_file(state, "convnext_atto") if wrapped else state
    name = None if wrapped else "convnext_atto"
    model = load_official(written(content), layout=layout, model_name=name, input_size=(64, 96))
    assert (model.input_size, model.grid, model.mask_ratio, model.layout) == ((64, 96), (2, 3), 0.75, layout)
    ours = model.state_dict()
    assert isinstance(model.densify[0].projection, nn.Identity)  # 320 channels meet a decoder of width 320
    for theirs, name in {
        "mask_tokens.3": "densify.3.token",
        "densify_norms.1.weight": "densify.1.norm.weight",
        "densify_projs.2.bias": "densify.2.projection.bias",
        "dense_decoder.dec.4.up_sample.weight": "decoder.blocks.4.upsample.weight",
        "dense_decoder.dec.1.conv.0.weight": "decoder.blocks.1.conv1.weight",
        "dense_decoder.dec.1.conv.1.running_var": "decoder.blocks.1.norm1.running_var",
        "dense_decoder.dec.1.conv.3.weight": "decoder.blocks.1.conv2.weight",
        "dense_decoder.dec.1.conv.4.bias": "decoder.blocks.1.norm2.bias",
        "dense_decoder.proj.weight": "decoder.head.weight",
        "sparse_encoder.sp_cnn.stages.2.5.dwconv.weight": "encoder.stages.2.blocks.5.conv_dw.weight",
        "sparse_encoder.sp_cnn.downsample_layers.3.1.bias": "encoder.stages.3.downsample.1.bias",
    }.items():
        assert torch.equal(ours[name], state[theirs]), name
    assert torch.isfinite(model(torch.randn(2, 3, 64, 96)).loss)


def test_load_official_resnet(written, caplog):
    caplog.set_level(logging.INFO)
    state = spark_style(plain_resnet(**NET18), (64, 128, 256, 512), width=32, norm="bn", input_size=192)
    model = load_official(written(training_file(state, "resnet18")))
    assert (model.input_size, model.layout) == ((224, 224), "packed")
    assert len(model.state_dict()) == len(state) - 4  # imn_m, imn_s, norm_black, config
    assert torch.equal(
        model.state_dict()["densify.0.norm.running_mean"], state["densify_norms.0.running_mean"]
    )
    assert torch.equal(
        model.state_dict()["encoder.layer4.1.bn2.bias"], state["sparse_encoder.sp_cnn.layer4.1.bn2.bias"]
    )
    assert f"{len(state) - 4} tensors loaded" in caplog.text
    assert "norm_black" in caplog.text


def test_load_official_without_a_decoder(written):
    state = plain_resnet(**NET18)
    path = written({"arch": "resnet18", "module": state})
    with pytest.raises(ValueError, match=r"no SparK model with a decoder.*SparK\(load_encoder"):
        load_official(path)
    model = SparK(load_encoder(path), input_size=64, decoder_width=32)  # what the sentence says to do
    assert same(model.encoder.state_dict(), state)
    with pytest.raises(ValueError, match=r"only a: if these are the weights of an encoder"):
        load_official(written({"a": torch.zeros(1)}))


def test_official_files_are_rebuilt_here_with_all_their_entries():
    """426 and 434 entries: counted in files that the official code wrote."""
    with torch.device("meta"):
        resnet50 = plain_resnet((3, 4, 6, 3), bottleneck=True)
        small = original_convnext((96, 192, 384, 768), (3, 3, 27, 3))
        assert len(spark_style(resnet50, (256, 512, 1024, 2048), 768, "bn")) == 426
        assert len(spark_style(small, (96, 192, 384, 768), 768, "ln")) == 434


def test_load_official_with_something_missing(written):
    state = spark_style(plain_resnet(**NET18), (64, 128, 256, 512), width=32, norm="bn")
    del state["mask_tokens.2"]
    state["teacher.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"1 tensors are missing.*densify\.2\.token.*teacher\.weight"):
        load_official(written(training_file(state, "resnet18")))


# ---------------------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_weights_have_the_permissions_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_encoder(build_encoder("test_resnet"), tmp_path / "encoder")
    finally:
        os.umask(before)
    for path in (tmp_path / "encoder").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "efficientnet_lite0"])
def test_export_is_read_by_timm_alone(tmp_path, name):
    encoder: Any = build_encoder(name, drop_path=0.1).eval()
    for buffer in (b for b in encoder.buffers() if b.is_floating_point()):
        nn.init.uniform_(buffer, 0.5, 1.5)
    encoder = encoder.to(memory_format=torch.channels_last)  # safetensors refuses such tensors as they are
    folder = save_encoder(encoder, tmp_path / "encoder", *IMAGENET, input_size=(96, 128))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

    source, images = f"local-dir:{folder}", torch.randn(2, 3, 64, 96)
    again = timm.create_model(source, pretrained=True).eval()
    assert same(again.state_dict(), encoder.state_dict())
    torch.testing.assert_close(again(images), encoder(images))
    assert (timm_config(again)["mean"], timm_config(again)["std"]) == tuple(map(list, IMAGENET))
    assert tuple(timm_config(again)["input_size"]) == (3, 96, 128)

    features = timm.create_model(source, pretrained=True, features_only=True).eval()(images)
    for ours, theirs in zip(
        features, encoder.forward_intermediates(images, intermediates_only=True), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    assert timm.create_model(source, pretrained=True, num_classes=10)(images).shape == (2, 10)
    assert timm.create_model(source, pretrained=True, in_chans=1)(images[:, :1]).shape == again(images).shape


def test_load_encoder_of_an_export(tmp_path):
    encoder = build_encoder("test_resnet", drop_path=0.1)
    before = torch.get_rng_state()
    folder = save_encoder(encoder, tmp_path / "encoder", *IMAGENET, input_size=64)
    assert torch.equal(torch.get_rng_state(), before)  # an export in mid-training changes nothing
    again, report = read_encoder(folder, drop_path_rate=0.2)
    assert same(again.state_dict(), encoder.state_dict())
    assert (timm_config(again)["mean"], timm_config(again)["input_size"]) == (IMAGENET[0], (3, 64, 64))
    assert report.missing == report.ignored == []
    assert same(load_encoder(f"local-dir:{folder}").state_dict(), encoder.state_dict())
    assert (
        len(load_encoder(str(folder), features_only=True, out_indices=(1, 2))(torch.zeros(1, 3, 64, 64))) == 2
    )
    with pytest.raises(ValueError, match=r"did you mean .*encoder\?"):
        load_encoder(tmp_path)
    with pytest.raises(ValueError, match="no classifier"):
        load_encoder(folder, num_classes=3)
    with pytest.raises(ValueError, match="does not accept these options"):
        load_encoder(folder, colour="red")


def test_architecture_options_survive_the_export(tmp_path):
    encoder = build_encoder("test_resnet", in_chans=4, stem_type="", avg_down=False)
    folder = save_encoder(encoder, tmp_path / "e", mean=(0.5,) * 4, std=(0.2,) * 4)
    for again in (timm.create_model(f"local-dir:{folder}", pretrained=True), load_encoder(folder)):
        assert same(again.state_dict(), encoder.state_dict())
    rgb = load_encoder(folder, in_chans=3)
    assert rgb.state_dict()["conv1.weight"].shape[1] == 3


def test_a_timm_name_is_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (
        tmp_path / "test_resnet"
    ).mkdir()  # a folder of that name without an encoder in it does not hide the model
    assert load_encoder("test_resnet", in_chans=2).state_dict()["conv1.0.weight"].shape[1] == 2
    assert len(load_encoder("test_resnet", features_only=True)(torch.zeros(1, 3, 64, 64))) == 5


def test_what_cannot_be_exported(tmp_path):
    with pytest.raises(ValueError, match="not a timm model"):
        save_encoder(nn.Conv2d(3, 3, 3), tmp_path / "e")
    with pytest.raises(ValueError, match="mean has 3 values and the encoder reads 1 channels"):
        save_encoder(build_encoder("test_resnet", in_chans=1), tmp_path / "e")
    with pytest.raises(ValueError, match=r"not timm's test_convnext as it comes.*features_only wrapper"):
        save_encoder(load_encoder("test_convnext", features_only=True), tmp_path / "e")
    with pytest.raises(ValueError, match=r"act_layer=.*a config\.json cannot hold"):
        save_encoder(build_encoder("test_resnet", act_layer=nn.SiLU), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_an_export_replaces_an_export_and_nothing_else(tmp_path):
    encoder = build_encoder("test_resnet")
    folder = save_encoder(encoder, tmp_path / "encoder")
    with torch.no_grad():
        encoder.get_parameter("bn1.bias").fill_(3)
    save_encoder(encoder, folder)
    assert same(load_encoder(folder).state_dict(), encoder.state_dict())
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"will not be replaced.*thesis\.tex"):
        save_encoder(encoder, folder)
    assert (folder / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "no architecture in it"),
        (lambda folder: (folder / "config.json").write_text("not json"), "does not describe a timm model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "missing, cut short or damaged"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "missing, cut short or damaged"),
        (
            lambda folder: (folder / "config.json").write_text('{"architecture": "resnet18"}'),
            "does not fit resnet18",
        ),
    ],
)
def test_damaged_exports(tmp_path, break_it, message):
    folder = save_encoder(build_encoder("test_resnet"), tmp_path / "encoder")
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        load_encoder(folder)


# ---------------------------------------------------------------------------------------------------------------
# Runs


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 1))
        self.body.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.body(x).square().mean()


def training(name="lamb", width=4, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Net(width)
    return model, build_optimizer(name, parameter_groups(model, 0.1), lr=0.01, **kwargs)


def train(model, optimizer, steps):
    """Train on batches that depend on the step alone; returns the losses."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        loss = model(torch.randn(2, 3, 8, 8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["lamb", "adamw", "sgd"])
def test_resuming_is_exact(tmp_path, name):
    model, optimizer = training(name)
    train(model, optimizer, range(3))
    extra = {
        "images": 12,
        "best": 0.5,
        "log": [1, {"a": None}],
        "t": torch.arange(3),
        "config": {"lr": (1, 2)},
    }
    path = save_run(tmp_path, 3, model=model, optimizer=optimizer, extra=extra)
    assert path == tmp_path / "checkpoints" / "step_0000003"
    assert sorted(file.name for file in path.iterdir()) == ["SHA256SUMS", "model.safetensors", "state.pt"]
    expected = train(model, optimizer, range(3, 8))

    again = training(name, seed=1)
    assert find_run(tmp_path, True) == path
    state = load_run(path, model=again[0], optimizer=again[1])
    assert torch.equal(state.pop("t"), torch.arange(3))
    assert state == {"step": 3} | {key: extra[key] for key in ("images", "best", "log", "config")}
    assert train(*again, range(3, 8)) == expected
    assert same(again[0].state_dict(), model.state_dict())


def test_spark_resumes_and_is_read_as_an_encoder(tmp_path):
    model = SparK("test_convnext", input_size=64, decoder_width=32)
    optimizer = build_optimizer("lamb", parameter_groups(model, 0.1), lr=0.01)
    (tmp_path / "config.yaml").write_text(
        "model: {name: test_convnext, input_size: [64, 96]}\ndata: {mean: [0.1, 0.2, 0.3], std: [1.0, 1.0, 1.0]}\n"
    )
    path = save_run(tmp_path, 1, model=model, optimizer=optimizer)
    other = SparK("test_convnext", input_size=64, decoder_width=32)
    load_run(path, model=other, optimizer=build_optimizer("lamb", parameter_groups(other, 0.1), lr=0.01))
    assert same(other.state_dict(), model.state_dict())

    encoder, report = read_encoder(path)
    assert same(encoder.state_dict(), model.encoder.state_dict())
    assert timm_config(encoder)["mean"] == (0.1, 0.2, 0.3)
    assert timm_config(encoder)["input_size"] == (3, 64, 96)
    assert ("decoder.head.weight", "not part of the encoder") in report.ignored


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    assert find_run(tmp_path, True) is None
    assert find_run(tmp_path, False) is None
    model, optimizer = training()
    for step in (5, 10, 15, 20):
        save_run(tmp_path, step, model=model, optimizer=optimizer, keep=9)
    checkpoints = tmp_path / "checkpoints"
    os.truncate(checkpoints / "step_0000020" / "state.pt", 1000)
    os.truncate(checkpoints / "step_0000015" / "model.safetensors", 300)
    (checkpoints / "step_0000090").mkdir()
    (checkpoints / "step_0000080").write_text("a file")
    (checkpoints / "step_0000010").rename(checkpoints / "step_0000011")
    assert find_run(tmp_path, True) == checkpoints / "step_0000005"
    for passed_over in (
        "step_0000020 is passed over: state.pt is cut short",
        "step_0000015 is passed over: model.safetensors is cut short",
        "step_0000090 is passed over: it has no model.safetensors and no state.pt",
        "step_0000011 is passed over: its name says another step than its state, 10",
    ):
        assert passed_over in caplog.text
    assert find_run("elsewhere", str(checkpoints / "step_0000005")) == checkpoints / "step_0000005"
    assert find_run("elsewhere", str(tmp_path)) == checkpoints / "step_0000005"
    with pytest.raises(ValueError, match=r"cannot resume from .*step_0000020: state.pt is cut short"):
        find_run(tmp_path, str(checkpoints / "step_0000020"))
    with pytest.raises(ValueError, match="there is no such folder"):
        find_run(tmp_path, str(checkpoints / "step_0000001"))
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_run(checkpoints / "step_0000020", model=model, optimizer=optimizer)


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt", "ema.safetensors"])
def test_a_flipped_bit_is_noticed(tmp_path, caplog, file):
    model, optimizer = training()
    train(model, optimizer, range(1))
    for step in (1, 2):
        newest = save_run(tmp_path, step, model=model, optimizer=optimizer, ema=model)
    content = bytearray((newest / file).read_bytes())
    assert f"{hashlib.sha256(content).hexdigest()}  {file}\n" in (newest / "SHA256SUMS").read_text()
    content[len(content) * 2 // 3] ^= 4  # in the numbers of a tensor: what reads it does not mind
    (newest / file).write_bytes(content)
    read_torch_file(newest / file) if file == "state.pt" else load_file(newest / file)
    assert find_run(tmp_path, True).name == "step_0000001"
    assert f"step_0000002 is passed over: {file} is not as it was written (SHA256SUMS)" in caplog.text
    with pytest.raises(ValueError, match=rf"cannot resume from .*{file} is not as it .* remove SHA256SUMS"):
        find_run(tmp_path, newest)
    (newest / "SHA256SUMS").unlink()  # as in older checkpoints
    assert find_run(tmp_path, True) == newest


def test_a_checkpoint_that_was_being_replaced_is_found(tmp_path):
    """Killed between the two renames, with the only checkpoint moved away for its successor."""
    model, optimizer = training()
    folder = save_run(tmp_path, 4, model=model, optimizer=optimizer)
    retired = folder.rename(folder.with_name(".step_0000004.old-123"))
    (folder.parent / ".step_0000004.new-123").mkdir()
    assert find_run(tmp_path, True) == retired
    assert step_of(retired) == 4
    assert find_run(tmp_path, True, before=4) is None
    again = training(seed=1)
    assert load_run(retired, model=again[0], optimizer=again[1])["step"] == 4
    assert same(again[0].state_dict(), model.state_dict())
    save_run(tmp_path, 5, model=model, optimizer=optimizer, keep=1)
    assert os.listdir(folder.parent) == ["step_0000005"]


@pytest.mark.parametrize("content", [b"hello", b"]a.", b"\x80\x02}q\x00(X"])
def test_foreign_bytes_are_no_checkpoint(tmp_path, caplog, content):
    model, optimizer = training()
    (save_run(tmp_path, 1, model=model, optimizer=optimizer) / "state.pt").write_bytes(content)
    assert find_run(tmp_path, True) is None
    assert "step_0000001 is passed over: state.pt is cut short or damaged" in caplog.text


def test_old_checkpoints_go_and_a_left_course_is_set_aside(tmp_path):
    model, optimizer = training()
    for step in (2, 4, 6, 8):
        save_run(tmp_path, step, model=model, optimizer=optimizer, keep=3)
    checkpoints = tmp_path / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["step_0000004", "step_0000006", "step_0000008"]
    (checkpoints / ".step_0000009.new-1").mkdir()  # of a process that was killed
    (checkpoints / "step_0000005").mkdir()
    (checkpoints / "step_0000005" / "notes.txt").write_text("mine")
    save_run(tmp_path, 5, model=model, optimizer=optimizer, keep=1)  # resumed from 4
    assert sorted(os.listdir(checkpoints)) == [
        "step_0000005",
        "superseded_step_0000005",
        "superseded_step_0000006",
        "superseded_step_0000008",
    ]
    assert find_run(tmp_path, True) == checkpoints / "step_0000005"
    save_run(tmp_path, 5, model=model, optimizer=optimizer, keep=1)  # the same step once more
    assert find_run(tmp_path, True) == checkpoints / "step_0000005"


def test_a_torn_checkpoint_pushes_out_no_whole_one(tmp_path):
    model, optimizer = training()
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        save_run(tmp_path, step, model=model, optimizer=optimizer, keep=2)
    os.truncate(checkpoints / "step_0000003" / "model.safetensors", 300)
    save_run(tmp_path, 4, model=model, optimizer=optimizer, keep=2)
    assert sorted(os.listdir(checkpoints)) == ["step_0000002", "step_0000003", "step_0000004"]
    os.truncate(checkpoints / "step_0000004" / "state.pt", 300)
    assert find_run(tmp_path, True) == checkpoints / "step_0000002"
    for step in (5, 6):
        save_run(tmp_path, step, model=model, optimizer=optimizer, keep=2)
    assert sorted(os.listdir(checkpoints)) == ["step_0000005", "step_0000006"]


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_full_disk_costs_nothing(tmp_path, monkeypatch, file):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = training()
    first = save_run(tmp_path, 1, model=model, optimizer=optimizer, keep=1)
    if file == "state.pt":
        monkeypatch.setattr(torch, "save", full)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(
        OSError, match=r"the disk is full, .*step_0000002 was not written.*Free|free some space"
    ) as error:
        save_run(tmp_path, 2, model=model, optimizer=optimizer, keep=1)
    assert error.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "checkpoints") == [first.name]
    assert find_run(tmp_path, True) == first


def test_a_write_that_really_fails(tmp_path):
    """The operating system refuses bytes beyond a limit: both writers must turn it into the same sentence."""
    model, optimizer = training(width=64)
    train(model, optimizer, range(1))
    sizes = {
        file.name: file.stat().st_size
        for file in save_run(tmp_path, 1, model=model, optimizer=optimizer).iterdir()
    }
    assert sizes["state.pt"] > sizes["model.safetensors"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (sizes["model.safetensors"] - 100, sizes["model.safetensors"] + 100):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(OSError, match="step_0000002 was not written: File too large"):
                save_run(tmp_path, 2, model=model, optimizer=optimizer)
            assert os.listdir(tmp_path / "checkpoints") == ["step_0000001"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "new" / "a.txt", b"old")
    assert path.read_bytes() == b"old"
    (tmp_path / "a folder").mkdir()
    with pytest.raises(OSError, match="a folder"):
        write_whole(tmp_path / "a folder", b"")

    def full(path, content):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"the disk is full, .*a\.txt was not written: free some space"
    ) as error:
        write_whole(path, b"new")
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a folder", "new"]
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_an_interrupted_write_leaves_nothing(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "kept", ["a"]) as temporary:  # noqa: PT012
        (temporary / "a").write_text("new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["kept"]
    assert (tmp_path / "kept" / "a").read_text() == "old"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="will not be replaced"), whole_folder(tmp_path / "file", ["a"]):
        pass
    with (
        pytest.raises(OSError, match=r"was not written: (Not a directory|File exists)"),
        whole_folder(tmp_path / "file" / "x", ["a"]),
    ):
        pass


@pytest.mark.parametrize("value", [Path("x"), {"a": [errno]}, torch.float32, {Path("k"): 1}])
def test_extra_must_be_readable_again(tmp_path, value):
    model, optimizer = training()
    with pytest.raises(ValueError, match="tensors, numbers, strings, lists and dicts only"):
        save_run(tmp_path, 1, model=model, optimizer=optimizer, extra={"config": value})
    assert not (tmp_path / "checkpoints").exists()


def test_a_checkpoint_of_another_run_is_refused_whole(tmp_path):
    model, optimizer = training()
    train(model, optimizer, range(1))
    path = save_run(tmp_path, 1, model=model, optimizer=optimizer)
    cases = {
        "Lamb, here it is AdamW": training("adamw"),
        r"group model/decay has betas \(0.9, 0.95\), here \(0.9, 0.999\)": training(betas=(0.9, 0.999)),
        r"have another shape \(body\.0\.weight: \[4, 3, 3, 3\] in the file, \[8, 3, 3, 3\] here.*config.yaml": training(
            width=8
        ),
    }
    for message, (other, other_optimizer) in cases.items():
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load_run(path, model=other, optimizer=other_optimizer)
        assert same(other.state_dict(), before)
        assert not other_optimizer.state
    frozen = Net()
    frozen.body[0].requires_grad_(False)
    with pytest.raises(ValueError, match="group number 0 is model/decay, here model/no_decay"):
        load_run(path, model=frozen, optimizer=build_optimizer("lamb", parameter_groups(frozen, 0.1), lr=0.1))


def test_the_gradient_scaler_is_kept(tmp_path, caplog):
    model, optimizer = training()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))
    path = save_run(tmp_path, 1, model=model, optimizer=optimizer, scaler=scaler)
    again = torch.amp.GradScaler("cpu", init_scale=4.0)
    load_run(path, model=model, optimizer=optimizer, scaler=again)
    assert again.get_scale() == 1024.0
    load_run(
        save_run(tmp_path, 2, model=model, optimizer=optimizer),
        model=model,
        optimizer=optimizer,
        scaler=again,
    )
    assert "no gradient scaler" in caplog.text


# ---------------------------------------------------------------------------------------------------------------
# spark/commands/export.py


@pytest.fixture(scope="module")
def export_tool():
    path = Path(__file__).parents[3] / "spark" / "commands" / "export.py"
    return runpy.run_path(str(path))["main"]


def test_export_tool_on_a_run(tmp_path, export_tool, capsys):
    run = tmp_path / "run"
    model = SparK("test_resnet", input_size=64, decoder_width=32)
    optimizer = build_optimizer("lamb", parameter_groups(model, 0.1), lr=0.01)
    config = {"model": {"input_size": 64}, "data": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    step = save_run(run, 1, model=model, optimizer=optimizer, extra={"config": config})
    for index, checkpoint in enumerate((step, run)):
        folder = tmp_path / f"encoder{index}"
        export_tool(["--checkpoint", str(checkpoint), "--output", str(folder)])
        assert same(load_encoder(folder).state_dict(), model.encoder.state_dict())
        written = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
        assert (written["mean"], written["input_size"]) == ([0.1, 0.2, 0.3], [3, 64, 64])
        out = capsys.readouterr().out
        assert "tensors loaded" in out
        assert f"local-dir:{folder}" in out


def test_export_tool_takes_averaged_weights(tmp_path, export_tool, capsys):
    model, average = (SparK("test_resnet", input_size=64, decoder_width=32) for _ in range(2))
    optimizer = build_optimizer("lamb", parameter_groups(model, 0.1), lr=0.01)
    with_average = save_run(tmp_path / "a", 1, model=model, optimizer=optimizer, ema=average)
    export_tool(["--checkpoint", str(tmp_path / "a"), "--ema", "--output", str(tmp_path / "e")])
    assert f"{with_average} (averaged weights): " in capsys.readouterr().out
    assert same(load_encoder(tmp_path / "e").state_dict(), average.encoder.state_dict())
    export_tool(["--checkpoint", str(tmp_path / "a"), "--output", str(tmp_path / "last")])
    assert f"{with_average} (last weights): " in capsys.readouterr().out
    assert same(load_encoder(tmp_path / "last").state_dict(), model.encoder.state_dict())

    save_run(tmp_path / "b", 1, model=model, optimizer=optimizer)
    for source, words in (("b", "holds no averaged weights"), ("e", "are in checkpoints of a run only")):
        with pytest.raises(SystemExit, match="2"):
            export_tool(["--checkpoint", str(tmp_path / source), "--ema", "--output", str(tmp_path / "no")])
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_export_tool_on_an_official_file(tmp_path, written, export_tool, capsys):
    path = written(training_file(original_convnext(**ATTO), "convnext_atto"))
    options = ["--mean", "0.5", "0.4", "0.3", "--std", "1", "1", "1", "--input_size", "96", "128"]
    export_tool(["--checkpoint", str(path), "--output", str(tmp_path / "e"), *options])
    encoder = load_encoder(tmp_path / "e")
    assert timm_config(encoder)["mean"] == (0.5, 0.4, 0.3)
    assert timm_config(encoder)["input_size"] == (3, 96, 128)
    assert "head.norm.weight" in capsys.readouterr().out


def test_export_tool_says_what_is_wrong(tmp_path, written, export_tool, capsys):
    bad = [
        (["--checkpoint", str(tmp_path / "no.pth"), "--output", str(tmp_path / "e")], "no checkpoint at"),
        (["--checkpoint", str(tmp_path), "--output", str(tmp_path / "e")], "not an exported encoder"),
        (
            ["--checkpoint", str(written(plain_resnet(**NET18))), "--output", str(tmp_path / "e")],
            "--model_name",
        ),
        (["--checkpoint", "resnet18", "--output", str(tmp_path / "e")], "no checkpoint at resnet18"),
    ]
    for argv, message in bad:
        with pytest.raises(SystemExit) as stop:
            export_tool(argv)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert message in err
        assert "Traceback" not in err
    assert not (tmp_path / "e").exists()


def test_export_tool_on_a_full_disk(tmp_path, written, export_tool, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    path = written(training_file(original_convnext(**ATTO), "convnext_atto"))
    with pytest.raises(SystemExit, match="2"):
        export_tool(["--checkpoint", str(path), "--output", str(tmp_path / "e")])
    text = capsys.readouterr().err
    assert text.startswith("error: the disk is full, ")
    assert text.count(str(tmp_path / "e")) == 1
