"""Rows of a table of results as the text of a file."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def rows_as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a CSV file, all rows with the columns of the first."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
