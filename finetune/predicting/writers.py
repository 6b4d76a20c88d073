"""The files of a predicted image or frame."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from finetune.depth_data.depth_files import MILLIMETRE, npy_bytes, pfm_bytes, png_bytes
from finetune.options import Format
from finetune.predicting.camera import Intrinsics
from finetune.predicting.pointcloud import mesh, point_cloud, step_of
from finetune.predicting.video import legend, paint
from finetune.report.figures import colour_range, depth_map, save_figure
from spark.files import write_whole

VIDEO_FORMATS: tuple[Format, ...] = ("colour", "side")
"""Of a video one file each; the others are files of each frame."""
NEED_METRES: tuple[Format, ...] = ("png", "ply", "mesh")
NEED_CAMERA: tuple[Format, ...] = ("ply", "mesh")
PICTURES = ("mm", "depth", *VIDEO_FORMATS)
"""Ends of the names of PNG files that predictions write."""
LONGEST_PICTURE = 4096
"""Long side of pictures for people [px]; of larger images every second, third, ... pixel is drawn."""


@dataclass(frozen=True)
class ImageWriter:
    """Writes the files of images and frames.

    Args:
        folder: that they are written to.
        metric: predictions are depth [m]; otherwise inverse depth up to scale and shift.
        limits: depths at the ends of the colours [m]; None: those of each image.
        png_scale: metres of one unit of the 16-bit PNG.
    """

    folder: Path
    metric: bool
    limits: tuple[float, float] | None
    png_scale: float = MILLIMETRE

    def ending(self, name: Format) -> str:
        """What the file of a format has behind the stem of an image or frame."""
        kind = "" if self.metric else "_disparity"
        unit = "mm" if self.png_scale == MILLIMETRE else "depth"
        endings = {
            "npy": f"{kind}.npy",
            "pfm": f"{kind}.pfm",
            "png": f"_{unit}.png",
            "ply": ".ply",
            "mesh": "_mesh.ply",
        }
        return endings.get(name, f"_{name}.png")

    def write(
        self,
        stem: str,
        image: np.ndarray,
        depth: np.ndarray,
        formats: Sequence[Format],
        camera: Intrinsics | None,
        files: list[str],
    ) -> dict[str, Any]:
        """Write the files of one image or frame.

        Args:
            stem: of their names.
            image: uint8 [H, W, 3].
            depth: the prediction [H, W].
            formats: which files.
            camera: of the image, for `NEED_CAMERA`.
            files: receives the name of each file once it is written.

        Returns:
            the entries of predictions.json on this image.
        """
        entry: dict[str, Any] = {"unit": "m" if self.metric else "inverse depth up to scale and shift"}
        entry |= self._range(depth)
        for name in formats:
            file = self.folder / (stem + self.ending(name))
            if name == "colour" and self.metric:
                ends = self.ends(depth)
                save_figure(depth_map(_thinned(depth), *ends, Path(stem).name), file)
                entry["colours_m"] = list(ends)
            else:
                content, more = self._content(name, image, depth, camera)
                write_whole(file, content)
                entry |= more
            files.append(file.relative_to(self.folder).as_posix())
        return entry

    def _range(self, depth: np.ndarray) -> dict[str, Any]:
        if not self.metric:
            return {}
        ends = {"nearest_m": depth.min(), "median_m": np.median(depth), "farthest_m": depth.max()}
        return {name: float(value) for name, value in ends.items()}

    def _content(
        self, name: Format, image: np.ndarray, depth: np.ndarray, camera: Intrinsics | None
    ) -> tuple[bytes, dict[str, Any]]:
        """The content of a file, and its entries of predictions.json."""
        if name == "npy":
            return npy_bytes(depth), {}
        if name == "pfm":
            return pfm_bytes(depth), {}
        if name == "png":
            content, saturated = png_bytes(depth, self.png_scale)
            return content, {"saturated_pixels": saturated}
        if name in NEED_CAMERA:
            assert camera is not None
            content = (point_cloud if name == "ply" else mesh)(image, depth, camera)
            return content, {"every_row_and_column": step_of(depth.size)}
        shown = _thinned(depth)
        limits = self.ends(depth) if self.metric else (float(shown.min()), float(shown.max()))
        picture = self.picture(name, _thinned(image), shown, limits)
        about = {"colours_m": list(limits)} if self.metric else {}
        return cv2.imencode(".png", np.ascontiguousarray(picture[..., ::-1]))[1].tobytes(), about

    def ends(self, depth: np.ndarray) -> tuple[float, float]:
        """Depths at the ends of the colours of an image [m]."""
        return self.limits or colour_range(depth)

    def picture(
        self, name: Format, image: np.ndarray, depth: np.ndarray, limits: tuple[float, float]
    ) -> np.ndarray:
        """The colours of depth; as "side" beside the image, with a legend if they are metres. uint8 [H, W', 3]."""
        colours = paint(depth, limits, not self.metric)
        if name == "colour":
            return colours
        return np.hstack([image, colours, *([legend(len(image), limits)] if self.metric else [])])


def _thinned(values: np.ndarray) -> np.ndarray:
    """Every n-th row and column, such that the long side is at most `LONGEST_PICTURE`."""
    step = -(-max(values.shape[:2]) // LONGEST_PICTURE)
    return values[::step, ::step]
