"""spark.pretrain in this process: results, exact resume, stopping, and every mistake a user can make."""

import copy
import errno
import os
import shutil
import signal
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spark.training.checkpoint
from spark import pretrain
from spark import task as pretraining
from spark.config import PretrainConfig
from spark.images.batches import MaskedBatches
from spark.images.sources import open_source, remote
from spark.model.spark import SparK
from spark.monitor.measures import Monitor
from spark.monitor.watch import build_monitor
from spark.sparse import PACKED
from spark.task import checkpoint_activations, default_betas, try_forward
from spark.training.cli import parse_config
from spark.training.guard import Guard
from spark.training.log import RunLog, read_rows

NOT_REPEATED = ("images_per_second", "data_wait")
EXACT = ("--model.drop_path=0.3", "--accumulation=2", "--data.workers=1")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Folder with 12 coloured images in two class folders."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(12):
        tiles = random.integers(0, 256, (5, 6, 3)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        path = folder / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(tiles).save(path)
    return folder


def small_run(photos, folder, *more):
    """Arguments of a small run of 8 steps; later ones override them."""
    options = {
        "model.name": "test_resnet",
        "model.input_size": "64",
        "model.decoder_width": "32",
        "data.train": str(photos),
        "data.workers": "0",
        "optim.batch_size": "8",
        "optim.base_lr": "0.1",
        "optim.warmup_steps": "2",
        "max_steps": "8",
        "log_every": "1",
        "checkpoint_every": "0",
        "panels_every": "0",
        "monitor.every": "0",
        "output_dir": str(folder),
    }
    return [f"--{name}={value}" for name, value in options.items()] + list(more)


@pytest.fixture
def command(photos, tmp_path):
    """Arguments of a small run into a folder of this test."""
    return lambda *more, output="run": small_run(photos, tmp_path / output, *more)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """An uninterrupted run; interrupted ones must come to the same."""
    folder = tmp_path_factory.mktemp("whole")
    run(small_run(photos, folder))
    return folder


@pytest.fixture(scope="module")
def whole_exact(photos, tmp_path_factory):
    """An uninterrupted run with everything that draws random numbers."""
    folder = tmp_path_factory.mktemp("whole_exact")
    run(small_run(photos, folder, *EXACT))
    return folder


def run(arguments):
    """A run as from the command line, each time as if in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain.main(arguments)


def curve(folder):
    """Rows without what depends on the clock."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in NOT_REPEATED} for row in rows]


def weights(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step:07d}" / "model.safetensors")


def moments(folder, step):
    state = torch.load(folder / "checkpoints" / f"step_{step:07d}" / "state.pt", weights_only=True)
    return {
        f"{i}.{k}": v
        for i, s in state["optimizer"]["state"].items()
        for k, v in s.items()
        if torch.is_tensor(v)
    }


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def error_of(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(arguments)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def at_step(monkeypatch, step, action):
    """Do something in the middle of a run: when the row of this step is logged."""
    original = RunLog.row

    def row(self, number, **values):
        original(self, number, **values)
        if number == step:
            action()

    monkeypatch.setattr(RunLog, "row", row)


# --- what a run leaves


def test_a_run_and_its_results(command, tmp_path, capsys):
    run(command("--panels_every=5", "--checkpoint_every=3", "--optim.base_lr=0.1"))
    folder = tmp_path / "run"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["optim"]["betas"] == [0.9, 0.95], "resolved by family and saved"
    assert config["data"]["mean"] == [0.485, 0.456, 0.406]
    assert parse_config(PretrainConfig, ["--config", str(folder / "config.yaml")], "").max_steps == 8

    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert {"loss", "lr", "weight_decay", "grad_norm", "images_per_second", "epoch"} <= row.keys()
        assert row["loss"] == pytest.approx(1.0, abs=0.1)
        assert row["epoch"] == pytest.approx(row["step"] * 8 / 12)
    peak = 0.1 * 8 / 256
    assert rows[0]["lr"] == pytest.approx(0.005 * peak)
    assert rows[2]["lr"] == pytest.approx(peak)
    assert rows[7]["lr"] == pytest.approx(0.001 * peak)
    assert (rows[0]["weight_decay"], rows[7]["weight_decay"]) == (pytest.approx(0.04), pytest.approx(0.2))

    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_0000006",
        "step_0000008",
    ]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == [
        "panels_0000005.png",
        "panels_0000008.png",
    ]
    assert list((folder / "tensorboard").iterdir())
    assert not (folder / "skipped_images.txt").exists()
    encoder = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True)
    trained = weights(folder, 8)
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, trained[f"encoder.{name}"]), name

    text = capsys.readouterr().out
    assert "betas [0.9, 0.95] (those of ResNets, as it has batch norm), lr " in text
    assert "batch      8 images: processes 1 x accumulation 1 x 8 at once; cpu, fp32" in text
    assert f"the encoder is in {folder / 'encoder'}" in text


def test_it_learns(command, tmp_path, photos):
    """Four images over and over, their tiles of random colours learned by heart: the loss must fall."""
    few = tmp_path / "few.txt"
    few.write_text("\n".join(str(path) for path in sorted(photos.rglob("*.png"))[:4]))
    run(
        command(
            f"--data.train={few}",
            "--optim.name=adamw",
            "--optim.base_lr=0.2",
            "--optim.batch_size=4",
            "--optim.weight_decay=0",
            "--optim.weight_decay_end=null",
            "--data.crop_scale=[1,1]",
            "--data.hflip=0",
            "--max_steps=40",
        )
    )
    losses = [row["loss"] for row in curve(tmp_path / "run")]
    assert np.mean(losses[-3:]) < 0.96 * losses[0]


