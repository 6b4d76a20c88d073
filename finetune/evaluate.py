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

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from finetune.config import expand_home
from finetune.depth_data import DepthFileError, DepthSet, Kind, open_depth_data
from finetune.model.depth_model import load_depth_model
from finetune.protocols import PROTOCOLS, Protocol, get_protocol
from finetune.report import depth_page
from finetune.report.figures import WorstRows, save_figure, triptychs
from finetune.scoring.caveats import reservations
from finetune.scoring.intervals import LEVEL, with_intervals
from finetune.scoring.metrics import METRIC, ORDINAL_METRICS, WKDR_METRICS, count, own_metrics, write_results
from finetune.scoring.score import check_ground_truth, chosen_device, score_all, summary, transform_of
from finetune.scoring.sources import BaselineSource, FolderSource, ModelSource, Source, mean_depth
from spark.errors import UserError, one_line_errors
from spark.training.cli import parse_config, require

DESCRIPTION = """Evaluate depth predictions (of a model, a folder or a baseline) on RGB-D pairs under named protocols:
print a table, and write it with every setting and the metrics of every image to the output file."""

SIDE_BY_SIDE = ("delta1", "delta2", "delta3", "abs_rel", "rmse", "log10", "silog")
"""Columns of several protocols, as many as fit beside their names."""


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
    """Score the predictions, print the table, write results and figures; returns what is written."""
    console = Console()
    protocols = asked_protocols(config)
    if config.figures and len(protocols) == 1 and protocols[0].family == "relations":
        raise UserError(f"protocol {protocols[0].name} has no maps to draw: leave figures out")
    opened: dict[str, DepthSet] = {}
    for kind in map(kind_to_open, protocols):
        if kind not in opened:
            opened[kind] = open_data(config, kind)
    sets = {protocol.depth: opened[kind_to_open(protocol)] for protocol in protocols}
    if len(set(map(repr, sets.values()))) == 1:  # layouts that have one kind of depth alone
        sets = dict.fromkeys(sets, next(iter(sets.values())))
    data = next(iter(sets.values()))
    source = open_source(config, data, protocols)
    protocols, left_out = fitting(config, protocols, source, sets)
    worst = [WorstRows(config.triptychs if config.figures else 0) for _ in protocols]
    console.print(f"{data}", highlight=False, markup=False, soft_wrap=True)
    present = source.paths if isinstance(source, FolderSource) else None
    indices = [index for index, name in enumerate(data.names()) if present is None or name in present]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scored", total=len(indices))
        scored = score_all(
            source,
            [sets[protocol.depth] for protocol in protocols],
            protocols,
            indices=indices,
            batch_size=config.batch_size,
            workers=config.data.workers,
            draw=config.triptychs if config.figures else 0,
            worst=worst,
            progress=lambda images: bar.advance(task, images),
        )
    every = [
        {
            **with_intervals(results),
            "data": repr(sets[protocol.depth]),
            **sets[protocol.depth].reading(),
        }
        for protocol, (results, _) in zip(protocols, scored, strict=True)
    ]
    print_results(console, every, left_out)  # first: a full disk must not lose the scores
    several = config.protocol == "all" or len(every) > 1
    written = {"protocols": every, "left_out": left_out} if several else every[0]
    write_results(config.output, written)
    console.print(f"written to {config.output}", highlight=False, markup=False, soft_wrap=True)
    for results, (_, rows), bad in zip(every, scored, worst, strict=True):
        for name, drawn in (("triptychs", rows), ("worst", bad.rows)):
            if drawn:
                title = f"{results['protocol']}   {count(results['images'], 'image')}   {summary(results['metrics'])}"
                heading = f"worst AbsRel   {title}" if name == "worst" else title
                file = f"{name}_{results['protocol']}.png" if several else f"{name}.png"
                path = save_figure(triptychs(drawn, heading), Path(config.figures or "") / file)
                console.print(f"drawn in {path}", highlight=False, markup=False, soft_wrap=True)
    refresh_page(console, Path(config.output))
    return written


def refresh_page(console: Console, results: Path) -> None:
    """Write report.html of the run anew whose results.json was written; a failure is told, for the scores are there."""
    folder = results.parent
    if results.name != "results.json" or not (folder / "config.yaml").is_file():
        return
    try:
        console.print(f"report in {depth_page(folder)}", highlight=False, markup=False, soft_wrap=True)
    except (ValueError, OSError) as error:
        console.print(f"no report: {error}", highlight=False, markup=False, soft_wrap=True)


