"""finetune/depth.py end to end on a tiny world: what a run writes, exact resume, freezing, stopping, and bad input."""

import json
import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from finetune import DepthModel, load_depth_model
from finetune.config import DepthConfig, DepthDataConfig, DepthModelConfig, TuningOptimConfig
from finetune.depth import main
from finetune.losses.weighted import WeightedLoss
from finetune.tasks import depth as task
from finetune.tasks.build import build_model, train_transform
from finetune.tasks.schedule import RunLength, run_phases
from spark.model.encoder import build_encoder
from spark.training.cli import parse_config
from spark.training.log import RunLog
from spark.weights.encoder import save_encoder
from spark.weights.official import timm_names
from tests.depth_world import make_depth_world
from tests.together import together


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_depth_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate remembers the precision of the first run of a process; every run here is a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def arguments(world: Path, output: Path, **options: Any) -> list[str]:
    """A run of 6 pairs in batches of 2, 3 steps an epoch."""
    given = {
        "encoder": "test_resnet",
        "data.root": world,
        "data.list": "nyu_train.txt",
        "data.val_list": "nyu_val.txt",
        "data.image_size": "[48,64]",
        "data.crop_size": "[32,32]",
        "data.border": "null",
        "data.workers": 0,
        "model.head_options": '{"decoder_channels": [16, 8, 8, 8, 8]}',
        "protocol": "nyu-bts-scaled",
        "optim.batch_size": 2,
        "optim.lr": 3e-3,
        "optim.warmup_steps": 1,
        "max_steps": 6,
        "log_every": 1,
        "triptychs": 1,
        "validate_every": 0,
        "output_dir": output,
        **options,
    }
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def run(world: Path, output: Path, **options: Any) -> list[dict]:
    AcceleratorState._reset_state(reset_partial_state=True)
    main(arguments(world, output, **options))
    return rows_of(output)


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows]