def test_accumulated_parts_add_up_to_the_mean_gradient(command, tmp_path, monkeypatch):
    """The step's gradient is the mean of those of its parts, each computed by itself from the weights at the start."""
    parts, before = [], []
    original = SparK.forward

    def forward(self, images, visible, *count):
        if self.training:
            before.extend([copy.deepcopy(self)] * (not parts))
            parts.append((images.clone(), visible.clone()))
        return original(self, images, visible, *count)

    with monkeypatch.context() as patch:
        patch.setattr(SparK, "forward", forward)
        run(
            command(
                "--model.name=test_convnext",
                "--accumulation=4",
                "--max_steps=1",
                "--optim.warmup_steps=0",
                "--optim.clip_grad=null",
            )
        )
    assert [len(images) for images, _ in parts] == [2, 2, 2, 2]

    (spark,) = before
    weights = [parameter for parameter in spark.parameters() if parameter.requires_grad]
    each = [torch.autograd.grad(spark(*part).loss, weights) for part in parts]
    mean = [torch.stack(gradients).mean(0) for gradients in zip(*each, strict=True)]
    expected = torch.stack([gradient.norm() for gradient in mean]).norm().item()
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["grad_norm"] == pytest.approx(expected, rel=1e-4)
    alone = torch.stack([gradient.norm() for gradient in each[-1]]).norm().item()
    assert expected != pytest.approx(alone / 4, rel=0.1), "a lost part shows in the norm"


@pytest.mark.parametrize(
    "options",
    [
        ["--model.name=test_convnext", "--model.input_size=[64,96]", "--model.drop_path=0.2"],
        ["--model.in_chans=1", "--optim.name=sgd", "--optim.clip_grad=null"],
        ["--precision=bf16", "--channels_last=false", "--accumulation=2"],
        ["--model.layout=masked", "--model.patch_size=64", "--model.input_size=128", "--optim.name=adamw"],
    ],
)
def test_other_options(command, tmp_path, options):
    run(command("--max_steps=3", *options))
    rows = curve(tmp_path / "run")
    assert len(rows) == 3
    assert all(row["loss"] == pytest.approx(1.0, abs=0.15) for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'encoder'}", pretrained=True) is not None


@pytest.mark.parametrize(
    ("name", "betas"), [("test_convnext", (0.9, 0.999)), ("test_efficientnet", (0.9, 0.95))]
)
def test_betas_by_default_are_those_of_nets_with_such_norms(name, betas):
    assert default_betas(SparK(name, 64, decoder_width=32)) == betas


def test_loader_processes_change_nothing(command, tmp_path, whole):
    run(command("--data.workers=2"))
    assert curve(tmp_path / "run") == curve(whole)


def test_seed_changes_the_run(command, tmp_path, whole):
    run(command("--seed=1", "--checkpoint_every=0"))
    assert curve(tmp_path / "run")[0]["loss"] != curve(whole)[0]["loss"]


# --- averaged weights


def averages(folder, step):
    return load_file(folder / "checkpoints" / f"step_{step:07d}" / "ema.safetensors")


def test_averaged_weights_are_exact_on_resume_and_exported_on_demand(command, tmp_path, monkeypatch, whole):
    options = ("--optim.ema_decay=0.7", "--checkpoint_every=1", "--keep_checkpoints=9", "--export_ema=true")
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run(command(*options))
    run(command(*options, "--resume=true"))
    assert curve(folder) == curve(whole), "an average changes no training"
    assert_equal(weights(folder, 8), weights(whole, 8))

    model = SparK("test_resnet", 64, decoder_width=32)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7))  # torch's own
    for step in range(1, 9):
        model.load_state_dict(weights(folder, step))
        expected.update_parameters(model)
        for name, value in averages(folder, step).items():
            torch.testing.assert_close(value, expected.module.state_dict()[name], msg=f"{name} at {step}")
    exported = load_file(folder / "encoder" / "model.safetensors")
    averaged = averages(folder, 8)
    for name, value in exported.items():
        assert torch.equal(value, averaged[f"encoder.{name}"]), name
    assert not torch.equal(averaged["encoder.conv1.0.weight"], weights(folder, 8)["encoder.conv1.0.weight"])


def test_an_average_may_begin_on_resume(command, tmp_path, capsys, caplog):
    run(command("--max_steps=2"))
    run(command("--max_steps=3", "--optim.ema_decay=0.5", "--resume=true"))
    assert "holds no averaged weights: the average starts from its weights" in caplog.text
    before, after, averaged = (
        weights(tmp_path / "run", 2),
        weights(tmp_path / "run", 3),
        averages(tmp_path / "run", 3),
    )
    name = "encoder.conv1.0.weight"
    torch.testing.assert_close(averaged[name], 0.5 * (before[name] + after[name]))


def test_a_torn_average_is_no_whole_checkpoint(command, tmp_path, caplog):
    run(command("--max_steps=4", "--checkpoint_every=2", "--optim.ema_decay=0.5"))
    torn = tmp_path / "run" / "checkpoints" / "step_0000004" / "ema.safetensors"
    torn.write_bytes(torn.read_bytes()[:100])
    assert spark.training.checkpoint.find_run(tmp_path / "run", True).name == "step_0000002"
    assert "ema.safetensors is missing, cut short or damaged" in caplog.text


# --- monitors