def asked_protocols(config: EvaluationConfig) -> list[Protocol]:
    """The protocols that `--protocol` names, with the settings that the options change.

    Raises:
        ValueError: No such protocol, one named twice, or a threshold of none that has one.
    """
    names = [name.strip() for name in config.protocol.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(
            f"protocol {config.protocol!r} must name protocols, each once: {', '.join(PROTOCOLS)}, or all"
        )
    every = list(PROTOCOLS) if names == ["all"] else names
    relations = [name for name in every if name in PROTOCOLS and PROTOCOLS[name].family == "relations"]
    return [
        get_protocol(
            name,
            flip_average=config.flip_average,
            threshold=config.threshold if name in relations or not relations else None,
        )
        for name in every
    ]


def kind_to_open(protocol: Protocol) -> Literal["raw", "filled"]:
    """Which depth a layout that has both is opened with for a protocol."""
    return "filled" if protocol.depth == "filled" else "raw"


def open_data(config: EvaluationConfig, depth: Literal["raw", "filled"]) -> DepthSet:
    """The pairs to score on, with ground truth of this kind unless the options say which."""
    return open_depth_data(
        config.data.root,
        config.data.list,
        config.data.split,
        kind=config.data.kind,
        depth=config.data.depth or depth,
        white_border=config.data.white_border,
        polarity=config.data.polarity,
        depth_scale=config.data.depth_scale,
        bad_depth=config.data.bad_depth,
    )


def open_source(config: EvaluationConfig, data: DepthSet, protocols: Sequence[Protocol]) -> Source:
    """Where the predictions come from.

    Raises:
        ValueError: It is not there, or not what it should be.
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
    kind, _, value = str(config.baseline).partition(":")
    about = {"baseline": config.baseline}
    if kind == "constant":
        try:
            metres = float(value)
        except ValueError:
            metres = 0.0
        if 0 < metres < float("inf"):
            return BaselineSource(np.full((2, 2), metres), about)
    elif config.baseline == "mean":
        training = open_depth_data(
            config.data.root,
            config.baseline_list,
            "train",
            kind=config.data.kind,
            depth=config.data.depth or kind_to_open(protocols[0]),
            depth_scale=config.data.depth_scale,
            bad_depth=config.data.bad_depth,
        )
        return BaselineSource(mean_depth(training), {**about, "baseline_data": repr(training)})
    raise UserError(
        f"baseline must be constant:METRES with a depth above 0, or mean, not {config.baseline!r}"
    )


def fitting(
    config: EvaluationConfig,
    protocols: Sequence[Protocol],
    source: Source,
    sets: dict[str, DepthSet],
) -> tuple[list[Protocol], dict[str, str]]:
    """The protocols that fit the data and the predictions, and of the others why not; asked by name, they must fit.

    Raises:
        ValueError: One that was asked for by name does not fit, or none does.
    """
    fit, left_out = [], {}
    for protocol in protocols:
        data = sets[protocol.depth]
        try:
            check_benchmark(data, protocol)
            source.check(protocol)
            check_ground_truth(data, protocol)
            fit.append(protocol)
        except DepthFileError:
            raise
        except OtherBenchmark:
            if config.protocol != "all":
                raise
            left_out[protocol.name] = f"not of {data.benchmark}, which this data set is"
        except ValueError as error:
            if config.protocol != "all":
                raise
            left_out[protocol.name] = str(error)
    if not fit:
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        raise UserError(f"no protocol fits {next(iter(sets.values()))}: {reasons}")
    return fit, left_out


class OtherBenchmark(UserError):
    """A protocol is of another data set than this."""


def check_benchmark(data: DepthSet, protocol: Protocol) -> None:
    """Refuse a protocol of another benchmark: OtherBenchmark."""
    if "any" not in (data.benchmark, protocol.data) and data.benchmark != protocol.data:
        raise OtherBenchmark(
            f"protocol {protocol.name} is of {protocol.data}, and this is {data.benchmark}: name one of"
            f" {data.benchmark}, or all"
        )


def print_results(console: Console, every: Sequence[dict[str, Any]], left_out: dict[str, str]) -> None:
    """Print the metrics as tables, and below them whatever makes them less than the protocols' full measurements."""
    if len(every) == 1:
        print_one(console, every[0])
    else:
        print_side_by_side(console, every)
    said: dict[str, list[str]] = {}
    for results in every:
        for sentence in reservations(results):
            said.setdefault(sentence, []).append(results["protocol"])
    for sentence, names in said.items():
        of = f"{', '.join(names)}: " if len(names) < len(every) else ""
        console.print(f"{of}{sentence}", highlight=False, markup=False, soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        line = f"left out, {reason}: {', '.join(names)}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def print_one(console: Console, results: dict[str, Any]) -> None:
    """A table of one protocol, with the ends of the intervals below the metrics; it fits 80 columns."""
    flips = ", flip average" if results["settings"]["flip_average"] else ""
    below = f"; below: {LEVEL:.0%} bootstrap interval" if results["images"] > 1 else ""
    names = list(own_metrics(results))
    title = f"{results['protocol']}{flips}: {count(results['images'], 'image')}{below}"
    console.print(title, style="italic", highlight=False, markup=False, soft_wrap=True)
    for some in (names[:9], names[9:]):
        if not some:
            continue
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
        for name in some:
            table.add_column(METRIC[name].column, justify="right", no_wrap=True)
        table.add_row(*(f"{results['metrics'][name]:.3f}" for name in some))
        for end in (0, 1):
            ends = [results["intervals"][name] for name in some]
            if any(ends):
                table.add_row(*(f"{one[end]:.3f}" if one else "" for one in ends), style="dim")
        console.print(table)


def print_side_by_side(console: Console, every: Sequence[dict[str, Any]]) -> None:
    """A table of the protocols of depth, one row each, and one of those of relations."""
    depth = [results for results in every if "delta1" in results["metrics"]]
    relations = [results for results in every if results not in depth]
    for group, columns in ((depth, SIDE_BY_SIDE), (relations, (*ORDINAL_METRICS, *WKDR_METRICS[1:]))):
        names = [name for name in columns if any(name in own_metrics(results) for results in group)]
        if not group:
            continue
        table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
        table.add_column("protocol", no_wrap=True)
        for name in names:
            table.add_column(METRIC[name].column, justify="right", no_wrap=True)
        for results in group:
            values = [own_metrics(results).get(name) for name in names]
            table.add_row(results["protocol"], *("" if value is None else f"{value:.3f}" for value in values))
        console.print(table)


if __name__ == "__main__":
    main()
