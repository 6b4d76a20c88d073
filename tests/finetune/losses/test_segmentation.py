"""Segmentation distillation: the decoder trains the core, and the saved model and what it says know nothing of it."""

import copy
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune import DepthModel
from finetune.losses.segmentation import Segmentation
from finetune.losses.weighted import WeightedLoss
from finetune.tasks.trained import TrainedDepth
from tests.depth_world import make_depth_world
from tests.finetune.tasks.test_depth_training import fails, run

BINS = {"width": 16, "bins": 8, "embedding": 8, "attractors": (4, 2, 2, 1)}
CHANNELS = (16, 8, 8, 8, 8)


def metric_model() -> DepthModel:
    torch.manual_seed(0)
    return DepthModel("test_resnet", head="metric_bins", **BINS)


def trained(classes: int = 13, **options: Any) -> TrainedDepth:
    model = metric_model()
    options = {"classes": classes, "decoder_channels": CHANNELS, **options}
    return TrainedDepth(model, WeightedLoss({"segmentation": 0.1}, {"segmentation": options})).train()


def test_three_million_parameters_on_a_core_of_256_channels() -> None:
    with torch.device("meta"):
        model = DepthModel("test_resnet", head="fusion")
        loss = Segmentation()
        loss.attach(model)
    assert sum(p.numel() for p in loss.parameters()) == pytest.approx(3e6, rel=0.05)


def test_logits_have_the_size_of_any_image() -> None:
    both = trained()
    output = both.model(torch.rand(2, 3, 40, 70))
    assert [tuple(output.extras[f"scale_{stride}"].shape[-2:]) for stride in (32, 16, 8, 4, 2)] == [
        (2, 3),
        (4, 6),
        (8, 12),
        (16, 24),
        (32, 48),
    ]
    loss = both.criterion.terms["segmentation"]
    logits = loss.prediction(output, {"labels": torch.zeros(2, 40, 70)}, both.model)
    assert logits.shape == (2, 13, 40, 70)
    assert output.extras["segmentation"].shape == (2, 13, 64, 96)


def test_the_model_knows_nothing_of_the_decoder(tmp_path: Path) -> None:
    model = metric_model().eval()
    images = torch.rand(1, 3, 50, 60)
    with torch.no_grad():
        plain = model(images)
    without = model.save(tmp_path / "without")
    both = trained().eval()
    saved = both.model.save(tmp_path / "with")
    for name in ("config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (without / name).read_bytes()
    with torch.no_grad():
        output = both.model(images)
    assert output.extras == {}
    assert torch.equal(output.depth, plain.depth)


def test_what_is_trained_has_the_names_of_its_parts() -> None:
    """As in the checkpoints of before the losses owned modules: the model's own names, then those of the decoder."""
    both = trained()
    names = list(both.state_dict())
    own = list(both.model.state_dict())
    assert names[: len(own)] == own
    assert {".".join(name.split(".")[:2]) for name in names[len(own) :]} == {
        "segmentation.decoder",
        "segmentation.classify",
    }
    again = copy.deepcopy(both)
    assert again.model.encoder is again.encoder
    assert again.criterion.terms["segmentation"] is again.segmentation
    assert again.encoder is not both.encoder


def test_a_frozen_encoder_stays_in_evaluation() -> None:
    both = trained()
    both.model.freeze_encoder()
    assert both.train().model.head.training
    assert not both.encoder.training


def test_classes_teach_the_core_and_the_encoder() -> None:
    both = trained(3)
    labels = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    total, parts = both({"image": torch.rand(2, 3, 64, 64), "labels": labels})
    torch.testing.assert_close(total.detach(), 0.1 * parts["segmentation"])
    total.backward()
    assert all(p.grad is not None for p in both.parameters() if p.requires_grad)
    reached = {name for name, p in both.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"segmentation.classify.weight", "segmentation.classify.bias"} <= reached
    assert any(name.startswith("encoder.") for name in reached)
    assert any(name.startswith("head.core.fuse.") for name in reached)
    assert not any(name.startswith("head.attractors") for name in reached)


@pytest.mark.parametrize("batch", [{}, {"labels": torch.full((2, 64, 64), 255)}], ids=["none", "void"])
def test_without_labels_every_parameter_has_a_gradient_of_zero(batch: dict[str, torch.Tensor]) -> None:
    both = trained(3)
    total, parts = both({"image": torch.rand(2, 3, 64, 64), **batch})
    assert parts == {}
    assert total == 0
    total.backward()
    for name, parameter in both.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert (parameter.grad == 0).all(), name


def test_heads_without_a_core_say_so() -> None:
    loss = Segmentation()
    loss.name = "segmentation"
    with pytest.raises(ValueError, match=r"needs a head with a core .*unetpp has none"):
        loss.attach(DepthModel("test_resnet", decoder_channels=(16, 8, 8, 8, 8)))
    with pytest.raises(ValueError, match="5 positive numbers"):
        trained(decoder_channels=(16, 8))


def make_labelled_world(root: Path) -> Path:
    """The tiny data set, with classes that can be read off the depth; 0 = void where there is no reading."""
    make_depth_world(root)
    for path in root.glob("*_scene/sync_depth_*.png"):
        metres = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) // 1000
        name = path.name.replace("sync_depth", "labels13")
        cv2.imwrite(str(path.with_name(name)), metres.clip(0, 13).astype(np.uint8))
    return root