def test_monitors_measure_and_leave_the_run_as_it_is(command, tmp_path, photos, whole, capsys, monkeypatch):
    """Bit for bit the run without: weights, batch norm's statistics, optimizer and every row."""
    monkeypatch.setattr(Monitor, "affordable", lambda self, rate: True)
    labelled = tmp_path / "labelled"
    for split in ("train", "val"):
        shutil.copytree(photos, labelled / split)
    run(command("--monitor.every=3", f"--monitor.data={labelled}"))
    rows = curve(tmp_path / "run")
    measured = (
        "rank",
        "channel_std",
        "bn_gap",
        "bn_drift",
        "knn",
        "linear",
        "monitor_seconds",
        "monitor_share",
    )
    assert [row["step"] for row in rows if "rank" in row] == [3, 6, 8]
    assert set(measured) <= rows[5].keys()
    assert rows[5]["linear"] >= 0.5
    assert rows[5]["knn"] == 1.0, "every validation image is a training image too"
    assert rows[5]["bn_drift"] > 0
    assert "unmasked features after step 6: rank " in capsys.readouterr().out
    assert [{k: v for k, v in row.items() if k not in measured} for row in rows] == curve(whole)
    assert_equal(weights(tmp_path / "run", 8), weights(whole, 8))
    assert_equal(moments(tmp_path / "run", 8), moments(whole, 8))


def test_monitors_that_cost_too_much_are_skipped_and_say_so(command, tmp_path):
    run(command("--monitor.every=4", "--monitor.max_share=1e-6", "--log_every=8"))
    rows = curve(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 4, 8]
    assert "monitor" not in rows[0]
    for row in rows[1:]:
        assert "rank" not in row
        assert row["monitor"].startswith("skipped: its ")
        assert row["loss"] > 0


def test_collapse_is_an_event_and_a_warning(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Monitor, "affordable", lambda self, rate: True)
    run(command("--monitor.every=8", "--monitor.collapse_rank=1000", "--max_steps=8"))
    row = curve(tmp_path / "run")[-1]
    assert row["event"] == "collapse"
    assert "below 1000" in row["reason"]
    assert "warning: after step 8 the features collapse: rank" in capsys.readouterr().out


def test_unfit_labelled_folder_is_refused_before_anything_is_written(command, tmp_path, capsys, photos):
    assert "there is no folder" in error_of(capsys, command("--monitor.every=1", f"--monitor.data={photos}"))
    assert not (tmp_path / "run").exists()


def test_labelled_images_have_the_channels_of_image_files(command, photos):
    options = command(
        "--monitor.every=1", f"--monitor.data={photos}", "--data.mean=[0,0]", "--data.std=[1,1]"
    )
    config = parse_config(PretrainConfig, options, "")
    with pytest.raises(ValueError, match=r"in_chans is 2: leave monitor\.data null"):
        build_monitor(config, [], SparK("test_resnet", in_chans=2, decoder_width=32), 1, True)


# --- resume


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_and_resumed_is_the_same_run(command, tmp_path, monkeypatch, capsys, whole_exact, number):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), number))
        run(command(*EXACT))  # ends without SystemExit: exit code 0
    text = capsys.readouterr().out
    assert "stopped and saved after step 3 of 8" in text
    assert f"--config {folder / 'config.yaml'} --resume true" in text
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000003"]
    assert not (folder / "encoder").exists()

    run([f"--config={folder / 'config.yaml'}", "--resume=true"])
    assert "changed since" not in capsys.readouterr().out
    assert curve(folder) == curve(whole_exact)
    assert_equal(weights(folder, 8), weights(whole_exact, 8))
    assert_equal(moments(folder, 8), moments(whole_exact, 8))


def test_crashed_and_resumed_is_the_same_run(command, tmp_path, monkeypatch, whole_exact):
    """Rows after the last checkpoint are computed again, and stand in the log once."""
    folder = tmp_path / "run"

    def crash():
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(command(*EXACT, "--checkpoint_every=2"))
    assert len(curve(folder)) == 5
    run(command(*EXACT, "--checkpoint_every=2", "--resume=true"))
    assert curve(folder) == curve(whole_exact)
    assert_equal(weights(folder, 8), weights(whole_exact, 8))


def test_time_limit_saves_and_ends_well(command, tmp_path, capsys):
    run(command("--max_steps=100000", "--time_limit=00:00:02", "--log_every=1000"))
    text = capsys.readouterr().out
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"stopped and saved after step {step} of 100000; to continue:" in text
    assert "--resume true" in text


