"""spark.training.accelerator: the stream of samples, logs, stopping, refusing."""

import errno
import json
import math
import os
import shlex
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.utils import LoggerType
from torch.utils.data import DataLoader, Dataset

import spark.pretrain
from finetune.config import DepthConfig, DepthDataConfig
from spark.errors import UserError, one_line_errors
from spark.files import write_whole
from spark.seeds import derive_seed
from spark.sparse import sparsify
from spark.training import accelerator as accelerator_module
from spark.training.accelerator import (
    match_gradient_strides,
    micro_batch_size,
    start_accelerator,
    worker_count,
)
from spark.training.cli import flat_config
from spark.training.log import RunLog, format_duration, progress_bar, read_rows
from spark.training.run_folder import check_output_dir, make_output_dir
from spark.training.sampling import StreamSampler, run_length
from spark.training.stop import StopRequest, ignore_stop_signals, resume_command, stop_run


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def full_disk(monkeypatch):
    """Every file is begun and none can be finished."""

    def full(path, *_, **__):
        path.open("w").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "write_text", full)


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_derive_seed_is_stable_and_distinct():
    assert derive_seed(0, 1) == 4059051691542397301, "seeds decide what old runs were: they may not change"
    seeds = {derive_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert derive_seed(1, 2) != derive_seed(2, 1) != derive_seed(2, 1, 0)
    torch.Generator().manual_seed(max(seeds))
    assert 0 <= derive_seed(-1) < 2**63


def test_stream_passes_hold_every_sample_once():
    pairs = flat(StreamSampler(10, 4, seed=3, stop=5))
    assert [position for position, _ in pairs] == list(range(20))
    first, second = [index for _, index in pairs[:10]], [index for _, index in pairs[10:]]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert pairs != flat(StreamSampler(10, 4, seed=4, stop=5))


@pytest.mark.parametrize(("world", "batch"), [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_stream_does_not_depend_on_the_number_of_processes(world, batch):
    whole = list(StreamSampler(7, 12, seed=1, stop=4))
    ranks = [list(StreamSampler(7, batch, rank=r, world_size=world, seed=1, stop=4)) for r in range(world)]
    for step, expected in enumerate(whole):
        assert flat(rank[step] for rank in ranks) == expected


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_stream_resumes_in_the_middle(start):
    whole = list(StreamSampler(9, 4, seed=2, stop=6))
    rest = StreamSampler(9, 4, seed=2, start=start, stop=6)
    assert list(rest) == whole[start:]
    assert len(rest) == 6 - start


def test_stream_smaller_than_a_batch_and_unshuffled():
    assert Counter(index for _, index in flat(StreamSampler(2, 8, stop=1))) == {0: 4, 1: 4}
    assert [index for _, index in flat(StreamSampler(3, 6, stop=1, shuffle=False))] == [0, 1, 2, 0, 1, 2]
    assert list(StreamSampler(3, 2, start=4, stop=2)) == []
    with pytest.raises(ValueError, match="data set is empty"):
        StreamSampler(0, 2, stop=1)


def test_micro_batch_size():
    assert micro_batch_size(64, 2, 4) == 8
    with pytest.raises(ValueError, match=r"batch_size 10 .* 2 processes with accumulation 2; use 8 or 12"):
        micro_batch_size(10, 2, 2)
    with pytest.raises(ValueError, match="use 4, or"):
        micro_batch_size(3, 2, 2)


def test_output_dir_is_not_overwritten(tmp_path):
    check_output_dir(tmp_path / "new" / "run", False)
    assert not (tmp_path / "new").exists(), "looking makes nothing"
    make_output_dir(tmp_path / "new" / "run")
    assert (tmp_path / "new" / "run").is_dir()
    (tmp_path / "notes.txt").write_text("a folder with other things is fine")
    check_output_dir(tmp_path, False)
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(
        ValueError, match=r"already holds a run \(config.yaml\); continue it with --resume true"
    ):
        check_output_dir(tmp_path, False)
    check_output_dir(tmp_path, True)
    check_output_dir(tmp_path, str(tmp_path / "checkpoints" / "step_0000010"))
    with pytest.raises(ValueError, match="already holds a run"):
        check_output_dir(tmp_path, str(tmp_path.parent / "other" / "checkpoints" / "step_0000010"))
    for path in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "run"):
        with pytest.raises(ValueError, match=r"output_dir .* cannot be made: .*notes.txt is a file"):
            check_output_dir(path, False)


def test_output_dir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output_dir .*run cannot be made \(.*\): choose a folder"):
        make_output_dir(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match=r"cannot be written: .* is read-only"):
        check_output_dir(tmp_path / "run", False)


def test_log_writes_rows_and_drops_those_after_the_checkpoint(tmp_path):
    accelerator = start_accelerator(tmp_path, "fp32", "tensorboard")
    log = RunLog(tmp_path, accelerator, None)
    for step in range(1, 6):
        log.row(step, loss=1.0 / step, lr=0.1, note="x")
    log.row(6, loss=math.nan, lr=0.1)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a crash in the middle of a line
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[5]["loss"] is None
    assert list((tmp_path / "tensorboard").iterdir())

    AcceleratorState._reset_state(reset_partial_state=True)
    log = RunLog(tmp_path, start_accelerator(tmp_path, "fp32", "tensorboard"), 3)
    log.row(4, loss=9.0, lr=0.1)
    log.close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]


def test_damaged_log_is_reported(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_rows(tmp_path / "metrics.jsonl")
    assert read_rows(tmp_path / "none.jsonl") == []


def test_full_disk_while_logging(tmp_path):
    log = RunLog(tmp_path, start_accelerator(tmp_path, "fp32"), None)
    log.path = Path("/dev/full")
    if not log.path.exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match=r"disk is full.*free some space and continue with --resume true"):
        log.row(1, loss=1.0)
    log.close()


def test_runs_of_one_process_may_differ_in_precision(tmp_path):
    assert start_accelerator(tmp_path, "fp32").mixed_precision == "no"
    assert start_accelerator(tmp_path, "bf16").mixed_precision == "bf16"


class Tracker(tracking.GeneralTracker):
    """Stands for wandb: keeps what it gets, and fails where `fails` says."""

    name = "wandb"
    requires_logging_directory = False
    tracker = None
    fails = ""

    def __init__(self, project, **options):
        super().__init__()
        self.got = [("project", project, options)]

    def _take(self, kind, *values):
        if kind == self.fails:
            raise RuntimeError("no route\nto host")
        self.got.append((kind, *values))

    def start(self):
        self._take("start")
        type(self).last = self

    def store_init_configuration(self, values):
        self._take("config", values)

    def log(self, values, step=None, **_):
        self._take("row", step, values)

    def finish(self):
        self._take("finish")


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setattr(accelerator_module, "get_available_trackers", lambda: [LoggerType.WANDB])
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    return Tracker


def test_a_tracker_gets_name_options_and_numbers(tmp_path, wandb):
    folder = tmp_path / "mine"
    folder.mkdir()
    log = RunLog(folder, start_accelerator(folder, "fp32", "wandb"), 2, {"optim.base_lr": 0.1})
    log.row(3, loss=1.0, note="x")
    log.close()
    assert wandb.last.got == [
        ("project", "mine", {}),
        ("start",),
        ("config", {"optim.base_lr": 0.1}),
        ("row", 3, {"loss": 1.0}),
        ("finish",),
    ]
    assert not (folder / "tensorboard").exists()


@pytest.mark.parametrize("fails", ["start", "config", "row", "finish"])
def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, wandb, monkeypatch, capsys, fails):
    monkeypatch.setattr(wandb, "fails", fails)
    log = RunLog(tmp_path, start_accelerator(tmp_path, "fp32", "wandb"), None)
    log.row(1, loss=1.0)
    log.row(2, loss=0.5)
    log.close()
    assert [row["step"] for row in read_rows(log.path)] == [1, 2]
    words = "the tracker wandb failed and gets no more rows, metrics.jsonl goes on: no route to host"
    assert capsys.readouterr().out.count(words) == 1


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator_module, "get_available_trackers", list)
    with pytest.raises(UserError, match="log_with mlflow needs a package: pip install mlflow"):
        start_accelerator(tmp_path, "fp32", "mlflow")
    start_accelerator(tmp_path, "fp32", "none")


