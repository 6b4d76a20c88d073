"""What spark-predict does, once its options are read."""

import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import Progress

from finetune.depth_data.depth_files import MILLIMETRE, npy_bytes, pfm_bytes, png_bytes
from finetune.model.depth_model import DepthModel, load_depth_model
from finetune.model.prediction import chosen_device, fitted_size, predict_image, predict_images, transform_of
from finetune.options import Format, PredictConfig
from finetune.predicting.camera import Intrinsics, camera_for, known_camera
from finetune.predicting.pointcloud import MOST_POINTS, mesh, point_cloud, step_of
from finetune.predicting.video import (
    CODECS,
    ColourRange,
    VideoFrames,
    VideoWriter,
    forget_killed,
    legend,
    paint,
)
from finetune.predicting.video import EXTENSIONS as VIDEO
from finetune.report.figures import depth_map, save_figure
from spark.errors import UserError
from spark.files import write_whole
from spark.images.decode import EXTENSIONS as IMAGE
from spark.images.decode import describe_failure, read_image
from spark.images.sources.files import list_images, walk
from spark.training.option_types import require

VIDEO_FORMATS: tuple[Format, ...] = ("colour", "side")
"""Of a video one file each; the others are files of each frame."""
PICTURES = ("mm", "depth", *VIDEO_FORMATS)
"""What the PNG files of an image have behind its name."""
RECORD = "predictions.json"
NEED_METRES: tuple[Format, ...] = ("png", "ply", "mesh")
LONGEST_PICTURE = 4096
"""Long side of pictures for people [px]; larger images are shown by every second, third, ... pixel."""
MOST_BATCH_PIXELS = 64_000_000
"""Pixels of images that wait for one forward."""


def predict(config: PredictConfig) -> int:
    """Predict every image and video of `config.input`; returns what `main` does."""
    console = Console()
    model = load_depth_model(config.model, config.encoder_name)
    job = Job(model, config)
    output = Path(config.output)
    present = next(place for place in (output, *output.parents) if place.exists())
    if not present.is_dir():
        raise UserError(f"output {output} cannot be a folder, {present} is a file: choose another --output")
    earlier = earlier_outputs(config.input, output)
    inputs = find_inputs(config.input, output, {path for paths in earlier.values() for path in paths})
    job.check_names(inputs)
    model.to(chosen_device(config.device))
    say(console, str(model.calibration) if model.calibration else "")
    for record, paths in earlier.items():
        say(console, f"left out: {len(paths)} files that an earlier prediction wrote, as {record} says")

    images = {source: stem for source, stem in inputs.items() if not is_video(source)}
    videos = {source: stem for source, stem in inputs.items() if is_video(source)}
    for stem in videos.values():
        for name in VIDEO_FORMATS:
            forget_killed(output / f"{stem}_{name}")
    interrupted = False
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        try:
            job.predict_images(images, _advance(bar, "images", visible=bool(images)))
            for source, stem in videos.items():
                job.predict_video(source, stem, _advance(bar, Path(stem).name))
        except KeyboardInterrupt:
            interrupted = True
        except Exception as error:
            with suppress(OSError):  # such as the full disk that was the error
                if not (job.written or job.videos or job.failed):
                    raise
                job.record(interrupted, str(error))
                say(console, f"stopped by an error: {output / RECORD} says what was written before", "yellow")
            raise
    job.record(interrupted)
    job.tell(console, images, videos, interrupted)
    return 130 if interrupted else 0 if job.written or any(video["frames"] for video in job.videos) else 1


