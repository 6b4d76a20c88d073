"""A small figure about runs, for a README: what a pretrained model paints, and the depth of several models.

    python -m tools.demo.figure --pretrain RUN --depth scratch=RUN1 --depth SparK=RUN2 --output figure.png

On top images, masked images and reconstructions; below images, true depth and the depth of every run, on one scale in
metres. The images are spread evenly over the validation list of the first depth run.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from finetune.depth_data import DepthSample, open_depth_data
from finetune.model.depth_model import load_depth_model
from finetune.model.prediction import predict_image
from finetune.protocols import get_protocol
from finetune.report.figures import colourise, depth_colours, save_figure, shared_range
from spark.config import ModelConfig
from spark.errors import UserError
from spark.model.masking import mean_ratio, visible_at
from spark.model.names import is_own
from spark.report import Run, read_run
from spark.task import build_model
from spark.training.checkpoint import find_run

Pictures = list[np.ndarray]


def draw(pretrain: Run | None, runs: dict[str, Run], count: int) -> Figure:
    """Reconstructions, then depth of each run, for images spread evenly over the validation list of the first one.

    Args:
        pretrain: a pretraining run, if any.
        runs: depth runs by label, at least one.
        count: of images.
    """
    samples = validation_samples(next(iter(runs.values())), count)
    near, far = shared_range([sample.metres for sample in samples], floor=0.5)
    rows: list[Pictures] = [[sample.image, colourise(sample.metres, near, far)] for sample in samples]
    for run in runs.values():
        model = load_depth_model(run.folder / "model")
        flips = get_protocol(run.option("protocol", "nyu-bts")).flip_average
        for row, sample in zip(rows, samples, strict=True):
            depth = predict_image(model, sample.image, flip_average=flips)
            row.append(colourise(np.clip(depth, 1e-3, None), near, far))
    headings = ["image", "true depth", *runs]
    height, width = samples[0].image.shape[:2]
    figure = Figure(
        figsize=(9, 2.3 * len(rows) * (2 if pretrain else 1) * height / width), layout="constrained"
    )
    below: Any = figure
    if pretrain:
        above, below = np.asarray(figure.subfigures(2, 1))
        restored = masked_and_reconstructed(pretrain, [sample.image for sample in samples])
        grid(above, ["image", "masked", "reconstruction"], restored)
    axes = grid(below, headings, rows)
    bar = below.colorbar(ScalarMappable(Normalize(near, far), depth_colours()), ax=axes, aspect=30)
    bar.set_label("depth [m]")
    bar.ax.invert_yaxis()  # near on top
    return figure


def grid(figure: Any, headings: list[str], rows: list[Pictures]) -> np.ndarray:
    """Draw rows of pictures under headings into a (sub)figure; returns the axes."""
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    for axis, picture in zip(axes.flat, (one for row in rows for one in row), strict=True):
        axis.imshow(picture)
        axis.set_axis_off()
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=9, loc="left")
    return axes


def validation_samples(run: Run, count: int) -> list[DepthSample]:
    """Pairs spread evenly over the validation data of a depth run."""
    if not run.option("data.root"):
        raise UserError(f"config.yaml of {run.folder} does not say where its data is (data.root)")
    data = open_depth_data(run.option("data.root"), run.option("data.val_list"), "test")
    count = min(count, len(data))
    return [data[(2 * i + 1) * len(data) // (2 * count)] for i in range(count)]


def masked_and_reconstructed(run: Run, images: Pictures) -> list[Pictures]:
    """Image, masked image and reconstruction, uint8 each, of the newest checkpoint of a pretraining run.

    Whole frames are resized to the size that the run was trained at.

    Raises:
        UserError: the run has no whole checkpoint, or is of a convnet of one's own.
    """
    checkpoint = find_run(run.folder, True)
    if checkpoint is None:
        raise UserError(f"{run.folder} has no checkpoint to reconstruct with")
    known = {item.name for item in fields(ModelConfig)}
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in run.option("model", {}).items()
        if name in known
    }
    if is_own(options["name"]):
        raise UserError(
            f"{run.folder} is of {options['name']}, and no file decides which code is run: leave it out"
        )
    model = build_model(ModelConfig(**options))
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    model.eval()
    height, width = model.input_size
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    resized = [
        np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)) for image in images
    ]
    batch = (torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255 - mean) / std
    visible = visible_at(range(len(batch)), model.grid, mean_ratio(model.mask_ratio), seed=0)
    with torch.inference_mode():
        restored = model.reconstruct(batch, model(batch, visible))
    made = (restored * std + mean).clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = visible.repeat_interleave(model.patch_size, 2).repeat_interleave(model.patch_size, 3)
    shown = seen.permute(0, 2, 3, 1).numpy()
    return [
        [image, np.where(mask, image, np.uint8(128)), picture]
        for image, mask, picture in zip(resized, shown, made, strict=True)
    ]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--pretrain", metavar="RUN", help="output_dir of a pretraining run")
    parser.add_argument(
        "--depth",
        metavar="LABEL=RUN",
        action="append",
        required=True,
        help="output_dir of a depth run and what to call it; may be given several times",
    )
    parser.add_argument("--output", required=True, metavar="FILE.png", help="the figure to write")
    parser.add_argument("--images", type=int, default=2, help="how many images it shows (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for a user error."""
    args = parse_arguments(argv)
    try:
        runs = {}
        for entry in args.depth:
            label, _, folder = entry.partition("=")
            if not folder or label in runs:
                raise UserError(f"--depth takes LABEL=RUN, each label once, not {entry!r}")
            runs[label] = read_run(folder, label)
        figure = draw(read_run(args.pretrain) if args.pretrain else None, runs, args.images)
        save_figure(figure, args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"drawn in {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
