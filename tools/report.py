"""One self-contained HTML page about a pretraining run and the depth runs that followed it.

    python tools/report.py --pretrain RUN --depth scratch=RUN1 --depth SparK=RUN2 --output report.html

Curves come from metrics.jsonl, pictures from figures/, settings from config.yaml, and one table from the results.json
(or evaluation.json) of the depth runs, with the difference of every label to the first one. A label may be given
several times: those runs count as seeds of one thing. All images are inside the page. What a run does not have is said
in the page; results that must not stand in one table are an error.

`--figure FILE.png` also draws a small figure, for a README: images, masked images and reconstructions; then images,
true depth and the depth of the first run of each label. Its images are spread evenly over the validation list.
"""

import argparse
import base64
import html
import io
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import timm
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from finetune.depth_data import DepthSample, open_depth_data
from finetune.figures import Page, colourise, depth_colours, save_figure, shared_range
from finetune.inference import predict_depth, transform_of
from finetune.model import ENCODER_NAME, load_depth_model
from finetune.protocols import get_protocol
from spark.assembly import build_model
from spark.checkpoint import find_run
from spark.config import ModelConfig
from spark.encoder import is_own
from spark.export import name_of
from spark.folders import write_whole
from spark.masking import mean_ratio, ratio_range, visible_at
from spark.run import format_duration, read_rows, usable_cores

# name in results.json -> heading, and whether larger is better
METRICS = {
    "delta1": ("δ<sub>1</sub>", True),
    "delta2": ("δ<sub>2</sub>", True),
    "delta3": ("δ<sub>3</sub>", True),
    "abs_rel": ("AbsRel", False),
    "sq_rel": ("SqRel [m]", False),
    "rmse": ("RMSE [m]", False),
    "rmse_log": ("RMSE log", False),
    "log10": ("log10", False),
    "silog": ("SILog", False),
}
FEW_IMAGES = 300  # with fewer, or with one seed, the page says how little it measures
RESAMPLES = 4000  # of the bootstrap
IMAGE_WIDTH = 1400  # [px], images of the page are made no wider
COLORS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito: safe for colour-blind eyes


# ------------------------------------------------------------------------------- what runs left behind


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Args:
        label: what the page calls it.
        folder: where it is.
        config: config.yaml, empty where there is none.
        rows: metrics.jsonl.
        pictures: images in figures/, in the order of their names.
        results: results.json or evaluation.json of a depth run.
    """

    label: str
    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    pictures: list[Path]
    results: dict[str, Any] | None

    @property
    def steps(self) -> int:
        """Optimizer steps that the log reaches to."""
        return max((int(row["step"]) for row in self.rows), default=0)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have a finite number under a name."""
        pairs = [
            (float(row["step"]), float(row[name]))
            for row in self.rows
            if isinstance(row.get(name), int | float) and math.isfinite(row[name])
        ]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def option(self, path: str, default: Any = None) -> Any:
        """An option of the configuration by its dotted name."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value


def read_run(folder: str | Path, label: str) -> Run:
    """Read a run folder.

    Raises:
        ValueError: it is not the folder of a run, or a file in it cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the output_dir of a run")
    if not (folder / "config.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it holds neither config.yaml nor metrics.jsonl"
        )
    try:
        text = (
            (folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").is_file() else ""
        )
        config = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'config.yaml'} is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.yaml'} holds no options")
    pictures = sorted(p for p in (folder / "figures").glob("*") if p.suffix in (".png", ".jpg", ".jpeg"))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "step" in row]
    return Run(label, folder, config, rows, pictures, read_results(folder))


def read_results(folder: Path) -> dict[str, Any] | None:
    """Read results.json of a run folder, or else the evaluation.json that training wrote; None without either."""
    for name in ("results.json", "evaluation.json"):
        path = folder / name
        if path.is_file():
            try:
                results = json.loads(path.read_text(encoding="utf-8"))
                missing = {"protocol", "images", "metrics", "per_image"} - set(results)
            except (json.JSONDecodeError, TypeError) as error:
                raise ValueError(f"{path} is not JSON: {error}") from error
            if missing:
                raise ValueError(
                    f"{path} has no {', '.join(sorted(missing))}: is it of finetune/evaluate.py?"
                )
            return results
    return None


