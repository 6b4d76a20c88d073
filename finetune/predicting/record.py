"""predictions.json: what a prediction wrote, how, and what it could not read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.predicting.camera import wide_view
from finetune.predicting.pointcloud import MOST_POINTS
from spark.files import write_whole

RECORD = "predictions.json"


@dataclass
class Record:
    """What came of every image and video.

    Attributes:
        predicted: an entry for each image whose files are written.
        videos: an entry for each video.
        failed: "image" and "reason" of each input that could not be read or written.
    """

    predicted: list[dict[str, Any]] = field(default_factory=list)
    videos: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)

    def fail(self, source: Path | int, reason: object) -> None:
        """Note an input that could not be read or written."""
        self.failed.append({"image": str(source), "reason": str(reason)})

    @property
    def empty(self) -> bool:
        """Whether nothing came of anything yet."""
        return not (self.predicted or self.videos or self.failed)

    @property
    def useful(self) -> bool:
        """Whether an image or a frame was predicted."""
        return bool(self.predicted) or any(video["frames"] for video in self.videos)

    def write(
        self, folder: Path, about: Mapping[str, Any], interrupted: bool, error: str | None = None
    ) -> None:
        """Write predictions.json.

        Args:
            folder: of the output.
            about: model and options, the first entries.
            interrupted: by Ctrl-C.
            error: that ended the prediction, if there was one.
        """
        report = {
            **about,
            "predicted": self.predicted,
            "videos": self.videos,
            "failed": self.failed,
            "interrupted": interrupted,
            "error": error,
        }
        report["earlier"] = earlier_reports(folder / RECORD, report)
        write_whole(folder / RECORD, (json.dumps(report, indent=1) + "\n").encode())

    def remarks(self, png_scale: float) -> list[str]:
        """Sentences on thinned clouds, and on pixels beyond the range of a PNG of `png_scale` metres a unit."""
        every, sentences = [*self.predicted, *self.videos], []
        if thinned := [n for entry in every if (n := entry.get("every_row_and_column", 1)) > 1]:
            sentences.append(
                f"point clouds and meshes of {len(thinned)} inputs have only one row and column of {max(thinned)} or"
                f" fewer, which are {MOST_POINTS / 1e6:g} million points at most"
            )
        if saturated := sum(entry.get("saturated_pixels", 0) for entry in every):
            far = f"{65535 * png_scale:g} m"
            sentences.append(
                f"{saturated} pixels are at {far} or beyond: in PNG they are 65535, .npy has their depth"
            )
        return sentences

    def assumed_camera(self) -> str:
        """A warning where the camera of point clouds was assumed; "" where it was not."""
        images = sum(entry.get("camera", {}).get("assumed", False) for entry in self.predicted)
        if not images and not any(entry.get("camera", {}).get("assumed") for entry in self.videos):
            return ""
        what = f"of {images} images " if images else ""
        return (
            f"the camera {what}is not known, 60 degrees of view along the long side were ASSUMED: point clouds are"
            " stretched where that is wrong; give --camera"
        )

    def wide_camera(self) -> str:
        """A warning where the camera of point clouds sees more than anything but a fisheye does; "" where none does."""
        cameras = [entry.get("camera") for entry in (*self.predicted, *self.videos)]
        return next(
            (text for camera in cameras if camera and (text := wide_view(camera["fx"], camera["width"]))), ""
        )


def earlier_reports(file: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Reports of earlier runs into the same folder, the newest first, without those whose files were all rewritten.

    Args:
        file: predictions.json before this run writes it; it may be missing.
        report: of this run.
    """

    def written(one: Mapping[str, Any]) -> set[tuple[str, str]]:
        entries = one["predicted"] + one["videos"]
        return {(entry["output"], name) for entry in entries for name in one.get("formats", [""])}

    try:
        former = json.loads(file.read_text(encoding="utf-8"))
        reports = [former, *former.pop("earlier", [])]
        return [one for one in reports if not written(one) <= written(report)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or not one of ours
        return []
