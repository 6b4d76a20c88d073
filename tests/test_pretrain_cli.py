"""spark/pretrain.py as users start it: real processes, real signals, two processes that equal one."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spark.run import read_rows
from tests.test_pretrain import photos, run, small_run  # noqa: F401  (photos is a fixture)

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = str(ROOT / "spark" / "pretrain.py")


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl")}


def test_two_processes_equal_one(photos, tmp_path):  # noqa: F811
    """A global batch over two processes gives the loss and the weights of one, statistics synchronised."""
    options = ("--optim.name=sgd", "--optim.base_lr=3", "--max_steps=5", "--accumulation=2")
    options += ("--model.train_sizes=[64,[64,96]]", "--model.mask_ratio=[0.4,0.6]")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher.append(str(ROOT / "configs" / "accelerate" / "cpu_2_processes.yaml"))
    done = subprocess.run(
        [*launcher, SCRIPT, *small_run(photos, tmp_path / "two", *options)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "batch      8 images: processes 2 x accumulation 2 x 2 at once; cpu, fp32" in done.stdout
    assert done.stdout.count("step 5/5") == 1, "one process speaks"
    assert "UserWarning" not in done.stderr, (
        "as DistributedDataParallel warns of gradients it must lay out anew"
    )

    # One process with the same parts: batch norm takes its statistics over what goes through the network at once.
    run(small_run(photos, tmp_path / "one", *options))
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() == {1, 2, 3, 4, 5}
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=2e-6)
    name = "checkpoints/step_0000005/model.safetensors"
    first, second = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(
            second[key], value, rtol=1e-4, atol=2e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_sigterm_saves_and_the_printed_command_continues(photos, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    arguments = small_run(photos, folder, "--max_steps=100000", "--data.workers=1")
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 240
    while len(read_rows(folder / "metrics.jsonl")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: the loader's processes are signalled too
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"stopped and saved after step {step} of 100000" in text

    resume = shlex.split(next(line for line in text.splitlines() if "--resume true" in line))
    assert resume[0] == "python"
    assert resume[1] == SCRIPT
    run([*resume[2:], f"--max_steps={step + 2}"])
    assert sorted(losses(folder)) == list(range(1, step + 3))
    assert (folder / "encoder" / "model.safetensors").exists()
