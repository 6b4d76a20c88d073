"""Depth models and encoders as ONNX and torch.export files, beside PyTorch, timm and Pillow."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from finetune import DepthModel, load_depth_model
from finetune.commands import export as export_depth
from finetune.commands.work import export as depth_work
from finetune.heads import HEADS
from finetune.model.calibration import Calibration
from finetune.model.graph import fitted, resample
from finetune.model.prediction import fitted_size, predict_image
from spark import save_encoder
from spark.commands import export as export_encoder
from spark.model.encoder import build_encoder
from spark.weights.graph import Sizes, write_graph

onnxruntime = pytest.importorskip("onnxruntime")
SMALL: dict[str, dict] = {
    "unetpp": {"decoder_channels": (16, 16, 8, 8, 8)},
    "lraspp": {"width": 16, "maps": 4, "encoder": "test_efficientnet"},
    "linear": {},
    "linear_bins": {"bins": 8, "layer_norm": True, "encoder": "test_convnext"},
    "fusion": {"width": 8, "encoder": "test_convnext"},
    "metric_bins": {"width": 8, "bins": 8, "embedding": 8},
    "fcrn": {"widths": (16, 16, 8, 8, 8)},
    "dorn": {"bins": 12, "width": 16, "fused": 16, "dilations": (1, 2)},
}
DOC = Path(__file__).parents[3] / "docs" / "use" / "export.md"


def depth_model(folder: Path, head: str = "unetpp", calibration: Calibration | None = None) -> Path:
    torch.manual_seed(0)
    options = {"encoder": "test_resnet", "image_size": (48, 64), "max_depth": 8.0, **SMALL[head]}
    model = DepthModel(head=head, **options)
    for parameter in model.head.parameters():  # an untrained head says nearly the same everywhere
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.calibrate(calibration)
    return model.save(folder / "run" / "model")


@pytest.fixture(scope="module")
def unetpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return depth_model(tmp_path_factory.mktemp("unetpp"))


@pytest.fixture(scope="module")
def fitted_onnx(unetpp: Path) -> Path:
    file = unetpp.parent / "depth.onnx"
    export_depth.main(["--model", str(unetpp), "--output", str(file)])
    return file


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def session(path: Path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def by_hand(model: DepthModel, images: torch.Tensor):
    """The model on images as they are, normalised as its config says."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    with torch.no_grad():
        return model((images / 255 - mean) / std)


def error_of(capsys: pytest.CaptureFixture[str], main, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err


@pytest.mark.parametrize("head", HEADS)
def test_onnx_of_every_head(tmp_path: Path, head: str) -> None:
    folder, file = depth_model(tmp_path, head), tmp_path / "depth.onnx"
    export_depth.main(["--model", str(folder), "--output", str(file), "--resize", "none"])
    model, run = load_depth_model(folder), session(file)
    name = "disparity_affine" if head == "fusion" else "depth"
    assert [(one.name, one.type) for one in run.get_inputs()] == [("image", "tensor(uint8)")]
    assert [one.name for one in run.get_outputs()] == [name]
    for shape in ((1, 3, 37, 85), (3, 3, 64, 96), (2, 3, 90, 33)):
        images = noise(*shape)
        wanted = getattr(by_hand(model, images), name)
        (got,) = run.run(None, {"image": images.numpy()})
        assert got.shape == (shape[0], 1, *shape[2:])
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4 * float(wanted.max()))
    told = run.get_modelmeta().custom_metadata_map
    assert told["unit"] == (
        "inverse depth up to scale and shift, larger is nearer" if head == "fusion" else "metre"
    )
    assert (float(told["max_depth"]), told["head"], told["protocol"]) == (8.0, head, "not recorded")
    assert float(told["largest_difference"]) <= float(told["tolerance"]) == 1e-4


def test_fitted_onnx_is_what_predict_writes(unetpp: Path, fitted_onnx: Path) -> None:
    model, run = load_depth_model(unetpp), session(fitted_onnx)
    for height, width in ((96, 128), (61, 97), (120, 50)):
        ramp = np.linspace(0, 200, height)[:, None, None] + np.linspace(0, 50, width)[None, :, None]
        photo = np.broadcast_to(ramp, (height, width, 3)).astype(np.uint8).copy()
        photo[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 90)
        wanted = predict_image(model, photo)
        (got,) = run.run(None, {"image": photo.transpose(2, 0, 1)[None]})
        np.testing.assert_allclose(got[0, 0], wanted, rtol=1e-4)
        assert wanted.max() - wanted.min() > 0.02  # there is something to agree on


