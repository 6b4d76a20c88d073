"""Which processor this is."""

import functools
import platform
from pathlib import Path


@functools.cache
def cpu_name() -> str:
    """The processor's model as Linux names it, or the machine's architecture; nothing that identifies the machine."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)
    return model or platform.machine()
