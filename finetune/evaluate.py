"""Evaluate depth predictions under named protocols: of a model, of a folder of files, or of a baseline.

    python finetune/evaluate.py --model RUN/model --data.root NYU --data.list nyu_val.txt --output results.json
    python finetune/evaluate.py --predictions DEPTH --protocol all ...
    python finetune/evaluate.py --baseline mean --baseline_list nyu_train.txt --protocol nyu-bts,nyu-laina ...

Predictions are made once, whatever the number of protocols. Prints a table and writes it, with every setting, the
metrics of every image and bootstrap intervals, to the output file: of one protocol its results, of several
{"protocols": [results, ...]}.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from finetune.config import expand_home
from finetune.depth_data import DepthSet, Kind, open_depth_data
from finetune.model.depth_model import load_depth_model
from finetune.model.prediction import chosen_device, transform_of
from finetune.protocols import PROTOCOLS, Protocol, get_protocol
from finetune.report import depth_page
from finetune.report.figures import save_figure, triptychs
from finetune.report.terminal import print_results, say
from finetune.scoring.checks import fitting_protocols
from finetune.scoring.evaluators import evaluator_class
from finetune.scoring.intervals import with_intervals
from finetune.scoring.metrics import count, summary, write_results
from finetune.scoring.pictures import WorstRows
from finetune.scoring.score import score_all
from finetune.scoring.sources import FolderSource, ModelSource, Source, baseline_source
from spark.errors import UserError, one_line_errors
from spark.training.cli import parse_config, require

DESCRIPTION = """Evaluate depth predictions (of a model, a folder or a baseline) on RGB-D pairs under named protocols:
print a table, and write it with every setting and the metrics of every image to the output file."""


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
        depth_scale: metres of one unit of the depth files of a plain folder; null is what a PNG says itself, else
            0.001, and 1 for NPY and PFM.
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
    """Evaluation: predictions, protocols and outputs. Give one of model, predictions and baseline.

    Attributes:
        data: the pairs to score on.
        output: JSON file for the results.
        model: folder of a depth model, such as OUTPUT_DIR/model of a training run, or hf-hub:OWNER/NAME.
        predictions: folder of predictions instead, of the whole frames, named after the images as predict.py does
            (SCENE/rgb_1.npy, .pfm, .png or _mm.png for SCENE/rgb_1.jpg).
        scale: metres of one unit of the files in predictions; null is what a PNG says itself, 0.001 for _mm.png, and 1
            for NPY and PFM.
        holds: what the files in predictions hold, depth or disparity (inverse depth); files named _disparity always
            hold that.
        missing: what to do about images without a prediction, refuse or skip; skipped ones are listed in the results.
        baseline: constant:METRES, or mean, which is the mean of each pixel over training depths.
        baseline_list: list of the training pairs of baseline mean, a name inside data.root or a path; null is the
            training split of the layout.
        protocol: name of the evaluation protocol, several separated by commas, or all, which is all that fit
            (docs/protocols.md).
        flip_average: average predictions with those of the mirror image; null is the protocol's own choice.
        threshold: largest difference between the predictions at two points that counts as equally far (metres, or the
            unit of inverse depth of head fusion); it bears on WKDR of the protocols of pairs of points only; null is
            0 for diw and redweb, and chosen on the scored images for nyu-wkdr and nyu-wkdr-sampled.
        image_size: size [height, width] in pixels at which the model sees an image; null is the size it was trained
            at.
        batch_size: images of one forward.
        figures: folder for triptychs of input, ground truth and prediction; null draws none.
        triptychs: how many images are drawn, spread evenly over the data; and as many of the worst.
        device: where to compute; auto takes a GPU if there is one.
        encoder_name: package.module:factory of the model's encoder where that is a convnet of your own
            (docs/options.md), for no file decides which code is run; null for timm's.
    """

    data: EvaluationDataConfig
    output: str
    model: str | None = None
    predictions: str | None = None
    scale: float | None = None
    holds: Literal["depth", "disparity"] = "depth"
    missing: Literal["refuse", "skip"] = "refuse"
    baseline: str | None = None
    baseline_list: str | None = None
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
        expand_home(self, "model", "predictions", "baseline_list", "output", "figures")
        given = [name for name in ("model", "predictions", "baseline") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"give one of --model, --predictions and --baseline, not {' and '.join(given) or 'none of them'}"
            )
        require(self.scale is None or self.scale > 0, "scale", self.scale, "above 0")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.triptychs >= 1, "triptychs", self.triptychs, "at least 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with one_line_errors():
        evaluate(parse_config(EvaluationConfig, argv, DESCRIPTION))


def evaluate(config: EvaluationConfig) -> dict[str, Any]:
    """Score the predictions, print the table, write results and figures; returns the results."""
    console = Console()
    protocols = asked_protocols(config)
    if config.figures and len(protocols) == 1 and not evaluator_class(protocols[0]).draws:
        raise UserError(f"protocol {protocols[0].name} has no maps to draw: leave figures out")
    sets = open_sets(config, protocols)
    data = next(iter(sets.values()))
    source = open_source(config, data, protocols)
    by_name = config.protocol != "all"
    protocols, left_out = fitting_protocols(protocols, source, sets, by_name=by_name)
    say(console, f"{data}")

    drawn = config.triptychs if config.figures else 0
    worst = [WorstRows(drawn) for _ in protocols]
    indices = [index for index, name in enumerate(data.names()) if name not in source.missing]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scored", total=len(indices))
        scored = score_all(
            source,
            [sets[protocol.depth] for protocol in protocols],
            protocols,
            indices=indices,
            batch_size=config.batch_size,
            workers=config.data.workers,
            draw=drawn,
            worst=worst,
            progress=lambda images: bar.advance(task, images),
        )
    every = [
        {**with_intervals(results), "data": repr(sets[protocol.depth]), **sets[protocol.depth].reading()}
        for protocol, (results, _) in zip(protocols, scored, strict=True)
    ]

    print_results(console, every, left_out)  # first: a full disk must not lose the scores
    several = len(every) > 1 or not by_name
    written = {"protocols": every, "left_out": left_out} if several else every[0]
    write_results(config.output, written)
    say(console, f"written to {config.output}")
    for results, (_, rows), bad in zip(every, scored, worst, strict=True):
        title = f"{results['protocol']}   {count(results['images'], 'image')}   {summary(results['metrics'])}"
        suffix = f"_{results['protocol']}" if several else ""
        for name, pictures, heading in (
            ("triptychs", rows, title),
            ("worst", bad.rows, f"worst AbsRel   {title}"),
        ):
            if pictures:
                path = Path(config.figures or "") / f"{name}{suffix}.png"
                say(console, f"drawn in {save_figure(triptychs(pictures, heading), path)}")
    refresh_page(console, Path(config.output))
    return written


def refresh_page(console: Console, results: Path) -> None:
    """Rewrite report.html of the run that the results lie in; a failure is only printed, for the scores are there."""
    folder = results.parent
    if results.name != "results.json" or not (folder / "config.yaml").is_file():
        return
    try:
        say(console, f"report in {depth_page(folder)}")
    except (ValueError, OSError) as error:
        say(console, f"no report: {error}")


def asked_protocols(config: EvaluationConfig) -> list[Protocol]:
    """The protocols that `--protocol` names, with the settings that the options change.

    Raises:
        UserError: No such protocol, one named twice, or a threshold of none that has one.
    """
    names = [name.strip() for name in config.protocol.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"protocol {config.protocol!r} must name protocols, each once: {', '.join(PROTOCOLS)}, or all"
        )
    every = list(PROTOCOLS) if names == ["all"] else names
    of_pairs = [name for name in every if name in PROTOCOLS and PROTOCOLS[name].scores_pairs]
    return [
        get_protocol(
            name,
            flip_average=config.flip_average,
            threshold=config.threshold if name in of_pairs or not of_pairs else None,
        )
        for name in every
    ]


def open_sets(config: EvaluationConfig, protocols: Sequence[Protocol]) -> dict[str, DepthSet]:
    """The pairs to score on by `Protocol.depth`; one set for all where the layout has one kind of depth alone."""
    opened = {
        depth: open_depth_data(
            config.data.root, config.data.list, config.data.split, **reading(config), depth=depth
        )
        for depth in dict.fromkeys(depth_to_open(config, protocol) for protocol in protocols)
    }
    sets = {protocol.depth: opened[depth_to_open(config, protocol)] for protocol in protocols}
    if len(set(map(repr, sets.values()))) == 1:
        sets = dict.fromkeys(sets, next(iter(sets.values())))
    return sets


def depth_to_open(config: EvaluationConfig, protocol: Protocol) -> Literal["raw", "filled"]:
    """Which depth of the labelled file a protocol is scored against."""
    return config.data.depth or ("filled" if protocol.depth == "filled" else "raw")


def reading(config: EvaluationConfig) -> dict[str, Any]:
    """How files are read, as options of `open_depth_data`."""
    names = ("kind", "white_border", "polarity", "depth_scale", "bad_depth")
    return {name: getattr(config.data, name) for name in names}


def open_source(config: EvaluationConfig, data: DepthSet, protocols: Sequence[Protocol]) -> Source:
    """Where the predictions come from.

    Raises:
        UserError: It is not there, or not what it should be.
    """
    if config.model is not None:
        model = load_depth_model(config.model, config.encoder_name).to(chosen_device(config.device))
        about: dict[str, Any] = {"model": str(config.model), "model_sha256": model.sha256}
        if model.calibration is not None:
            about["calibration"] = model.calibration.as_config()
        return ModelSource(model, transform_of(model, config.image_size), about)
    if config.predictions is not None:
        return FolderSource(
            config.predictions, data, scale=config.scale, holds=config.holds, missing=config.missing
        )

    def training() -> DepthSet:
        depth = depth_to_open(config, protocols[0])
        return open_depth_data(
            config.data.root, config.baseline_list, "train", **reading(config), depth=depth
        )

    return baseline_source(str(config.baseline), training)


if __name__ == "__main__":
    main()
