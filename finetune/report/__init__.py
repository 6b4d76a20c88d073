"""The page about depth runs, built with `spark.report`."""

from pathlib import Path

from finetune.report.labels import (
    classification_sections,
    is_classification,
    is_segmentation,
    segmentation_sections,
)
from finetune.report.results import with_results
from finetune.report.sections import depth_sections, is_depth
from spark.report import RunKind, read_run, run_page

__all__ = ["CLASSIFICATION", "DEPTH", "SEGMENTATION", "depth_page", "label_page"]

DEPTH = RunKind("depth", is_depth, depth_sections, with_results)
CLASSIFICATION = RunKind("classification", is_classification, classification_sections, with_results)
SEGMENTATION = RunKind("segmentation", is_segmentation, segmentation_sections, with_results)


def depth_page(folder: str | Path) -> Path:
    """Write ``report.html`` of a depth run into its folder, from its files. OSError: it cannot be written."""
    return run_page(folder, DEPTH)


def label_page(folder: str | Path) -> Path:
    """`depth_page` of a run that learns classes, of photos or of pixels."""
    run = read_run(folder)
    return run_page(folder, CLASSIFICATION if is_classification(run) else SEGMENTATION)
