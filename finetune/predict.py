"""Predict depth for an image or a folder of images.

    python finetune/predict.py --model RUN/model --input PHOTOS --output DEPTH

For every image, under its own name and subfolder: NAME.npy (float32, metres, the image's own size), NAME_mm.png
(uint16, millimetres; 0 = no prediction, 65535 = 65.535 m or more) and NAME_colour.png (a picture with a colour bar in
metres). predictions.json says what was written and what could not be read. A model without metres (head fusion) writes
NAME_disparity.npy, float32 inverse depth up to scale and shift, and NAME_colour.png from its nearest to its farthest.
"""

import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional as F

from finetune.config import expand_home
from finetune.figures import colourise, depth_map, save_figure
from finetune.inference import chosen_device, predict_depth, transform_of
from finetune.model import DepthModel, load_depth_model
from finetune.protocols import Protocol
from spark.config import parse_config, require
from spark.decoding import describe_failure, read_image
from spark.folders import write_whole
from spark.run import one_line_errors
from spark.sources import list_images

DESCRIPTION = """Predict depth for an image or a folder of images: for each NAME.npy (metres), NAME_mm.png (16-bit
millimetres) and NAME_colour.png, and predictions.json with what was written and what could not be read."""

VIDEO = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
MOST_MM = np.iinfo(np.uint16).max


