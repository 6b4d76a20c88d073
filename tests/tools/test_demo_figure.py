"""The small figure about runs: what it draws, from which images, and what it refuses."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from finetune import DepthModel
from spark.config import ModelConfig
from spark.report import Run, read_run
from spark.task import build_model
from tests.depth_world import make_depth_world
from tools.demo import figure as demo_figure


def pretrained(folder: Path, **options) -> Run:
    """A pretraining run of a tiny model with a whole checkpoint."""
    options = {"name": "test_resnet", "input_size": 64, "decoder_width": 32, **options}
    checkpoint = folder / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": options}))
    model = build_model(ModelConfig(**options))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, checkpoint / "model.safetensors")
    torch.save({"step": 1, "optimizer": {}, "extra": {}}, checkpoint / "state.pt")
    return read_run(folder)


def trained(folder: Path) -> Path:
    """A depth run with its model."""
    DepthModel("test_resnet", decoder_channels=(16, 16, 8, 8, 4), image_size=(48, 64)).save(folder / "model")
    data = {"root": "rooms", "list": "nyu_train.txt", "val_list": "nyu_val.txt"}
    config = {"encoder": "test_resnet", "data": data, "protocol": "nyu-bts-scaled"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_it_shows_reconstructions_and_every_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_depth_world(tmp_path / "rooms", train=1, val=4, size=(48, 64))
    pretrained(tmp_path / "pretrain", input_size=(64, 96))
    depth = [f"{label}={trained(tmp_path / label)}" for label in ("scratch", "spark")]
    command = ["--pretrain", "pretrain", "--depth", depth[0], "--depth", depth[1], "--images", "3"]
    assert demo_figure.main([*command, "--output", "docs/demo.png"]) == 0
    with Image.open("docs/demo.png") as image:
        assert 800 < image.width < 1200
        assert np.asarray(image).std() > 20


def test_a_long_list_of_images_is_sampled_evenly(tmp_path):
    make_depth_world(tmp_path, train=1, val=9)
    run = Run("x", tmp_path, {"data": {"root": str(tmp_path), "val_list": "nyu_val.txt"}})
    names = [sample.name for sample in demo_figure.validation_samples(run, 3)]
    assert [re.search(r"(\d+)\.png", name)[1] for name in names] == ["0001", "0004", "0007"]  # type: ignore[index]


def test_visible_patches_are_as_they_were(tmp_path):
    run = pretrained(tmp_path / "run")
    colour = np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)
    ((shown, masked, made),) = demo_figure.masked_and_reconstructed(run, [colour])
    assert shown.shape == masked.shape == made.shape == (64, 64, 3)
    hidden = (masked == 128).all(-1)
    assert 0.4 < hidden.mean() < 0.8
    np.testing.assert_array_equal(shown[~hidden], masked[~hidden])
    assert np.abs(made[~hidden].astype(int) - shown[~hidden]).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--depth", "x"], "takes LABEL=RUN"),
        (["--depth", "a=run", "--depth", "a=run"], "each label once"),
        (["--depth", "a=none"], "there is no folder none"),
        (["--depth", "a=run"], "does not say where its data is"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("encoder: x")
    assert demo_figure.main([*arguments, "--output", "a.png"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
