"""Processes of a test: what they get and leave, how a launcher is imitated, what becomes of one that hangs."""

import os
import signal
import sys
import time

import pytest

from tests.together import launched, start, together

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MARK", "LATE")


def speak(rank, word):
    print(word, rank, *(os.environ[name] for name in VARIABLES))
    os.system("echo from below 1>&2")


def fail_in_one(rank):
    if rank:
        time.sleep(100)
    sys.exit(3)


def wait_for_ever(rank):
    print("waiting", rank)
    time.sleep(100)


def test_processes_get_the_environment_of_now_and_leave_what_they_print(tmp_path, monkeypatch):
    start(print, folder=tmp_path).ended(200)  # the server runs already when the variable is set
    monkeypatch.setenv("LATE", "yes")
    done = together(speak, "hello", folder=tmp_path, MARK="7")
    assert done.codes == [0, 0]
    assert done.stdout == "hello 0 0 0 2 2 7 yes\nhello 1 1 1 2 2 7 yes\n"
    assert done.stderr == "from below\n" * 2


def test_one_that_fails_ends_the_others(tmp_path):
    assert together(fail_in_one, folder=tmp_path).codes == [3, -signal.SIGTERM]


def test_processes_that_hang_fail_with_what_they_printed_and_where_they_stand(tmp_path):
    start(print, folder=tmp_path).ended(200)
    with pytest.raises(AssertionError) as failure:
        together(wait_for_ever, folder=tmp_path, limit=3)
    text = str(failure.value)
    assert "still running after 3 s" in text
    assert "waiting 0\nwaiting 1\n" in text
    assert text.count("in wait_for_ever") == 2


def test_variables_of_the_launcher():
    before = dict(os.environ)
    sharded = launched("gpu_8_fsdp.yaml")
    assert (sharded["ACCELERATE_USE_FSDP"], sharded["FSDP_VERSION"]) == ("true", "2")
    whole = launched("cpu_2_processes.yaml")
    assert whole["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in whole
    assert dict(os.environ) == before