def test_options_as_trackers_show_them(tmp_path):
    options = flat_config(
        DepthConfig(encoder="resnet18", data=DepthDataConfig(root="x"), output_dir=str(tmp_path))
    )
    assert options["optim.lr"] == 1e-4
    assert options["losses.silog"] == 1.0
    assert all(isinstance(value, bool | int | float | str) for value in options.values())


@pytest.mark.parametrize(
    ("started", "spec", "processes", "words"),
    [
        ("/bin/x/spark-pretrain", None, 1, "/bin/x/spark-pretrain"),
        ("spark/pretrain.py", None, 1, "PYTHON CWD/spark/pretrain.py"),
        ("/site/spark/pretrain.py", "spark.pretrain", 1, "PYTHON -m spark.pretrain"),
        ("/site/ipykernel_launcher.py", "ipykernel_launcher", 1, "PYTHON -m spark.pretrain"),
        (
            "/bin/x/spark-pretrain",
            None,
            2,
            "ACCELERATE launch --multi_gpu --num_processes 2 -m spark.pretrain",
        ),
        (
            "spark/pretrain.py",
            None,
            2,
            "ACCELERATE launch --multi_gpu --num_processes 2 CWD/spark/pretrain.py",
        ),
    ],
)
def test_the_command_that_continues_a_run(tmp_path, monkeypatch, started, spec, processes, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    programs = {
        "PYTHON": sys.executable,
        "ACCELERATE": str(Path(sys.executable).with_name("accelerate")),
        "CWD": str(tmp_path),
    }
    for name, path in programs.items():
        words = words.replace(name, path)
    saved = tmp_path / "run" / "config.yaml"
    assert resume_command("spark.pretrain", "run", processes) == f"{words} --config {saved} --resume true"
    sharded = shlex.split(resume_command("spark.pretrain", "run", 1, sharded=True))
    assert sharded[2:5] == ["--use_fsdp", "--fsdp_version", "2"]


def test_a_row_that_was_half_written_is_taken_back(tmp_path):
    """A file may grow by 10 bytes more: the row does not fit, and what of it did is gone."""
    resource = pytest.importorskip("resource")
    log = RunLog(tmp_path, start_accelerator(tmp_path, "fp32"), None)
    log.row(1, loss=1.0)
    before = log.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
    try:
        with pytest.raises(OSError, match=r"."):
            log.row(2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before
    log.close()


def test_rows_are_dropped_on_the_way_back_and_events_move(tmp_path):
    log = RunLog(tmp_path, start_accelerator(tmp_path, "fp32"), None)
    for step in range(1, 5):
        log.row(step, loss=float(step), val_rmse=1.0, **({"event": "skip"} if step == 3 else {}))
    log.rewind(2, keep_events=True)
    rows = read_rows(log.path)
    assert [row["step"] for row in rows] == [1, 2, 2]
    assert rows[2] == {"step": 2, "loss": 3.0, "event": "skip", "at_step": 3}
    log.rewind(1)
    assert [row["step"] for row in read_rows(log.path)] == [1]
    log.close()


def test_a_deadline_counts_as_a_request(tmp_path):
    accelerator = start_accelerator(tmp_path, "fp32")
    with StopRequest(time.monotonic() + 0.2) as stop:
        assert not stop.agreed(accelerator)
        time.sleep(0.25)
        assert stop.agreed(accelerator)


def test_fp16_without_gpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ValueError, match="fp16 needs a GPU; use bf16 or fp32"):
        start_accelerator(tmp_path, "fp16")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"FSDP_VERSION": "1"}, "write fsdp_version: 2"),
        (
            {"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"},
            "fsdp_auto_wrap_policy: NO_WRAP",
        ),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "write fsdp_offload_params: false"),
        (
            {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "use --model.grad_checkpointing",
        ),
    ],
)
def test_what_fsdp_cannot_do_is_refused(tmp_path, monkeypatch, settings, words):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        start_accelerator(tmp_path, "fp32")


