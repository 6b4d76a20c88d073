"""The sections about pretraining runs."""

from typing import Any

from spark.model.masking import ratio_range
from spark.report.charts import number
from spark.report.page import Section, Text, picture
from spark.report.runs import Run, RunKind
from spark.report.sections import Fact, curves, differences, fact_blocks, named, speed

CURVES = (
    ("loss", "Loss"),
    ("lr", "Learning rate"),
    ("images_per_second", "Images per second"),
    ("knn", "kNN accuracy"),
    ("linear", "Linear probe accuracy"),
    ("rank", "Effective rank of the features"),
)


def pretraining_sections(arms: dict[str, list[Run]]) -> list[Section]:
    """What was trained, its curves and its reconstructions; runs by label, several are seeds of one thing."""
    runs = named(arms)
    tasks: dict[str, list[str]] = {}
    for run in runs:
        tasks.setdefault(task(run), []).append(run.label)
    what = [
        Text(f"{', '.join(labels)}: {about}" if len(tasks) > 1 else about) for about, labels in tasks.items()
    ]
    drawn = curves(runs, CURVES)
    nothing = Text("No loss was logged: metrics.jsonl is missing or empty.", note=True)
    panels: list[Any] = []
    for run in runs:
        shown = dict.fromkeys(run.pictures[:1] + run.pictures[-1:])  # how it began and how far it came
        caption = f"{run.label}: " if len(runs) > 1 else ""
        panels += [
            picture(p, f"reconstructions of {run.label}", caption + panel_caption(p, run)) for p in shown
        ]
        if not shown:
            panels.append(
                Text(f"{run.label} has drawn no reconstructions yet: its figures/ is empty.", note=True)
            )
    return [
        Section("Pretraining", [*what, *fact_blocks(runs, [facts(run) for run in runs]), *differences(arms)]),
        Section("Curves of pretraining", [drawn or nothing]),
        Section("Reconstructions", panels),
    ]


def facts(run: Run) -> list[Fact]:
    """The run in a few numbers: (name, value, remark); None is not known."""
    size, ratio = run.option("model.input_size"), run.option("model.mask_ratio")
    if not isinstance(ratio, list):  # of one number, whole patches may round much: 0.5 of 2x2, not 0.6
        ratio = run.last("mask_ratio") or ratio
    loss = run.last("loss")
    return [
        ("encoder", run.option("model.name"), ""),
        ("input [px]", " × ".join(map(str, size)) if isinstance(size, list) else size, ""),
        ("hidden", _percent(ratio), "of the patches"),
        ("channels", run.option("model.in_chans"), ""),
        ("batch", run.option("optim.batch_size"), "images"),
        ("steps", f"{run.steps:,}" if run.steps else None, ""),
        ("loss", None if loss is None else number(loss), "last logged"),
        ("speed", speed(run) or None, "median"),
        ("layout", run.texts.get("layout"), ""),
        ("seed", run.option("seed"), ""),
    ]


def task(run: Run) -> str:
    """What the run has to predict, from what, and what its loss means."""
    seen = {
        "zero": "The encoder, a dense network, sees the whole image with hidden patches in the mean colour; the decoder"
        " gets its features of the visible ones",
        "token": "The encoder, a dense network, sees the whole image with a learned colour in hidden patches",
    }.get(run.option("model.masked_pixels"), "The encoder sees the visible patches only")
    maps = run.option("model.decoder_maps", 4)
    if maps != 4:
        seen += f"; of its feature maps the decoder gets the deepest {'one' if maps == 1 else maps} only"
    counted = "all patches" if run.option("model.loss_on") == "all" else "the hidden patches"
    loss = {
        "pixels": f"the mean squared error of {counted}, in the standard deviations of the data set",
        "hog": f"the mean squared error of histograms of oriented gradients in {counted}",
    }.get(
        run.option("model.target"),
        f"the mean squared error of {counted}, each normalised by its own mean and deviation: 1 is what a prediction of"
        " the mean alone gives",
    )
    return f"{seen}. The loss is {loss}."


def panel_caption(path: Any, run: Run) -> str:
    """Caption of a reconstruction panel; its file name ends in the step."""
    step = path.stem.rpartition("_")[2]
    when = f"after step {int(step)}" if step.isdecimal() else path.name
    hog = "histograms of oriented gradients, and the same with predicted ones in hidden patches"
    shown = (
        f"masked input, {hog}" if run.option("model.target") == "hog" else "masked input and reconstruction"
    )
    return f"Input, {shown}, {when}. Training images."


def _percent(ratio: Any) -> str | None:
    try:
        return None if ratio is None else " to ".join(f"{r:.0%}" for r in dict.fromkeys(ratio_range(ratio)))
    except (TypeError, ValueError):  # of a config that somebody edited
        return str(ratio)


def is_pretraining(run: Run) -> bool:
    """Whether a run is one of spark-pretrain; one without a readable config.yaml counts as such."""
    return not run.config or run.option("model.name") is not None


PRETRAINING = RunKind("pretraining", is_pretraining, pretraining_sections)