def read_steps(path: str | Path) -> list[dict[str, Any]]:
    """Read the commands of a run.

    JSON, a list of {"name", "command", "seconds"}; further keys that are shown are "cpu_seconds" and, equal in steps
    that ran side by side, "group".
    """
    try:
        steps = json.loads(Path(path).read_text(encoding="utf-8"))
        if any(not isinstance(step["seconds"], int | float) or "command" not in step for step in steps):
            raise TypeError("seconds is not a number")
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}: --steps takes a JSON list of commands") from error
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path} is not a JSON list of {{"name", "command", "seconds"}}: {error!r}'
        ) from error
    return steps


# ------------------------------------------------------------------------------------ pieces of a page


def picture(content: bytes, alt: str, width: int | None = None) -> str:
    """An image inside the page, made no wider than `IMAGE_WIDTH`; PNG or JPEG, whichever is smaller."""
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGB")
    if image.width > IMAGE_WIDTH:
        image = image.resize(
            (IMAGE_WIDTH, round(image.height * IMAGE_WIDTH / image.width)), Image.Resampling.LANCZOS
        )
    forms = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 90, "subsampling": 0})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        forms[kind] = buffer.getvalue()
    kind = min(forms, key=lambda name: len(forms[name]))
    data = base64.b64encode(forms[kind]).decode("ascii")
    style = f' style="width:{width}px"' if width else ""
    return f'<img alt="{html.escape(alt)}" src="data:image/{kind};base64,{data}"{style}>'


