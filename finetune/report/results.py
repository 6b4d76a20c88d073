"""Tables of what depth models score: what was measured alike stands in one table, with differences and intervals."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune.protocols.metrics import METRIC
from finetune.scoring.caveats import READING, caveats
from finetune.scoring.intervals import draws, interval
from finetune.scoring.metrics import count, own_metrics
from spark.report.charts import number
from spark.report.page import Cell, Table, Text
from spark.report.runs import Run, read_json
from spark.report.sections import plain_path

Results = dict[str, Any]

FEW_IMAGES = 300  # with fewer, or with one seed, the page warns how little it measures
FEW_SCENES = 5  # under which no interval is given
SAME_TIME = 60  # [s] between files that were copied together


def heading(name: str) -> str:
    """Heading of a metric with unit and direction; one that is not known here keeps its name."""
    return METRIC[name].column if name in METRIC else name


def is_better(name: str, one: float, other: float) -> bool:
    """Whether a value of a known metric is better than another one."""
    return one > other if METRIC[name].better == "higher" else one < other


def results_blocks(scored: Mapping[str, list[Results]]) -> list[Any]:
    """A table for every way in which results were measured, and how to read it.

    Args:
        scored: results by label, at least one each; several under one label are seeds.
    """
    alike: dict[str, dict[str, list[Results]]] = {}
    for label, results in scored.items():
        for result in results:
            alike.setdefault(measured_as(result), {}).setdefault(label, []).append(result)
    blocks: list[Any] = []
    if len(alike) > 1:
        text = "Results that were scored differently (protocol, settings, images, reading) are in separate tables."
        blocks.append(Text(f"{text} Do not compare numbers of different tables.", note=True))
    for group in alike.values():
        blocks += [table(group), *reading(group)]
    return blocks


def result_tiles(result: Results) -> list[tuple[str, str, str]]:
    """The metrics of one result, with their bootstrap intervals over images where it has them."""
    intervals = result.get("intervals") or {}
    tiles = []
    for name, value in own_metrics(result).items():
        if isinstance(value, int | float):
            ends = intervals.get(name)
            tiles.append((heading(name), f"{value:.3f}", "{:.3f} … {:.3f}".format(*ends) if ends else ""))
    return tiles


def measured_as(result: Results) -> str:
    """Equal for results that may stand in one table: of one protocol, its settings, and the same images, read alike."""
    names = sorted(str(row["name"]) for row in result["per_image"])
    read = {key: result.get(key) for key in READING}
    return json.dumps([result["protocol"], result.get("settings"), read, names], sort_keys=True, default=str)


def table(scored: Mapping[str, list[Results]]) -> Table:
    """Means over seeds with the best of each column marked, and differences to the first label."""
    names = [n for n in own_metrics(next(iter(scored.values()))[0]) if _everywhere(n, scored)]
    means = {
        label: {name: statistics.fmean(r["metrics"][name] for r in results) for name in names}
        for label, results in scored.items()
    }
    rows = []
    for label, results in scored.items():
        cells = [Cell(label, head=True), Cell(str(len(results)))]
        for name in names:
            spread = ""
            if len(results) > 1:
                spread = f"± {statistics.stdev(r['metrics'][name] for r in results):.3f}"
            is_best = len(means) > 1 and name in METRIC and means[label][name] == _best(name, means)
            cells.append(Cell(f"{means[label][name]:.3f}", spread, "best" if is_best else ""))
        rows.append(cells)
    base, *others = scored
    for label in others:
        cells = [Cell(f"{label} − {base}", head=True), Cell("")]
        rows.append(cells + [difference(name, scored[base], scored[label]) for name in names])
    return Table(["", "runs", *(heading(name) for name in names)], rows)


def difference(name: str, base: list[Results], other: list[Results]) -> Cell:
    """Mean of a metric minus that of the base, with the interval from the images, marked where that excludes 0."""
    before, after = (statistics.fmean(r["metrics"][name] for r in results) for results in (base, other))
    delta = after - before
    ends = paired_interval(name, base, other)
    if ends is None:
        return Cell(f"{delta:+.3f}")
    low, high = ends
    clear = name in METRIC and not low <= 0 <= high
    mark = ("better" if is_better(name, delta, 0.0) else "worse") if clear else ""
    return Cell(f"{delta:+.3f}", f"{low:+.3f} … {high:+.3f}", mark)


def paired_interval(name: str, base: list[Results], other: list[Results]) -> list[float] | None:
    """95 % bootstrap interval of the mean difference over images, whole scenes drawn together.

    Images of one scene (one folder) resemble each other, so scenes are drawn, not images. None for metrics that are not
    means over images, and for fewer than `FEW_SCENES` scenes.
    """
    if any((r.get("settings") or {}).get("aggregation", "per_image") != "per_image" for r in base + other):
        return None

    def by_image(results: list[Results]) -> dict[str, float]:
        columns: dict[str, list[float]] = {}
        for result in results:
            for row in result["per_image"]:
                if isinstance(row.get(name), int | float):
                    columns.setdefault(row["name"], []).append(float(row[name]))
        return {image: statistics.fmean(values) for image, values in columns.items()}

    before, after = by_image(base), by_image(other)
    scenes: dict[str, list[float]] = {}
    for image in before.keys() & after.keys():
        scenes.setdefault(scene_of(image), []).append(after[image] - before[image])
    if len(scenes) < FEW_SCENES:
        return None
    ordered = [scenes[scene] for scene in sorted(scenes)]
    sums = np.array([sum(values) for values in ordered])
    images = np.array([len(values) for values in ordered])
    drawn = draws(len(scenes))
    return interval(drawn @ sums / (drawn @ images))


def scene_of(image: str) -> str:
    """Folder of an image; an image without one is a scene of its own."""
    return image.strip("/").rpartition("/")[0] or image


def reading(scored: Mapping[str, list[Results]]) -> list[Text]:
    """How to read a table: what was measured, on how much, and what that cannot show."""
    result = next(iter(scored.values()))[0]
    scenes = len({scene_of(str(row["name"])) for row in result["per_image"]})
    settings = result.get("settings") or {}
    about = f" ({str(settings['description']).rstrip('.')})" if settings.get("description") else ""
    text = [
        f"Protocol {result['protocol']}{about}, {count(result['images'], 'image')} of {count(scenes, 'scene')}."
    ]
    read = [
        f"{name} {result[key]}" for key, name in READING.items() if key in result and result[key] is not None
    ]
    if read:
        text.append(f"Read with {', '.join(read)}.")
    if len(scored) > 1:
        text.append(
            "Differences are to the first row; below each is the 95 % bootstrap interval over scenes (paired, whole"
            " scenes drawn together), and colour marks intervals without 0. The interval knows the choice of test"
            " images only, not the chance in training, which takes several seeds."
        )
    caution = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in caveats(result)]
    if len(scored) > 1 and max(len(results) for results in scored.values()) == 1:
        caution.append("One seed each: a second one may turn a small difference around.")
    if result["images"] < FEW_IMAGES:
        few = "1 image is little" if result["images"] == 1 else f"{result['images']} images are few"
        caution.append(f"{few}: this shows that the path works, not what a method is worth.")
    return [Text(" ".join(text)), *([Text(" ".join(caution), note=True)] if caution else [])]


def protocol_table(result: Results) -> Table | None:
    """All settings of the protocol that a result stands on; None where it does not tell."""
    settings = result.get("settings")
    if not isinstance(settings, dict) or not settings:
        return None
    extra = {
        name: result[name] for name in ("image_size", "data", "model", "step", *READING) if name in result
    }
    rows = [
        [Cell(str(name), head=True), Cell(_shown(value))] for name, value in {**settings, **extra}.items()
    ]
    return Table(["setting", ""], rows, textual=True)


def worst_table(result: Results, count: int = 8) -> Table | None:
    """The images with the largest error, by AbsRel or, of pairs of points, by WHDR; None without such a number."""
    rows = result["per_image"]
    key = next((n for n in ("abs_rel", "whdr") if any(isinstance(r.get(n), int | float) for r in rows)), None)
    if key is None:
        return None
    known = [row for row in rows if isinstance(row.get(key), int | float)]
    worst = sorted(known, key=lambda row: -row[key] if math.isfinite(row[key]) else -math.inf)[:count]
    beside = ("delta1", "rmse", "silog", "accuracy", "pixels", "pairs")
    shown = [key, *(name for name in beside if name in worst[0])]
    body = [
        [Cell(str(row["name"]), head=True), *(Cell(_number(row.get(name))) for name in shown)]
        for row in worst
    ]
    caption = f"The {len(worst)} of {len(rows)} images with the largest {METRIC[key].heading}."
    return Table(["image", *(heading(name) for name in shown)], body, caption=caption)


def _everywhere(name: str, scored: Mapping[str, list[Results]]) -> bool:
    return all(
        isinstance(r["metrics"].get(name), int | float) for results in scored.values() for r in results
    )


def _best(name: str, means: Mapping[str, Mapping[str, float]]) -> float:
    return (max if METRIC[name].better == "higher" else min)(mean[name] for mean in means.values())


def _number(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else ""


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " × ".join(_shown(item) for item in value) if value else "none"
    return "" if value is None else number(value) if isinstance(value, float) else plain_path(str(value))


def with_results(run: Run) -> Run:
    """A depth run with the scores of its results.json, or else of the evaluation.json that training wrote, if any."""
    folder, problems = run.folder, run.problems
    for name in ("results.json", "evaluation.json"):
        content = read_json(folder / name, problems)
        if content is None:
            continue
        several = content.get("protocols") if isinstance(content, dict) else None
        found = several if isinstance(several, list) else [content]
        if found and all(_is_results(one) for one in found):
            _say_if_older(folder / name, folder / "evaluation.json", problems)
            return replace(run, results=found)
        problems.append(
            f"{name} has not the protocol, images, metrics and per_image of the files of spark-evaluate"
        )
    return run


def _say_if_older(path: Path, other: Path, problems: list[str]) -> None:
    """Scores from before the run was trained on are not those of its model."""
    if other.is_file() and other.stat().st_mtime - path.stat().st_mtime > SAME_TIME:
        problems.append(
            f"{path.name} is older than {other.name}, which the end of a training wrote: score the model again with"
            " spark-evaluate"
        )


def _is_results(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and {"protocol", "images"} <= set(content)
        and isinstance(content.get("metrics"), dict)
        and isinstance(content.get("per_image"), list)
        and all(isinstance(row, dict) and "name" in row for row in content["per_image"])
    )