def distillation(world: Path, output: Path, **options: Any) -> list[dict]:
    return run(
        world,
        output,
        **{
            "model.head": "metric_bins",
            "model.head_options": '{"width": 16, "bins": 8, "embedding": 8, "attractors": [4, 2, 2, 1]}',
            "losses": '{"silog": 1.0, "segmentation": 0.1}',
            "loss_options": '{"segmentation": {"decoder_channels": [16, 8, 8, 8, 8]}}',
            "data.labels": 13,
            "max_steps": 4,
            **options,
        },
    )


def test_a_run_with_distillation_resumes_and_exports_without_it(tmp_path: Path) -> None:
    world = make_labelled_world(tmp_path / "world")
    rows = distillation(world, tmp_path / "whole", checkpoint_every=2)
    steps = [row for row in rows if "loss_silog" in row]
    assert len(steps) == 4
    for row in steps:
        assert row["loss"] == pytest.approx(row["loss_silog"] + 0.1 * row["loss_segmentation"], rel=1e-5)
    checkpoint = load_file(tmp_path / "whole" / "checkpoints" / "step_0000004" / "model.safetensors")
    assert any(key.startswith("segmentation.") for key in checkpoint)
    exported = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    assert set(exported) == {key for key in checkpoint if not key.startswith("segmentation.")}
    assert all(torch.equal(value, checkpoint[key]) for key, value in exported.items())

    half = tmp_path / "whole" / "checkpoints" / "step_0000002"
    resumed = distillation(world, tmp_path / "resumed", resume=half)
    assert [row["loss"] for row in resumed] == [row["loss"] for row in rows[2:]]

    without = distillation(world, tmp_path / "without", losses='{"silog": 1.0}', loss_options="{}")
    # The decoder draws its weights apart: depth starts from the same ones with and without it.
    assert without[0]["loss"] == pytest.approx(steps[0]["loss_silog"], rel=1e-6)
    assert (tmp_path / "without" / "model" / "config.json").read_bytes() == (
        tmp_path / "whole" / "model" / "config.json"
    ).read_bytes()


@pytest.mark.parametrize(("void", "classes"), [("ignore", 13), ("class", 14)])
def test_void_is_ignored_or_a_class(
    void: str, classes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_labelled_world(tmp_path / "world")
    options = {"segmentation": {"decoder_channels": [16, 8, 8, 8, 8], "classes": classes}}
    given = {"data.void": void, "loss_options": json.dumps(options), "max_steps": 1, "triptychs": 0}
    assert len(distillation(world, tmp_path / "run", **given)) == 1
    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step_0000001" / "model.safetensors")
    assert checkpoint["segmentation.classify.bias"].shape == (classes,)
    options["segmentation"]["classes"] = 27 - classes
    with pytest.raises(SystemExit):
        distillation(world, tmp_path / "wrong", **{**given, "loss_options": json.dumps(options)})
    assert f"set loss_options.segmentation.classes to {classes}" in capsys.readouterr().err
    # and every further set must have as many
    other = "class" if void == "ignore" else "ignore"
    sets = f"[{{root: {world}, list: nyu_train.txt, labels: 13, void: {other}}}]"
    with pytest.raises(SystemExit):
        distillation(world, tmp_path / "wrong", **{**given, "data.sets": sets})
    assert f"to {27 - classes}, of all sets alike" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_labels_that_the_data_lacks_are_asked_for_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_depth_world(tmp_path / "world")
    sentence = fails(
        world,
        tmp_path / "run",
        capsys,
        **{
            "model.head": "fusion",
            "model.head_options": '{"width": 16}',
            "losses": '{"segmentation": 1.0}',
            "protocol": "nyu-affine",
        },
    )
    assert "needs labels of the data, which has only" in sentence
    assert "data.labels 13 or 40" in sentence
    assert not (tmp_path / "run").exists()