def weights_of(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def assert_same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def fails(world: Path, output: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """Run what must fail with one sentence and exit code 2; returns the sentence."""
    with pytest.raises(SystemExit) as stopped:
        run(world, output, **options)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    return errors


# --- options


def test_every_option_of_augmentation_reaches_the_transform() -> None:
    """All of them other than their defaults, so that one that is left out shows."""
    given = {
        "image_size": (96, 128),
        "crop_size": (32, 64),
        "border": None,
        "zoom": (1.1, 1.2),
        "flip": 0.1,
        "rotation": 3.0,
        "colour": 0.2,
        "gamma": (0.8, 1.2),
        "brightness": (0.7, 1.2),
        "channel": (0.8, 1.2),
        "contrast": (0.8, 1.2),
        "cut_depth": 0.3,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
    }
    config = DepthConfig(
        encoder="resnet18",
        data=DepthDataConfig(root="data", **given),
        output_dir="runs",
        model=DepthModelConfig(min_depth=0.1, max_depth=9.0),
    )
    assert asdict(train_transform(config)) == {**given, "min_depth": 0.1, "max_depth": 9.0}


# --- what a run writes


def test_a_run_writes_everything_and_learns(world: Path, tmp_path: Path) -> None:
    options = {"data.zoom": "[1,1]", "data.colour": 0, "losses": '{"silog": 1.0, "l1": 0.5}', "max_steps": 18}
    rows = run(world, tmp_path / "run", **options, validate_every=3)
    assert [row["step"] for row in rows] == list(range(1, 19))
    for row in rows:
        assert {
            "loss",
            "loss_silog",
            "loss_l1",
            "lr",
            "grad_norm",
            "epoch",
            "images_per_second",
        } <= row.keys()
        assert row["loss"] == pytest.approx(row["loss_silog"] + 0.5 * row["loss_l1"], rel=1e-5)
    assert np.mean(losses_of(rows)[-4:]) < 0.8 * np.mean(losses_of(rows)[:4])
    assert [row["step"] for row in rows if "val_delta1" in row] == [9, 18]
    assert rows[2]["epoch"] == 1.0

    output = tmp_path / "run"
    names = {path.name for path in output.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "figures",
        "checkpoints",
        "model",
        "evaluation.json",
        "best",
        "environment.json",
        "report.html",
    }
    figures = sorted(path.name for path in (output / "figures").iterdir())
    assert figures == ["triptychs_step_0000009.png", "triptychs_step_0000018.png", "worst_step_0000018.png"]
    results = json.loads((output / "evaluation.json").read_text())
    assert (results["protocol"], results["images"], results["step"]) == ("nyu-bts-scaled", 2, 18)
    assert len(results["per_image"]) == 2
    assert results["metrics"]["rmse"] == pytest.approx(rows[-1]["val_rmse"])
    model = load_depth_model(output / "model")
    assert model.image_size == (48, 64)
    assert results["model_sha256"] == model.sha256
    config = yaml.safe_load((output / "config.yaml").read_text())
    assert config["data"]["mean"] == list(model.mean)
    assert config["losses"] == {"silog": 1.0, "l1": 0.5}


def test_config_yaml_makes_the_same_run(world: Path, tmp_path: Path) -> None:
    first = run(world, tmp_path / "one")
    main(["--config", str(tmp_path / "one" / "config.yaml"), "--output_dir", str(tmp_path / "two")])
    assert losses_of(first) == losses_of(rows_of(tmp_path / "two"))


def test_without_pairs_to_validate_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(world, tmp_path / "run", **{"data.val_list": "null", "max_steps": 1})
    assert not (tmp_path / "run" / "evaluation.json").exists()
    assert (tmp_path / "run" / "model").is_dir()
    assert "--data.val_list" in capsys.readouterr().out


def test_home_folder_is_expanded_in_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text(
        "encoder: ~/encoder\noutput_dir: ~/out\nresume: ~/old\n"
        "data: {root: ~/nyu, list: ~/train.txt, val_list: ~/val.txt}\n"
    )
    config = parse_config(DepthConfig, ["--config", str(file)], "")
    paths = (config.encoder, config.output_dir, config.resume)
    assert paths == tuple(str(tmp_path / name) for name in ("encoder", "out", "old"))
    paths = (config.data.root, config.data.list, config.data.val_list)
    assert paths == tuple(str(tmp_path / name) for name in ("nyu", "train.txt", "val.txt"))


def test_bf16_is_evaluated_in_fp32(world: Path, tmp_path: Path) -> None:
    rows = run(world, tmp_path / "run", precision="bf16", max_steps=2)
    assert all(math.isfinite(loss) for loss in losses_of(rows))
    assert all(value.dtype != torch.bfloat16 for value in weights_of(tmp_path / "run").values())


# --- exactness


def test_resume_is_exact(world: Path, tmp_path: Path) -> None:
    """Drop path, accumulation, two losses, layer decay, the end of a frozen phase: all as if never stopped."""
    options = {
        "encoder": "test_convnext",
        "model.drop_path": 0.3,
        "accumulation": 2,
        "optim.frozen_epochs": 1,
        "optim.layer_decay": 0.8,
        "optim.encoder_lr_factor": 0.5,
        "losses": '{"silog": 1.0, "berhu": 0.5}',
        "optim.ema_decay": 0.7,
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
    }
    whole = run(world, tmp_path / "whole", **options)
    for step in (2, 4):
        checkpoint = tmp_path / "whole" / "checkpoints" / f"step_{step:07d}"
        rest = run(world, tmp_path / f"from{step}", **options, resume=checkpoint)
        assert losses_of(rest) == losses_of(whole)[step:]
        assert_same_weights(weights_of(tmp_path / f"from{step}"), weights_of(tmp_path / "whole"))


def test_averaged_weights_are_validated_and_exported(world: Path, tmp_path: Path) -> None:
    """The average is the recursion over the weights of each step, which the checkpoints hold."""
    rows = run(world, tmp_path / "run", **{"optim.ema_decay": 0.7}, checkpoint_every=1, keep_checkpoints=6)
    average: dict[str, torch.Tensor] = {}
    for step in range(1, 7):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:07d}"
        for name, value in load_file(folder / "model.safetensors").items():
            keep = 0.7 if step > 1 and value.is_floating_point() and "running_" not in name else 0.0
            average[name] = keep * average.get(name, torch.zeros(())) + (1 - keep) * value
    exported = weights_of(tmp_path / "run")
    for name, value in exported.items():
        torch.testing.assert_close(value, average[name].to(value.dtype), rtol=1e-5, atol=1e-6, msg=name)
    last = load_file(folder / "model.safetensors")
    assert any(not torch.equal(value, last[name]) for name, value in exported.items())
    results = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert results["metrics"]["rmse"] == pytest.approx(rows[-1]["val_rmse"])


def test_the_best_model_is_kept_and_patience_ends_a_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores from a list; the best of them is the second, after which two follow that are not better."""
    scores = dict(zip(range(1, 7), (0.5, 0.3, 0.4, 0.3, 0.1, 0.1), strict=True))
    seen: list[int] = []
    plain_score = task.score

    def scored(model: Any, *arguments: Any, **options: Any) -> Any:
        results, drawn = plain_score(model, *arguments, **options)
        seen.append(len(rows_of(tmp_path / "run")))
        results["metrics"]["abs_rel"] = scores[min(seen[-1], 6)]
        return results, drawn

    monkeypatch.setattr(task, "score", scored)
    monkeypatch.setattr(RunLength, "validates_after", lambda self, step: True)
    options = {"checkpoint_every": 1, "keep_checkpoints": 9, "patience": 2}
    rows = run(world, tmp_path / "run", **options)
    assert [row["val_abs_rel"] for row in rows] == [0.5, 0.3, 0.4, 0.3]
    text = capsys.readouterr().out
    assert "ended early: the last 2 validations were no better" in text
    assert "the best validation (abs_rel 0.300, step 2) is that of" in text

    def at(step: int) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / "run" / "checkpoints" / f"step_{step:07d}" / "model.safetensors")

    assert_same_weights(load_file(tmp_path / "run" / "best" / "model.safetensors"), at(2))
    assert_same_weights(weights_of(tmp_path / "run"), at(4))

    # A resumed run knows the scores before; with more patience it goes on and finds a better one.
    run(world, tmp_path / "run", **options, resume="true")
    assert "ended early" in capsys.readouterr().out
    rows = run(world, tmp_path / "run", **{**options, "patience": 3}, resume="true")
    assert [row["val_abs_rel"] for row in rows] == [0.5, 0.3, 0.4, 0.3, 0.1, 0.1]
    assert_same_weights(load_file(tmp_path / "run" / "best" / "model.safetensors"), at(5))

    # A crash between the checkpoint and the validation of a step: the validation is made up for.
    known = [
        {name: value for name, value in row.items() if row["step"] < 5 or not name.startswith("val_")}
        for row in rows[:5]
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_0000006")
    rows = run(world, tmp_path / "run", **{**options, "patience": 3}, resume="true")
    assert [(row["step"], row["val_abs_rel"]) for row in rows][4:] == [(5, 0.1), (6, 0.1)]


def train_with_settled_norms(model: DepthModel, mode: bool = True) -> DepthModel:
    """In place of `DepthModel.train`: batch norms keep their statistics, so that images do not depend on each other."""
    torch.nn.Module.train(model, mode)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return model


def test_accumulation_changes_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts with equally many readings, and batch norms that keep their statistics: the gradients add up to the same.

    Nothing hides a gradient that is lost or too large: plain descent, without clipping.
    """
    monkeypatch.setattr(DepthModel, "train", train_with_settled_norms)
    options = {
        "encoder": "test_convnext",
        "losses": '{"l1": 1.0}',
        "data.crop_size": "[48,64]",
        "data.zoom": "[1,1]",
        "data.val_list": "null",
        "optim.name": "sgd",
        "optim.lr": 1e-2,
        "optim.batch_size": 4,
        "optim.clip_grad": "null",
        "max_steps": 3,
    }
    whole = run(world, tmp_path / "whole", **options)
    parts = run(world, tmp_path / "parts", **options, accumulation=2)
    assert losses_of(parts) == pytest.approx(losses_of(whole), rel=1e-5)
    assert [row["grad_norm"] for row in parts] == pytest.approx([row["grad_norm"] for row in whole], rel=1e-4)
    expected, weights = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_memory_format_is_a_matter_of_speed(world: Path, tmp_path: Path) -> None:
    last = run(world, tmp_path / "last", max_steps=3)
    assert yaml.safe_load((tmp_path / "last" / "config.yaml").read_text())["channels_last"] is True
    first = run(world, tmp_path / "first", max_steps=3, channels_last="false")
    assert losses_of(last) == pytest.approx(losses_of(first), rel=1e-3)


def test_loader_processes_change_nothing(world: Path, tmp_path: Path) -> None:
    alone = run(world, tmp_path / "alone", max_steps=3)
    helped = run(world, tmp_path / "helped", max_steps=3, **{"data.workers": 2})
    assert losses_of(alone) == losses_of(helped)


def test_stop_signal_saves_and_resume_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(world, tmp_path / "whole")
    write_row = RunLog.row

    def stop_after_three(log: Any, step: int, **values: Any) -> None:
        write_row(log, step, **values)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "row", stop_after_three)
        stopped = run(world, tmp_path / "run")  # returns: exit code 0
    assert len(stopped) == 3
    assert not (tmp_path / "run" / "model").exists()
    printed = capsys.readouterr().out
    assert "stopped and saved after step 3 of 6" in printed
    assert f"--config {tmp_path}/run/config.yaml --resume true" in printed
    main(["--config", str(tmp_path / "run" / "config.yaml"), "--resume", "true"])
    assert losses_of(rows_of(tmp_path / "run")) == losses_of(whole)
    assert_same_weights(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_resuming_a_finished_run_changes_nothing(world: Path, tmp_path: Path) -> None:
    run(world, tmp_path / "run", max_steps=2)
    before = weights_of(tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    rows = run(world, tmp_path / "run", max_steps=2, resume="true")
    assert len(rows) == 2
    assert_same_weights(before, weights_of(tmp_path / "run"))
    assert (tmp_path / "run" / "evaluation.json").exists()


def test_resuming_beyond_the_end_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(world, tmp_path / "run", max_steps=3)
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000003"
    run(world, tmp_path / "short", max_steps=2, resume=checkpoint)
    said = capsys.readouterr().out
    assert "the checkpoint is at step 3, this run has 2 steps: nothing is left to train" in said
    assert "done after step 3" in said
    assert "to continue" not in said
    assert_same_weights(weights_of(tmp_path / "short"), weights_of(tmp_path / "run"))
    assert json.loads((tmp_path / "short" / "evaluation.json").read_text())["step"] == 3


# --- encoders


def test_frozen_epochs_hold_the_encoder_still(world: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    encoder = build_encoder("test_resnet")
    save_encoder(encoder, tmp_path / "encoder")
    options = {"encoder": tmp_path / "encoder", "optim.frozen_epochs": 1, "checkpoint_every": 3}
    run(world, tmp_path / "run", **options)
    stored = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    frozen = load_file(tmp_path / "run" / "checkpoints" / "step_0000003" / "model.safetensors")
    for name, value in stored.items():
        assert torch.equal(frozen[name], value), name
    final = weights_of(tmp_path / "run")
    assert all(
        not torch.equal(final[name], value) for name, value in stored.items() if name.endswith("conv1.weight")
    )
    assert final["encoder.bn1.num_batches_tracked"] == 3


def test_an_encoder_that_never_learns_is_announced(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data.val_list": "null", "max_steps": 2}
    run(world, tmp_path / "all", **options, **{"optim.frozen_epochs": 5})
    said = capsys.readouterr().out
    assert "warning: optim.frozen_epochs 5 are 15 steps and this run has 2" in said
    run(world, tmp_path / "some", **options, **{"optim.frozen_epochs": 0.34})
    assert "warning" not in capsys.readouterr().out


def test_a_run_from_an_official_file(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the encoder frozen for the one step, the model that is written has the weights that it started from."""
    # Not at the top: that module computes when it is imported, and the server that forks the processes of
    # test_two_processes_with_a_frozen_encoder imports this one; a process forked from one with threads hangs.
    from tests.spark.training.test_checkpoint import ATTO, original_convnext, spark_style, training_file

    torch.manual_seed(5)
    state = original_convnext(**ATTO)
    path = tmp_path / "convnext_atto_1kpretrained_spark_style.pth"
    torch.save(spark_style(state, ATTO["dims"], width=320, norm="ln"), path)
    options = {"encoder": path, "data.val_list": "null", "max_steps": 1, "optim.frozen_epochs": 1}

    sentence = fails(world, tmp_path / "run", capsys, **options)
    assert "(--encoder_name) with its timm name" in sentence
    assert "model_name" not in sentence
    sentence = fails(world, tmp_path / "run", capsys, **options, encoder_name="resnet18")
    assert "does not fit resnet18" in sentence
    assert "(--encoder_name)" in sentence
    assert "model_name" not in sentence

    run(world, tmp_path / "run", **options, encoder_name="convnext_atto")
    final = weights_of(tmp_path / "run")
    assert torch.equal(final["encoder.stem.0.weight"], state["downsample_layers.0.0.weight"])
    assert torch.equal(final["encoder.stages.3.blocks.1.gamma"], state["stages.3.1.gamma"])
    for name, value in timm_names(state).items():
        assert torch.equal(final[f"encoder.{name}"].flatten(), value.flatten()), name

    torch.save(training_file(state, "convnext_atto"), path)  # says what it is
    run(world, tmp_path / "named", **options)
    named = weights_of(tmp_path / "named")
    for name in timm_names(state):
        assert torch.equal(named[f"encoder.{name}"], final[f"encoder.{name}"]), name


def test_the_head_starts_alike_whatever_the_encoder_weights(tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_encoder(build_encoder("test_resnet"), tmp_path / "encoder")

    def head_of(source: str, seed: int = 0) -> dict[str, torch.Tensor]:
        config = DepthConfig(encoder=source, data=DepthDataConfig(root="data"), output_dir="runs", seed=seed)
        return build_model(config)[0].head.state_dict()

    assert_same_weights(head_of("test_resnet"), head_of(str(tmp_path / "encoder")))
    assert not torch.equal(
        head_of("test_resnet")["project.weight"], head_of("test_resnet", seed=1)["project.weight"]
    )


@pytest.mark.parametrize("encoder", ["test_resnet", "other"])
def test_checkpoint_of_another_architecture(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoder: str
) -> None:
    run(world, tmp_path / "run", max_steps=1)
    changed = (
        {"encoder": "test_convnext"} if encoder == "other" else {"losses": '{"l1": 1.0}', "optim.name": "sgd"}
    )
    sentence = fails(world, tmp_path / "run", capsys, max_steps=2, resume="true", **changed)
    assert "step_0000001" in sentence


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data.root": "/no/such/folder"}, "/no/such/folder"),
        ({"data.list": "nyu_trian.txt"}, "no list file nyu_trian.txt"),
        ({"data.val_list": "none.txt"}, "no list file none.txt"),
        ({"encoder": "resnet5O"}, "resnet50"),
        ({"encoder": "no/encoder"}, "no encoder at"),
        ({"encoder": "vit_tiny_patch16_224"}, "pyramid"),
        ({"model.head": "unet"}, "unetpp"),
        ({"model.max_deph": 3}, "model.max_depth"),
        ({"losses": '{"silok": 1.0}'}, "did you mean 'silog'"),
        ({"data.crop_size": "[300,32]"}, "does not fit"),
        ({"protocol": "nyu-bst"}, "nyu-bts"),
        ({"protocol": "nyu-bts"}, "480x640"),
        ({"accumulation": 3}, "optim.batch_size 2"),
        ({"optim.warmup_steps": 9}, "optim.warmup_steps"),
        ({"optim.lr": -1}, "optim.lr must be a number above 0"),
        ({"model.head_options": '{"decoder_chanels": [8]}'}, "did you mean 'decoder_channels'"),
        ({"loss_options": '{"silog": {"variance": 1}}'}, "variance_focus"),
        ({"model.encoder_options.pretrained": "true"}, "encoder_options cannot set pretrained"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        (
            {"encoder_name": "resnet18"},
            "encoder_name is for .pth files and for convnets of your own in files and folders: test_resnet",
        ),
    ],
)
def test_user_errors_are_sentences(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict, message: str
) -> None:
    if options.get("precision") == "fp16" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert message in fails(world, tmp_path / "run", capsys, **options)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_with_a_run_is_not_overwritten(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(world, tmp_path / "run", max_steps=1)
    assert "--resume true" in fails(world, tmp_path / "run", capsys, max_steps=1)
    assert rows_of(tmp_path / "run") == rows


def test_nan_stops_with_the_state_saved_and_the_batch_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(world, tmp_path / "whole", max_steps=4)
    forward = WeightedLoss.forward
    calls = []

    def spoil(self: Any, *maps: torch.Tensor) -> Any:
        calls.append(0)
        total, parts = forward(self, *maps)
        return (total * math.nan if len(calls) == 3 else total), parts

    with monkeypatch.context() as patch:
        patch.setattr(WeightedLoss, "forward", spoil)
        sentence = fails(world, tmp_path / "run", capsys, max_steps=4)
    assert "the loss is nan" in sentence
    assert "at step 3" in sentence
    named = (tmp_path / "run" / "nonfinite_step_0000003.txt").read_text().splitlines()
    assert len(named) == 2
    assert all(name.startswith("train_scene/rgb_") for name in named)
    rows = run(world, tmp_path / "run", max_steps=4, resume="true")
    assert losses_of(rows) == losses_of(whole)
    assert_same_weights(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_pairs_without_ground_truth_are_counted_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_depth_world(tmp_path / "world", train=4)
    depth = world / "train_scene" / "sync_depth_0001.png"
    cv2.imwrite(str(depth), np.full((48, 64), 60000, np.uint16))  # readings, all beyond max_depth
    options = {"optim.batch_size": 1, "max_steps": 4, "data.crop_size": "[32,64]"}
    rows = run(world, tmp_path / "run", **options, **{"data.max_empty": 0.5})
    assert rows[-1]["empty_batches"] == 1
    assert sum(loss is None for loss in losses_of(rows)) == 1
    assert all(value.isfinite().all() for value in weights_of(tmp_path / "run").values())
    assert (
        "1 micro-batches taught nothing: they had no pixel with a ground truth between 0.001 and 10 m"
        in capsys.readouterr().out
    )
    assert "data.max_empty" in fails(world, tmp_path / "strict", capsys, **options)


def test_unreadable_pairs_are_skipped_reported_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_depth_world(tmp_path / "world", train=4)
    image = world / "train_scene" / "rgb_0002.png"
    image.write_bytes(image.read_bytes()[:200])
    options = {"data.max_unreadable": 0.3, "max_steps": 2}
    run(world, tmp_path / "run", **options)
    assert "rgb_0002.png" in (tmp_path / "run" / "skipped_images.txt").read_text()
    assert "rgb_0002.png" in capsys.readouterr().out
    assert "data.max_unreadable" in fails(
        world, tmp_path / "strict", capsys, max_steps=2, **{"data.max_unreadable": 0}
    )


def test_a_failing_validation_does_not_lose_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its header passes the check at the start; repaired, the run goes on as if nothing had been."""
    world = make_depth_world(tmp_path / "world")
    options = {"validate_every": 1, "max_steps": 4}
    whole = run(world, tmp_path / "whole", **options)
    depth = world / "val_scene" / "sync_depth_0001.png"
    sound = depth.read_bytes()
    depth.write_bytes(sound[:100])
    assert "sync_depth_0001.png" in fails(world, tmp_path / "run", capsys, **options)
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3]
    depth.write_bytes(sound)
    resumed = run(world, tmp_path / "run", **options, resume="true")
    assert losses_of(resumed) == losses_of(whole)
    assert_same_weights(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))


def test_every_validation_pair_is_checked_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = make_depth_world(tmp_path / "world")
    (world / "val_scene" / "rgb_0001.png").write_bytes(b"no image")
    assert "rgb_0001.png" in fails(world, tmp_path / "run", capsys)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_figures_that_cannot_be_written_do_not_stop_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(task, "save_figure", full)
    rows = run(world, tmp_path / "run", max_steps=1)
    assert "val_delta1" in rows[0]
    assert "no triptychs of step 1, the run goes on: the disk is full" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("out of memory"), RuntimeError("DataLoader worker (pid 1) was killed")],
    ids=["GPU memory", "loader"],
)
def test_errors_outside_our_hands_save_the_state(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = run(world, tmp_path / "whole", max_steps=3)
    forward = WeightedLoss.forward
    calls = []

    def fail(self: Any, *maps: torch.Tensor) -> Any:
        calls.append(0)
        if len(calls) == 3:
            raise error
        return forward(self, *maps)

    with monkeypatch.context() as patch:
        patch.setattr(WeightedLoss, "forward", fail)
        with pytest.raises((SystemExit, RuntimeError)):
            run(world, tmp_path / "run", max_steps=3)
    assert losses_of(run(world, tmp_path / "run", max_steps=3, resume="true")) == losses_of(whole)


def test_skipped_pairs_are_in_every_checkpoint(tmp_path: Path) -> None:
    world = make_depth_world(tmp_path / "world", train=4)
    image = world / "train_scene" / "rgb_0002.png"
    image.write_bytes(image.read_bytes()[:200])
    run(
        world,
        tmp_path / "run",
        **{"data.max_unreadable": 0.3, "max_steps": 3, "log_every": 100, "checkpoint_every": 2},
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000002"
    extra = torch.load(checkpoint / "state.pt", weights_only=True)["extra"]
    assert [Path(name).name for name in extra["unreadable"]["reasons"]] == ["rgb_0002.png"]


def test_resume_says_that_the_pairs_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = make_depth_world(tmp_path / "world")
    run(world, tmp_path / "run", max_steps=1)
    capsys.readouterr()
    run(world, tmp_path / "run", max_steps=2, resume="true")
    assert "the pairs to train on" not in capsys.readouterr().out
    lines = (world / "nyu_train.txt").read_text().splitlines()
    (world / "nyu_train.txt").write_text("\n".join(lines[1:]))
    run(world, tmp_path / "run", max_steps=3, resume="true")
    assert "the pairs to train on, 6 then and 5 now" in capsys.readouterr().out


def test_the_border_of_other_frames_is_announced(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data.crop_size": "[32,48]", "max_steps": 1, "data.val_list": "null"}
    run(world, tmp_path / "cut", **options, **{"data.border": "[45,472,43,608]"})
    assert (
        "scaled to these frames of 48x64: crops come from rows 4:47, columns 4:61" in capsys.readouterr().out
    )
    run(world, tmp_path / "whole", **options)
    assert "scaled to" not in capsys.readouterr().out


# --- length


def length_of(num_pairs: int, **options: Any) -> RunLength:
    optim = TuningOptimConfig(batch_size=32, frozen_epochs=2)
    return run_phases(
        DepthConfig(encoder="", data=DepthDataConfig(root="data"), output_dir="runs", optim=optim, **options),
        num_pairs,
    )


def test_phases_in_steps() -> None:
    length = length_of(795, epochs=15)
    assert (length.steps, length.warmup, length.frozen) == (373, 25, 50)
    assert [step for step in range(1, 374) if length.validates_after(step)] == [
        *(math.ceil(epoch * 795 / 32) for epoch in range(1, 15)),
        373,
    ]
    assert length_of(795, max_steps=10).warmup == 10
    rare = length_of(64, epochs=4, validate_every=0)
    assert [step for step in range(1, 9) if rare.validates_after(step)] == [8]
    often = length_of(64, epochs=2, validate_every=0.5)
    assert [step for step in range(1, 5) if often.validates_after(step)] == [1, 2, 3, 4]


# --- several processes


def one_of_two(rank: int, argv: list[str]) -> None:
    main(argv)


def test_two_processes_with_a_frozen_encoder(world: Path, tmp_path: Path) -> None:
    """DDP must accept an encoder without gradients, and its learning afterwards."""
    options = {"encoder": "test_convnext", "optim.frozen_epochs": 0.67, "max_steps": 4, "checkpoint_every": 2}
    argv = arguments(world, tmp_path / "run", **options)
    done = together(one_of_two, argv, folder=tmp_path, ACCELERATE_USE_CPU="true")
    assert done.codes == [0, 0], done.stderr
    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(loss) for loss in losses_of(rows))
    assert (tmp_path / "run" / "evaluation.json").exists()
    config = DepthConfig(encoder="test_convnext", data=DepthDataConfig(root="data"), output_dir="runs")
    start = {f"encoder.{name}": value for name, value in build_model(config)[0].encoder.state_dict().items()}
    frozen = load_file(tmp_path / "run" / "checkpoints" / "step_0000002" / "model.safetensors")
    assert_same_weights(start, {name: frozen[name] for name in start})
    assert not torch.equal(
        weights_of(tmp_path / "run")["encoder.stem.0.weight"], start["encoder.stem.0.weight"]
    )
    assert "2 processes x 1 parts x 1 pairs" in (tmp_path / "rank0.out").read_text()
    assert "step 4" not in (tmp_path / "rank1.out").read_text()
    assert "step 4" not in (tmp_path / "rank1.err").read_text()


STEADY = {
    "encoder": "test_convnext",
    "losses": '{"l1": 1.0}',
    "data.crop_size": "[48,64]",
    "data.zoom": "[1,1]",
    "optim.name": "sgd",
    "optim.lr": 1e-2,
}
"""With them, losses of the processes' shares average to the loss of the whole batch."""


def with_settled_norms(rank: int, argv: list[str]) -> None:
    DepthModel.train = train_with_settled_norms  # type: ignore[method-assign]
    main(argv)


def test_two_processes_train_and_measure_as_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a batch each, with equally many readings: losses, weights and scores are those of one process."""
    options = {**STEADY, "max_steps": 3}
    done = together(
        with_settled_norms,
        arguments(world, tmp_path / "two", **options),
        folder=tmp_path,
        ACCELERATE_USE_CPU="true",
    )
    assert done.codes == [0, 0], done.stderr
    monkeypatch.setattr(DepthModel, "train", train_with_settled_norms)
    one = run(world, tmp_path / "one", **options)
    assert losses_of(rows_of(tmp_path / "two")) == pytest.approx(losses_of(one), rel=1e-5)
    for name, value in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(weights_of(tmp_path / "two")[name], value, rtol=1e-4, atol=1e-5)
    scores = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two")]
    assert scores[1]["metrics"] == pytest.approx(scores[0]["metrics"], rel=1e-4)
    assert len(scores[0]["per_image"]) == len(scores[1]["per_image"])


def test_a_batch_larger_than_the_data_is_said(world, tmp_path, capsys) -> None:
    run(
        world,
        tmp_path / "run",
        **{"optim.batch_size": 16, "max_steps": "null", "epochs": 1, "validate_every": 0},
    )
    assert (
        "warning: a batch of 16 takes each of the 6 pairs 2.7 times: the run is 2.7 epochs; the whole run has 1 step"
        in capsys.readouterr().out
    )