def test_resampling_is_pillows() -> None:
    for size in ((93, 64), (48, 90), (480, 640), (96, 128), (200, 130), (1, 7)):
        images = noise(1, 3, *size)
        wanted = fitted(images, (96, 128))
        assert tuple(wanted.tolist()) == fitted_size(size, (96, 128))
        got = resample(images, wanted)[0].permute(1, 2, 0).numpy()
        pillow = Image.fromarray(images[0].permute(1, 2, 0).numpy())
        np.testing.assert_array_equal(got, pillow.resize(got.shape[1::-1], Image.Resampling.BILINEAR))


def test_calibration_is_inside_and_told(tmp_path: Path) -> None:
    calibration = Calibration("depth", 2.0, 0.5, 0.001, 20.0, "a test")
    folder, file = depth_model(tmp_path, "linear", calibration), tmp_path / "depth.onnx"
    export_depth.main(["--model", str(folder), "--output", str(file), "--resize", "none"])
    plain = load_depth_model(folder)
    plain.calibrate(None)
    images = noise(1, 3, 40, 50)
    (got,) = session(file).run(None, {"image": images.numpy()})
    np.testing.assert_allclose(got, 2 * by_hand(plain, images).depth.numpy() + 0.5, rtol=1e-4)
    told = session(file).get_modelmeta().custom_metadata_map
    assert json.loads(told["calibration"])["scale"] == 2.0
    assert float(told["max_depth"]) == 20.0


def test_encoder_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    folder = save_encoder(build_encoder("test_efficientnet"), tmp_path / "encoder", mean, std, 64)
    file = tmp_path / "encoder.onnx"
    export_encoder.main(["--checkpoint", str(folder), "--output", str(file)])
    stock: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    run, images = session(file), noise(3, 3, 64, 96)
    normalised = (images / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        wanted = {
            f"stride_{info['reduction']}": map_
            for info, map_ in zip(stock.feature_info, stock(normalised), strict=True)
        }
    got = dict(
        zip((one.name for one in run.get_outputs()), run.run(None, {"image": images.numpy()}), strict=True)
    )
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key], atol=1e-4 * float(wanted[key].abs().max()))
    odd = run.run(None, {"image": noise(1, 3, 33, 70).numpy()})
    assert odd[-1].shape[2:] == (2, 3)


def test_torch_export(tmp_path: Path, monkeypatch) -> None:
    """Of a small network, for torch.export takes long over the sizes of a large one."""
    torch.manual_seed(0)
    model = DepthModel(Small(), head="linear", mean=(0.5, 0.4, 0.3), std=(0.25,) * 3).eval()
    model.head.project.weight.data += torch.randn_like(model.head.project.weight)
    monkeypatch.setattr(depth_work, "load_depth_model", lambda *_: model)
    file, told = tmp_path / "depth.pt2", {"metadata.json": ""}
    export_depth.main(["--model", str(tmp_path), "--output", str(file)])
    program = torch.export.load(file, extra_files=told).module()
    for images in (noise(3, 3, 44, 20), noise(1, 3, 8, 32)):
        torch.testing.assert_close(program(images)[0], by_hand(model, images).depth)
    assert json.loads(told["metadata.json"])["unit"] == "metre"


class Small(nn.Module):
    """An encoder of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_info = [{"num_chs": 4, "reduction": 2}, {"num_chs": 6, "reduction": 4}]
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 6, 3, 2, 1)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x = self.first(images).relu()
        return [x, self.second(x)]


class Plain(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (image.float().mean(1, keepdim=True),)


class Frozen(nn.Module):
    """Its output has the size of the example: what a graph does that took a size for a constant."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        height, width = (int(side) for side in image.shape[-2:])
        return (F.interpolate(image.float().mean(1, keepdim=True), size=(height, width)),)


class Complex(nn.Module):
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.linalg.inv(image.float()),)


def plain(image: torch.Tensor) -> list[torch.Tensor]:
    return [image.float().mean(1, keepdim=True)]


def test_the_gate_tries_photos_larger_than_the_training_size(
    unetpp: Path, tmp_path: Path, monkeypatch
) -> None:
    kept: dict = {}
    monkeypatch.setattr(depth_work, "write_graph", lambda *_, **options: kept.update(options) or 0.0)
    command = ["--model", str(unetpp), "--output", str(tmp_path / "x.onnx")]
    export_depth.main(command)
    assert (1, 193, 131) in (tried := kept["sizes"].probes(".onnx"))  # of a model of 48x64 px
    assert (1, 127, 192) in tried
    export_depth.main([*command, "--resize", "none"])
    assert max(size for _, *size in kept["sizes"].probes(".onnx")) < [100, 100]


