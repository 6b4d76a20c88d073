"""What `layout="auto"` means: the layout that was the fastest in the committed measurements, `measured.csv`.

`python -m tools.benchmark layouts` writes that table: times of the encoder alone, for a layout changes nothing else.
"""

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from spark.sparse import LAYOUTS
from spark.sparse.processor import cpu_name

AUTO = "auto"
MEASURED = Path(__file__).with_name("measured.csv")
# Taken where nothing was measured: it runs everywhere and computes visible sites only.
UNMEASURED = "packed"
_TABLE = "spark/sparse/measured.csv"


class Choice(NamedTuple):
    """A layout, and why it was taken: "auto: " and the reason from the table, or "as named"."""

    layout: str
    reason: str


def choose_layout(device_type: str, convolutions: str, precision: str, mask_ratio: float) -> Choice:
    """Pick the layout of the highest median speed-up over the masked one, in the measurements nearest to this use.

    Nearest: of this device type; then, each only where the table has it, of this very device, kind of convolutions and
    precision; then of the nearest mask ratio. A layout whose package is missing is no candidate. Of equally fast
    layouts "packed" goes first, then "masked".

    Args:
        device_type: "cpu" or "cuda".
        convolutions: "dense" or "grouped", see `convolution_kind`.
        precision: "fp32", "bf16", "fp16" or "fp64".
        mask_ratio: share of hidden patches.
    """
    rows = [row for row in measured() if row["device_type"] == device_type]
    present = {
        layout for layout in LAYOUTS if any(row["layout"] == layout for row in rows) and is_available(layout)
    }
    rows = [row for row in rows if row["layout"] in present]
    if not rows:
        return Choice(UNMEASURED, f"auto: not yet measured on {device_type}; {_TABLE}")
    name = device_name(device_type)
    rows = _where(rows, "device", name)
    rows = _where(rows, "convolutions", convolutions)
    rows = _where(rows, "precision", precision)
    # Rounded: 0.6 - 0.45 and 0.45 - 0.3 differ in their last bits.
    distances = [round(abs(float(row["mask_ratio"]) - mask_ratio), 6) for row in rows]
    rows = [row for row, distance in zip(rows, distances, strict=True) if distance == min(distances)]
    speed = {
        layout: statistics.median(float(row["speedup_median"]) for row in rows if row["layout"] == layout)
        for layout in ("packed", *LAYOUTS)
        if any(row["layout"] == layout for row in rows)
    }
    layout = max(speed, key=speed.__getitem__)  # the first of equals
    gain = "the fastest layout" if layout == "masked" else f"{speed[layout]:.1f}x the masked layout"
    precisions, ratios, models, sides, batches = (
        " and ".join(dict.fromkeys(row[column] for row in rows))
        for column in ("precision", "mask_ratio", "model", "height", "batch")
    )
    place = f"this {device_type}" if all(row.get("device") == name for row in rows) else device_type
    case = f"{precisions}, mask ratio {ratios}, {models} at {sides} px, batch {batches}"
    return Choice(layout, f"auto: {gain} on {place}, {case}; {_TABLE}")


def measured() -> list[dict[str, str]]:
    """Rows of the table; empty if nothing was measured yet."""
    with MEASURED.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def device_name(device: str) -> str:
    """Kind of the machine, as the table names it; nothing that identifies it. "" for a GPU that is not there."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    return f"cpu ({cpu_name()})"


def is_available(layout: str) -> bool:
    """Whether the package that a layout needs is there (the packed and the masked one need none)."""
    try:
        LAYOUTS[layout]()
    except ValueError:
        return False
    return True


def convolution_kind(encoder: nn.Module) -> str:
    """The kind of an encoder's convolutions in the table: "grouped" if any k x k one has groups, else "dense"."""
    grouped = any(
        isinstance(module, nn.Conv2d) and module.groups > 1 and max(module.kernel_size) > 1
        for module in encoder.modules()
    )
    return "grouped" if grouped else "dense"


def _where(rows: Sequence[Mapping[str, str]], column: str, value: str) -> list[Mapping[str, str]]:
    """The rows with this value, or all rows if no row has it."""
    return [row for row in rows if row.get(column) == value] or list(rows)
