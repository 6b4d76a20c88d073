"""The table behind `layout="auto"`: which layouts run on a device, and the rows of `spark/sparse/measured.csv`."""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from spark.errors import UserError
from spark.model.encoder import build_encoder
from spark.sparse import LAYOUTS
from spark.sparse.choice import convolution_kind, is_available

COLUMNS = (
    "device",
    "device_type",
    "threads",
    "model",
    "convolutions",
    "precision",
    "batch",
    "height",
    "width",
    "mask_ratio",
    "layout",
    "seconds_median",
    "seconds_quartile_low",
    "seconds_quartile_high",
    "speedup_median",
    "speedup_quartile_low",
    "speedup_quartile_high",
    "rounds",
    "torch",
    "timm",
    "python",
)
"""Of the table; all but `device_type`, `convolutions` and `layout` are those of other timings."""


def layouts_of(device: str) -> tuple[str, ...]:
    """The layouts that are worth measuring on a device, "masked" first; tells which are left out on a GPU.

    On a CPU spconv has only its slow algorithm and Triton only its interpreter, both for tests.
    """
    if torch.device(device).type == "cpu":
        return ("masked", "packed")
    present = {layout: is_available(layout) for layout in LAYOUTS}
    for layout in LAYOUTS:
        if not present[layout]:
            print(f"note: layout {layout} is left out, its package is missing", file=sys.stderr)
    return tuple(layout for layout in LAYOUTS if present[layout])


def table_rows(timings: Sequence[Mapping[str, str]], device: str) -> list[dict[str, str]]:
    """Rows of timings (of `timing_rows`, taken on `device`) as rows of the table."""
    kinds = {name: convolution_kind(build_encoder(name)) for name in {row["model"] for row in timings}}
    rows = []
    for row in timings:
        own = {"device_type": torch.device(device).type, "convolutions": kinds[row["model"]]}
        whole = {**row, **own, "layout": row["contender"]}
        rows.append({column: whole[column] for column in COLUMNS})
    return rows


def replace_cases(path: Path, rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The table in a file with these rows in place of those of the same cases, after all others.

    A case goes as a whole, with all its layouts: their speed-ups are over the same masked one.

    Raises:
        ValueError: the file has other columns.
        OSError: it cannot be read; a file that is not there yet is an empty table.
    """
    kept: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise UserError(f"{path} is no table of layouts: its first line must be {','.join(COLUMNS)}")
            kept = list(reader)
    measured = {_case(row) for row in rows}
    return [*(row for row in kept if _case(row) not in measured), *map(dict, rows)]


def _case(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[column] for column in COLUMNS[: COLUMNS.index("layout")])
