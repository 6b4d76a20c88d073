# ruff: noqa: F401, F811  (fixtures of another file)
"""One's own convnets, networks at a lower stride, and images of other numbers of channels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import DepthModel, depth, evaluate, load_depth_model, predict
from finetune.model.prediction import transform_of
from spark import SparK, load_encoder, load_official, pretrain, save_encoder
from spark.commands import export as export_encoder
from spark.commands import probe
from spark.model.encoder import build_encoder
from spark.model.masking import random_visible
from spark.start import start_from
from spark.weights.channels import adapt_input, adapt_output, adapt_statistics
from tests.depth_world import make_depth_world
from tests.finetune.tasks.test_depth_training import arguments
from tests.spark.commands.test_probe import make_folder
from tests.spark.test_pretrain import command, error_of, fresh_accelerate, photos, run, small_run
from tools.demo import figure as demo_figure

DOCS = Path(__file__).resolve().parents[2] / "docs" / "use" / "model_options.md"


@pytest.fixture
def my_nets(tmp_path, monkeypatch):
    """The module that docs/use/model_options.md shows, importable."""
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


# --- depth


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_depth_world(tmp_path_factory.mktemp("world"))


def depth_options(world, output, **options):
    given = {"model.head_options": '{"decoder_channels": [16, 8, 8, 8]}', "max_steps": 2, **options}
    return arguments(world, output, **given)


def depth_run(world, output, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    depth.main(depth_options(world, output, **options))


def refusal(capsys, main, options):
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    text = capsys.readouterr().err.strip()
    assert len(text.splitlines()) == 1, text
    return text


def test_an_own_encoder_from_photos_to_predicted_depth(my_nets, command, world, tmp_path, capsys):
    run(command("--model.name=my_nets:TinyNet", "--max_steps=2", "--model.drop_path=0"))
    encoder = tmp_path / "run" / "encoder"
    trained = load_file(encoder / "model.safetensors")
    named = {"encoder": encoder, "encoder_name": "my_nets:TinyNet"}
    output = tmp_path / "depth"
    depth_run(world, output, **named)
    depth_run(world, output, **named, **{"max_steps": 3, "resume": "true", "optim.encoder_lr_factor": 1.0})
    assert f"{encoder}: {len(trained)} tensors loaded" in capsys.readouterr().out
    model = load_depth_model(output / "model", encoder_name="my_nets:TinyNet")
    assert type(model.encoder) is my_nets.TinyNet
    tuned = model.encoder.state_dict()
    assert all((tuned[key] - value).abs().max() < 0.1 for key, value in trained.items() if value.ndim == 4)
    assert model.mean == pytest.approx((0.485, 0.456, 0.406))

    scores = tmp_path / "scores.json"
    options = [f"--model={output / 'model'}", f"--data.root={world}", "--data.list=nyu_val.txt"]
    evaluate.main(
        [*options, "--protocol=nyu-bts-scaled", f"--output={scores}", "--encoder_name=my_nets:TinyNet"]
    )
    written = json.loads((output / "evaluation.json").read_text())
    assert json.loads(scores.read_text())["metrics"] == pytest.approx(written["metrics"])
    photo = next((world / "val_scene").glob("rgb_*"))
    assert predict.main(predicting(output, photo, tmp_path / "predicted", "my_nets:TinyNet")) == 0
    array = np.load(tmp_path / "predicted" / f"{photo.stem}.npy")
    image = transform_of(model).prepare(cv2.imread(str(photo))[..., ::-1].copy())
    assert np.isfinite(array).all()
    assert array.shape == (48, 64)
    torch.testing.assert_close(
        torch.from_numpy(array), model(image[None]).depth[0, 0].detach(), rtol=1e-3, atol=1e-3
    )

    # a second stage starts from the first one's model, which needs no code
    depth_run(
        world,
        tmp_path / "second",
        **{"encoder": "my_nets:TinyNet", "model.init": output / "model", "max_steps": 1, "optim.lr": 1e-9},
    )
    second = load_depth_model(tmp_path / "second" / "model", "my_nets:TinyNet").encoder.state_dict()
    for key in (key for key, value in tuned.items() if value.ndim == 4):
        torch.testing.assert_close(second[key], tuned[key], rtol=0, atol=1e-6)


def predicting(output, photo, folder, name):
    named = [] if name is None else [f"--encoder_name={name}"]
    return [f"--model={output / 'model'}", f"--input={photo}", f"--output={folder}", *named]


def test_prediction_with_an_own_encoder_as_a_process(my_nets, world, tmp_path):
    model = DepthModel("my_nets:TinyNet", decoder_channels=[16, 8, 8, 8], image_size=(48, 64))
    model.save(tmp_path / "model")
    photo = next((world / "val_scene").glob("rgb_*"))
    root = Path(__file__).resolve().parents[2]
    options = predicting(tmp_path, photo, tmp_path / "out", "my_nets:TinyNet")
    found = subprocess.run(
        [sys.executable, root / "finetune" / "predict.py", *options],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / f"{photo.stem}_mm.png").is_file()


def test_own_encoders_of_depth_models_are_named_by_the_user_alone(my_nets, world, tmp_path, capsys, caplog):
    made = DepthModel("my_nets:TinyNet", decoder_channels=[16, 8, 8, 8])
    made.save(tmp_path / "model")
    photo = next((world / "val_scene").glob("rgb_*"))

    def predicted(name):
        return refusal(capsys, predict.main, predicting(tmp_path, photo, tmp_path / "out", name))

    assert re.search(
        r"/model holds my_nets:TinyNet, which is not timm's, and no code is run because a file names it: name your "
        r"network with encoder_name= \(--encoder_name\), such as my_nets:TinyNet",
        predicted(None),
    )
    assert "no code is run" in predicted("resnet18")
    assert "my_nets:Missing cannot be imported" in predicted("my_nets:Missing")
    my_nets.Wide = lambda in_chans: build_wide(my_nets, in_chans)
    with pytest.raises(
        ValueError, match=r"are of my_nets:TinyNet and do not fit my_nets:Wide: name .*--encoder_name"
    ):
        load_depth_model(tmp_path / "model", "my_nets:Wide")
    my_nets.Renamed = my_nets.TinyNet
    assert type(load_depth_model(tmp_path / "model", "my_nets:Renamed").encoder) is my_nets.TinyNet
    assert "was written of my_nets:TinyNet and is read as my_nets:Renamed" in caplog.text
    DepthModel("test_resnet", decoder_channels=[8] * 5).save(tmp_path / "model")
    assert "is timm's test_resnet: leave encoder_name= (--encoder_name) out" in predicted("my_nets:TinyNet")
    assert not (tmp_path / "out").exists()


def build_wide(my_nets, in_chans):
    net = my_nets.TinyNet(in_chans)
    net.stages[3] = nn.Conv2d(64, 128, 3, stride=2, padding=1)
    net.feature_info[3]["num_chs"] = 128
    return net


def test_a_file_never_runs_code_that_only_it_names(my_nets, world, tmp_path, capsys, monkeypatch):
    """Every tool that opens a folder of an own encoder, given without its name."""
    calls = []
    monkeypatch.setattr(my_nets, "TinyNet", lambda **options: calls.append(options))
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text(
        json.dumps({"own": "my_nets:TinyNet", "model_args": {"in_chans": 3}})
    )
    save_file({"stages.0.0.weight": torch.zeros(16, 3, 3, 3)}, encoder / "model.safetensors")
    sentence = "holds my_nets:TinyNet, which is not timm's, and no code is run because a file names it"
    out = tmp_path / "out"
    assert f"{sentence}: name your network with encoder_name= (--encoder_name)" in refusal(
        capsys, depth.main, depth_options(world, out, encoder=encoder)
    )
    assert f"{sentence}: name your network with --model.name" in refusal(
        capsys, pretrain.main, small_run(world, out, f"--model.init={encoder}")
    )
    export = [f"--checkpoint={encoder}", f"--output={out}"]
    assert f"{sentence}: name your network with model_name= (--model_name)" in refusal(
        capsys, export_encoder.main, export
    )
    with pytest.raises(ValueError, match=sentence):
        DepthModel(encoder)
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints").mkdir(parents=True)
    (run_folder / "config.yaml").write_text("model: {name: 'my_nets:TinyNet'}\n")
    monkeypatch.setattr(demo_figure, "find_run", lambda *_: run_folder)
    with pytest.raises(ValueError, match="is of my_nets:TinyNet, and no file decides which code is run"):
        demo_figure.masked_and_reconstructed(demo_figure.read_run(run_folder, "run"), [])
    assert not calls
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "my_nets:TinyNet", "encoder_name": "my_nets:TinyNet"}, "encoder_name is for .pth files and for"),
        ({"encoder": "my_nets:TinyNet", "pretrained": "true"}, "so timm has no weights of it: leave pretrained false"),
        ({"encoder": "my_nets:Missing"}, "my_nets:Missing cannot be imported"),
        ({"encoder": "TIMM", "encoder_name": "my_nets:TinyNet"}, "says itself which encoder it is, leave it out"),
        ({"encoder": "my_nets:TinyNet", "optim.layer_decay": 0.5}, "or use encoder_lr_factor"),
    ],
)  # fmt: skip
def test_depth_options_that_do_not_go_with_own_encoders(my_nets, world, tmp_path, capsys, options, message):
    if options["encoder"] == "TIMM":
        options = {**options, "encoder": save_encoder(build_encoder("test_resnet"), tmp_path / "timm")}
    assert message in refusal(capsys, depth.main, depth_options(world, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


def test_weights_of_ones_own_in_a_file(my_nets, tmp_path):
    """A state dict in a .pth file, whatever its tensors are called."""
    torch.manual_seed(0)
    net = my_nets.TinyNet(1)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = load_encoder(tmp_path / "net.pth", model_name="my_nets:TinyNet")
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert loaded.pretrained_cfg["input_size"] == (1, 224, 224)
    model = DepthModel(tmp_path / "net.pth", encoder_name="my_nets:TinyNet", decoder_channels=[16, 8, 8, 8])
    assert model.encoder.stages[0][0].weight.shape[1] == 3
    torch.save({"arch": "resnet18", **build_encoder("test_resnet").state_dict()}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match=r"other\.pth does not fit my_nets:TinyNet.*Name the right one with encoder_name="
    ):
        DepthModel(tmp_path / "other.pth", encoder_name="my_nets:TinyNet")


def test_the_stochastic_depth_of_a_pretraining_stays_there(my_nets, tmp_path):
    """As of timm's encoders, it is a matter of use: not recorded, and given anew."""
    rates = []

    class Deep(my_nets.TinyNet):
        def __init__(self, in_chans=3, drop_path=0.0):
            rates.append(drop_path)
            super().__init__(in_chans)

    my_nets.Deep = Deep
    pretrained = build_encoder("my_nets:Deep", drop_path=0.3)
    save_encoder(pretrained, tmp_path / "encoder")
    DepthModel(tmp_path / "encoder", encoder_name="my_nets:Deep", decoder_channels=[16, 8, 8, 8])
    model = DepthModel(
        tmp_path / "encoder", encoder_name="my_nets:Deep", drop_path=0.2, decoder_channels=[16, 8, 8, 8]
    )
    load_depth_model(model.save(tmp_path / "model"), "my_nets:Deep")
    assert rates == [0.3, 0.0, 0.2, 0.0]


