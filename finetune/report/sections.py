"""Sections of the page about depth runs: results, curves, pictures, worst images."""

from pathlib import Path
from typing import Any

from finetune.report.results import (
    heading,
    protocol_table,
    reading,
    result_tiles,
    results_blocks,
    worst_table,
)
from spark.report.charts import number
from spark.report.page import Folded, Section, Text, Tiles, picture
from spark.report.runs import Run
from spark.report.sections import Fact, curves, differences, fact_blocks, named, plain_path, speed

SHOWN = ("delta1", "abs_rel", "rmse", "whdr")  # validation curves to show at once, others are folded
CURVES = (
    ("loss", "Training loss"),
    *((f"val_{name}", f"Validation {heading(name)}") for name in SHOWN),
    ("lr", "Learning rate"),
    ("images_per_second", "Images per second"),
)
NO_RESULTS = "Not scored yet (no results.json or evaluation.json)"


def is_depth(run: Run) -> bool:
    """Whether a run is one of spark-depth; without config.yaml its scores tell."""
    if run.config:
        return "encoder" in run.config
    scored = any((run.folder / name).is_file() for name in ("results.json", "evaluation.json"))
    return scored or any(name.startswith("val_") for name in run.series)


def depth_sections(arms: dict[str, list[Run]]) -> list[Section]:
    """Results, curves, pictures and worst images.

    Args:
        arms: depth runs by label; several under one label are seeds, and the first label is what others are compared
            with.
    """
    runs = named(arms)
    drawn = curves(runs, CURVES, terms="loss_")
    nothing = Text("No loss was logged: metrics.jsonl is missing or empty.", note=True)
    return [
        Section("Depth", [*fact_blocks(runs, [facts(run) for run in runs]), *differences(arms)]),
        Section("Results", _results(arms)),
        Section("Curves of depth", [drawn or nothing]),
        Section("Predictions", _pictures(arms)),
        Section("Worst images", _worst(arms)),
    ]


def facts(run: Run) -> list[Fact]:
    """The run in a few numbers: (name, value, remark); None is not known."""
    size, loss = run.option("data.image_size"), run.last("loss")
    losses = run.option("losses")
    summed = isinstance(losses, dict)
    return [
        ("encoder", plain_path(str(run.option("encoder", ""))) or None, ""),
        ("head", run.option("model.head"), ""),
        ("image [px]", " × ".join(map(str, size)) if isinstance(size, list) else size, ""),
        ("losses", " + ".join(f"{number(w)} {name}" for name, w in losses.items()) if summed else losses, ""),
        ("batch", run.option("optim.batch_size"), "pairs"),
        ("steps", f"{run.steps:,}" if run.steps else None, ""),
        ("loss", None if loss is None else number(loss), "last logged"),
        ("speed", speed(run) or None, "median"),
        ("seed", run.option("seed"), ""),
    ]


def _results(arms: dict[str, list[Run]]) -> list[Any]:
    without = [label for label, runs in arms.items() if not all(run.results for run in runs)]
    blocks: list[Any] = [Text(f"{NO_RESULTS}: {', '.join(without)}.", note=True)] if without else []
    scored = {label: [result for run in runs for result in run.results] for label, runs in arms.items()}
    scored = {label: results for label, results in scored.items() if results}
    if len(scored) == 1 and len(next(iter(scored.values()))) == 1:
        (result,) = next(iter(scored.values()))
        blocks += [Tiles(result_tiles(result)), *reading({"": [result]})]
    else:
        blocks += results_blocks(scored)
    for label, results in scored.items():
        for result in {result["protocol"]: result for result in results}.values():
            if settings := protocol_table(result):
                which = f"How {label} was scored" if len(scored) > 1 else "How it was scored"
                blocks.append(Folded(f"{which}: all settings of {result['protocol']}", [settings]))
    return blocks


def _pictures(arms: dict[str, list[Run]]) -> list[Any]:
    blocks: list[Any] = []
    for label, same in arms.items():
        shown = _drawn(same[0], "triptychs")
        if shown is None:
            blocks.append(Text(f"{label} has drawn no depth yet: figures/ of its run is empty.", note=True))
            continue
        which = f" (first of {len(same)} runs)" if len(same) > 1 else ""
        caption = f"{label}{which}: input, ground truth, prediction and its relative error, {shown.name}."
        blocks.append(picture(shown, f"depth of {label}", caption))
    return blocks


def _worst(arms: dict[str, list[Run]]) -> list[Any]:
    blocks: list[Any] = []
    for label, same in arms.items():
        run = same[0]
        drawn = _drawn(run, "worst")
        table = worst_table(run.results[0]) if run.results else None
        if (table or drawn) and len(arms) > 1:
            blocks.append(Text(label))
        blocks += [table] if table else []
        if drawn:
            blocks.append(picture(drawn, f"worst images of {label}", _caption(drawn)))
    return blocks


def _drawn(run: Run, kind: str) -> Path | None:
    """The picture "triptychs" or "worst" of an evaluation, under its protocol, or that of the last validation."""
    names = {p.name: p for p in run.pictures if p.name.startswith("worst") == (kind == "worst")}
    wanted = [f"{kind}_{run.results[0]['protocol']}.png"] if run.results else []
    return next((names[n] for n in (*wanted, f"{kind}.png", *reversed(names)) if n in names), None)


def _caption(path: Path) -> str:
    return f"Input, ground truth, prediction and its relative error, the worst first, {path.name}."