def test_launcher_that_started_one_process_of_several(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    start_accelerator(tmp_path, "fp32")
    assert "accelerate launch --multi_gpu --num_processes N" in capsys.readouterr().out


def test_worker_count(tmp_path, monkeypatch):
    accelerator = start_accelerator(tmp_path, "fp32")
    assert worker_count(3, accelerator) == 3
    assert worker_count(0, accelerator) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert worker_count(None, accelerator) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert worker_count(None, accelerator) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert worker_count(None, accelerator) == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_request(tmp_path, number):
    accelerator = start_accelerator(tmp_path, "fp32")
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.agreed(accelerator)
        os.kill(os.getpid(), number)
        assert stop.agreed(accelerator)
    assert signal.getsignal(number) is before


def test_second_interrupt_acts_at_once_but_not_its_echo(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes the same Ctrl-C on
        assert stop.requested
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_export_signal(tmp_path):
    accelerator = start_accelerator(tmp_path, "fp32")
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not stop.export, "not before all processes know"
        assert not stop.agreed(accelerator)
        assert stop.export
        stop.export = False
        assert not stop.agreed(accelerator)
        assert not stop.export, "once for a signal"


def test_killed_launcher_counts_as_stop(tmp_path, monkeypatch):
    accelerator = start_accelerator(tmp_path, "fp32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with StopRequest() as stop:
        assert not stop.agreed(accelerator)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.agreed(accelerator)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    with StopRequest() as stop:  # without a launcher, as under nohup, a parent may go
        monkeypatch.setattr(os, "getppid", lambda: 2)
        assert not stop.agreed(accelerator)


class Numbers(Dataset):
    def __init__(self, kind=ValueError):
        self.kind = kind

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise self.kind("sample 3 is no good")
        return os.getpid()


def test_loader_processes_outlive_signals_to_the_group():
    loader = DataLoader(Numbers(), sampler=[0, 1, 2], num_workers=1, worker_init_fn=ignore_stop_signals)
    batches = iter(loader)
    worker = int(next(batches)[0])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(worker, number)
    assert [int(batch[0]) for batch in batches] == [worker, worker]


def test_a_stopped_run_saves_and_lists_its_batch(tmp_path):
    accelerator = start_accelerator(tmp_path, "fp32")
    options = {"output_dir": tmp_path, "save": lambda: tmp_path / "checkpoints" / "step_0000006"}
    with pytest.raises(
        ValueError, match=r"the loss is nan at step 7.*step_0000006.*nonfinite_step_0000007.txt"
    ):
        stop_run(accelerator, 7, "the loss is nan", files=["a.jpg", "b.jpg"], **options)
    assert (tmp_path / "nonfinite_step_0000007.txt").read_text().split() == ["a.jpg", "b.jpg"]
    with pytest.raises(ValueError, match=r"at step 7.*no longer finite"):
        stop_run(accelerator, 7, "the loss is nan", files=[], output_dir=tmp_path, save=lambda: None)


def test_user_errors_are_one_line(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        micro_batch_size(3, 2, 1)
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith("error: optim.batch_size 3")
    assert text.count("\n") == 1

    with pytest.raises(SystemExit), one_line_errors():
        (tmp_path / "missing.txt").read_text()
    assert capsys.readouterr().err == f"error: No such file or directory: {tmp_path / 'missing.txt'}\n"


@pytest.mark.parametrize("filename", [None, "out/depth.png"])
def test_full_disk_anywhere_comes_with_advice(capsys, filename):
    with pytest.raises(SystemExit), one_line_errors():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), filename)
    where = f" ({filename})" if filename else ""
    text = capsys.readouterr().err
    assert text.startswith(f"error: the disk is full{where}: free space, then run the same command again")
    assert "--resume true" in text


def test_a_sentence_that_names_its_file_is_left_alone(capsys, tmp_path, full_disk):
    with pytest.raises(SystemExit), one_line_errors():
        write_whole(tmp_path / "results.json", b"")
    assert capsys.readouterr().err.count("results.json") == 1


def test_a_full_disk_leaves_no_half_written_file(tmp_path, full_disk):
    accelerator = start_accelerator(tmp_path, "fp32")
    with pytest.raises(OSError, match=r"the disk is full, .*metrics\.jsonl was not written"):
        RunLog(tmp_path, accelerator, None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_hides_no_reason(tmp_path, full_disk):
    def save():
        raise OSError(errno.ENOSPC, "No space left on device")

    accelerator = start_accelerator(tmp_path, "fp32")
    with pytest.raises(UserError) as stopped:
        stop_run(accelerator, 7, "the loss is nan", files=["a", "b"], output_dir=tmp_path, save=save)
    sentence = str(stopped.value)
    assert sentence.startswith(
        "the loss is nan at step 7, the run has stopped; the state before this step could not"
    )
    assert "The images of this batch, a, b first, could not be listed (" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_run_may_be_started_from_another_thread():
    """Only the main thread may handle signals; the run there goes without."""
    before = signal.getsignal(signal.SIGTERM)

    def stop_of_a_thread():
        with StopRequest() as stop:
            return stop.requested, signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(stop_of_a_thread).result() == (False, before)


def test_operators_without_a_sparse_rule_are_a_users_error(capsys):
    value = sparsify(torch.zeros(1, 3, 4, 4), torch.ones(1, 1, 2, 2, dtype=torch.bool))
    with pytest.raises(SystemExit), one_line_errors():
        torch.fft.fft2(value)  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith("error: no sparse rule for operator")


def test_control_c_before_the_first_step_is_a_line(capsys, monkeypatch):
    """Signals are handled from the first step on; before, torch is imported and data are listed."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("spark.training.run.Run.__init__", stopped)
    with pytest.raises(SystemExit) as ended:
        spark.pretrain.main(["--model=resnet18", "--data=photos", "--output_dir=run"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted; --resume true goes on")


def test_bugs_keep_their_traceback():
    with pytest.raises(ValueError, match="invalid literal"), one_line_errors():
        json.loads("1", parse_int=lambda _: int("x"))
    with pytest.raises(KeyError), one_line_errors():
        {}["x"]
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker"), one_line_errors():
        list(
            DataLoader(Numbers(), sampler=[3], num_workers=1)
        )  # raised by this test, which is not the project


def test_user_error_in_a_loader_process(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        list(DataLoader(Numbers(UserError), sampler=[3], num_workers=1))
    assert capsys.readouterr().err == "error: sample 3 is no good\n"


def test_plain_progress_lines(capsys):
    with progress_bar(20, 10, every=5) as bar:
        for step in range(11, 21):
            bar.update(step, loss=0.5, lr=1e-3, images_per_second=123.4)
        bar.say("[done]")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == ["11/20", "15/20", "20/20"]
    assert "loss 0.5000  lr 1.00e-03  123.4 images/s  0:00:00 left" in lines[2]
    assert lines[-1] == "[done]"
    with progress_bar(2, enabled=False) as bar:
        bar.update(1, loss=0.5)
        bar.say("nothing")
    assert capsys.readouterr().out == ""


def test_live_progress_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar(2) as bar:
        bar.update(1, loss=0.25, lr=1e-3, images_per_second=8.0)
        bar.update(2, loss=0.125, lr=1e-3, images_per_second=8.0)
    text = capsys.readouterr().out
    assert "2/2" in text
    assert "loss 0.1250" in text


def test_format_duration():
    assert format_duration(3725.4) == "1:02:05"


def test_length_and_warmup():
    length = run_length
    assert length(100 / 32, 10, None, 2, None) == (32, 6)
    assert length(100 / 32, 10, None, 2, 5) == (32, 5)
    assert length(100 / 32, 10, 7, 2, 5) == (7, 5)
    assert length(100 / 32, 10, 7, 40, None) == (7, 7), "the recipe's warm-up is cut to a shorter trial run"
    assert length(100 / 32, 0.01, None, 0, None) == (1, 0)
    with pytest.raises(ValueError, match="warmup_steps 9 are more than the 7 steps"):
        length(100 / 32, 10, 7, 2, 9)


def test_gradients_lie_in_memory_as_their_parameters():
    """A 1x1 and a depthwise weight, whose strides along axes of length 1 autograd is free to choose."""
    model = torch.nn.ParameterList(
        [torch.zeros(1, 6, 1, 1), torch.zeros(6, 1, 3, 3), torch.zeros(4, 6, 3, 3)]
    )
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    values = [torch.randn(parameter.shape) for parameter in model]
    for hooks in (False, True):
        if hooks:
            match_gradient_strides(model)
        for parameter, value in zip(model, values, strict=True):
            parameter.grad = None
            for _ in range(2):  # accumulated, as the parts of a batch are
                (parameter * 1).backward(value)
        alike = [parameter.grad.stride() == parameter.stride() for parameter in model]
        assert alike == [hooks, hooks, True]
        for parameter, value in zip(model, values, strict=True):
            assert torch.equal(parameter.grad, 2 * value)