# --- other tools of pretraining


def test_a_pretraining_goes_on_from_an_own_encoder(my_nets, command, tmp_path, capsys):
    run(command("--model.name=my_nets:TinyNet", "--max_steps=2"))
    first = load_file(tmp_path / "run" / "encoder" / "model.safetensors")
    torch.save(first, tmp_path / "net.pth")
    for number, source in enumerate(("run", "run/encoder", "net.pth")):
        model = SparK("my_nets:TinyNet", 96, decoder_width=32)
        start_from(model, str(tmp_path / source), "my_nets:TinyNet")
        for key, value in model.encoder.state_dict().items():
            assert torch.equal(value, first[key]), (number, key)
    wrong = command("--model.name=test_resnet", f"--model.init={tmp_path / 'run'}", output="other")
    assert "name your network with --model.name, such as my_nets:TinyNet" in refusal(
        capsys, pretrain.main, wrong
    )
    wrong = command("--model.name=my_nets:TinyNet", "--model.init=timm", output="other")
    assert "model.init timm is for encoders of timm, and my_nets:TinyNet is not" in refusal(
        capsys, pretrain.main, wrong
    )
    options = [f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'exported'}"]
    export_encoder.main([*options, "--model_name=my_nets:TinyNet"])
    assert 'model_name="my_nets:TinyNet")' in capsys.readouterr().out
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert all(torch.equal(value, first[key]) for key, value in exported.items())


def test_probing_an_own_encoder(my_nets, tmp_path):
    folder = make_folder(tmp_path / "labelled")
    encoder = save_encoder(build_encoder("my_nets:TinyNet"), tmp_path / "encoder", input_size=32)
    arguments = [
        f"--data={folder}",
        f"--output={tmp_path / 'probe.json'}",
        "--model_name=my_nets:TinyNet",
        "--k=2",
    ]
    probe.main([*arguments, "--encoder", str(encoder), "my_nets:TinyNet", "test_resnet", "--size=32"])
    rows = json.loads((tmp_path / "probe.json").read_text())["encoders"]
    assert [row["architecture"] for row in rows] == ["my_nets:TinyNet", "my_nets:TinyNet", "test_resnet"]


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
