"""Golden files, the machine that wrote them, and how numbers of another one are compared with theirs."""

import json
import math
import platform
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Tolerance = list[tuple[str, float, float]]
"""Patterns of places, each with the relative and the absolute deviation that is allowed there; the first one counts."""

HERE = Path(__file__).parent
PER_MACHINE = ("sha256",)
"""Keys whose values are of bits that another processor may compute otherwise."""


def processor() -> str:
    """Name, family and model of the processor and the instructions that PyTorch uses of it.

    Virtual machines give processors of several generations one name.
    """
    name, info = platform.processor(), Path("/proc/cpuinfo")
    if info.is_file():
        text = info.read_text()
        parts = (re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "cpu family", "model"))
        name = ", ".join(part[1] for part in parts if part)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def origin(commit: str, threads: int) -> dict[str, Any]:
    """Where numbers come from."""
    return {
        "commit": commit,
        "torch": torch.__version__,
        "processor": processor(),
        "threads": threads,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def same_machine(written: dict[str, Any]) -> bool:
    """Whether numbers must be those of this origin, bit for bit."""
    return written["processor"] == processor() and written["torch"] == torch.__version__


def allowed(where: str, tolerance: Tolerance) -> tuple[float, float]:
    """Relative and absolute deviation that is allowed at a place: those of the first pattern that is found in it."""
    return next(
        (relative, absolute) for pattern, relative, absolute in tolerance if re.search(pattern, where)
    )


def differences(expected: Any, found: Any, tolerance: Tolerance | None, where: str = "") -> list[str]:
    """A line for each value of `expected` that `found` does not have.

    Rows of a run (`rows`) may have further columns; everything else must have exactly the same keys.

    Args:
        expected: Nested dicts and lists of numbers, texts, truth values and None.
        found: Likewise.
        tolerance: How far numbers may be off, by place; counts are held to it like all numbers. None demands equal
            bits.
        where: Name of the place, for the lines.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        lines = [f"{where}.{key} is missing" for key in expected if key not in found]
        if not where.endswith("rows"):
            lines += [f"{where}.{key} is new: {found[key]!r}" for key in found if key not in expected]
        for key in expected.keys() & found.keys():
            if tolerance is None or key not in PER_MACHINE:
                lines += differences(expected[key], found[key], tolerance, f"{where}.{key}")
        return sorted(lines)
    if isinstance(expected, list) and isinstance(found, list):
        if len(expected) != len(found):
            return [f"{where} has {len(found)} entries, not {len(expected)}"]
        each = enumerate(zip(expected, found, strict=True))
        return [line for index, (a, b) in each for line in differences(a, b, tolerance, f"{where}[{index}]")]
    if type(expected) in (int, float) and type(found) is type(expected):
        if math.isnan(expected) and math.isnan(found):
            return []
        relative, absolute = (0.0, 0.0) if tolerance is None else allowed(where, tolerance)
        if math.isclose(expected, found, rel_tol=relative, abs_tol=absolute):
            return []
    elif type(expected) is type(found) and expected == found:
        return []
    return [f"{where} was {expected!r}, is {found!r}"]


def read(name: str, folder: Path = HERE) -> dict[str, Any]:
    """A golden file: origin, tolerances, cases."""
    return json.loads((folder / f"{name}.json").read_text())


def as_text(value: Any, indent: int = 0) -> str:
    """JSON with one entry of a dict a line, and lists of plain values on one."""
    if isinstance(value, dict) and value:
        inside = " " * (indent + 1)
        entries = [f"{inside}{json.dumps(key)}: {as_text(each, indent + 1)}" for key, each in value.items()]
        return "{\n" + ",\n".join(entries) + "\n" + " " * indent + "}"
    return json.dumps(value)
