"""Parts of an encoder that no map of the head needs are not in depth models; predictions stay, older files load."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import finetune.model.depth_model as module
from finetune import DepthModel, load_depth_model
from spark.errors import UserError
from spark.model.encoder import Unneeded, build_encoder, freeze_unreached, pyramid_info
from spark.training.checkpoint import load_run, save_run

MOBILE = "mobilenetv3_small_050"


def made(encoder: str, head: str, monkeypatch: pytest.MonkeyPatch | None = None) -> DepthModel:
    """A model; with `monkeypatch` as it was made before: nothing is taken out."""
    torch.manual_seed(0)
    if monkeypatch is None:
        return DepthModel(encoder, head=head, image_size=(64, 64)).eval()
    with monkeypatch.context() as patch:
        patch.setattr(module, "drop_unneeded", freeze_unreached)
        return DepthModel(encoder, head=head, image_size=(64, 64)).eval()


def test_lraspp_with_mobilenetv3_large_has_the_weights_of_its_maps() -> None:
    with torch.device("meta"):
        encoder = build_encoder("mobilenetv3_large_100")
    model = DepthModel(encoder.to_empty(device="cpu"), head="lraspp")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 3.22
    assert isinstance(model.encoder.conv_head, Unneeded)
    assert not any(name.startswith("encoder.conv_head") for name in model.state_dict())


@pytest.mark.parametrize("head", ["lraspp", "unetpp", "linear", "fusion"])
@pytest.mark.parametrize("encoder", [MOBILE, "test_resnet", "convnext_atto", "test_efficientnet"])
def test_weights_and_predictions_are_those_of_before(encoder, head, monkeypatch) -> None:
    if encoder == "test_resnet" and head == "fusion":
        pytest.skip("its maps end at stride 16")
    now, before = made(encoder, head), made(encoder, head, monkeypatch)
    images = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = now(images), before(images)
    assert torch.equal(one.get(now.outputs[0]), other.get(now.outputs[0]))
    kept = now.state_dict()
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in kept.items())


def test_an_older_export_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = made(MOBILE, "lraspp", monkeypatch)
    before.save(tmp_path / "before")
    assert "encoder.conv_head.weight" in load_file(tmp_path / "before" / "model.safetensors")
    read = load_depth_model(tmp_path / "before")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(read(images).depth, before(images).depth)
    read.save(tmp_path / "after")
    assert "encoder.conv_head.weight" not in load_file(tmp_path / "after" / "model.safetensors")
    assert load_depth_model(tmp_path / "after").sha256 != read.sha256
    model = made(MOBILE, "lraspp")
    report = module.start_from(model, tmp_path / "before")
    assert not report.unexpected
    assert not report.missing


def test_an_older_checkpoint_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    before, now = made(MOBILE, "lraspp", monkeypatch), made(MOBILE, "lraspp")
    for parameter in before.parameters():
        parameter.data.add_(0.01)
    folder = save_run(tmp_path, 3, model=before, optimizer=optimizer_of(before), ema=before, extra={}, keep=2)
    average = made(MOBILE, "lraspp")
    load_run(folder, model=now, optimizer=optimizer_of(now), ema=average)
    wanted = before.state_dict()
    for read in (now, average):
        assert all(torch.equal(value, wanted[name]) for name, value in read.state_dict().items())


def test_a_part_that_was_taken_out_says_so_when_it_is_run() -> None:
    encoder = build_encoder(MOBILE)
    DepthModel(encoder, head="lraspp")
    with pytest.raises(UserError, match="make the encoder anew"):
        encoder(torch.zeros(1, 3, 64, 64))
    assert pyramid_info(encoder)[-1].stride == 32