@dataclass
class PredictConfig:
    """Prediction of depth for images.

    Attributes:
        model: folder of a depth model, such as OUTPUT_DIR/model of a training run.
        input: an image, a folder of images (searched recursively), or a text file with one path a line.
        output: folder that everything is written to.
        image_size: size [height, width] in pixels at which the model sees an image; null is the size it was trained
            at. Only the long side counts where an image has other proportions, which are kept.
        flip_average: average with the prediction of the mirror image.
        colour_near: depth in metres at the near end of the colours.
        colour_far: depth in metres at the far end of the colours; null is the model's max_depth.
        device: where to compute; auto takes a GPU if there is one.
        encoder_name: package.module:factory of the model's encoder where that is a convnet of your own
            (docs/options.md), for no file decides which code is run; null for timm's.
    """

    model: str
    input: str
    output: str
    image_size: tuple[int, int] | None = None
    flip_average: bool = False
    colour_near: float = 0.0
    colour_far: float | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    encoder_name: str | None = None

    def __post_init__(self) -> None:
        expand_home(self, "model", "input", "output")
        require(
            self.image_size is None or min(self.image_size) >= 1,
            "image_size",
            self.image_size,
            "two sizes of at least 1",
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 1 if no image could be read."""
    with one_line_errors():
        return predict(parse_config(PredictConfig, argv, DESCRIPTION))


def predict(config: PredictConfig) -> int:
    """Predict every image of `config.input`; returns 0, or 1 if none could be read."""
    console = Console()
    model = load_depth_model(config.model, config.encoder_name)
    far = model.depth_range.max_depth if config.colour_far is None else config.colour_far
    require(
        0 <= config.colour_near < far,
        "colour_near",
        config.colour_near,
        f"at least 0 and below colour_far, {far}",
    )
    output = Path(config.output)
    present = next(place for place in (output, *output.parents) if place.exists())
    if not present.is_dir():
        raise ValueError(f"output {output} cannot be a folder, {present} is a file: choose another --output")
    images = output_stems(config.input, output)
    model.to(chosen_device(config.device))

    written, failed = [], []
    for path, stem in track(images.items(), "depth", console=console, disable=not console.is_terminal):
        try:
            image = np.asarray(read_image(path))
        except Exception as error:  # Pillow raises a dozen kinds for a damaged file
            _, _, reason = describe_failure(path, error).rpartition(": ")
            failed.append({"image": str(path), "reason": reason})
            continue
        depth = predict_image(model, image, config.image_size, config.flip_average)
        if "depth" not in model.head.outputs:
            written.append({"image": str(path), "output": stem, **write_relative(output / stem, depth)})
            continue
        millimetres, saturated = to_millimetres(depth)
        array = io.BytesIO()
        np.save(array, depth)
        write_whole(output / f"{stem}.npy", array.getvalue())
        write_whole(output / f"{stem}_mm.png", cv2.imencode(".png", millimetres)[1].tobytes())
        save_figure(depth_map(depth, config.colour_near, far, path.name), output / f"{stem}_colour.png")
        written.append(
            {
                "image": str(path),
                "output": stem,
                "size": list(depth.shape),
                "nearest_m": float(depth.min()),
                "median_m": float(np.median(depth)),
                "farthest_m": float(depth.max()),
                "saturated_pixels": saturated,
            }
        )

    report = {
        "model": str(config.model),
        "colour_range_m": [config.colour_near, far],
        "predicted": written,
        "failed": failed,
    }
    write_whole(output / "predictions.json", (json.dumps(report, indent=1) + "\n").encode())
    for failure in failed:
        console.print(
            f"skipped {failure['image']}: {failure['reason']}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    if "depth" in model.head.outputs:
        what = f".npy in metres, _mm.png in millimetres, _colour.png from {config.colour_near:g} to {far:g} m"
    else:
        what = "_disparity.npy up to scale and shift, no metres"
    console.print(
        f"{len(written)} of {len(images)} images predicted into {output}: {what}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if saturated := sum(entry.get("saturated_pixels", 0) for entry in written):
        console.print(
            f"{saturated} pixels are at 65.535 m or beyond: in _mm.png they are 65535, .npy has their depth"
        )
    return 0 if written else 1


def write_relative(stem: Path, disparity: np.ndarray) -> dict[str, object]:
    """Write inverse depth [H, W] without scale and shift as STEM_disparity.npy and a picture; what to report of it."""
    array = io.BytesIO()
    np.save(array, disparity)
    write_whole(stem.with_name(f"{stem.name}_disparity.npy"), array.getvalue())
    low, high = float(disparity.min()), float(disparity.max())
    colours = colourise(1 + (high - disparity) / max(high - low, 1e-12), 1.0, 2.0)
    picture = cv2.imencode(".png", np.ascontiguousarray(colours[..., ::-1]))[1]
    write_whole(stem.with_name(f"{stem.name}_colour.png"), picture.tobytes())
    return {"size": list(disparity.shape), "unit": "inverse depth up to scale and shift"}


def predict_image(
    model: DepthModel,
    image: np.ndarray,
    image_size: tuple[int, int] | None = None,
    flip_average: bool = False,
) -> np.ndarray:
    """Predict depth [H, W] [m] float32 for an image, uint8 [H, W, 3], of any size; inverse depth without metres.

    The image is presented at the size the model was trained at. If it has other proportions they are kept and the
    long sides are matched, so a photo held upright is seen as large as one held across. The depth is resized back
    bilinearly.
    """
    transform = transform_of(model, image_size)
    size = fitted_size((image.shape[0], image.shape[1]), transform.image_size)
    prepared = transform_of(model, size).prepare(image)
    plain = Protocol(
        "predict", "", model.depth_range.min_depth, model.depth_range.max_depth, flip_average=flip_average
    )
    depth = torch.from_numpy(predict_depth(model, prepared[None], plain))[None]
    return (
        F.interpolate(depth, size=image.shape[:2], mode="bilinear", align_corners=False)[0, 0].float().numpy()
    )


def fitted_size(image: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """The size (H, W) to present an image of `image` (H, W) at: `wanted`, or its long side at the image's
    proportions.

    Proportions within 1 % count as equal, so that 640x480 at 192x144 is not turned into 192x143 by rounding.
    """
    stretch = (wanted[0] / image[0]) / (wanted[1] / image[1])
    if abs(stretch - 1) <= 0.01:
        return wanted
    scale = max(wanted) / max(image)
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def to_millimetres(depth: np.ndarray) -> tuple[np.ndarray, int]:
    """Depth [m] as uint16 millimetres, and how many pixels are too far for that and were set to 65535.

    Values that are not finite become 0, which readers of such files take for no reading.
    """
    millimetres = np.rint(np.nan_to_num(depth.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0) * 1000)
    return millimetres.clip(0, MOST_MM).astype(np.uint16), int((millimetres >= MOST_MM).sum())


def output_stems(source: str | Path, output: Path) -> dict[Path, str]:
    """Find the images and decide, for each, the path inside the output folder that its files are named after.

    Subfolders are kept, and the extension is dropped unless another image of the folder has the same name without it,
    so no two images share a name. Images inside `output` (of an earlier prediction) are left out.

    Raises:
        ValueError: A video, nothing there, or no image in it.
    """
    source = Path(source)
    if source.suffix.lower() in VIDEO:
        raise ValueError(
            f"{source} is a video, which this command does not read: extract its frames into a folder and give that"
        )
    if source.is_file() and source.suffix.lower() != ".txt":
        return {source: source.stem}
    inside = output.resolve()
    absolute = {os.path.abspath(path): path for path in list_images(source)}  # a list may name a file twice
    images = {name: path for name, path in absolute.items() if inside not in path.resolve().parents}
    if not images:
        raise ValueError(
            f"{source} holds no image outside the output folder {output}: choose another output folder."
        )
    folders = [os.path.dirname(name) for name in images]
    root = os.path.abspath(source) if source.is_dir() else os.path.commonpath(folders)
    names = [Path(os.path.relpath(name, root)) for name in images]
    stems = Counter(name.with_suffix("") for name in names)
    chosen = [name.with_suffix("") if stems[name.with_suffix("")] == 1 else name for name in names]
    if len(set(chosen)) < len(chosen):  # a.jpg and a.png beside a.jpg.png
        chosen = names
    return {path: name.as_posix() for path, name in zip(images.values(), chosen, strict=True)}


if __name__ == "__main__":
    raise SystemExit(main())
