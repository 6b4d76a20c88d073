"""A small figure about runs, for a README: what a pretrained model paints, and the depth of several models.

    python tools/demo_figure.py --pretrain RUN --depth scratch=RUN1 --depth SparK=RUN2 --output figure.png

On top images, masked images and reconstructions, where a pretraining run is given; below images, true depth and the
depth of every run, on one scale in metres. The images are spread evenly over the validation list of the first depth
run.
"""

import argparse
import math
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
from finetune.model.depth_model import ENCODER_NAME, load_depth_model
from finetune.model.prediction import transform_of
from finetune.protocols import get_protocol
from finetune.report.figures import Page, colourise, depth_colours, save_figure, shared_range
from finetune.scoring.score import predict_depth
from spark.config import ModelConfig
from spark.errors import UserError
from spark.model.masking import mean_ratio, visible_at
from spark.model.names import is_own
from spark.report import Run, read_run
from spark.task import build_model
from spark.training.checkpoint import find_run
from spark.weights.encoder import name_of


def draw(pretrain: Run | None, runs: dict[str, Run], count: int, encoder_name: str | None = None) -> Figure:
    """Reconstructions, then depth of each run, for images spread evenly over the validation list of the first one.

    Args:
        pretrain: a pretraining run, if any.
        runs: depth runs by label, at least one.
        count: of images.
        encoder_name: "package.module:factory" of the runs over a convnet of one's own.

    Raises:
        ValueError: data or a model is missing, or an own convnet was not named.
    """
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
        raise UserError(f"config.yaml of {run.folder} does not say where its data is (data.root)")
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
        raise UserError(
            f"{run.folder} was trained on images of {channels} channels, and those of the depth runs have 3: leave "
            "--pretrain out"
        )
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


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    parser.add_argument(
        "--encoder_name",
        metavar="MODULE:FACTORY",
        help="the encoder of runs over a convnet of your own: no file decides which code is run",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0, or 2 for a user error."""
    args = parse_arguments(argv)
    try:
        if args.images < 1:
            raise UserError(f"--images must be at least 1, not {args.images}")
        runs = {}
        for entry in args.depth:
            label, equals, folder = entry.partition("=")
            if not equals or not label or not folder or label in runs:
                raise UserError(
                    f"--depth takes LABEL=RUN, each label once, such as scratch=runs/scratch, not {entry!r}"
                )
            runs[label] = read_run(folder, label)
        pretrain = read_run(args.pretrain) if args.pretrain else None
        save_figure(draw(pretrain, runs, args.images, args.encoder_name), args.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"drawn in {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
