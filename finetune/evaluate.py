"""Evaluate a depth model on RGB-D pairs under a named protocol.

    python finetune/evaluate.py --model RUN/model --data.root NYU --data.list nyu_val.txt --output results.json

Prints a table and writes it, with every setting and the metrics of every image, to the output file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from finetune.config import expand_home
from finetune.depth_data import Kind, open_depth_data
from finetune.figures import save_figure, triptychs
from finetune.inference import (
    check_ground_truth,
    check_protocol,
    chosen_device,
    score,
    summary,
    transform_of,
)
from finetune.metrics import write_results
from finetune.model import load_depth_model
from finetune.protocols import get_protocol
from spark.config import parse_config, require
from spark.run import one_line_errors

DESCRIPTION = """Evaluate a depth model on RGB-D pairs under a named protocol: print a table, and write it with every
setting and the metrics of every image to the output file."""

COLUMNS = {
    "delta1": ("δ1", "↑"),
    "delta2": ("δ2", "↑"),
    "delta3": ("δ3", "↑"),
    "abs_rel": ("AbsRel", "↓"),
    "sq_rel": ("SqRel m", "↓"),
    "rmse": ("RMSE m", "↓"),
    "rmse_log": ("RMSElog", "↓"),
    "log10": ("log10", "↓"),
    "silog": ("SILog", "↓"),
}
ORDINAL_COLUMNS = {
    "whdr": ("WHDR", "↓"),
    "accuracy": ("accuracy", "↑"),
    "wkdr": ("WKDR", "↓"),
    "wkdr_unequal": ("WKDR unequal", "↓"),
    "wkdr_equal": ("WKDR equal", "↓"),
}


@dataclass
class EvaluationDataConfig:
    """Data: the pairs to score on.

    Attributes:
        root: folder that the list's entries are relative to, or the file or folder that a layout without lists has.
        kind: layout (docs/depth_data.md shows each); null recognises it, and the log says which it was.
        list: list of the pairs, a name inside root or a path; null scores on a split of the layout.
        split: official split, of a layout that has some.
        depth: depth of the labelled file to score against; null is what the protocol stands on.
        white_border: of the labelled NYU images, which training crops leave out: fill continues the pixels next to it,
            black paints it black as in the published test images, keep leaves it.
        polarity: what the relation > of DIW says of its point A, farther (as its authors' code) or closer.
        depth_scale: metres of one unit of the depth files of a plain folder; null is 0.001 for PNG, 1 for NPY and PFM.
        bad_depth: NaN, infinite and negative depths are refused, or taken for holes.
        workers: processes that read pairs.
    """

    root: str
    kind: Kind | None = None
    list: str | None = None
    split: Literal["train", "test"] = "test"
    depth: Literal["raw", "filled"] | None = None
    white_border: Literal["keep", "black", "fill"] = "keep"
    polarity: Literal["farther", "closer"] = "farther"
    depth_scale: float | None = None
    bad_depth: Literal["refuse", "hole"] = "refuse"
    workers: int = 0

    def __post_init__(self) -> None:
        expand_home(self, "root", "list")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass
class EvaluationConfig:
    """Evaluation: model, protocol and outputs.

    Attributes:
        model: folder of a depth model, such as OUTPUT_DIR/model of a training run, or hf-hub:OWNER/NAME.
        data: the pairs to score on.
        output: JSON file for the results.
        protocol: name of the evaluation protocol.
        flip_average: average predictions with those of the mirror image; null is the protocol's own choice.
        threshold: of protocol diw, largest difference between the predictions at two points that counts as equally far
            (metres, or the unit of inverse depth of head fusion); it bears on WKDR only; null is the protocol's own.
        image_size: size [height, width] in pixels at which the model sees an image; null is the size it was trained
            at.
        batch_size: images of one forward.
        figures: folder for triptychs of input, ground truth and prediction; null draws none.
        triptychs: how many images are drawn, spread evenly over the data.
        device: where to compute; auto takes a GPU if there is one.
        encoder_name: package.module:factory of the model's encoder where that is a convnet of your own
            (docs/options.md), for no file decides which code is run; null for timm's.
    """

    model: str
    data: EvaluationDataConfig
    output: str
    protocol: str = "nyu-bts"
    flip_average: bool | None = None
    threshold: float | None = None
    image_size: tuple[int, int] | None = None
    batch_size: int = 8
    figures: str | None = None
    triptychs: int = 8
    device: Literal["auto", "cpu", "cuda"] = "auto"
    encoder_name: str | None = None

    def __post_init__(self) -> None:
        expand_home(self, "model", "output", "figures")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.triptychs >= 1, "triptychs", self.triptychs, "at least 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        evaluate(parse_config(EvaluationConfig, argv, DESCRIPTION))


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Score the model, print the table, write results and figures; returns the results."""
    console = Console()
    protocol = get_protocol(config.protocol, flip_average=config.flip_average, threshold=config.threshold)
    if config.figures and protocol.supervision == "ordinal":
        raise ValueError(f"protocol {protocol.name} has no maps to draw: leave figures out")
    model = load_depth_model(config.model, config.encoder_name).to(chosen_device(config.device))
    check_protocol(model, protocol)
    data = open_depth_data(
        config.data.root,
        config.data.list,
        config.data.split,
        kind=config.data.kind,
        depth=config.data.depth or protocol.depth,
        white_border=config.data.white_border,
        polarity=config.data.polarity,
        depth_scale=config.data.depth_scale,
        bad_depth=config.data.bad_depth,
    )
    check_ground_truth(data, protocol)
    console.print(f"{data}", highlight=False, markup=False, soft_wrap=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scored", total=len(data))
        results, rows = score(
            model,
            data,
            protocol,
            transform_of(model, config.image_size),
            batch_size=config.batch_size,
            workers=config.data.workers,
            draw=config.triptychs if config.figures else 0,
            progress=lambda images: bar.advance(task, images),
        )
    print_results(console, results, protocol.expected_images)  # first: a full disk must not lose the scores
    write_results(config.output, {**results, "model": str(config.model), "data": repr(data)})
    console.print(f"written to {config.output}", highlight=False, markup=False, soft_wrap=True)
    if config.figures:
        figure = triptychs(
            rows, f"{protocol.name}   {results['images']} images   {summary(results['metrics'])}"
        )
        path = save_figure(figure, Path(config.figures) / "triptychs.png")
        console.print(f"drawn in {path}", highlight=False, markup=False, soft_wrap=True)
    return results


def print_results(console: Console, results: dict[str, Any], expected_images: int | None) -> None:
    """Print the metrics as a table, and below it whatever makes them less than the protocol's full measurement."""
    settings = results["settings"]
    title = f"{results['protocol']}{', flip average' if settings['flip_average'] else ''}: {results['images']} images"
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, collapse_padding=True
    )  # fits 80 columns
    columns = ORDINAL_COLUMNS if "pairs" in results else COLUMNS
    columns = {name: heading for name, heading in columns.items() if name in results["metrics"]}
    for heading, better in columns.values():
        table.add_column(f"{heading}{better}", justify="right", no_wrap=True)
    table.add_row(*(f"{results['metrics'][name]:.3f}" for name in columns))
    console.print(table)
    if expected_images is not None and results["images"] != expected_images:
        console.print(
            f"the official list of this protocol has {expected_images} images: published numbers stand on those"
        )
    if results["skipped"]:
        console.print(f"{len(results['skipped'])} images without a pixel that counts were left out")
    if results["nonfinite_pixels"]:
        console.print(
            f"{results['nonfinite_pixels']} predicted pixels, in {results['nonfinite_images']} images, were not finite"
            " and scored as the nearest or farthest depth"
        )


if __name__ == "__main__":
    main()