def earlier_reports(file: Path, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Reports of earlier runs into the same folder, the newest first, but for those whose files were all written anew.

    Args:
        file: predictions.json as it is before this run writes it; it may be missing.
        report: of this run.
    """

    def written(one: dict[str, Any]) -> set[tuple[str, str]]:
        return {
            (entry["output"], name)
            for entry in one["predicted"] + one["videos"]
            for name in one.get("formats", [""])
        }

    try:
        former = json.loads(file.read_text(encoding="utf-8"))
        reports = [former, *former.pop("earlier", [])]
        return [one for one in reports if not written(one) <= written(report)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not one of ours
        return []


class Job:
    """What is asked of every image and frame, and the record of what came of it.

    Args:
        model: with its weights; it may be moved to a device later.
        config: the options.

    Raises:
        ValueError: options that do not go together, or with the model.
    """

    def __init__(self, model: DepthModel, config: PredictConfig) -> None:
        self.model, self.config, self.output = model, config, Path(config.output)
        self.metric = "depth" in model.outputs
        far = model.max_depth if config.colour_far is None else config.colour_far
        require(
            0 <= config.colour_near < far,
            "colour_near",
            config.colour_near,
            f"at least 0 and below colour_far, {far}",
        )
        self.limits = config.colour_near, far
        usual: tuple[Format, ...] = ("npy", "png", "colour") if self.metric else ("npy", "colour")
        self.image_formats: tuple[Format, ...] = tuple(config.formats or usual)
        self.video_formats: tuple[Format, ...] = tuple(config.formats or ("colour",))
        if not self.metric and (wrong := [name for name in self.image_formats if name in NEED_METRES]):
            raise UserError(
                f"formats {', '.join(wrong)} need metres, which head {model.head_name} does not give: leave them out,"
                " or calibrate the model with a few known distances (finetune/commands/calibrate.py)"
            )
        if config.camera is not None:
            known_camera(config.camera, (1, 1))  # a wrong one is refused before anything is written
        self.wanted = transform_of(model, config.image_size).image_size
        self.written: list[dict[str, Any]] = []
        self.videos: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []

    def check_names(self, inputs: dict[Path | int, str]) -> None:
        """Raise ValueError where outputs of two inputs would have one name."""
        owners: dict[str, Path | int] = {}
        for source, stem in inputs.items():
            formats = self.video_formats if is_video(source) else self.image_formats
            for name in formats:
                if is_video(source) and name not in VIDEO_FORMATS:
                    continue  # in a folder of the video's own
                file = stem + ("_" + name if is_video(source) else self._ending(name))
                if (other := owners.setdefault(file, source)) != source:
                    raise UserError(
                        f"{other} and {source} would both be predicted into {file}: rename one, or ask for other"
                        " formats"
                    )

    def _ending(self, name: Format) -> str:
        """What the file of a format has behind the stem of an image or frame."""
        kind = "" if self.metric else "_disparity"
        unit = "mm" if self.config.png_scale == MILLIMETRE else "depth"
        return {
            "npy": f"{kind}.npy",
            "pfm": f"{kind}.pfm",
            "png": f"_{unit}.png",
            "ply": ".ply",
            "mesh": "_mesh.ply",
        }.get(name, f"_{name}.png")

    def record(self, interrupted: bool, error: str | None = None) -> None:
        """Write predictions.json: what was written so far, and the error that ended it if there was one."""
        calibration = self.model.calibration
        report: dict[str, Any] = {
            "model": str(self.config.model),
            "calibration": calibration.as_config() if calibration else None,
            "colour_range_m": list(self.limits) if self.metric else None,
            "png_scale_m": self.config.png_scale,
            "formats": sorted(
                {*(self.image_formats if self.written else ()), *(self.video_formats if self.videos else ())}
            ),
            "predicted": self.written,
            "videos": self.videos,
            "failed": self.failed,
            "interrupted": interrupted,
            "error": error,
        }
        report["earlier"] = earlier_reports(self.output / RECORD, report)
        write_whole(self.output / RECORD, (json.dumps(report, indent=1) + "\n").encode())

    def predict_images(
        self, images: dict[Path | int, str], progress: Callable[[int, int | None], Any]
    ) -> None:
        """Predict and write all.

        Args:
            images: with the stems of their outputs.
            progress: called after each batch with how many images it had and how many there are in all.
        """
        for group in self._batches(images):
            depths = self._depths([image for _, _, image in group])
            for (path, stem, image), depth in zip(group, depths, strict=True):
                entry = {"image": str(path), "output": stem, "size": list(depth.shape)}
                try:
                    camera = self._camera(path, depth.shape, self.image_formats)
                except ValueError as error:  # such as intrinsics of another size
                    self.failed.append({"image": str(path), "reason": str(error)})
                    continue
                files: list[str] = []
                try:
                    entry |= self._write(stem, camera, image, depth, self.image_formats, files)
                except BaseException as error:  # a full disk, Ctrl-C
                    reason = f"stopped ({type(error).__name__}) when these were written: {', '.join(files) or 'none'}"
                    self.failed.append({"image": str(path), "reason": reason})
                    raise
                self.written.append(entry | {"files": files})
            progress(len(group), len(images))

    def _batches(self, images: dict[Path | int, str]) -> Iterator[list[tuple[Path, str, np.ndarray]]]:
        """Images that are presented at one size, in order; those that cannot be read are recorded as failed."""
        group: list[tuple[Path, str, np.ndarray]] = []
        for path, stem in images.items():
            assert isinstance(path, Path)
            try:
                image = np.asarray(read_image(path, self.config.max_pixels))
            except Exception as error:  # Pillow raises a dozen kinds for a damaged file
                _, _, reason = describe_failure(path, error).rpartition(": ")
                self.failed.append({"image": str(path), "reason": reason})
                continue
            full = len(group) == self.config.batch_size or (
                sum(other.size for _, _, other in group) + image.size > 3 * MOST_BATCH_PIXELS
            )
            if group and (full or self._presented(group[0][2]) != self._presented(image)):
                yield group
                group = []
            group.append((path, stem, image))
        if group:
            yield group

    def _presented(self, image: np.ndarray) -> tuple[int, int]:
        return fitted_size((image.shape[0], image.shape[1]), self.wanted)

    def _depths(self, images: list[np.ndarray]) -> list[np.ndarray]:
        size, flip, tiles = self.config.image_size, self.config.flip_average, self.config.tiles
        if tiles > 1:
            return [predict_image(self.model, image, size, flip, tiles) for image in images]
        return predict_images(self.model, images, size, flip)

    def _camera(
        self, path: Path | None, shape: Sequence[int], formats: Iterable[Format]
    ) -> Intrinsics | None:
        """The camera of an image, or of a frame, if one of the formats needs it; ValueError if it cannot be its."""
        if not {"ply", "mesh"} & set(formats):
            return None
        return camera_for(self.config.camera, path, (shape[0], shape[1]))

    def _write(
        self,
        stem: str,
        camera: Intrinsics | None,
        image: np.ndarray,
        depth: np.ndarray,
        formats: Iterable[Format],
        files: list[str],
    ) -> dict[str, Any]:
        """Write the files of one image or frame and put their names into `files`; what to report of it."""
        entry: dict[str, Any] = {"unit": "m" if self.metric else "inverse depth up to scale and shift"}
        if self.metric:
            entry |= {
                "nearest_m": float(depth.min()),
                "median_m": float(np.median(depth)),
                "farthest_m": float(depth.max()),
            }
        if camera is not None:
            entry["camera"] = asdict(camera)
        for name in formats:
            file = self.output / (stem + self._ending(name))
            if name == "npy":
                write_whole(file, npy_bytes(depth))
            elif name == "pfm":
                write_whole(file, pfm_bytes(depth))
            elif name == "png":
                content, entry["saturated_pixels"] = png_bytes(depth, self.config.png_scale)
                write_whole(file, content)
            elif name == "colour" and self.metric:
                save_figure(depth_map(_thinned(depth), *self.limits, Path(stem).name), file)
            elif name in VIDEO_FORMATS:
                shown = _thinned(depth)
                limits = self.limits if self.metric else (float(shown.min()), float(shown.max()))
                picture = paint(shown, limits, not self.metric)
                picture = picture if name == "colour" else self._beside(_thinned(image), picture, limits)
                encoded = cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1]
                write_whole(file, encoded.tobytes())
            else:
                assert camera is not None
                entry["every_row_and_column"] = step_of(depth.size)
                write_whole(file, (point_cloud if name == "ply" else mesh)(image, depth, camera))
            files.append(file.relative_to(self.output).as_posix())
        return entry

    def _beside(self, image: np.ndarray, picture: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
        """An image and the colours of its depth, with what they mean if that is metres."""
        return np.hstack([image, picture, *([legend(len(image), limits)] if self.metric else [])])

    def predict_video(
        self, source: Path | int, stem: str, progress: Callable[[int, int | None], Any]
    ) -> None:
        """Predict and write a video.

        After Ctrl-C the videos of depth so far are whole, and the record says how many frames they have.

        Args:
            source: its file, or the number of a camera.
            stem: of its outputs.
            progress: called after each batch with how many frames it had and how many there should be in all, if known.
        """
        config, most = self.config, self.config.frames
        try:
            frames = VideoFrames(source, most)
            camera = self._camera(None, frames.shape, self.video_formats)
        except ValueError as error:
            self.failed.append({"image": str(source), "reason": str(error)})
            return
        total = min((n for n in (frames.announced, most) if n is not None), default=None)
        follow = config.video_range == "smooth" or not self.metric
        colours = ColourRange(None if follow else self.limits, frames.rate)
        entry: dict[str, Any] = {
            "video": str(source),
            "output": stem,
            "frames": 0,
            "frames_announced": frames.announced,
            "frames_per_second": frames.rate,
            "seconds_announced": frames.seconds,
            "colour_range": "smooth" if follow else "fixed",
            "files": [],
        }
        if camera is not None:
            entry["camera"] = asdict(camera)
        self.videos.append(entry)
        each: list[Format] = [name for name in self.video_formats if name not in VIDEO_FORMATS]
        writers = {
            name: VideoWriter(self.output / f"{stem}_{name}", frames.rate)
            for name in self.video_formats
            if name in VIDEO_FORMATS
        }
        try:
            with ExitStack() as stack:
                for writer in writers.values():
                    stack.enter_context(writer)
                for group in _groups(frames, 1 if isinstance(source, int) else config.batch_size, most):
                    for image, depth in zip(group, self._depths(group), strict=True):
                        limits = colours.next(depth)
                        picture = paint(depth, limits, not self.metric)
                        for name, writer in writers.items():
                            both = name == "side"
                            writer.write(self._beside(image, picture, limits) if both else picture)
                        if each:
                            place = f"{stem}_frames/{entry['frames']:06d}"
                            about = self._write(place, camera, image, depth, each, [])
                            if "saturated_pixels" in about:
                                count = entry.get("saturated_pixels", 0) + about["saturated_pixels"]
                                entry["saturated_pixels"] = count
                            if "every_row_and_column" in about:
                                entry["every_row_and_column"] = about["every_row_and_column"]
                        entry["frames"] += 1
                    progress(len(group), total)
        finally:
            frames.close()
            entry["files"] = [writer.path.name for writer in writers.values() if writer.path is not None]
            if each and entry["frames"]:
                entry["files"].append(f"{Path(stem).name}_frames")
            if uneven := frames.uneven():
                entry["uneven"] = uneven
        if (most is None or entry["frames"] < most) and (missing := frames.missing()):
            entry["ends_early"] = missing

    def tell(self, console: Console, images: dict, videos: dict, interrupted: bool) -> None:
        """Print what was written and what was not."""
        for failure in self.failed:
            say(console, f"skipped {failure['image']}: {failure['reason']}", "yellow")
        if images:
            done = ", ".join(self.image_formats)
            unit = f"in metres, colours from {self.limits[0]:g} to {self.limits[1]:g} m"
            unit = unit if self.metric else "up to scale and shift, no metres"
            say(
                console,
                f"{len(self.written)} of {len(images)} images predicted into {self.output}: {done}; {unit}",
            )
        for video in self.videos:
            say(
                console,
                f"{video['frames']} frames of {video['video']}: {', '.join(video['files'])} in {self.output}",
            )
            if "ends_early" in video:
                say(console, f"{video['video']} ends early: {video['ends_early']}", "yellow")
            if "uneven" in video:
                say(console, f"{video['video']}: {video['uneven']}", "yellow")
        every = [*self.written, *self.videos]
        if thinned := [n for entry in every if (n := entry.get("every_row_and_column", 1)) > 1]:
            say(
                console,
                f"point clouds and meshes of {len(thinned)} inputs have only one row and column of"
                f" {max(thinned)} or fewer, which are {MOST_POINTS / 1e6:g} million points at most",
            )
        if saturated := sum(entry.get("saturated_pixels", 0) for entry in every):
            far = 65535 * self.config.png_scale
            say(
                console,
                f"{saturated} pixels are at {far:g} m or beyond: in PNG they are 65535, .npy has their depth",
            )
        assumed = sum(entry.get("camera", {}).get("assumed", False) for entry in self.written)
        if assumed or (
            self.videos and self.config.camera is None and {"ply", "mesh"} & set(self.video_formats)
        ):
            what = f"of {assumed} images " if assumed else ""
            say(
                console,
                f"the camera {what}is not known, 60 degrees of view along the long side were ASSUMED: point clouds are"
                " stretched where that is wrong; give --camera",
                "yellow",
            )
        if interrupted:
            say(console, "interrupted: what was written is whole, predictions.json says what it is", "yellow")


def _advance(bar: Progress, name: str, visible: bool = True) -> Callable[[int, int | None], None]:
    """What moves a new line of a progress bar: how many more are done, of how many."""
    task = bar.add_task(name, total=None, visible=visible)
    return lambda count, total: bar.update(task, advance=count, total=total)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print one line of text as it is, if there is any."""
    if text:
        console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def is_video(source: Path | int) -> bool:
    """Whether an input is a camera, or by its extension a video."""
    return isinstance(source, int) or source.suffix.lower() in VIDEO


def _thinned(values: np.ndarray) -> np.ndarray:
    """Every n-th row and column, such that the long side is at most `LONGEST_PICTURE`."""
    step = -(-max(values.shape[:2]) // LONGEST_PICTURE)
    return values[::step, ::step]


def _groups(frames: Iterable[np.ndarray], size: int, most: int | None) -> Iterator[list[np.ndarray]]:
    """Lists of `size` frames, the last one shorter; `most` frames in all."""
    group: list[np.ndarray] = []
    for count, frame in enumerate(frames, 1):
        group.append(frame)
        last = count == most
        if len(group) == size or last:
            yield group
            group = []
        if last:
            return
    if group:
        yield group


def find_inputs(text: str, output: Path, left_out: Collection[str] = ()) -> dict[Path | int, str]:
    """What an input names: images, videos, the index of a camera; each with the stem of its outputs.

    See `output_stems`.
    """
    if text.isdecimal() and not Path(text).exists():
        return {int(text): f"camera_{text}"}
    return {**output_stems(text, output, left_out)}


def earlier_outputs(source: str | Path, output: Path) -> dict[Path, set[str]]:
    """The pictures and videos in a folder that earlier predictions wrote there, by the predictions.json that says so.

    Args:
        source: what is to be predicted; only folders are searched.
        output: what is in it is left out anyway.

    Returns:
        absolute paths, of each predictions.json that names some.
    """
    found: dict[Path, set[str]] = {}
    if not Path(source).is_dir():
        return found
    inside = output.resolve()
    for folder, names in walk(Path(source)):
        record = Path(folder, RECORD)
        if RECORD not in names or inside in record.resolve().parents:
            continue
        try:
            report = json.loads(record.read_text(encoding="utf-8"))
            stems = [f"{folder}/{entry['output']}" for entry in report["predicted"]]
            videos = [f"{folder}/{entry['output']}" for entry in report["videos"]]
        except (OSError, ValueError, LookupError, TypeError):  # of another program
            continue
        for video in videos:
            frames = {path.stem.rpartition("_")[0] for path in Path(f"{video}_frames").glob("*.png")}
            stems += [f"{video}_frames/{frame}" for frame in frames]
        possible = {f"{stem}_{end}.png" for stem in stems for end in PICTURES}
        possible |= {f"{stem}_{end}{kind}" for stem in videos for end in VIDEO_FORMATS for kind, _ in CODECS}
        if wrote := {os.path.abspath(path) for path in possible if os.path.isfile(path)}:
            found[record] = wrote
    return found


def output_stems(source: str | Path, output: Path, left_out: Collection[str] = ()) -> dict[Path, str]:
    """Find images and videos and decide, for each, the path inside the output folder that its files are named after.

    Subfolders are kept, and the extension is dropped unless another file of the folder has the same name without it,
    so no two share a name. What is inside `output` (of an earlier prediction), and `left_out` (absolute paths), is not
    taken.

    Raises:
        ValueError: Nothing there, or no image and no video in it.
    """
    source = Path(source)
    if source.is_file() and source.suffix.lower() != ".txt":
        return {source: source.stem}
    inside = output.resolve()
    absolute = {os.path.abspath(path): path for path in _listed(source)}  # a list may name a file twice
    images = {
        name: path
        for name, path in absolute.items()
        if inside not in path.resolve().parents and name not in left_out
    }
    if not images:
        raise UserError(
            f"{source} holds no image and no video outside the output folder {output} that is not itself a prediction:"
            " choose another output folder, or other images"
        )
    folders = [os.path.dirname(name) for name in images]
    root = os.path.abspath(source) if source.is_dir() else os.path.commonpath(folders)
    names = [Path(os.path.relpath(name, root)) for name in images]
    stems = Counter(name.with_suffix("") for name in names)
    chosen = [name.with_suffix("") if stems[name.with_suffix("")] == 1 else name for name in names]
    if len(set(chosen)) < len(chosen):  # a.jpg and a.png beside a.jpg.png
        chosen = names
    return {path: name.as_posix() for path, name in zip(images.values(), chosen, strict=True)}


def _listed(source: Path) -> list[Path]:
    """The files of a folder, list or pattern, or one file; ValueError if there are none."""
    if not source.exists() and re.search(r"[*?\[]", str(source)):
        fitting = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
        found = [path for path in fitting if path.suffix.lower() in (*IMAGE, *VIDEO) and path.is_file()]
        if not found:
            raise UserError(f"no image and no video fits {source}: check the pattern, and put it in quotes")
        return found
    if not source.exists():
        raise UserError(
            f"there is no image, video, folder or list at {source.absolute()}: check the path (a relative one starts at"
            " the current folder)"
        )
    videos: list[Path] = []
    if source.is_dir():
        videos = sorted(
            Path(folder, name)
            for folder, names in walk(source)
            for name in names
            if Path(name).suffix.lower() in VIDEO
        )
    try:
        return [*list_images(source), *videos]
    except ValueError:
        if not videos:
            raise
        return videos
