# ruff: noqa: F401, F811  (fixtures of another file)
"""One's own convnets, networks at a lower stride, and images of other numbers of channels."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from finetune import DepthModel, depth
from spark import SparK, load_encoder, load_official, save_encoder
from spark.channels import adapt_input, adapt_output, adapt_statistics
from spark.encoder import build_encoder
from spark.masking import random_visible
from tests.test_pretrain import command, error_of, fresh_accelerate, photos, run

DOCS = Path(__file__).resolve().parents[1] / "docs" / "options.md"


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    """The module that docs/options.md shows, importable."""
    (code,) = re.findall(r"```python\n(from torch import nn\n.*?)```", DOCS.read_text(), re.S)
    (tmp_path / "my_nets.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("my_nets")
    sys.modules.pop("my_nets", None)


def test_the_example_of_the_documents(my_nets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(model = SparK\(TinyNet.*?)```", DOCS.read_text(), re.S)
    names = {
        "TinyNet": my_nets.TinyNet, "SparK": SparK, "save_encoder": save_encoder, "load_encoder": load_encoder
    }  # fmt: skip
    exec(code, names)
    made, loaded = names["model"].encoder, names["encoder"]
    assert type(loaded) is my_nets.TinyNet
    assert loaded is not made
    images = torch.randn(1, 3, 64, 64)
    for a, b in zip(made.eval()(images), loaded.eval()(images), strict=True):
        torch.testing.assert_close(a, b)
    plain = my_nets.TinyNet()
    plain.load_state_dict(load_file("encoder/model.safetensors"))
    assert json.loads(Path("encoder/config.json").read_text())["own"] == "my_nets:TinyNet"


def test_an_own_encoder_is_masked_as_timms_are(my_nets):
    torch.manual_seed(0)
    packed = SparK("my_nets:TinyNet", 64, decoder_width=32).double()
    masked = SparK(my_nets.TinyNet(), 64, decoder_width=32, layout="masked").double()
    masked.load_state_dict(packed.state_dict())
    assert (packed.stride, packed.grid, [level.channels for level in packed.levels]) == (
        16,
        (4, 4),
        [16, 32, 64, 96],
    )
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    visible = random_visible(2, (4, 4), 0.6)
    a, b = packed(images, visible), masked(images, visible)
    torch.testing.assert_close(a.prediction, b.prediction)
    a.loss.backward()
    assert all(p.grad is not None for p in packed.parameters())
    everything = torch.ones_like(visible)
    dense = SparK(my_nets.TinyNet(), 64, decoder_width=32, masked_pixels="zero").double()
    dense.load_state_dict(packed.state_dict())
    torch.testing.assert_close(packed(images, everything).prediction, dense(images, everything).prediction)


def test_a_run_over_an_own_encoder(my_nets, command, tmp_path, capsys):
    options = ("--model.name=my_nets:TinyNet", "--optim.betas=[0.9,0.95]", "--checkpoint_every=2")
    run(command(*options, "--max_steps=3"))
    run(command(*options, "--max_steps=4", "--resume=true"))
    folder = tmp_path / "run"
    trained = load_file(folder / "checkpoints" / "step_0000004" / "model.safetensors")
    for source in (folder / "encoder", folder / "checkpoints" / "step_0000004"):
        encoder = load_encoder(source, model_name="my_nets:TinyNet")
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, trained[f"encoder.{name}"])
        with pytest.raises(
            ValueError, match=r"holds my_nets:TinyNet, which is not timm's, and no code is run"
        ):
            load_encoder(source)
    assert encoder.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)
    assert encoder.pretrained_cfg["input_size"] == (3, 64, 64)
    depth = DepthModel(encoder, decoder_channels=[32, 16, 8, 8])
    assert depth(torch.randn(1, 3, 48, 64)).depth.shape == (1, 1, 48, 64)
    grey = load_encoder(folder / "encoder", model_name="my_nets:TinyNet", in_chans=1)
    images = torch.randn(1, 1, 64, 64)
    colour = load_encoder(folder / "encoder", model_name="my_nets:TinyNet").eval()
    torch.testing.assert_close(grey.eval()(images)[-1], colour(images.expand(-1, 3, -1, -1))[-1])


@pytest.mark.parametrize("source", ["name", "name of a folder", "folder"])
def test_depth_runs_refuse_own_encoders_before_anything_is_written(my_nets, tmp_path, capsys, source):
    folder = save_encoder(build_encoder("my_nets:TinyNet"), tmp_path / "encoder")
    options = {
        "name": ["--encoder=my_nets:TinyNet"],
        "name of a folder": [f"--encoder={folder}", "--encoder_name=my_nets:TinyNet"],
        "folder": [f"--encoder={folder}"],
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stopped:
        depth.main([*options[source], f"--data.root={tmp_path}", f"--output_dir={tmp_path / 'out'}"])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert re.search("my_nets:TinyNet(, which)? is not timm's: give the loaded encoder to DepthModel", text)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "my_nets:Missing",
            "my_nets:Missing cannot be imported .*Missing.*installed or its folder be on PYTHONPATH",
        ),
        ("no_such_package.nets:Net", "cannot be imported .*no_such_package"),
        ("my_nets:nn", "could not be called with in_chans=3"),
        ("builtins:dict", "made a dict, not a torch.nn.Module"),
    ],
)
def test_names_of_own_encoders_that_do_not_work(my_nets, name, message):
    with pytest.raises(ValueError, match=message):
        SparK(name, 64)


def test_contracts_that_are_not_kept(my_nets):
    with pytest.raises(ValueError, match=r"Sequential yields no feature pyramid \(it has no feature_info\)"):
        SparK(nn.Sequential(nn.Conv2d(3, 8, 3)), 64)
    net = my_nets.TinyNet()
    net.feature_info[1]["num_chs"] = 31
    with pytest.raises(
        ValueError, match=r"made a feature map \[1, 32, 8, 8\] .* announces \[1, 31, 8, 8\]: correct"
    ):
        SparK(net, 64, decoder_width=32)
    net = my_nets.TinyNet()
    net.feature_info = net.feature_info[:3]
    with pytest.raises(
        ValueError, match="returns 4 maps, not the list of 3 feature maps that its feature_info"
    ):
        SparK(net, 64, decoder_width=32)
    with pytest.raises(ValueError, match="so timm has no weights of it"):
        build_encoder("my_nets:TinyNet", pretrained=True)


# --- strides


def test_a_run_counts_the_parameters_that_it_uses(command, capsys):
    run(command("--model.stride=8", "--max_steps=2"))
    stages = dict(build_encoder("test_resnet").named_children())
    deep = sum(p.numel() for name in ("layer3", "layer4") for p in stages[name].parameters()) / 1e6
    rest = sum(p.numel() for p in build_encoder("test_resnet").parameters()) / 1e6 - deep
    text = capsys.readouterr().out
    assert f"model      test_resnet: {rest:.2f}M parameters ({deep:.2f}M more are not used), with" in text


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_a_pyramid_cut_below_a_stride(stride):
    torch.manual_seed(0)
    packed = SparK("test_resnet", 64, stride=stride, decoder_width=32).double()
    masked = SparK("test_resnet", 64, stride=stride, decoder_width=32, layout="masked").double()
    masked.load_state_dict(packed.state_dict())
    assert (packed.stride, packed.patch_size, packed.grid) == (stride, stride, (64 // stride,) * 2)
    assert len(packed.decoder.blocks) == {4: 2, 8: 3, 16: 4}[stride]
    calls = []
    packed.encoder.layer4.register_forward_hook(lambda *_: calls.append(1))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    visible = random_visible(2, packed.grid, 0.6)
    out = packed(images, visible)
    assert not calls, "what is cut does not run"
    torch.testing.assert_close(out.prediction, masked(images, visible).prediction)
    out.loss.backward()
    for name, p in packed.encoder.named_parameters():
        assert (
            p.requires_grad
            == (p.grad is not None)
            == (int(name[5]) <= {4: 1, 8: 2, 16: 3}[stride] if name.startswith("layer") else True)
        ), name


@pytest.mark.parametrize(("name", "stride"), [("resnet18", 8), ("convnext_atto", 16)])
def test_a_dilated_encoder(name, stride, tmp_path):
    torch.manual_seed(0)
    small = {
        "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
        "convnext_atto": {"depths": (1, 1, 1, 1)},
    }
    options = {"output_stride": stride, "decoder_width": 32, **small[name]}
    packed = SparK(name, 64, **options).double()
    masked = SparK(name, 64, layout="masked", **options).double()
    masked.load_state_dict(packed.state_dict())
    assert (packed.stride, packed.grid) == (stride, (64 // stride,) * 2)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    visible = random_visible(2, packed.grid, 0.6)
    out = packed(images, visible)
    torch.testing.assert_close(out.prediction, masked(images, visible).prediction)
    changed = torch.where(visible.repeat_interleave(stride, 2).repeat_interleave(stride, 3), images, 7.0)
    torch.testing.assert_close(packed(changed, visible).prediction, out.prediction)
    save_encoder(packed.float().encoder, tmp_path / "encoder")
    again = load_encoder(tmp_path / "encoder").eval()
    for a, b in zip(
        *(
            e.eval().forward_intermediates(images.float(), intermediates_only=True)
            for e in (again, packed.encoder)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 12}, r"no feature map of stride 12: use one of \[2, 4, 8, 16, 32\]"),
        ({"stride": 8, "patch_size": 12}, "patch_size 12 must be a multiple of the encoder's stride 8"),
        (
            {"stride": 8, "target": "hog"},
            "predicted at a stride of 8, which the encoder's stride of 8 does not exceed",
        ),
        ({"encoder": "hrnet_w18_small", "output_stride": 16}, "does not accept these options"),
    ],
)
def test_strides_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        SparK(**{"encoder": "test_resnet", "input_size": 64, "decoder_width": 64, **options})


# --- channels


@pytest.mark.parametrize("count", [1, 2, 6])
def test_images_of_other_channels_start_where_colour_ended(count, tmp_path):
    torch.manual_seed(0)
    colour = build_encoder("test_resnet").eval()
    save_encoder(colour, tmp_path / "encoder", mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    other = load_encoder(tmp_path / "encoder", in_chans=count).eval()
    images = torch.randn(1, 3, 64, 64)
    images = images[:, :1].expand(-1, 3, -1, -1) if count == 1 else images
    turns = images[:, [i % 3 for i in range(count)]]
    if count != 2:  # of two channels blue is missing, and no image gives the same
        torch.testing.assert_close(other(turns), colour(images), rtol=1e-4, atol=1e-5)
    weight, wide = colour.conv1[0].weight, other.conv1[0].weight
    if count == 2:
        torch.testing.assert_close(wide, weight[:, :2] * 1.5)
    torch.testing.assert_close(adapt_input(weight, count), wide)
    expected = {
        1: (0.299 * 0.1 + 0.587 * 0.2 + 0.114 * 0.3,),
        2: (0.1, 0.2),
        6: (0.1, 0.2, 0.3, 0.1, 0.2, 0.3),
    }
    assert other.pretrained_cfg["mean"] == pytest.approx(expected[count])
    assert adapt_statistics((0.1, 0.2, 0.3), count) == pytest.approx(expected[count])
    save_encoder(SparK(other, 64, in_chans=count, decoder_width=32).encoder, tmp_path / "again")
    assert load_encoder(tmp_path / "again").pretrained_cfg["mean"] == pytest.approx(expected[count])


def test_outputs_take_the_channels_in_turn():
    weight = torch.arange(12.0).view(6, 2)  # two numbers for each of three channels
    assert torch.equal(adapt_output(weight, 3, 4), weight[[0, 1, 2, 3, 4, 5, 0, 1]])
    torch.testing.assert_close(
        adapt_output(weight, 3, 1), 0.299 * weight[:2] + 0.587 * weight[2:4] + 0.114 * weight[4:]
    )
    assert adapt_statistics((1.0, 3.0), 1) == (2.0,)
    assert adapt_statistics((1.0,), 3) == (1.0, 1.0, 1.0)


def test_an_official_model_goes_on_with_more_channels(tmp_path):
    torch.manual_seed(0)
    colour = SparK("resnet50", 64, decoder_width=32).eval()
    names = {"token": "mask_tokens.{}", "norm": "densify_norms.{}", "projection": "densify_projs.{}"}
    tensors = {}
    for key, value in colour.state_dict().items():
        if key.startswith("encoder."):
            key = f"sparse_encoder.sp_cnn.{key.removeprefix('encoder.')}"
        elif key.startswith("densify."):
            _, i, part, *rest = key.split(".")
            key = ".".join([names[part].format(i), *rest])
        elif key.startswith("decoder.head"):
            key = key.replace("decoder.head", "dense_decoder.proj")
        else:
            _, _, i, part, *rest = key.split(".")
            part = {
                "upsample": "up_sample",
                "conv1": "conv.0",
                "norm1": "conv.1",
                "conv2": "conv.3",
                "norm2": "conv.4",
            }[part]
            key = ".".join(["dense_decoder.dec", i, part, *rest])
        tensors[key] = value
    torch.save(tensors, tmp_path / "file.pth")
    images, visible = torch.randn(1, 3, 64, 64), random_visible(1, (2, 2), 0.5)
    wide = load_official(tmp_path / "file.pth", in_chans=6).eval()
    first, second = wide(images.repeat(1, 2, 1, 1), visible).prediction.chunk(2, 1)
    expected = colour(images, visible).prediction
    torch.testing.assert_close(first, expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(first, second)
