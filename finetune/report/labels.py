"""Sections of the page about runs that learn classes, of photos and of pixels."""

from typing import Any

from finetune.report.results import heading
from finetune.report.sections import NO_LOSS, scored_blocks
from spark.report.charts import number
from spark.report.page import Cell, Folded, Section, Table, Text
from spark.report.runs import Run
from spark.report.sections import Fact, curves, differences, fact_blocks, named, plain_path, speed

CURVES = (
    ("loss", "Training loss"),
    *(
        (f"val_{name}", f"Validation {heading(name)}")
        for name in ("top1", "miou", "mean_accuracy", "pixel_accuracy")
    ),
    ("lr", "Learning rate"),
    ("images_per_second", "Images per second"),
)
MOST_CLASSES = 20  # with more a table of all confusions is unreadable


def is_classification(run: Run) -> bool:
    """Whether a run is one of spark-classify."""
    return run.option("data.labels_seed") is not None


def is_segmentation(run: Run) -> bool:
    """Whether a run is one of spark-segment."""
    return run.option("model.decoder") is not None and run.option("encoder") is not None


def classification_sections(arms: dict[str, list[Run]]) -> list[Section]:
    """What was trained, results with those of each class, curves; runs by label, several are seeds of one thing."""
    return _sections("classification", arms)


def segmentation_sections(arms: dict[str, list[Run]]) -> list[Section]:
    """See `classification_sections`."""
    return _sections("segmentation", arms)


def _sections(what: str, arms: dict[str, list[Run]]) -> list[Section]:
    runs = named(arms)
    drawn = curves(runs, CURVES, terms="loss_")
    classes: list[Any] = []
    for label, same in arms.items():
        for result in same[0].results[:1]:
            which = f" of {label}" if len(arms) > 1 else ""
            classes.append(_class_table(result, f"Each class{which}."))
            if len(result.get("classes", ())) <= MOST_CLASSES:
                classes.append(Folded(f"Confusion matrix{which}", [_confusion(result)]))
    return [
        Section(what.capitalize(), [*fact_blocks(runs, [_facts(run) for run in runs]), *differences(arms)]),
        Section(f"Results of {what}", scored_blocks(arms)),
        Section("Classes", classes),
        Section(f"Curves of {what}", [drawn or NO_LOSS]),
    ]


def _facts(run: Run) -> list[Fact]:
    size = run.option("data.image_size") or run.option("data.size")
    loss, labels = run.last("loss"), run.option("data.labels")
    result = run.results[0] if run.results else {}
    return [
        ("encoder", plain_path(str(run.option("encoder", ""))) or None, ""),
        ("learns", "the head alone" if run.option("model.frozen") else "encoder and head", ""),
        ("decoder", run.option("model.decoder"), ""),
        ("images [px]", " × ".join(map(str, size)) if isinstance(size, list) else size, ""),
        ("labels", labels, "share, or photos of each class" if labels is not None else ""),
        ("trained on", result.get("training_photos") or result.get("training_images"), "images"),
        ("steps", f"{run.steps:,}" if run.steps else None, ""),
        ("loss", None if loss is None else number(loss), "last logged"),
        ("speed", speed(run) or None, "median"),
        ("seed", run.option("seed"), ""),
    ]


def _class_table(result: dict[str, Any], caption: str) -> Table:
    """Numbers of each class; empty where there is nothing of it."""
    rows = result.get("per_class") or []
    names = [name for name in (rows[0] if rows else ()) if name != "class"]
    body = [[Cell(str(row["class"]), head=True), *(Cell(_text(row[name])) for name in names)] for row in rows]
    return Table(["class", *names], body, caption=caption)


def _confusion(result: dict[str, Any]) -> Table | Text:
    """Share of each true class (row) that was taken for each class (column), in percent."""
    names = result["classes"]
    body = []
    for name, counts in zip(names, result["confusion"], strict=True):
        total = sum(counts) or 1
        body.append([Cell(name, head=True), *(Cell(f"{100 * n / total:.0f}") for n in counts)])
    return Table(["%", *names], body, caption="A row is a class, a column what it was taken for.")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
