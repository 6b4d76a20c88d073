"""Shared fixtures: where real data lies, and one thread a test so that two workers share two cores."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images and NYU pairs: $SPARK_DATA, or ../shared/data beside the checkout."""
    named = os.environ.get("SPARK_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "nyu" / "nyu_train.txt").exists():
        pytest.skip(f"no real data at {folder}: set SPARK_DATA to a folder that holds nyu/ and images/")
    return folder