def chart(lines: Sequence[tuple[str, list[float], list[float]]], ylabel: str, log: bool = False) -> bytes:
    """Lines over optimizer steps as PNG; a line of one point is drawn as a point."""
    figure = Figure(figsize=(4.6, 2.9), dpi=180, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (label, steps, values), color in zip(lines, COLORS * len(lines), strict=False):
        style = {"marker": "o", "markersize": 3.5} if len(steps) < 12 else {}
        axes.plot(steps, values, color=color, linewidth=1.4, label=label, **style)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    if log:
        axes.set_yscale("log")
    axes.tick_params(labelsize=8)
    axes.grid(True, linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def figure_html(content: str, caption: str) -> str:
    """A figure with its caption (HTML both)."""
    return f"<figure>{content}<figcaption>{caption}</figcaption></figure>"


def missing(text: str) -> str:
    """A paragraph about something that is not there."""
    return f'<p class="missing">{html.escape(text)}</p>'


def facts(pairs: Sequence[tuple[str, Any]]) -> str:
    """A list of names and values; those that are None are left out."""
    shown = "".join(
        f"<div><dt>{name}</dt><dd>{html.escape(str(v))}</dd></div>" for name, v in pairs if v is not None
    )
    return f"<dl>{shown}</dl>"


def plain_path(text: str) -> str:
    """Text without what names this machine: paths relative to the current folder, the home folder as ~."""
    for known, short in ((f"{Path.cwd()}{os.sep}", ""), (str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(known) > 2:
            text = text.replace(known, short)
    return text


def curves(runs: Sequence[Run], names: Sequence[tuple[str, str, bool]]) -> str:
    """Charts of logged values: (name in the rows, label of the axis, logarithmic or not); one line a run."""
    drawn = []
    for name, label, log in names:
        lines = [(run.label, *run.series(name)) for run in runs]
        lines = [line for line in lines if line[1]]
        if lines:
            drawn.append(picture(chart(lines, label, log), f"{label} over optimizer steps"))
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else ""


# ---------------------------------------------------------------------------------------- the sections


def pretraining_section(run: Run) -> str:
    """Settings, curves and reconstructions of a pretraining run."""
    size = run.option("model.input_size")
    ratio = run.option("model.mask_ratio")
    _, losses = run.series("loss")
    _, speeds = run.series("images_per_second")
    parts = [
        "<h2>Pretraining</h2>",
        f"<p>{task(run)}</p>",
        facts(
            [
                ("encoder", run.option("model.name")),
                ("input", " × ".join(map(str, size)) if isinstance(size, list) else size),
                (
                    "hidden",
                    None
                    if ratio is None
                    else " to ".join(f"{r:.0%}" for r in dict.fromkeys(ratio_range(ratio))),
                ),
                ("channels", run.option("model.in_chans")),
                ("batch", run.option("optim.batch_size")),
                ("steps", run.steps or None),
                ("seed", run.option("seed")),
                ("last logged loss", f"{losses[-1]:.3f}" if losses else None),
                ("speed", f"{statistics.median(speeds):.0f} images/s" if speeds else None),
            ]
        ),
    ]
    charts = curves([run], [("loss", "loss", False), ("lr", "learning rate", False)])
    parts.append(
        charts or missing(f"No loss was logged: metrics.jsonl of {run.folder.name} is missing or empty.")
    )
    if not run.pictures:
        parts.append(missing("The run has drawn no reconstructions yet: its figures/ is empty."))
    shown = [
        figure_html(
            picture(path.read_bytes(), "reconstructions"),
            panel_caption(path, run.option("model.target") == "hog"),
        )
        for path in dict.fromkeys((run.pictures[:1] if len(run.pictures) > 1 else []) + run.pictures[-1:])
    ]
    parts.append(f'<div class="charts">{"".join(shown)}</div>' if shown else "")
    return "\n".join(parts)


def task(run: Run) -> str:
    """What the run has to predict, from what, and what its loss means."""
    seen = {
        "absent": "The encoder sees the visible patches only",
        "zero": "The encoder, a dense network, sees the whole image with hidden patches in the mean colour; the decoder"
        " gets its features of the visible ones",
        "token": "The encoder, a dense network, sees the whole image with a learned colour in hidden patches",
    }[run.option("model.masked_pixels", "absent")]
    maps = run.option("model.decoder_maps", 4)
    if maps != 4:
        seen += f"; of its feature maps the decoder gets the deepest {'one' if maps == 1 else maps} only"
    counted = {"masked": "the hidden patches", "all": "all patches"}[run.option("model.loss_on", "masked")]
    loss = {
        "normalised": f"the mean squared error of {counted}, each normalised by its own mean and deviation: 1 is what"
        " a prediction of the mean alone gives",
        "pixels": f"the mean squared error of {counted}, in the standard deviations of the data set",
        "hog": f"the mean squared error of histograms of oriented gradients in {counted}",
    }[run.option("model.target", "normalised")]
    return f"{seen}. The loss is {loss}."


def panel_caption(path: Path, histograms: bool = False) -> str:
    """Caption of a reconstruction panel; its file name ends in the step."""
    step = path.stem.rpartition("_")[2]
    when = f" after step {int(step)}" if step.isdecimal() else f", <code>{html.escape(path.name)}</code>"
    shown = (
        "Input, masked input, histograms of oriented gradients, and the same with predicted ones in hidden patches"
        if histograms
        else "Input, masked input and reconstruction"
    )
    return f"{shown}{when}. Training images."


def depth_section(arms: dict[str, list[Run]]) -> str:
    """Curves and triptychs of the depth runs, and in what their settings differ."""
    runs = [
        replace(run, label=f"{label}, seed {run.option('seed', '?')}" if len(same) > 1 else label)
        for label, same in arms.items()
        for run in same
    ]
    validated = [
        name for name in ("delta1", "abs_rel", "rmse") if any(run.series(f"val_{name}")[0] for run in runs)
    ]
    names = [("loss", "training loss", False), *((f"val_{n}", f"validation {n}", False) for n in validated)]
    parts = ["<h2>Depth</h2>", budget(arms)]
    parts.append(curves(runs, names) or missing("No loss was logged: metrics.jsonl is missing or empty."))
    for label, same in arms.items():
        run = same[0]
        if not run.pictures:
            parts.append(missing(f"{label} has drawn no depth yet: figures/ of its run is empty."))
            continue
        path = run.pictures[-1]
        which = f" (first of {len(same)} runs)" if len(same) > 1 else ""
        caption = (
            f"<b>{html.escape(label)}</b>{which}: input, ground truth and prediction, one colour scale in metres,"
            f" <code>{html.escape(path.name)}</code>."
        )
        parts.append(figure_html(picture(path.read_bytes(), f"depth of {label}"), caption))
    return "\n".join(parts)


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options by their dotted names."""
    out = {}
    for name, value in options.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def budget(arms: dict[str, list[Run]]) -> str:
    """A paragraph on what was equal between the labels and what was not, read off the configurations."""
    first = {label: flat(runs[0].config) for label, runs in arms.items()}
    steps = {label: sorted({run.steps for run in runs}) for label, runs in arms.items()}
    text = "; ".join(f"{label}: {' and '.join(map(str, s))} optimizer steps" for label, s in steps.items())
    if len(arms) < 2:
        return f"<p>{html.escape(text)}.</p>"
    same = all(s == next(iter(steps.values())) for s in steps.values())
    counted = (
        f"Equal length, {' and '.join(map(str, next(iter(steps.values()))))} optimizer steps"
        if same
        else text
    )
    names = dict.fromkeys(name for options in first.values() for name in options)
    ignored = ("output_dir", "seed", "resume")
    differ = [n for n in names if n not in ignored and len({repr(o.get(n)) for o in first.values()}) > 1]
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(f"<td>{html.escape(plain_path(str(options.get(name))))}</td>" for options in first.values())
        + "</tr>"
        for name in differ
    )
    if not differ:
        return f"<p>{html.escape(counted)}; the configurations do not differ.</p>"
    head = "".join(f"<th>{html.escape(label)}</th>" for label in arms)
    return (
        f"<p>{html.escape(counted)}. All that differs in the configurations:</p>"
        f'<div class="wide"><table class="options"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def results_section(arms: dict[str, list[Run]]) -> str:
    """The table of results, with differences to the first label and their intervals.

    Raises:
        ValueError: the results are of different protocols, settings or images.
    """
    scored = {label: [run.results for run in runs if run.results] for label, runs in arms.items()}
    parts = ["<h2>Results</h2>"]
    without = [label for label, results in scored.items() if len(results) < len(arms[label])]
    if without:
        parts.append(missing(f"Not scored yet (no results.json or evaluation.json): {', '.join(without)}."))
    scored = {label: results for label, results in scored.items() if results}
    if not scored:
        return "\n".join(parts)
    check_comparable(scored)
    means = {
        label: {name: statistics.fmean(r["metrics"][name] for r in results) for name in METRICS}
        for label, results in scored.items()
    }
    seeds = max(len(results) for results in scored.values())
    body = "".join(
        f"<tr><th>{html.escape(label)}</th><td>{len(scored[label])}</td>"
        + "".join(f"<td>{cell(label, name, means, scored)}</td>" for name in METRICS)
        + "</tr>"
        for label in scored
    )
    base, *others = scored
    for label in others:
        cells = "".join(f"<td>{difference(name, scored[base], scored[label])}</td>" for name in METRICS)
        body += (
            f'<tr class="difference"><th>{html.escape(label)} − {html.escape(base)}</th><td></td>{cells}</tr>'
        )
    head = "".join(f"<th>{heading} {'↑' if up else '↓'}</th>" for heading, up in METRICS.values())
    parts.append(
        f'<div class="wide"><table><thead><tr><th></th><th>runs</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    parts.append(f"<p>{reading(next(iter(scored.values()))[0], seeds, bool(others))}</p>")
    return "\n".join(parts)


def check_comparable(scored: dict[str, list[dict[str, Any]]]) -> None:
    """Refuse to put results into one table that were not measured alike."""
    (first_label, (first, *_)), *_ = scored.items()
    names = {row["name"] for row in first["per_image"]}
    for label, results in scored.items():
        for other in results:
            if other["protocol"] != first["protocol"]:
                raise ValueError(
                    f"{first_label} was scored by {first['protocol']} and {label} by {other['protocol']}: numbers of"
                    " two protocols cannot stand in one table. Score both with finetune/evaluate.py --protocol ..."
                )
            if other.get("settings") != first.get("settings"):
                raise ValueError(
                    f"{first_label} and {label} were scored by {first['protocol']} with different settings (such as"
                    " flip averaging): score both alike with finetune/evaluate.py"
                )
            if {row["name"] for row in other["per_image"]} != names:
                raise ValueError(
                    f"{first_label} and {label} were scored on different images ({first['images']} and"
                    f" {other['images']}): score both on one list with finetune/evaluate.py"
                )


def cell(label: str, name: str, means: dict[str, dict[str, float]], scored: dict[str, list[dict]]) -> str:
    """A number of the table, with its spread over several seeds; the best of a column is bold."""
    best = (max if METRICS[name][1] else min)(mean[name] for mean in means.values())
    text = f"{means[label][name]:.3f}"
    if len(scored[label]) > 1:
        spread = statistics.stdev(r["metrics"][name] for r in scored[label])
        text += f'<br><span class="small">± {spread:.3f}</span>'
    return f"<b>{text}</b>" if len(means) > 1 and means[label][name] == best else text


def difference(name: str, base: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    """Mean of a metric minus that of the base, with the interval from the images, marked where that excludes 0."""
    delta = statistics.fmean(r["metrics"][name] for r in other) - statistics.fmean(
        r["metrics"][name] for r in base
    )
    interval = paired_interval(name, base, other)
    if interval is None:
        return f"{delta:+.3f}"
    low, high = interval
    kind = "" if low <= 0 <= high else "better" if (delta > 0) == METRICS[name][1] else "worse"
    text = f'{delta:+.3f}<br><span class="small">{low:+.3f} … {high:+.3f}</span>'
    return f'<span class="{kind}" title="{kind}">{text}</span>' if kind else text


def paired_interval(
    name: str, base: list[dict[str, Any]], other: list[dict[str, Any]]
) -> tuple[float, float] | None:
    """95 % bootstrap interval of the mean difference over images, whole scenes drawn together.

    Images of one scene (one folder) resemble each other, so scenes are drawn, not images. None for metrics that are not
    means over images, and for fewer than five scenes.
    """
    if any(r.get("settings", {}).get("aggregation", "per_image") != "per_image" for r in base + other):
        return None

    def by_image(results: list[dict[str, Any]]) -> dict[str, float]:
        columns: dict[str, list[float]] = {}
        for result in results:
            for row in result["per_image"]:
                columns.setdefault(row["name"], []).append(float(row[name]))
        return {image: statistics.fmean(values) for image, values in columns.items()}

    before, after = by_image(base), by_image(other)
    scenes: dict[str, list[float]] = {}
    for image in before:
        scenes.setdefault(scene_of(image), []).append(after[image] - before[image])
    if len(scenes) < 5:
        return None
    sums = np.array([sum(values) for values in scenes.values()])
    counts = np.array([len(values) for values in scenes.values()])
    drawn = np.random.default_rng(0).integers(len(scenes), size=(RESAMPLES, len(scenes)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def scene_of(image: str) -> str:
    """Folder of an image; an image without one is a scene of its own."""
    return image.strip("/").rpartition("/")[0] or image


def reading(result: dict[str, Any], seeds: int, compared: bool) -> str:
    """How to read the table: what was measured, on how much, and what that cannot show."""
    scenes = len({scene_of(row["name"]) for row in result["per_image"]})
    settings = result.get("settings") or {}
    text = [f"Protocol <code>{html.escape(result['protocol'])}</code>"]
    if settings.get("description"):
        text[0] += f" ({html.escape(settings['description'].rstrip('.'))})"
    text[0] += f", {result['images']} images of {scenes} scenes."
    expected = settings.get("expected_images")
    if expected and expected != result["images"]:
        text.append(
            f"Published numbers of this protocol stand on {expected} images: do not compare with them."
        )
    if compared:
        text.append(
            "Differences are to the first row; below each is the 95 % bootstrap interval over scenes (paired, whole"
            " scenes drawn together), and colour marks intervals without 0. The interval knows the choice of test"
            " images only, not the chance in training, which takes several seeds."
        )
    if seeds == 1:
        text.append("<b>One seed each: a second one may turn a small difference around.</b>")
    if result["images"] < FEW_IMAGES:
        few = f"{result['images']} images are few"
        text.append(f"<b>{few}: this shows that the path works, not what a method is worth.</b>")
    if result.get("skipped"):
        text.append(f"{len(result['skipped'])} images without a pixel that counts were left out.")
    if result.get("nonfinite_images"):
        text.append(f"{result['nonfinite_images']} images had predictions that were not finite.")
    return " ".join(text)


def commands_section(steps: list[dict[str, Any]]) -> str:
    """The commands that were run, with their durations."""
    rows = "".join(
        f"<tr><td><b>{html.escape(str(step.get('name', '')))}</b>"
        f"<pre>{html.escape(plain_path(step['command']))}</pre></td>"
        f"<td>{step['seconds']:.0f} s</td>"
        f"<td>{format(step['cpu_seconds'], '.0f') + ' s' if 'cpu_seconds' in step else ''}</td></tr>"
        for step in steps
    )
    groups: dict[Any, float] = {}
    for number, step in enumerate(steps):
        group = step.get("group", f"alone {number}")
        groups[group] = max(groups.get(group, 0.0), step["seconds"])
    beside = " Steps of the same kind ran side by side." if len(groups) < len(steps) else ""
    return (
        f"<h2>Commands</h2><p>All that was run, in {format_duration(sum(groups.values()))}.{beside}</p>"
        '<table class="commands"><thead><tr><th>step</th><th>time</th><th>processor</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def settings_section(runs: Sequence[tuple[str, Run]]) -> str:
    """The whole configuration of every run, folded."""
    shown = "".join(
        f"<details><summary>{html.escape(title)}</summary>"
        f"<pre>{html.escape(plain_path(yaml.safe_dump(run.config, sort_keys=False)))}</pre></details>"
        for title, run in runs
        if run.config
    )
    return f"<h2>Settings</h2>{shown}" if shown else ""


def machine() -> str:
    """Versions and the kind of machine that writes the page; nothing that tells one machine from another."""
    cores = usable_cores()
    gpu = ""
    if torch.cuda.is_available():
        gpu = f", {torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}, accelerate"
        f" {accelerate.__version__}; {platform.system()} {platform.machine()}, {cores} processor cores{gpu}"
    )


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #5c6670; --line: #d9dee3; --card: #f6f8fa; --back: #ffffff;
  --good: #0a6b3d; --bad: #a3341f; --note: #8a5a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa5b0; --line: #363d45; --card: #1d2228;
  --back: #14181c; --good: #5fce97; --bad: #ff9a85; --note: #e3b45c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.5rem 1.25rem 4rem; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; } h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem;
  padding-top: 1rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; } .lead { color: var(--soft); font-size: 1.05rem; }
code, pre { font: .86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: 1rem; margin: 1rem 0; }
.charts img { width: 100%; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.8rem; margin: 1rem 0; } dl div { min-width: 4rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-weight: 600; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: .92rem; margin: .8rem 0; }
th, td { padding: .4rem .55rem; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; }
th:first-child, .commands td:first-child, .options td { text-align: left; }
thead th { color: var(--soft); font-size: .82rem; } .options td { overflow-wrap: anywhere; }
.difference { background: var(--card); } .small { font-size: .78rem; color: var(--soft); white-space: nowrap; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.missing { color: var(--note); border-left: 3px solid; padding-left: .7rem; }
details { margin: .4rem 0; } summary { cursor: pointer; } details pre { background: var(--card); padding: .8rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } .difference, details pre { background: none; } details { display: none; } }
"""


def build_page(
    title: str,
    lead: str,
    pretrain: Run | None,
    arms: dict[str, list[Run]],
    steps: list[dict[str, Any]] | None,
) -> str:
    """The whole page.

    Args:
        title: its heading.
        lead: a sentence below it, plain text; empty for none.
        pretrain: the pretraining run, if there is one.
        arms: depth runs by label; several under one label are seeds of one thing.
        steps: the commands that were run, if they were recorded.
    """
    titled = [("pretraining", pretrain)] if pretrain else []
    titled += [(f"depth, {label}, {run.folder.name}", run) for label, runs in arms.items() for run in runs]
    sections = [
        results_section(arms) if arms else "",
        pretraining_section(pretrain) if pretrain else "",
        depth_section(arms) if arms else "",
        commands_section(steps) if steps else "",
        settings_section(titled),
    ]
    introduction = f'<p class="lead">{html.escape(lead)}</p>' if lead else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>"
        f"<h1>{html.escape(title)}</h1>{introduction}\n"
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Written by tools/report.py on {html.escape(machine())}.</footer></body></html>\n"
    )


# ------------------------------------------------------------------------------ the figure of a README


def readme_figure(
    pretrain: Run | None, arms: dict[str, list[Run]], count: int, encoder_name: str | None = None
) -> Figure:
    """Reconstructions, then depth of the first run of each label, for images spread evenly over the validation list.

    Args:
        pretrain: a pretraining run, if any.
        arms: depth runs by label.
        count: of images.
        encoder_name: "package.module:factory" of the runs over a convnet of one's own.

    Raises:
        ValueError: there is no depth run to take images from, or its data or a model is missing, or an own convnet
            was not named.
    """
    if not arms:
        raise ValueError("--figure needs a depth run: its validation list says which images to draw")
    runs = {label: same[0] for label, same in arms.items()}
    samples = validation_samples(next(iter(runs.values())), count)
    truths = [sample.metres for sample in samples]
    nearest = min(
        (float(np.quantile(truth[truth > 0], 0.01)) for truth in truths if (truth > 0).any()), default=0.0
    )
    near, far = shared_range(truths, floor=math.floor(2 * nearest) / 2)
    rows = [[sample.image, colourise(sample.metres, near, far)] for sample in samples]
    for run in runs.values():
        own = any(is_own(run.option(name, "")) for name in ("encoder", "encoder_name"))
        model = load_depth_model(run.folder / "model", encoder_name if own else None)
        transform, protocol = transform_of(model), get_protocol(run.option("protocol", "nyu-bts"))
        for row, sample in zip(rows, samples, strict=True):
            depth = predict_depth(model, transform(sample)["image"][None], protocol)[0]
            row.append(colourise(np.clip(depth, 1e-3, None), near, far))
    headings = ["image", "true depth", *runs]
    masked = None
    if pretrain and pretrain.option("model.target") != "hog":  # from histograms no picture can be made
        masked = masked_and_reconstructed(pretrain, [sample.image for sample in samples], encoder_name)

    height, width = samples[0].image.shape[:2]
    columns, gap, label = len(headings), 0.07, 0.24  # inches: between pictures, and a line of text
    panel = 8.4 / max(columns, 4)
    tall = panel * height / width
    left, block = 0.05, label + len(samples) * (tall + gap)
    small = (
        columns * (panel + gap) - gap - 5 * gap
    ) / 6  # two triples of input, masked, reconstruction in a row
    small_tall = small * height / width
    lines = math.ceil(len(samples) / 2)
    upper = label + lines * (small_tall + gap) + 0.12 if masked else 0.0
    page = Page(left + columns * (panel + gap) + 0.62, upper + block + 0.05, dpi=110)
    if masked:
        for at, triple in enumerate(masked):
            line, side = divmod(at, 2)
            for column, (name, content) in enumerate(
                zip(("image", "masked", "reconstruction"), triple, strict=True)
            ):
                x = left + (3 * side + column) * (small + gap)
                if line == 0:
                    page.text(x, 0.05, name, fontsize=9)
                page.axes(x, label + line * (small_tall + gap), small, small_tall).imshow(
                    content, aspect="auto"
                )
    for column, heading in enumerate(headings):
        page.text(left + column * (panel + gap), upper + 0.05, heading, fontsize=9)
        for number, row in enumerate(rows):
            y = upper + label + number * (tall + gap)
            axes = page.axes(left + column * (panel + gap), y, panel, tall)
            axes.imshow(row[column], aspect="auto", interpolation="antialiased")
    bar = page.axes(
        left + columns * (panel + gap) + 0.04, upper + label, 0.12, len(samples) * (tall + gap) - gap
    )
    bar.set_axis_on()
    page.figure.colorbar(ScalarMappable(Normalize(near, far), depth_colours()), cax=bar).set_label(
        "depth [m]", fontsize=8
    )
    bar.invert_yaxis()  # near on top
    bar.tick_params(labelsize=8)
    return page.figure


def validation_samples(run: Run, count: int) -> list[DepthSample]:
    """Pairs spread evenly over the validation data of a depth run."""
    if not run.option("data.root"):
        raise ValueError(f"config.yaml of {run.folder} does not say where its data is (data.root)")
    data = open_depth_data(
        run.option("data.val_root") or run.option("data.root"),
        run.option("data.val_list"),
        "test",
        kind=run.option("data.val_kind")
        or (None if run.option("data.val_root") else run.option("data.kind")),
        depth_scale=run.option("data.depth_scale"),
        bad_depth=run.option("data.bad_depth", "refuse"),
        depth=run.option("data.depth", "raw"),
        white_border=run.option("data.white_border", "keep"),
    )
    count = min(count, len(data))
    return [data[(2 * i + 1) * len(data) // (2 * count)] for i in range(count)]


def masked_and_reconstructed(
    run: Run, images: list[np.ndarray], encoder_name: str | None = None
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Image, masked image and reconstruction, uint8 each, of the newest checkpoint of a pretraining run.

    Whole frames are resized to the size that the run was trained at.

    Args:
        run: the pretraining run.
        images: uint8 `[H, W, 3]`.
        encoder_name: "package.module:factory" of its encoder where that is one's own.

    Raises:
        ValueError: the run has no whole checkpoint, or is one of images that are neither colour nor grey, or of an own
            convnet that was not named.
    """
    channels = run.option("model.in_chans", 3)
    if channels not in (1, 3):
        raise ValueError(
            f"{run.folder} was trained on images of {channels} channels, and those of the depth runs have 3: leave "
            "--figure out, or --pretrain"
        )
    checkpoint = find_run(run.folder, True)
    if checkpoint is None:
        raise ValueError(f"{run.folder} has no checkpoint to reconstruct with")
    known = {item.name for item in fields(ModelConfig)}
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.option("model", {}).items()
        if name in known
    }
    if is_own(options["name"]):
        options["name"] = name_of({"own": options["name"]}, run.folder, encoder_name, ENCODER_NAME)
    model = build_model(ModelConfig(**options))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model.eval()
    height, width = model.input_size
    mean = torch.tensor(run.option("data.mean", IMAGENET_DEFAULT_MEAN)).view(-1, 1, 1)
    std = torch.tensor(run.option("data.std", IMAGENET_DEFAULT_STD)).view(-1, 1, 1)
    seen_as = [Image.fromarray(image).convert("L" if channels == 1 else "RGB") for image in images]
    resized = [
        np.array(image.resize((width, height), Image.Resampling.BICUBIC).convert("RGB")) for image in seen_as
    ]
    batch = torch.stack([torch.from_numpy(i).permute(2, 0, 1)[:channels].float() / 255 for i in resized])
    batch = (batch - mean) / std
    visible = visible_at(range(len(batch)), model.grid, mean_ratio(model.mask_ratio), seed=0)
    with torch.inference_mode():
        output = model(batch, visible)
        restored = model.reconstruct(batch, output)
    pictures = (restored * std + mean).clamp(0, 1).mul(255).round().byte().expand(-1, 3, -1, -1)
    patches = visible.repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)[:, 0]
    return [
        (image, np.where(seen[..., None], image, np.uint8(128)), made.permute(1, 2, 0).numpy())
        for image, seen, made in zip(resized, patches.numpy(), pictures, strict=True)
    ]


# ----------------------------------------------------------------------------------------- the command


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrain", metavar="DIR", help="output_dir of a pretraining run")
    parser.add_argument(
        "--depth",
        metavar="LABEL=DIR",
        action="append",
        default=[],
        help="output_dir of a depth run and what to call it; the first label is what others are compared with",
    )
    parser.add_argument("--output", required=True, metavar="FILE.html", help="the page to write")
    parser.add_argument("--title", default="SparK pretraining and depth", help="heading of the page")
    parser.add_argument("--lead", default="", help="a sentence below the heading")
    parser.add_argument("--steps", metavar="FILE.json", help="commands and durations to list, see read_steps")
    parser.add_argument("--figure", metavar="FILE.png", help="also draw a small figure for a README")
    parser.add_argument("--figure_images", type=int, default=2, help="how many images it shows (%(default)s)")
    parser.add_argument(
        "--encoder_name",
        metavar="MODULE:FACTORY",
        help="for --figure, the encoder of the runs over a convnet of your own: no file decides which code is run",
    )
    return parser.parse_args(argv)


def read_arms(entries: Sequence[str]) -> dict[str, list[Run]]:
    """Depth runs by label, from `label=folder` entries."""
    arms: dict[str, list[Run]] = {}
    for entry in entries:
        label, equals, folder = entry.partition("=")
        if not equals or not label or not folder:
            raise ValueError(f"--depth takes LABEL=DIR, such as scratch=runs/scratch, not {entry!r}")
        arms.setdefault(label, []).append(read_run(folder, label))
    return arms


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for a user error."""
    args = parse_arguments(argv)
    try:
        if not args.pretrain and not args.depth:
            raise ValueError("there is nothing to report: give --pretrain DIR, --depth LABEL=DIR, or both")
        if args.figure_images < 1:
            raise ValueError(f"--figure_images must be at least 1, not {args.figure_images}")
        pretrain = read_run(args.pretrain, "pretraining") if args.pretrain else None
        arms = read_arms(args.depth)
        steps = read_steps(args.steps) if args.steps else None
        page = build_page(args.title, args.lead, pretrain, arms, steps)
        write_whole(args.output, page.encode("utf-8"))
        print(f"written to {args.output} ({len(page) / 1e6:.1f} MB)")
        if args.figure:
            save_figure(readme_figure(pretrain, arms, args.figure_images, args.encoder_name), args.figure)
            print(f"drawn in {args.figure}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