def test_the_gate_writes_nothing_that_is_off(tmp_path: Path, capfd) -> None:
    file, sizes = tmp_path / "x.onnx", Sizes(32, None, (64, 96))
    outputs = {"depth": ""}
    large = Sizes(32, None, (64, 96), [(150, 200)])
    with pytest.raises(ValueError, match="on 1 images of 150x200 px it is off"):
        write_graph(
            Plain(),
            lambda image: [plain(image)[0] * (1.01 if image.shape[-2] > 128 else 1)],
            file,
            outputs=outputs,
            sizes=large,
            metadata={},
        )
    cases = [
        (Plain(), lambda image: [1.01 * plain(image)[0]], "off by 0.0099 of the largest value"),
        (Plain(), lambda image: [plain(image)[0] * float("nan")], "off by nan"),
        (Plain(), lambda image: [plain(image)[0][:, :, 1:]], "has shape"),
        (Frozen(), plain, "fix it, such as with --size 64 96"),
    ]
    for network, reference, words in cases:
        with pytest.raises(ValueError, match=words):
            write_graph(network, reference, file, outputs=outputs, sizes=sizes, metadata={})
        assert list(tmp_path.iterdir()) == []
    assert (
        write_graph(Frozen(), plain, file, outputs=outputs, sizes=Sizes(32, (50, 70), (50, 70)), metadata={})
        < 1e-6
    )
    assert session(file).get_inputs()[0].shape == ["batch", 3, 50, 70]
    with pytest.raises(ValueError, match=r"opset 17 cannot express this network .*inv"):
        write_graph(Complex(), plain, tmp_path / "y.onnx", outputs=outputs, sizes=sizes, metadata={})
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        write_graph(Plain(), plain, tmp_path / "folder.onnx", outputs=outputs, sizes=sizes, metadata={})
    (tmp_path / "folder.onnx").rmdir()
    with pytest.raises(ValueError, match="opset 99 cannot express"):
        write_graph(Plain(), plain, tmp_path / "y.onnx", outputs=outputs, sizes=sizes, metadata={}, opset=99)
    assert list(tmp_path.iterdir()) == [file]
    assert capfd.readouterr().out == ""  # torch prints graphs


def test_without_the_packages(unetpp: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    error = error_of(capsys, export_depth.main, "--model", unetpp, "--output", tmp_path / "x.onnx")
    assert "pip install 'spark-pretrain[onnx]'" in error
    assert list(tmp_path.iterdir()) == []


def test_options_that_do_not_go_together(unetpp: Path, tmp_path: Path, capsys) -> None:
    model = ("--model", unetpp, "--output")
    for words, *arguments in (
        ("--license is for a folder", tmp_path / "x.onnx", "--license", "mit"),
        ("--size is for FILE.onnx", tmp_path / "x", "--size", 64, 64),
        ("--resize is for FILE.onnx", tmp_path / "x", "--resize", "none"),
        ("--results is for the card", tmp_path / "x.pt2", "--results", "r.json"),
        ("cannot resize images", tmp_path / "x.pt2", "--resize", "fitted"),
        ("--opset is of ONNX", tmp_path / "x.pt2", "--opset", 17),
        ("whole numbers above 0", tmp_path / "x.onnx", "--size", 0, 64),
        ("opset must be a whole number above 0 or null, got 0", tmp_path / "x.onnx", "--opset", 0),
        ("--opset is for FILE.onnx", tmp_path / "x", "--opset", 17),
        ("a .pth file is not written", tmp_path / "x.pth"),
        ("tolerance must be a number above 0 or null, got -1", tmp_path / "x.onnx", "--tolerance", -1),
        ("--private is for --push_to_hub", tmp_path / "x", "--private"),
    ):
        assert words in error_of(capsys, export_depth.main, *model, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_lines_of_the_documentation(unetpp: Path, fitted_onnx: Path, monkeypatch) -> None:
    """docs/use/export.md in a folder with depth.onnx and photo.jpg."""
    Image.fromarray(noise(50, 80, 3).numpy()).save(fitted_onnx.parent / "photo.jpg")
    monkeypatch.chdir(fitted_onnx.parent)
    code = DOC.read_text().split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code, found)
    assert found["depth"].shape == (50, 80)
    wanted = predict_image(load_depth_model(unetpp), np.asarray(Image.open("photo.jpg").convert("RGB")))
    np.testing.assert_allclose(found["depth"], wanted, rtol=1e-4)
