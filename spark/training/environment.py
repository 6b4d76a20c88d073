"""What a run runs on: versions and the kind of machine, nothing that identifies the machine."""

import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import numpy
import timm
import torch

from spark.files import write_whole
from spark.training.accelerator import usable_cores

ENVIRONMENT = "environment.json"


def environment() -> dict[str, Any]:
    """Versions, system, cores and GPUs of this process."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpus": ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)) or "none",
    }


def record_environment(folder: str | Path, step: int, processes: int) -> Path:
    """Add this start of a run to its ``environment.json``, a list with an entry for each start.

    Args:
        folder: of the run.
        step: that it starts behind; at 0 the list begins anew.
        processes: that train.
    """
    path = Path(folder) / ENVIRONMENT
    before: Any = []
    if step and path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # damaged: it is a record, not worth stopping a run for
            before = []
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"step": step, "started": started, "processes": processes, **environment()}
    entries = [*(before if isinstance(before, list) else []), entry]
    return write_whole(path, (json.dumps(entries, indent=1) + "\n").encode())
