"""Loader processes: they live through stop signals, and do not keep a program that failed from ending."""

import subprocess
import sys

FAILS = """
import torch
from torch.utils.data import Dataset
from spark.images.loader import load_batches

class Numbers(Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return torch.tensor(index)

def train():
    batches = load_batches(Numbers(), 1, torch.device("cpu"), batch_size=2)
    next(batches)
    raise RuntimeError("a bug")

train()
"""


def test_a_program_that_fails_ends() -> None:
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr
