"""What spark-calibrate does, once its options are read."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from finetune.depth_data import open_depth_data
from finetune.model.calibration import (
    Calibration,
    Readings,
    contradictions,
    fit_calibration,
    for_intrinsics,
    stated_contradictions,
)
from finetune.model.depth_model import DepthModel, load_depth_model, write_calibration
from finetune.model.prediction import predict_image, read_photo
from finetune.options import CalibrateConfig, Fit, Space
from finetune.predicting.camera import known_camera, wide_view
from finetune.report.terminal import say
from spark.errors import UserError
from spark.files import check_replaceable, check_writable
from spark.training.accelerator import chosen_device
from spark.weights.encoder import CONFIG, WEIGHTS
from spark.weights.hub import PREFIX

MARGIN = 0.03
"""Share of each side of a pair that is left out: borders of frames are often white, black or warped."""
PIXELS_OF_A_PAIR = 2000


def calibrate(config: CalibrateConfig) -> Calibration:
    """Find the calibration, write the model, print what was found; returns it."""
    console = Console()
    check_target(config)
    model = load_depth_model(config.model, config.encoder_name)
    if model.calibration is not None:
        say(console, f"takes the place of: {model.calibration}")
    model.calibrate(None)  # fits are to what the head gives
    if config.camera is not None:
        found = by_camera(config, model)
    else:
        model.to(chosen_device(config.device))
        found = by_distances(config, model, console)
    model.calibrate(found)
    if config.output is None:
        write_calibration(config.model, found)
    else:
        model.cpu().save(config.output)
    say(console, str(found))
    names = {"before": "before", "after": "after, on the same", "left_out": "of what was left out of the fit"}
    for name, error in found.errors.items():
        say(console, f"mean relative error {names[name]}: {error:.3f}")
    if "left_out" not in found.errors and config.camera is None:
        say(console, "too few to leave one out: the error after the fit is no measure of it")
    written = config.output or config.model
    say(console, f"written to {written}")
    if (card := Path(written) / "README.md").is_file():
        say(
            console,
            f"{card} still describes the model before this calibration: calibrate RUN/model with --in_place true, and"
            " export that again with spark-export-depth, which writes a card of both",
        )
    return found


def by_distances(config: CalibrateConfig, model: DepthModel, console: Console) -> Calibration:
    """A fit to the known distances of points, or of pairs."""
    of_points = config.points is not None
    readings, origin = by_points(config, model) if of_points else by_pairs(config, model, console)
    space: Space = config.space or ("disparity" if readings.relative else "log_depth")
    fit: Fit = config.fit or ("scale_shift" if readings.relative else "scale")
    found = fit_calibration(
        readings,
        space,
        fit,
        model.depth_range.min_depth,
        model.depth_range.max_depth,
        limit=config.max_depth,
        # Pixels of pairs are many and noisy, and no typing errors: they are weighted, not named.
        tolerance=config.tolerance if of_points else None,
        downweight=config.outliers == "downweight",
        origin=f"{'scale and shift' if fit == 'scale_shift' else 'scale'} in {space} fitted to {origin}",
    )
    if of_points and config.outliers == "downweight":
        fitted = found.metres(readings.predicted, readings.relative)
        wrong = contradictions(fitted, readings.metres, config.tolerance)
        say(console, stated_contradictions(readings, fitted, wrong) + (", and counted less" if wrong else ""))
    return found


def check_target(config: CalibrateConfig) -> None:
    """Refuse, before anything is fitted, where the calibration could not be written or would take something away."""
    if config.output is None:
        if config.model.startswith(PREFIX):
            raise UserError(f"{config.model} is no folder of yours to calibrate in place: give --output")
        return
    if Path(config.output).resolve() == Path(config.model).resolve():
        raise UserError(
            f"output {config.output} is the model's own folder: give --in_place true instead, which keeps its card"
        )
    check_replaceable(config.output, (CONFIG, WEIGHTS))
    check_writable(config.output)


def by_camera(config: CalibrateConfig, model: DepthModel) -> Calibration:
    """The factor for another lens."""
    assert config.camera is not None
    if "depth" not in model.outputs:
        raise UserError(
            f"head {model.head_name} gives no metres to correct for a camera: calibrate it with points or pairs"
        )
    new, old = known_camera(config.camera), known_camera(config.trained_camera)
    for camera in (new, old):
        say(Console(), wide_view(camera.fx, camera.width), "yellow")
    factor = new.relative_focal / old.relative_focal
    origin = f"times {factor:.4g} for a camera with {new}, where the model learnt from one with {old}"
    return for_intrinsics(factor, model.depth_range.min_depth, model.depth_range.max_depth, origin)


def by_points(config: CalibrateConfig, model: DepthModel) -> tuple[Readings, str]:
    """Predictions at the points, and a description of the points."""
    assert config.points is not None
    points = read_points(config.points, config.image)
    depths: dict[str, np.ndarray] = {}
    predicted = []
    for number, (image, x, y, _) in enumerate(points, 1):
        if image not in depths:
            depths[image] = predict_image(model, _photo(image), config.image_size, config.flip_average)
        height, width = depths[image].shape
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(
                f"point {number} (x {x:g}, y {y:g}) lies outside {image}, which has {width} columns and {height} rows"
            )
        predicted.append(float(depths[image][int(y), int(x)]))
    names = [f"point {number} at x {x:g}, y {y:g}" for number, (_, x, y, _) in enumerate(points, 1)]
    metres = np.array([metres for *_, metres in points])
    relative = "depth" not in model.outputs
    readings = Readings(np.array(predicted), metres, np.arange(len(points)), names, relative)
    images = f"{len(depths)} images" if len(depths) > 1 else Path(next(iter(depths))).name
    return readings, f"{len(points)} known distance{'s' * (len(points) > 1)} in {images}"


def _photo(path: str) -> np.ndarray:
    try:
        return read_photo(path)
    except UserError as error:
        raise UserError(f"image {error}: give one that can be read") from error


def read_points(text: str, image: str | None) -> list[tuple[str, float, float, float]]:
    """(image, x, y, metres) of each known distance.

    Args:
        text: "x,y,metres; x,y,metres", or a CSV or JSON file; paths of images in it are relative to the file.
        image: of the points that do not say.
    """
    rows: list[dict[str, Any]]
    path = Path(text).expanduser()
    if is_file := path.suffix.lower() in (".csv", ".json"):
        if not path.is_file():
            raise UserError(f"there is no file of points {path}: check the path")
        try:
            content = path.read_text(encoding="utf-8-sig")
            is_json = path.suffix.lower() == ".json"
            rows = json.loads(content) if is_json else list(csv.DictReader(content.splitlines()))
        except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
            raise UserError(
                f"{path} cannot be read as points ({error}): write columns x, y, metres"
            ) from error
    else:
        parts = [part for part in text.split(";") if part.strip()]
        rows = [dict(zip(("x", "y", "metres"), part.split(","), strict=False)) for part in parts]
    points = []
    if not isinstance(rows, list) or not rows:
        raise UserError(f"points {text} hold no known distance: give x, y and metres of one at least")
    for number, row in enumerate(rows, 1):
        try:
            x, y, metres = (float(row[key]) for key in ("x", "y", "metres"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"point {number} of {text} is not x, y and metres in numbers: {row if is_file else parts[number - 1]}"
            ) from error
        named = str(path.parent / row["image"]) if row.get("image") else image
        if named is None:
            raise UserError(
                f"point {number} does not say in which image it lies: give --image, or a column image"
            )
        points.append((named, x, y, metres))
    return points


def by_pairs(config: CalibrateConfig, model: DepthModel, console: Console) -> tuple[Readings, str]:
    """Predictions where pairs have readings, equally many of each, and a description of the pairs."""
    assert config.data.root is not None
    data = open_depth_data(config.data.root, config.data.list, config.data.split, **config.data.reading())
    if data.supervision != "metric":
        raise UserError(f"{data} has no depth in metres to calibrate to: name RGB-D pairs")
    if len(data) < config.pairs:
        raise UserError(f"{data} has {len(data)} pairs, {config.pairs} were asked for: give fewer --pairs")
    chosen = np.linspace(0, len(data) - 1, config.pairs).round().astype(int)
    predicted, metres, group, names = [], [], [], []
    for index in track(
        chosen.tolist(), "pairs", console=console, transient=True, disable=not console.is_terminal
    ):
        sample = data[index]
        depth = predict_image(model, sample.image, config.image_size, config.flip_average)
        height, width = depth.shape
        inside = np.zeros(depth.shape, bool)
        inside[round(MARGIN * height) : height - round(MARGIN * height), :] = True
        inside[:, : round(MARGIN * width)] = inside[:, width - round(MARGIN * width) :] = False
        known = np.flatnonzero(inside & (sample.metres > model.depth_range.min_depth))
        if not len(known):
            say(console, f"{sample.name} has no reading and is left out")
            continue
        spread = known[np.linspace(0, len(known) - 1, min(len(known), PIXELS_OF_A_PAIR)).astype(int)]
        predicted.append(depth.flat[spread])
        metres.append(sample.metres.flat[spread])
        group.append(np.full(len(spread), len(names)))
        names.append(sample.name)
    if not names:
        raise UserError(f"none of the {config.pairs} pairs has a reading: check the data")
    readings = Readings(
        np.concatenate(predicted).astype(np.float64),
        np.concatenate(metres).astype(np.float64),
        np.concatenate(group),
        names,
        "depth" not in model.outputs,
    )
    return readings, f"{len(names)} pairs of {Path(config.data.list or config.data.root).name}"
