"""spark/pretrain.py as users start it: real processes, real signals, two processes that equal one."""

import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spark import pretrain
from spark.training.log import read_rows
from tests.spark.test_pretrain import photos, run, small_run  # noqa: F401  (photos is a fixture)
from tests.together import launched, together
from tests.together import start as forked

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "spark" / "pretrain.py")
TWO = "cpu_2_processes.yaml"


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def losses(folder):
    return {row["step"]: row["loss"] for row in read_rows(folder / "metrics.jsonl")}


def launch(arguments):
    """`accelerate launch` with two processes, as users type it."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    return subprocess.run(
        [*launcher, str(ROOT / "configs" / "accelerate" / TWO), SCRIPT, *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )


def of_two(rank, arguments):
    pretrain.main(arguments)


def two_processes(arguments, folder):
    """The same two processes, forked: what they print goes to files in `folder`."""
    folder.mkdir(exist_ok=True)
    return together(of_two, arguments, folder=folder, **launched(TWO))


def start(arguments):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for_rows(process, folder, count):
    deadline = time.monotonic() + 240
    while len(read_rows(folder / "metrics.jsonl")) < count:
        running = process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()
        assert running
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_processes_equal_one(photos, tmp_path):  # noqa: F811
    """A global batch over two processes gives the loss and the weights of one, statistics synchronised."""
    options = ("--optim.name=sgd", "--optim.base_lr=3", "--max_steps=5", "--accumulation=2")
    options += ("--model.train_sizes=[64,[64,96]]", "--model.mask_ratio=[0.4,0.6]")
    done = launch(small_run(photos, tmp_path / "two", *options))
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
            second[key], value, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_sigterm_saves_and_the_printed_command_continues(photos, tmp_path):  # noqa: F811
    folder = tmp_path / "run"
    arguments = small_run(photos, folder, "--max_steps=100000", "--data.workers=1")
    process = start(arguments)
    wait_for_rows(process, folder, 3)
    os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: the loader's processes are signalled too
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    (checkpoint,) = (folder / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"stopped and saved after step {step} of 100000" in text

    resume = shlex.split(next(line for line in text.splitlines() if "--resume true" in line))
    assert Path(resume[0]).name.startswith("python")
    assert resume[1] == SCRIPT
    assert resume[3] == str((folder / "config.yaml").absolute())
    run([*resume[2:], f"--max_steps={step + 2}"])
    assert sorted(losses(folder)) == list(range(1, step + 3))
    assert (folder / "encoder" / "model.safetensors").exists()


def test_killed_at_a_random_step_and_resumed_is_the_same_run(photos, tmp_path):  # noqa: F811
    """SIGKILL, wherever it hits; what the kill tears is passed over, and the rest is computed again."""
    options = ("--max_steps=40", "--checkpoint_every=2", "--optim.ema_decay=0.9", "--data.workers=1")
    folder = tmp_path / "run"
    started = forked(pretrain.main, small_run(photos, folder, *options), folder=tmp_path)
    wait_for_rows(started.process, folder, random.randint(3, 12))
    time.sleep(random.random() / 10)
    os.killpg(started.process.pid, signal.SIGKILL)
    assert started.ended(60) == -signal.SIGKILL
    killed = max(losses(folder))
    assert killed < 40
    run(small_run(photos, folder, *options, "--resume=true"))
    run(small_run(photos, tmp_path / "whole", *options))
    assert losses(folder) == losses(tmp_path / "whole"), f"killed after step {killed}"
    for name in ("model.safetensors", "ema.safetensors"):
        mine, whole = (
            load_file(each / "checkpoints" / "step_0000040" / name) for each in (folder, tmp_path / "whole")
        )
        for key, value in whole.items():
            assert torch.equal(mine[key], value), f"{key}, killed after step {killed}"


def test_one_process_goes_on_as_two(photos, tmp_path):  # noqa: F811
    options = ("--optim.name=sgd", "--optim.base_lr=3")
    run(small_run(photos, tmp_path / "whole", *options, "--max_steps=6"))
    run(small_run(photos, tmp_path / "run", *options, "--max_steps=6", "--checkpoint_every=3"))
    resume = tmp_path / "run" / "checkpoints" / "step_0000003"
    more = ("--max_steps=6", f"--resume={resume}", "--guard.on_nonfinite=rollback")
    done = two_processes(small_run(photos, tmp_path / "two", *options, *more), tmp_path / "printed")
    assert done.codes == [0, 0], done.stderr
    assert done.stdout.count("processes were 1, are 2: the same batches of images, divided anew") == 1
    one, two = losses(tmp_path / "whole"), losses(tmp_path / "two")
    assert sorted(two) == [4, 5, 6]
    for step, loss in two.items():
        assert loss == pytest.approx(one[step], rel=2e-6)


def test_two_processes_roll_back_alike_and_stop(photos, tmp_path):  # noqa: F811
    """A learning rate that spoils the weights at once: both go back to the first checkpoint, then both stop."""
    options = ("--optim.name=sgd", "--optim.base_lr=1000", "--optim.clip_grad=null", "--checkpoint_every=1")
    policy = ("--guard.on_nonfinite=rollback", "--guard.max_rollbacks=1")
    done = two_processes(small_run(photos, tmp_path / "run", *options, *policy), tmp_path / "printed")
    assert done.codes[0] == 2
    assert done.codes[1]
    assert done.stderr.count("after 1 rollbacks (guard.max_rollbacks)") == 1, done.stderr[-2000:]
    events = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "event" in row]
    assert [row["event"] for row in events] == ["rollback"]


def test_two_processes_stream_without_repeating_and_resume(photos, tmp_path, capsys):  # noqa: F811
    """Each process reads shards of its own; resumed as two it is the same run, as one it says what has changed."""
    files = sorted(photos.rglob("*.png"))
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in range(4):
        with tarfile.open(shards / f"{shard}.tar", "w") as archive:
            for file in files[3 * shard : 3 * shard + 3]:
                archive.add(file, file.name)
    options = ("--data.streaming=true", "--data.shuffle_buffer=2", "--data.size=12", "--optim.batch_size=4")
    options += (
        "--data.workers=1",
        "--max_steps=5",
        "--checkpoint_every=3",
        "--optim.name=sgd",
        "--optim.base_lr=3",
    )
    done = two_processes(small_run(shards, tmp_path / "two", *options), tmp_path / "printed")
    assert done.codes == [0, 0], done.stderr
    assert "streamed: 2 to a reader in each pass, none left out" in " ".join(done.stdout.split())
    half = tmp_path / "two" / "checkpoints" / "step_0000003"
    stream = torch.load(half / "state.pt", weights_only=True)["extra"]["stream"]
    assert [state[:2] for state in stream["states"]] == [[0, 1], [0, 1]], "6 images of each, in blocks of 2"
    resume = f"--resume={half}"
    again = two_processes(small_run(shards, tmp_path / "again", *options, resume), tmp_path / "printed_again")
    assert again.codes == [0, 0], again.stderr
    expected = losses(tmp_path / "two")
    assert losses(tmp_path / "again") == {step: pytest.approx(expected[step], rel=2e-6) for step in (4, 5)}

    run(small_run(shards, tmp_path / "one", *options, resume))
    text = " ".join(capsys.readouterr().out.split())
    assert "processes were 2, are 1: other batches of images" in text
    assert "readers (processes x loader processes) were 2, now 1" in text
    assert sorted(losses(tmp_path / "one")) == [4, 5]