def test_resume_from_a_path_into_another_folder(command, tmp_path):
    run(command("--max_steps=8", "--checkpoint_every=5"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_0000005"
    run(command(f"--resume={checkpoint}", output="fork"))
    assert curve(tmp_path / "fork") == curve(tmp_path / "run")[5:]
    assert_equal(weights(tmp_path / "fork", 8), weights(tmp_path / "run", 8))


def test_resume_without_checkpoint_starts_anew_and_says_so(command, capsys):
    run(command("--max_steps=1", "--optim.warmup_steps=0", "--resume=true"))
    assert "starting from the beginning" in capsys.readouterr().out


def test_resume_of_a_finished_run_trains_no_further(command, tmp_path, capsys):
    run(command())
    before = curve(tmp_path / "run")
    for steps in (8, 4):
        run(command("--resume=true", f"--max_steps={steps}"))
        assert curve(tmp_path / "run") == before
        text = capsys.readouterr().out
        assert f"the checkpoint is at step 8, this run has {steps} steps: nothing is left to train" in text
        assert "done after step 8" in text


def test_changed_options_are_listed_on_resume(command, tmp_path, capsys):
    run(command("--max_steps=4"))
    run(command("--max_steps=5", "--optim.base_lr=0.2", "--resume=true"))
    text = capsys.readouterr().out
    assert "changed since that checkpoint: max_steps was 4, is 5" in text
    assert "changed since that checkpoint: optim.base_lr was 0.1, is 0.2" in text
    assert "resume was" not in text
    assert len(curve(tmp_path / "run")) == 5


def test_another_batch_size_goes_on_behind_the_images_seen(command, tmp_path, monkeypatch, capsys):
    positions = []
    original = MaskedBatches.__call__

    def call(self, samples):
        positions.append([sample["position"] for sample in samples])
        return original(self, samples)

    monkeypatch.setattr(MaskedBatches, "__call__", call)
    run(command("--max_steps=4"))
    assert positions[-1][-1] == 31
    run(command("--max_steps=6", "--optim.batch_size=12", "--resume=true"))
    assert positions[-2:] == [list(range(36, 48)), list(range(48, 60))], "the whole batches from image 32 on"
    text = capsys.readouterr().out
    assert "changed since that checkpoint: optim.batch_size was 8, is 12" in text
    assert "batches were 8 images, are 12: the stream goes on with the first whole batch behind" in text
    run(command("--max_steps=8", "--optim.batch_size=4", "--resume=true"))
    assert positions[-2:] == [[60, 61, 62, 63], [64, 65, 66, 67]]
    rows = curve(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["epoch"] for row in rows[3:]] == [pytest.approx(n / 12) for n in (32, 48, 60, 64, 68)]


def test_another_architecture_is_refused_on_resume(command, tmp_path, capsys):
    run(command("--max_steps=2"))
    before = weights(tmp_path / "run", 2)
    text = error_of(capsys, command("--max_steps=3", "--model.name=resnet10t", "--resume=true"))
    assert "step_0000002" in text
    assert_equal(weights(tmp_path / "run", 2), before)


def test_resume_from_nothing_is_refused(command, tmp_path, capsys):
    text = error_of(capsys, command(f"--resume={tmp_path / 'nowhere'}"))
    assert f"cannot resume from {tmp_path / 'nowhere'}" in text


# --- on demand


def test_encoder_is_exported_on_demand(command, tmp_path, monkeypatch, capsys):
    exported = []
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    original = pretraining.save_encoder
    monkeypatch.setattr(
        pretraining,
        "save_encoder",
        lambda *args: exported.append(len(curve(tmp_path / "run"))) or original(*args),
    )
    run(command("--max_steps=4"))
    assert exported == [2, 4]
    assert "encoder after step 2 written to" in capsys.readouterr().out


# --- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.train=no/such/folder"], "no/such/folder"),
        (["--model.input_size=100"], "96x96 or 128x128"),
        (["--model.input_size=0"], "model.input_size must be a whole number above 0"),
        (["--model.name=resnet51"], "nearest: resnet"),
        (["--model.name=resnet18.foo_in1k"], "use resnet18 or one of resnet18.a1_in1k, "),
        (["--model.name=test_vit"], "no feature pyramid"),
        (["--accumulation=3"], "use 6 or 9"),
        (["--optim.warmup_steps=9"], "more than the 8 steps"),
        (["--model.mask_ratio=0.99"], "mask_ratio 0.99"),
        (["--model.in_chans=2"], "in_chans"),
        (["--data.mean=[0.5]"], "mean has 1 values for 3 channels"),
        (["--data.std=[0,1,1]"], "data.std must be a list [...] of numbers above 0"),
    ],
)
def test_mistakes_are_sentences_and_write_nothing(command, tmp_path, capsys, options, words):
    assert words in error_of(capsys, command(*options))
    assert not (tmp_path / "run").exists()


def test_unknown_option(command, tmp_path, capsys):
    text = error_of(capsys, command("--data.trian=x"))
    assert text == "error: unknown option --data.trian; did you mean data.train?"
    assert not (tmp_path / "run").exists()


def test_betas_are_taken_as_given(command, tmp_path, capsys):
    run(command("--max_steps=2", "--model.name=test_efficientnet", "--optim.betas=[0.8,0.9]"))
    assert "betas [0.8, 0.9], lr " in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["optim"]["betas"] == [0.8, 0.9]


