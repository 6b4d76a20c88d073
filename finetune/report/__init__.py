"""The page about depth runs, built with `spark.report`."""

from pathlib import Path

from finetune.report.results import with_results
from finetune.report.sections import depth_sections, is_depth
from spark.report import RunKind, run_page

__all__ = ["DEPTH", "depth_page"]

DEPTH = RunKind("depth", is_depth, depth_sections, with_results)


def depth_page(folder: str | Path) -> Path:
    """Write ``report.html`` of a depth run into its folder, from its files. OSError: it cannot be written."""
    return run_page(folder, DEPTH)
