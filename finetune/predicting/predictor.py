"""Predicts images and videos as the options of spark-predict ask."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console

from finetune.model.depth_model import DepthModel
from finetune.model.prediction import fitted_size, predict_image, predict_images, read_photo, transform_of
from finetune.options import Format, PredictConfig
from finetune.predicting.camera import Intrinsics, camera_for, known_camera
from finetune.predicting.inputs import is_video
from finetune.predicting.record import Record
from finetune.predicting.video import ColourRange, VideoFrames, VideoWriter, hidden_path
from finetune.predicting.writers import NEED_CAMERA, NEED_METRES, VIDEO_FORMATS, ImageWriter
from finetune.report.terminal import say
from spark.errors import UserError
from spark.training.option_types import require

MOST_BATCH_PIXELS = 64_000_000
"""Pixels of images that wait for one forward."""
Progressed: TypeAlias = Callable[[int, int | None], object]
"""Called after each batch with how many more images are done, and of how many in all, if known."""


class Predictor:
    """Predicts images and videos as the options ask, writes their files, and records what came of each.

    Args:
        model: with its weights; it may be moved to a device later.
        config: the options.
    """

    def __init__(self, model: DepthModel, config: PredictConfig) -> None:
        self.model, self.config, self.output = model, config, Path(config.output)
        self.metric = "depth" in model.outputs
        far = model.max_depth if config.colour_far is None else config.colour_far
        near = config.colour_near or 0.0
        require(0 <= near < far, "colour_near", near, f"at least 0 and below colour_far, {far}")
        self.limits = near, far
        self.own_range = config.colour_near is None and config.colour_far is None  # of each image
        usual: tuple[Format, ...] = ("npy", "png", "colour") if self.metric else ("npy", "colour")
        self.image_formats: tuple[Format, ...] = tuple(config.formats or usual)
        self.video_formats: tuple[Format, ...] = tuple(config.formats or ("colour",))
        if not self.metric and (wrong := [name for name in self.image_formats if name in NEED_METRES]):
            raise UserError(
                f"formats {', '.join(wrong)} need metres, which head {model.head_name} does not give: leave them out,"
                " or calibrate the model with a few known distances (spark-calibrate)"
            )
        if config.camera is not None:
            known_camera(config.camera, (1, 1))  # a wrong one is refused before anything is written
        self.writer = ImageWriter(
            self.output, self.metric, None if self.own_range else self.limits, config.png_scale
        )
        self.wanted = transform_of(model, config.image_size).image_size
        self.record = Record()

    def check_names(self, inputs: Mapping[Path | int, str]) -> None:
        """Raise UserError where outputs of two inputs would have one name."""
        owners: dict[str, Path | int] = {}
        for source, stem in inputs.items():
            if is_video(source):  # the files of its frames are in a folder of its own
                files = [f"{stem}_{name}" for name in self.video_formats if name in VIDEO_FORMATS]
            else:
                files = [stem + self.writer.ending(name) for name in self.image_formats]
            for file in files:
                if (other := owners.setdefault(file, source)) != source:
                    raise UserError(
                        f"{other} and {source} would both be predicted into {file}: rename one, or ask for other"
                        " formats"
                    )

    def predict_images(self, images: Mapping[Path, str], progress: Progressed) -> None:
        """Predict and write images, given with the stems of their outputs."""
        for group in self._batches(images):
            depths = self._depths([image for _, _, image in group])
            for (path, stem, image), depth in zip(group, depths, strict=True):
                try:
                    camera = self._camera(path, depth.shape, self.image_formats)
                except ValueError as error:  # such as intrinsics of another size
                    self.record.fail(path, error)
                    continue
                entry = {"image": str(path), "output": stem, "size": list(depth.shape)}
                files: list[str] = []
                try:
                    entry |= self.writer.write(stem, image, depth, self.image_formats, camera, files)
                except BaseException as error:  # a full disk, Ctrl-C
                    written = f"when these were written: {', '.join(files) or 'none'}"
                    self.record.fail(path, f"stopped ({type(error).__name__}) {written}")
                    raise
                entry |= {} if camera is None else {"camera": asdict(camera)}
                self.record.predicted.append(entry | {"files": files})
            progress(len(group), len(images))

    def _batches(self, images: Mapping[Path, str]) -> Iterator[list[tuple[Path, str, np.ndarray]]]:
        """Images that are presented at one size, in order; those that cannot be read are recorded as failed."""
        group: list[tuple[Path, str, np.ndarray]] = []
        for path, stem in images.items():
            try:
                image = read_photo(path, self.config.max_pixels)
            except UserError as error:
                self.record.fail(path, str(error).rpartition(": ")[2])
                continue
            waiting = sum(other.size for _, _, other in group)
            full = len(group) == self.config.batch_size or waiting + image.size > 3 * MOST_BATCH_PIXELS
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
        """The camera of an image, or of a frame, if one of the formats needs it; UserError if it cannot be its."""
        if set(NEED_CAMERA).isdisjoint(formats):
            return None
        return camera_for(self.config.camera, path, (shape[0], shape[1]))

    def predict_video(self, source: Path | int, stem: str, progress: Progressed) -> None:
        """Predict and write a video; after Ctrl-C the videos of depth so far are whole.

        Args:
            source: its file, or the number of a camera.
            stem: of its outputs.
            progress: see `Progressed`.
        """
        config, most = self.config, self.config.frames
        try:
            frames = VideoFrames(source, most)
            camera = self._camera(None, frames.shape, self.video_formats)
        except ValueError as error:
            self.record.fail(source, error)
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
            "colours_m": None if follow else list(self.limits),
            "files": [],
        }
        entry |= {} if camera is None else {"camera": asdict(camera)}
        self.record.videos.append(entry)
        each: list[Format] = [name for name in self.video_formats if name not in VIDEO_FORMATS]
        paths: dict[Format, Path] = {name: self.output / f"{stem}_{name}.mp4" for name in VIDEO_FORMATS}
        for path in paths.values():
            hidden_path(path).unlink(missing_ok=True)  # of a killed prediction
        writers: dict[Format, VideoWriter] = {
            name: VideoWriter(path, frames.rate) for name, path in paths.items() if name in self.video_formats
        }
        try:
            with ExitStack() as stack:
                for writer in writers.values():
                    stack.enter_context(writer)
                for group in _groups(frames, 1 if isinstance(source, int) else config.batch_size, most):
                    for image, depth in zip(group, self._depths(group), strict=True):
                        limits = colours.next(depth)
                        for name, writer in writers.items():
                            writer.write(self.writer.picture(name, image, depth, limits))
                        if each:
                            place = f"{stem}_frames/{entry['frames']:06d}"
                            about = self.writer.write(place, image, depth, each, camera, [])
                            if "saturated_pixels" in about:
                                count = entry.get("saturated_pixels", 0) + about["saturated_pixels"]
                                entry["saturated_pixels"] = count
                            if "every_row_and_column" in about:
                                entry["every_row_and_column"] = about["every_row_and_column"]
                        entry["frames"] += 1
                    progress(len(group), total)
        finally:
            frames.close()
            entry["files"] = [writer.path.name for writer in writers.values() if writer.done]
            if each and entry["frames"]:
                entry["files"].append(f"{Path(stem).name}_frames")
            if uneven := frames.uneven():
                entry["uneven"] = uneven
        if (most is None or entry["frames"] < most) and (missing := frames.missing()):
            entry["ends_early"] = missing

    def write_record(self, interrupted: bool, error: str | None = None) -> None:
        """Write predictions.json: what was written so far, and the error that ended it if there was one."""
        calibration = self.model.calibration
        formats = {
            *(self.image_formats if self.record.predicted else ()),
            *(self.video_formats if self.record.videos else ()),
        }
        about = {
            "model": str(self.config.model),
            "calibration": calibration.as_config() if calibration else None,
            "colour_range_m": list(self.limits) if self.metric and not self.own_range else None,
            "png_scale_m": self.config.png_scale,
            "formats": sorted(formats),
        }
        self.record.write(self.output, about, interrupted, error)

    def print_record(self, console: Console, images: int, interrupted: bool) -> None:
        """Print what was written and what was not.

        Args:
            console: where to.
            images: how many were asked for.
            interrupted: by Ctrl-C.
        """
        record = self.record
        for failure in record.failed:
            say(console, f"skipped {failure['image']}: {failure['reason']}", "yellow")
        if images:
            unit = "up to scale and shift, no metres"
            if self.metric:
                colours = f"colours from {self.limits[0]:g} to {self.limits[1]:g} m"
                if self.own_range:
                    colours = "colours over the range of each image (--colour_near and --colour_far fix them)"
                unit = (
                    f"in metres, {colours}" if set(VIDEO_FORMATS) & set(self.image_formats) else "in metres"
                )
            done = f"{len(record.predicted)} of {images} images predicted into {self.output}"
            say(console, f"{done}: {', '.join(self.image_formats)}; {unit}")
        for video in record.videos:
            files = ", ".join(video["files"])
            say(console, f"{video['frames']} frames of {video['video']}: {files} in {self.output}")
            if "ends_early" in video:
                say(console, f"{video['video']} ends early: {video['ends_early']}", "yellow")
            if "uneven" in video:
                say(console, f"{video['video']}: {video['uneven']}", "yellow")
        for text in record.remarks(self.config.png_scale):
            say(console, text)
        say(console, record.assumed_camera(), "yellow")
        say(console, record.wide_camera(), "yellow")
        if interrupted:
            say(console, "interrupted: what was written is whole, predictions.json says what it is", "yellow")


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