def test_empty_folder(command, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "no image in" in error_of(capsys, command(f"--data.train={tmp_path / 'empty'}"))


def test_folder_with_a_run_is_not_overwritten(command, tmp_path, capsys):
    run(command("--max_steps=2"))
    before = curve(tmp_path / "run")
    assert "already holds a run" in error_of(capsys, command("--max_steps=2"))
    assert curve(tmp_path / "run") == before


@pytest.fixture
def damaged(photos, tmp_path):
    """The images and three files that are none."""
    folder = tmp_path / "damaged"
    shutil.copytree(photos, folder)
    for number in range(3):
        whole = (folder / "class0" / "00.png").read_bytes()
        (folder / f"damaged{number}.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_unreadable_images_are_skipped_and_reported(command, tmp_path, capsys, damaged):
    run(command(f"--data.train={damaged}", "--data.max_unreadable=0.2"))
    report = (tmp_path / "run" / "skipped_images.txt").read_text().splitlines()
    assert [Path(line.split(": ")[0]).name for line in report] == [
        "damaged0.png",
        "damaged1.png",
        "damaged2.png",
    ]
    text = capsys.readouterr().out
    assert text.count("skipped ") == 3
    assert "3 unreadable images were skipped" in text


def test_unreadable_images_count_the_same_after_resume(command, tmp_path, damaged):
    options = (f"--data.train={damaged}", "--data.max_unreadable=0.2", "--checkpoint_every=4")
    run(command(*options))
    run(command(*options, f"--resume={tmp_path / 'run' / 'checkpoints' / 'step_0000004'}", output="b"))
    reports = [(tmp_path / name / "skipped_images.txt").read_text() for name in ("run", "b")]
    assert reports[0] == reports[1]
    assert curve(tmp_path / "b") == curve(tmp_path / "run")[4:]


def test_too_many_unreadable_images_stop_the_run_and_lose_nothing(command, tmp_path, capsys, damaged):
    options = (f"--data.train={damaged}", "--max_steps=12")
    text = error_of(capsys, command(*options, "--data.max_unreadable=0.1"))
    assert "raise data.max_unreadable" in text
    folder = tmp_path / "run"
    assert (folder / "skipped_images.txt").exists()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == f"step_{len(curve(folder)):07d}"
    run(command(*options, "--data.max_unreadable=0.5", "--resume=true"))
    run(command(*options, "--data.max_unreadable=0.5", output="whole"))
    assert curve(folder) == curve(tmp_path / "whole")
    assert_equal(weights(folder, 12), weights(tmp_path / "whole", 12))


def test_no_readable_image_at_all(command, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.jpg").write_text("no image")
    for workers in (0, 1):
        text = error_of(capsys, command(f"--data.train={folder}", f"--data.workers={workers}"))
        assert "none could be read" in text


def poisoned(monkeypatch, step):
    """From this step on (counted from 1) every batch holds a NaN, which reaches batch norm's statistics too."""
    calls = [0]
    original = SparK.forward

    def forward(self, images, visible=None, *count):
        calls[0] += self.training
        if self.training and calls[0] >= step:
            images = images.clone()
            images[:, :, ::7] = float("nan")
        return original(self, images, visible, *count)

    monkeypatch.setattr(SparK, "forward", forward)


def test_nan_loss_stops_saves_and_names_the_batch(command, tmp_path, monkeypatch, capsys, photos, whole):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        poisoned(patch, 6)
        text = error_of(capsys, command("--checkpoint_every=2", "--keep_checkpoints=1"))
    assert "the loss is nan" in text
    assert "at step 6" in text
    assert "lower the learning rate" in text
    named = (folder / "nonfinite_step_0000006.txt").read_text().splitlines()
    assert len(named) == 8
    assert set(named) <= {str(path) for path in photos.rglob("*.png")}
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step_0000004", "step_0000005"], "the older one stays"
    saved = weights(folder, 5)
    assert all(torch.isfinite(value).all() for value in saved.values()), "batch norm's statistics among them"

    run(command("--resume=true"))
    assert curve(folder) == curve(whole)
    assert_equal(weights(folder, 8), weights(whole, 8))


def spoiled(monkeypatch, steps, spoil):
    """The loss of these training forwards (counted from 1) becomes something else; after it, the statistics moved."""
    calls = [0]
    original = SparK.forward

    def forward(self, images, visible=None, *count):
        calls[0] += self.training
        output = original(self, images, visible, *count)
        return output._replace(loss=spoil(output.loss)) if self.training and calls[0] in steps else output

    monkeypatch.setattr(SparK, "forward", forward)


EVENTS = ("--guard.spike_window=4", "--checkpoint_every=1", "--keep_checkpoints=99")


@pytest.mark.parametrize(
    ("policy", "spoil", "reason"),
    [
        ("--guard.on_nonfinite=skip", lambda loss: loss * float("nan"), "the loss is nan"),
        ("--guard.on_spike=skip", lambda loss: loss + 100, "is a spike, above"),
    ],
)
def test_a_skipped_step_changes_nothing_and_is_told(
    command, tmp_path, monkeypatch, capsys, policy, spoil, reason
):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoiled(patch, {5}, spoil)
        run(command(policy, *EVENTS, "--log_every=100"))
    rows = curve(folder)
    assert [row["step"] for row in rows] == [1, 5, 8]
    assert rows[1]["event"] == "skip"
    assert reason in rows[1]["reason"]
    assert "event" not in rows[2]
    assert_equal(weights(folder, 4), weights(folder, 5))
    assert_equal(moments(folder, 4), moments(folder, 5))
    assert any(not torch.equal(v, weights(folder, 6)[k]) for k, v in weights(folder, 5).items())
    assert f"step 5: {rows[1]['reason']}: skip" in capsys.readouterr().out


def test_a_rollback_goes_on_behind_the_batch_that_failed(command, tmp_path, monkeypatch, photos):
    """Steps 4 and 5 of the stream's batches 3 and 4 are given up; steps 4 to 8 train on batches 5 to 9."""
    folder, seen = tmp_path / "run", []
    original = MaskedBatches.__call__

    def call(self, samples):
        seen.append(samples[0]["position"] // 8)
        return original(self, samples)

    options = (
        "--guard.on_nonfinite=rollback",
        "--checkpoint_every=3",
        "--keep_checkpoints=9",
        "--optim.ema_decay=0.5",
    )
    with monkeypatch.context() as patch:
        patch.setattr(MaskedBatches, "__call__", call)
        spoiled(patch, {5}, lambda loss: loss * float("nan"))
        run(command(*options))
    assert seen[-10:] == list(range(10))
    rows = curve(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 7, 8]
    event = rows[3]
    assert (event["event"], event["at_step"], event["loss"]) == ("rollback", 5, None)
    assert rows[4]["epoch"] == pytest.approx(6 * 8 / 12)

    # a run resumed behind it knows how far the stream is, and comes to the same
    run(command(*options, f"--resume={folder / 'checkpoints' / 'step_0000006'}", output="fork"))
    assert curve(tmp_path / "fork") == rows[-2:]
    assert_equal(weights(tmp_path / "fork", 8), weights(folder, 8))
    assert_equal(averages(tmp_path / "fork", 8), averages(folder, 8))


def bad_batches(monkeypatch, bad, killed_at=None):
    """The loss of these batches of the stream is NaN, whenever they come; at one batch the process is killed.

    Returns:
        The batches in the order in which they were asked for.
    """
    asked = []
    collate, forward = MaskedBatches.__call__, SparK.forward

    def call(self, samples):
        asked.append(samples[0]["position"] // self.plan.batch_size)
        return collate(self, samples)

    def spoiled_forward(self, images, visible=None, *count):
        output = forward(self, images, visible, *count)
        if self.training and asked[-1] == killed_at:
            raise SystemExit(137)
        return (
            output._replace(loss=output.loss * float("nan")) if self.training and asked[-1] in bad else output
        )

    monkeypatch.setattr(MaskedBatches, "__call__", call)
    monkeypatch.setattr(SparK, "forward", spoiled_forward)
    return asked


def test_a_second_rollback_goes_further_back_and_a_kill_repeats_nothing(command, tmp_path, monkeypatch):
    """Step 6 fails on batch 5, back to step 4; step 5 fails on batch 6, back to step 2; steps 3 to 8 take 7 to 12."""
    options = ("--guard.on_nonfinite=rollback", "--checkpoint_every=2", "--keep_checkpoints=9")
    with monkeypatch.context() as patch:
        asked = bad_batches(patch, {5, 6})
        run(command(*options))
    assert asked[-13:] == list(range(13))
    rows = curve(tmp_path / "run")
    assert [(row["step"], row.get("event"), row.get("at_step")) for row in rows] == [
        *((1, None, None), (2, None, None), (2, "rollback", 6), (2, "rollback", 5)),
        *((step, None, None) for step in range(3, 9)),
    ]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [*(f"step_{step:07d}" for step in (2, 4, 6, 8)), "superseded_step_0000004"]

    with monkeypatch.context() as patch:
        bad_batches(patch, {5, 6}, killed_at=8)
        with pytest.raises(SystemExit):
            run(command(*options, output="killed"))
    killed = tmp_path / "killed"
    assert [path.name for path in (killed / "checkpoints").glob("step_*")] == ["step_0000002"]
    with monkeypatch.context() as patch:
        asked = bad_batches(patch, {5, 6})
        run(command(*options, "--resume=true", output="killed"))
    assert asked[-6:] == list(range(7, 13))
    assert curve(killed) == rows
    assert_equal(weights(killed, 8), weights(tmp_path / "run", 8))
    state = torch.load(killed / "checkpoints" / "step_0000008" / "state.pt", weights_only=True)
    assert (state["extra"]["guard"]["rollbacks"], state["extra"]["offset"]) == (2, 5)


def test_rollbacks_are_bounded_and_the_first_steps_are_skipped(command, tmp_path, monkeypatch, capsys):
    spoiled(monkeypatch, {2, *range(5, 100)}, lambda loss: loss + float("inf"))
    options = ("--guard.on_nonfinite=rollback", "--guard.max_rollbacks=2", "--checkpoint_every=3")
    text = error_of(capsys, command(*options))
    assert "the loss is inf, after 2 rollbacks (guard.max_rollbacks) at step 4, the run has stopped" in text
    events = [row for row in curve(tmp_path / "run") if "event" in row]
    assert [(row["event"], row["step"]) for row in events] == [("skip", 2), ("rollback", 3), ("rollback", 3)]
    assert "no checkpoint to roll back to" in events[0]["reason"]


def test_a_rollback_never_finds_a_state_whose_next_steps_failed(command, tmp_path, monkeypatch):
    """Steps 3 and 4 are skipped, so the checkpoint of step 4 waits for step 5; the rollback of step 6 goes there."""
    original = Guard.judge
    calls = [0]

    def judge(self, numbers):
        calls[0] += 1
        if calls[0] == 6:
            return original(self, {"the loss": float("nan")})
        return self.skip("a spike", "spike") if calls[0] in (3, 4) else original(self, numbers)

    monkeypatch.setattr(Guard, "judge", judge)
    run(
        command(
            "--guard.on_nonfinite=rollback", "--checkpoint_every=4", "--keep_checkpoints=9", "--max_steps=7"
        )
    )
    rows = curve(tmp_path / "run")
    assert [(row["step"], row.get("event"), row.get("at_step")) for row in rows] == [
        *((1, None, None), (2, None, None), (3, "skip", None), (4, "skip", None), (5, None, None)),
        *((5, "rollback", 6), (6, None, None), (7, None, None)),
    ]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step_0000005", "step_0000007"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(command, tmp_path, capsys):
    run(command("--max_steps=2", "--checkpoint_every=1"))
    folder = tmp_path / "run"
    rows = (folder / "metrics.jsonl").read_text()
    os.truncate(folder / "checkpoints" / "step_0000001" / "state.pt", 100)
    flipped = folder / "checkpoints" / "step_0000002" / "model.safetensors"
    content = bytearray(flipped.read_bytes())
    content[-9] ^= 1
    flipped.write_bytes(content)
    text = error_of(capsys, command("--resume=true"))
    assert "none of the checkpoints in" in text
    assert "step_0000002: model.safetensors is not as it was written (SHA256SUMS)" in text
    assert "step_0000001: state.pt is cut short or damaged" in text
    assert (folder / "metrics.jsonl").read_text() == rows


def test_a_step_that_comes_anew_is_saved_anew(command, tmp_path, monkeypatch, capsys):
    """Back from step 6 by way of 4 to 6, which is skipped, so that no checkpoint is due, and the run is stopped."""
    original = Guard.judge
    calls = [0]

    def judge(self, numbers):
        calls[0] += 1
        if calls[0] in (7, 8):
            return original(self, {"the loss": float("nan")})
        if calls[0] == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            return self.skip("a spike", "spike")
        return original(self, numbers)

    monkeypatch.setattr(Guard, "judge", judge)
    run(command("--guard.on_nonfinite=rollback", "--checkpoint_every=2", "--keep_checkpoints=9"))
    assert "stopped and saved after step 6 of 8" in capsys.readouterr().out
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step_0000006" / "state.pt", weights_only=True)
    assert (saved["extra"]["offset"], saved["extra"]["guard"]["rollbacks"]) == (4, 2)


def test_a_spike_can_stop_the_run(command, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        spoiled(patch, {6}, lambda loss: loss + 1)
        text = error_of(capsys, command("--guard.on_spike=stop", "--guard.spike_window=4"))
    assert "is a spike, above" in text
    assert len((tmp_path / "run" / "spike_step_0000006.txt").read_text().splitlines()) == 8
    assert not list((tmp_path / "run").glob("nonfinite*"))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_0000005"]


def test_diverging_run_stops(command, tmp_path, capsys):
    text = error_of(
        capsys,
        command("--optim.name=sgd", "--optim.base_lr=1000", "--optim.clip_grad=null", "--checkpoint_every=1"),
    )
    assert "has stopped" in text
    steps = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert all(torch.isfinite(v).all() for v in load_file(steps[0] / "model.safetensors").values())
    assert list((tmp_path / "run").glob("nonfinite_step_*.txt"))


def test_a_row_that_cannot_be_written_need_not_stop_training(command, tmp_path, monkeypatch, capsys):
    original = RunLog.row

    def row(self, step, **values):
        if step == 3:
            raise OSError(errno.ENOSPC, "the disk is full, metrics.jsonl could not be written")
        original(self, step, **values)

    monkeypatch.setattr(RunLog, "row", row)
    run(command("--guard.on_save_error=continue"))
    assert [row["step"] for row in curve(tmp_path / "run")] == [1, 2, 4, 5, 6, 7, 8]
    assert "a row after step 3 could not be written, training goes on" in capsys.readouterr().out


def test_training_goes_on_without_the_checkpoint_if_wanted(command, tmp_path, monkeypatch, capsys, whole):
    folder = tmp_path / "run"
    original = spark.training.checkpoint.write_tensors

    def write_tensors(model, path, metadata):
        if "step_0000004" in str(path) or "step_0000006" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(model, path, metadata)

    monkeypatch.setattr(spark.training.checkpoint, "write_tensors", write_tensors)
    seen = []
    at_step(monkeypatch, 7, lambda: seen.extend(sorted(p.name for p in (folder / "checkpoints").iterdir())))
    run(command("--checkpoint_every=2", "--guard.on_save_error=continue"))
    assert seen == ["step_0000002"], "the last whole one stays"
    text = capsys.readouterr().out
    assert "the checkpoint after step 4 could not be written, training goes on (guard.on_save_error)" in text
    assert "[Errno" not in text
    events = [row for row in curve(folder) if "event" in row]
    assert [(row["event"], row["step"], row["reason"]) for row in events] == [
        ("not_saved", step, f"no checkpoint of step {step} could be written") for step in (4, 6)
    ]
    told = ("event", "reason")
    assert [{k: v for k, v in row.items() if k not in told} for row in curve(folder)] == curve(whole)
    assert_equal(weights(folder, 8), weights(whole, 8))


def test_full_disk_keeps_older_checkpoints(command, tmp_path, monkeypatch, capsys, whole):
    folder = tmp_path / "run"
    original = spark.training.checkpoint.write_tensors
    saves = []

    def write_tensors(model, path, metadata):
        saves.append(path)
        if len(saves) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(model, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(spark.training.checkpoint, "write_tensors", write_tensors)
        text = error_of(capsys, command("--checkpoint_every=2"))
    assert "the disk is full" in text
    assert "free some space" in text
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "step_0000002",
        "step_0000004",
    ]
    run(command("--resume=true"))
    assert curve(folder) == curve(whole)


def test_a_picture_that_an_interruption_left_out_is_drawn_on_resume(command, tmp_path, capsys):
    options = ("--panels_every=2", "--checkpoint_every=2")
    run(command(*options, "--max_steps=2"))
    picture = next(tmp_path.rglob("panels_0000002.png"))
    before = picture.read_bytes()
    picture.unlink()  # as if killed between the checkpoint and the picture
    run(command(*options, "--max_steps=3", "--resume=true"))
    assert picture.read_bytes() == before


def test_pictures_and_exports_on_demand_do_not_stop_training(command, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    saved_before = []

    def full(*args):
        saved_before.append((folder / "checkpoints" / "step_0000002").exists())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "panels.png")

    original = pretraining.save_encoder
    exports = []

    def first_fails(*args):
        exports.append(args)
        return full() if len(exports) == 1 else original(*args)

    monkeypatch.setattr(pretraining, "save_panels", full)
    monkeypatch.setattr(pretraining, "save_encoder", first_fails)
    at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    run(command("--max_steps=4", "--panels_every=2", "--checkpoint_every=2"))
    assert saved_before == [True, True, True]
    text = capsys.readouterr().out
    assert "panels after step 2 could not be written: No space left on device (panels.png). The run" in text
    assert "the encoder after step 2 could not be written" in text
    assert "free space" in text
    assert "done after step 4" in text
    assert len(curve(folder)) == 4


@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.cuda.OutOfMemoryError("full"), SystemExit), (RuntimeError("loader killed"), RuntimeError)],
)
def test_whatever_breaks_a_step_the_steps_before_are_kept(
    command, tmp_path, monkeypatch, capsys, whole, error, kind
):
    folder, calls = tmp_path / "run", []
    original = SparK.forward

    def forward(self, images, visible=None, *count):
        calls.extend([1] * self.training)
        output = original(self, images, visible, *count)
        if len(calls) == 4:
            raise error
        return output

    with monkeypatch.context() as patch:
        patch.setattr(SparK, "forward", forward)
        with pytest.raises(kind):
            run(command())
    assert "the state before this step is saved in" in capsys.readouterr().out
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000003"]
    run(command("--resume=true"))
    assert curve(folder) == curve(whole)
    assert_equal(weights(folder, 8), weights(whole, 8))


def test_model_without_a_sparse_rule_is_refused_before_anything_is_written(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.delitem(PACKED.rules, "conv2d")
    text = error_of(capsys, command())
    assert "no sparse rule for operator 'conv2d'" in text
    assert not (tmp_path / "run").exists()


def test_the_trial_forward_leaves_no_trace():
    torch.manual_seed(0)
    model = SparK("test_resnet", input_size=64, decoder_width=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    try_forward(model, torch.device("cpu"), [(64, 64), (32, 96)])
    assert torch.equal(state, torch.get_rng_state())
    assert_equal(before, model.state_dict())
    assert model.training


def test_changed_images_are_told_on_resume(command, tmp_path, capsys, photos):
    names = [str(path) for path in sorted(photos.rglob("*.png"))]
    listing = tmp_path / "list.txt"

    def resumed(lines, steps):
        listing.write_text("\n".join(lines))
        run(command(f"--data.train={listing}", f"--max_steps={steps}", "--resume=true"))
        return capsys.readouterr().out

    resumed(names[:6], 2)
    assert "data " not in resumed(names[:6], 3).replace("data       ", "")
    assert "data was 6 images, is 8: the stream of images differs from here on" in resumed(names[:8], 4)
    assert "data is 8 images as before, but of other names" in resumed(names[1:9], 5)


def test_fingerprint_moves_with_the_data(tmp_path):
    prints = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / place / "x.png")
        prints.append(open_source(str(tmp_path / place), "unused")[0].digest())
    assert prints[0] == prints[1]


def test_shards_train_as_their_folder_does_also_from_a_server_and_resumed(
    command, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    shards = tmp_path / "shards"
    shards.mkdir()
    files = sorted(photos.rglob("*.png"))
    for shard in range(3):
        with tarfile.open(shards / f"{shard}.tar", "w") as archive:
            for file in files[4 * shard : 4 * shard + 4]:
                archive.add(file, file.name)
    handler = partial(SimpleHTTPRequestHandler, directory=str(shards))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"--data.train=http://127.0.0.1:{server.server_port}/{{0..3}}.tar"
        kept = ("--data.max_unreadable=0.5", "--max_steps=4")
        run(command("--max_steps=4", output="folder"))
        run(command(f"--data.train={shards}", "--max_steps=4", output="shards"))
        run(command(url, *kept, "--checkpoint_every=2", output="url"))
        server.shutdown()
    half = tmp_path / "url" / "checkpoints" / "step_0000002"
    run(command(url, *kept, f"--resume={half}", output="url"))  # the shards are there, the server is gone
    losses = [[row["loss"] for row in curve(tmp_path / name)] for name in ("folder", "shards", "url")]
    assert losses[0] == losses[1] == losses[2]
    assert "left out the shard http://127.0.0.1" in capsys.readouterr().out
    assert "3.tar: " in (tmp_path / "url" / "skipped_images.txt").read_text()


@pytest.mark.parametrize("switches", [("zero", "pixels", "all"), ("token", "hog", "masked")])
def test_ablations_run_resume_and_leave_what_every_run_leaves(command, tmp_path, switches):
    names = ("masked_pixels", "target", "loss_on")
    options = [f"--model.{name}={value}" for name, value in zip(names, switches, strict=True)]
    run(command(*options, "--max_steps=4", "--panels_every=2", output="whole"))
    run(command(*options, "--max_steps=4", "--checkpoint_every=2"))
    run(
        command(
            *options, "--max_steps=4", f"--resume={tmp_path / 'run/checkpoints/step_0000002'}", output="b"
        )
    )
    assert curve(tmp_path / "b") == curve(tmp_path / "whole")[2:]
    assert_equal(weights(tmp_path / "b", 4), weights(tmp_path / "whole", 4))
    figures = sorted(path.name for path in (tmp_path / "whole" / "figures").iterdir())
    assert figures == ["panels_0000002.png", "panels_0000004.png"]
    timm.create_model(f"local-dir:{tmp_path / 'whole' / 'encoder'}", pretrained=True)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_grad_checkpointing_gives_the_same_losses(command, tmp_path, name):
    options = (f"--model.name={name}", "--max_steps=3", "--model.densify_norm=ln")
    run(command(*options, output="plain"))
    run(command(*options, "--model.grad_checkpointing=true"))
    losses = [[row["loss"] for row in curve(tmp_path / folder)] for folder in ("plain", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    counts = [value.item() for key, value in weights(tmp_path / "run", 3).items() if "num_batches" in key]
    assert set(counts) == {3}, "a batch that goes through twice is one batch"


def test_grad_checkpointing_is_refused_by_models_that_cannot():
    class Refuses(torch.nn.Module):
        def set_grad_checkpointing(self, enable=True):
            raise AssertionError("gradient checkpointing not supported")

    spark = SparK("test_resnet", input_size=64, decoder_width=32)
    spark.encoder = Refuses()
    with pytest.raises(ValueError, match=r"dla34 refuses .*not supported.*model.grad_checkpointing false"):
        checkpoint_activations(spark, "dla34")
    spark.encoder = torch.nn.Identity()
    with pytest.raises(ValueError, match="x cannot checkpoint"):
        checkpoint_activations(spark, "x")
    spark.masked_pixels = "zero"
    with pytest.raises(ValueError, match=r"needs model.masked_pixels absent, not zero"):
        checkpoint_activations(spark, "x")


def test_bugs_are_not_dressed_up(command, monkeypatch):
    def broken(self, images, visible=None):
        raise KeyError("a bug")

    monkeypatch.setattr(SparK, "forward", broken)
    with pytest.raises(KeyError, match="a bug"):
        run(command())


def test_what_does_not_fit_the_data_is_said_before_the_first_step(command, capsys):
    run(command("--optim.batch_size=16", "--optim.base_lr=1e-3", "--max_steps=1", "--optim.warmup_steps=1"))
    said = capsys.readouterr().out
    begin, _, rest = said.partition("model      test_resnet")
    assert rest
    assert (
        "warning: a batch of 16 takes each of the 12 images 1.3 times: the run is 1.3 epochs; all of them are warm-up. "
        "What fits: --optim.batch_size 2 --optim.warmup_steps 0" in begin
    )
    assert "warning: the learning rate is 6.25e-05 at its peak" in begin
    assert "mask 0.5 (mask_ratio 0.6)" in rest
