"""Processes of a test, forked from a server that has imported the package once.

A new Python imports torch, timm and torchvision for many seconds, and a launcher with two processes does so three
times. Here every pytest process pays for it once, at the first test that asks. The server has run nothing, so that what
it forks is as a new process: no threads, no process group, no CUDA.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command, launch_command_parser

ROOT = Path(__file__).resolve().parents[1]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["spark.task", "finetune.tasks.depth", "pytest"])


@dataclass(frozen=True)
class Started:
    """A process that leads a group of its own, as after `setsid`; what it prints goes to two files."""

    process: BaseProcess
    out: Path
    err: Path

    def stdout(self) -> str:
        return self.out.read_text()

    def stderr(self) -> str:
        return self.err.read_text()

    def ended(self, limit: float) -> int:
        """Its exit code.

        Raises:
            AssertionError: it still runs after `limit` seconds; with all that it printed and where it stands. It is
                killed then.
        """
        self.process.join(limit)
        hangs = self.process.exitcode is None
        self.kill()
        assert not hangs, f"still running after {limit:.0f} s\n{self.stdout()}\n{self.stderr()[-5000:]}"
        assert self.process.exitcode is not None
        return self.process.exitcode

    def kill(self) -> None:
        """While it runs: let it write where it stands, then end it and the processes that it has started."""
        if self.process.exitcode is None:
            assert self.process.pid is not None
            os.kill(self.process.pid, signal.SIGUSR2)
            self.process.join(0.5)
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not come to `setsid` yet
                self.process.kill()
            self.process.join()


@dataclass(frozen=True)
class Done:
    """What several processes left: their exit codes, and one text of what all of them printed."""

    codes: list[int | None]
    stdout: str
    stderr: str


def start(
    function: Callable, *arguments: Any, folder: Path, name: str = "process", **environment: str
) -> Started:
    """Call `function(*arguments)` in a process with these variables beside the present ones; files go to `folder`."""
    started = folder / f"{name}.out", folder / f"{name}.err"
    for path in started:
        path.write_text("")
    everything = {
        **os.environ,
        **environment,
    }  # the server would hand on those of the time when it was started
    process = server.Process(target=_call, args=(function, arguments, everything, started))
    process.start()
    return Started(process, *started)


def together(
    function: Callable, *arguments: Any, folder: Path, count: int = 2, limit: float = 200, **environment: str
) -> Done:
    """Call `function(rank, *arguments)` in `count` processes that can find each other as after a launcher.

    None of them outlives this call, which takes at most `limit` seconds.

    As under a launcher, one that fails ends the others: SIGTERM, and SIGKILL when that was to no avail for 30 s.

    Raises:
        AssertionError: one still runs after `limit` seconds; with all that they printed and where they stand.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    deadline, failed = time.monotonic() + limit, False
    started: list[Started] = []
    try:
        for rank in range(count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(
                start(function, rank, *arguments, folder=folder, name=f"rank{rank}", **environment, **own)
            )
        running = {one.process.sentinel: one.process for one in started}
        while running and (ended := wait(list(running), max(0, deadline - time.monotonic()))):
            codes = [running.pop(cast(int, sentinel)).exitcode for sentinel in ended]
            if any(codes) and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + 30)
                for process in running.values():
                    process.terminate()
    finally:
        for one in started:
            one.kill()
    out, err = "".join(one.stdout() for one in started), "".join(one.stderr() for one in started)
    assert failed or not running, f"still running after {limit:.0f} s\n{out}\n{err[-10000:]}"
    return Done([one.process.exitcode for one in started], out, err)


def launched(config: str, count: int = 2) -> dict[str, str]:
    """The variables that `accelerate launch --config_file configs/accelerate/CONFIG` gives `count` processes.

    The launcher itself makes them; only that it would start the processes then is left out.
    """
    given: dict[str, str] = {}
    options = ["--config_file", str(ROOT / "configs" / "accelerate" / config), "--num_processes", str(count)]
    before = {**os.environ}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed.run, "run", lambda _: given.update(os.environ))
        launch_command(launch_command_parser().parse_args([*options, "script.py"]))
    assert given
    mine = {name: value for name, value in given.items() if before.get(name) != value}
    return {**mine, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _call(
    function: Callable, arguments: tuple, environment: dict[str, str], outputs: tuple[Path, Path]
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.register(signal.SIGUSR2)
    torch.set_num_threads(1)
    function(*arguments)
