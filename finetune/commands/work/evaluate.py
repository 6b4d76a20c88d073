"""What spark-evaluate does, once its options are read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.progress import Progress

from finetune.depth_data import DepthSet, open_depth_data
from finetune.model.depth_model import load_depth_model
from finetune.model.prediction import transform_of
from finetune.options import EvaluationConfig, ReadingConfig
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
from spark.errors import UserError
from spark.training.accelerator import chosen_device


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


def run_white_border(model: Path) -> str | None:
    """How the run that left a model read the white border, by the config.yaml beside its folder; None: not known."""
    try:
        config = yaml.safe_load((model.parent / "config.yaml").read_text(encoding="utf-8"))
        return config["data"].get("white_border", ReadingConfig.white_border) if "encoder" in config else None
    except (
        OSError,
        ValueError,
        yaml.YAMLError,
        LookupError,
        TypeError,
        AttributeError,
    ):  # not of a depth run
        return None


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
    """The protocols that `--protocol` names, with the settings that the options change."""
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
            config.data.root, config.data.list, config.data.split, **config.data.reading(), depth=depth
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


def open_source(config: EvaluationConfig, data: DepthSet, protocols: Sequence[Protocol]) -> Source:
    """Where the predictions come from."""
    if config.model is not None:
        model = load_depth_model(config.model, config.encoder_name).to(chosen_device(config.device))
        about: dict[str, Any] = {"model": str(config.model), "model_sha256": model.sha256}
        if model.calibration is not None:
            about["calibration"] = model.calibration.as_config()
        border = run_white_border(Path(config.model))
        if hasattr(data, "white_border") and border not in (None, config.data.white_border):
            about["run_white_border"] = border
        return ModelSource(model, transform_of(model, config.image_size), about)
    if config.predictions is not None:
        return FolderSource(
            config.predictions, data, scale=config.scale, holds=config.holds, missing=config.missing
        )

    def training() -> DepthSet:
        depth = depth_to_open(config, protocols[0])
        return open_depth_data(
            config.data.root, config.baseline_list, "train", **config.data.reading(), depth=depth
        )

    return baseline_source(str(config.baseline), training)
