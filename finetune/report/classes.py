"""The page about a run that learns classes, of images or of their pixels."""

from pathlib import Path
from typing import Any

from finetune.report.results import result_tiles, with_results
from spark.report import RunKind, run_page
from spark.report.charts import number
from spark.report.page import Cell, Section, Table, Text, Tiles
from spark.report.runs import Run
from spark.report.sections import Fact, curves, differences, fact_blocks, named, plain_path

CURVES = (
    ("loss", "Training loss"),
    ("val_top1", "Validation top-1"),
    ("val_class_top1", "Validation top-1 of classes"),
    ("val_miou", "Validation mIoU"),
    ("val_pixel_accuracy", "Validation pixel accuracy"),
    ("lr", "Learning rate"),
)


def is_classes(run: Run) -> bool:
    """Whether a run is one of spark-classify or spark-segment."""
    return "encoder" in run.config and ("linear" in run.config or "decoder_channels" in run.config)


def classes_sections(arms: dict[str, list[Run]]) -> list[Section]:
    """Results, the score of each class, and curves."""
    runs = named(arms)
    results: list[Any] = []
    for run in runs:
        if not run.results:
            results.append(Text(f"{run.label} is not scored yet.", note=True))
            continue
        (result,) = run.results
        heading = "top-1" if result["protocol"] == "classification" else "IoU"
        rows = [
            [Cell(name, head=True), Cell("" if value is None else f"{value:.3f}")]
            for name, value in result["per_class"].items()
        ]
        results += [Text(run.label), Tiles(result_tiles(result)), Table(["class", heading], rows)]
    drawn = curves(runs, CURVES)
    return [
        Section("Classes", [*fact_blocks(runs, [facts(run) for run in runs]), *differences(arms)]),
        Section("Results", results),
        Section("Curves", [drawn or Text("No loss was logged.", note=True)]),
    ]


def facts(run: Run) -> list[Fact]:
    """The run in a few numbers: (name, value, remark); None is not known."""
    loss = run.last("loss")
    return [
        ("encoder", plain_path(str(run.option("encoder", ""))) or None, ""),
        ("labels", run.option("data.labels"), "share, or classes"),
        ("batch", run.option("optim.batch_size"), ""),
        ("steps", f"{run.steps:,}" if run.steps else None, ""),
        ("loss", None if loss is None else number(loss), "last logged"),
        ("seed", run.option("seed"), ""),
    ]


CLASSES = RunKind("classes", is_classes, classes_sections, with_results)


def classes_page(folder: str | Path) -> Path:
    """Write ``report.html`` of such a run into its folder, from its files. OSError: it cannot be written."""
    return run_page(folder, CLASSES)
