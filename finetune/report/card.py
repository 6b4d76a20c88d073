"""The model card of a depth model, from what its run, the run of its encoder, and evaluations wrote."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData

from finetune.model.depth_model import DepthModel
from finetune.protocols.metrics import METRIC
from finetune.scoring.best import Selection
from finetune.scoring.caveats import caveats
from finetune.scoring.metrics import own_metrics, read_results
from spark.errors import UserError
from spark.report.card import (
    NOT_MEASURED,
    NOT_RECORDED,
    PRETRAINING_MARK,
    Publication,
    RunRecord,
    compose,
    pretraining,
    public_name,
    read_record,
    table,
)
from spark.weights.hub import PREFIX

DEPTH_MARK = "model.head"
"""An option that only depth runs have."""

EVALUATION = "evaluation.json"
RELATIVE = "inverse depth up to scale and shift, larger is nearer; no metres"
WHITE_BORDER = {
    "fill": "The white border of the images was filled from the pixels beside it.",
    "black": "The white border of the images was painted black.",
}
AUGMENTATION = (
    *("zoom", "flip", "rotation", "colour", "gamma", "brightness", "channel", "contrast", "cut_depth"),
)
"""Options of `data` that change training images."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of this model.

    Args:
        data: What they were taken on, by name.
        results: What `results.json` holds.
        before_calibration: The model was calibrated after them.
        chosen_by: The metric of these scores by which the model was chosen among others.
        by_path: The results name their model by its path alone.
    """

    data: str
    results: Mapping[str, Any]
    before_calibration: bool = False
    chosen_by: str | None = None
    by_path: bool = False

    @property
    def setting(self) -> str:
        """The protocol, and where its settings were changed."""
        flips = self.results.get("settings", {}).get("flip_average")
        border = self.results.get("white_border", "keep")
        more = ["flip average"] * bool(flips) + [f"white border {border}"] * (border in WHITE_BORDER)
        return str(self.results["protocol"]) + (f" with {', '.join(more)}" if more else "")


def run_of(model: Path) -> tuple[RunRecord | None, Selection | None]:
    """The run that trained a model, as it was at the step of the model; and of RUN/best its validations."""
    run = read_record(model, DEPTH_MARK)
    if run is None:
        return None, None
    if run.option("optim.ema_decay") != NOT_RECORDED:
        run = replace(run, averaged=True)
    metric = run.option("select")
    if model.resolve() != run.folder / "best" or metric not in METRIC:
        return run, None
    selection = Selection(metric)
    selection.read(run.rows)
    return (run, None) if selection.best is None else (run.at(selection.best[0]), selection)


def read_evaluations(
    model: DepthModel,
    folder: Path,
    run: RunRecord | None,
    selection: Selection | None,
    files: Sequence[Path],
) -> list[Evaluation]:
    """The evaluation that a run made of its own model, and those in the files of spark-evaluate.

    Args:
        model: As it was read.
        folder: That it was read from. `evaluation.json` of a run is of RUN/model only, and only while that holds the
            weights that were scored; of RUN/best there is the validation that it was chosen by.
        run: That trained it, as `run_of` gives it.
        selection: Likewise.
        files: Written by spark-evaluate, under one protocol or several.
    """
    found = []
    now = None if model.calibration is None else model.calibration.as_config()
    for file in files:
        for results in read_results(file):
            check_model(file, results, model, folder)
            data = data_name(str(results.get("data", NOT_RECORDED)))
            by_path = "model_sha256" not in results
            found.append(Evaluation(data, results, results.get("calibration") != now, by_path=by_path))
    if run is None:
        return found
    place = run.option("data.val_root")
    root = run.option("data.root") if place == NOT_RECORDED else place
    held_out = run.option("data.val_list")
    name = public_name(root) + ("" if held_out == NOT_RECORDED else f" {public_name(held_out)}")
    written = read_results(run.folder / EVALUATION) if (run.folder / EVALUATION).is_file() else []
    own: list[dict[str, Any]] = []
    if selection is not None:
        scores = {metric: run.rows[-1].get(f"val_{metric}") for metric in METRIC}
        # the evaluation at the end is of the same images under the same settings
        same = {key: one[key] for one in written for key in ("images", "settings", "skipped") if key in one}
        metrics = {metric: value for metric, value in scores.items() if value is not None}
        own = [{**same, "protocol": run.option("protocol"), "metrics": metrics}]
    elif folder.resolve() == run.folder / "model":
        # a run that was resumed and exported its model before it ended has not scored that one
        own = [one for one in written if one.get("model_sha256", model.sha256) == model.sha256]
    # spark-evaluate may have found the same
    known = [(one.results["protocol"], one.results["metrics"]) for one in found]
    return [
        Evaluation(name, one, now is not None, None if selection is None else selection.metric)
        for one in own
        if (one["protocol"], one["metrics"]) not in known
    ] + found


def check_model(file: Path, results: Mapping[str, Any], model: DepthModel, folder: Path) -> None:
    """Refuse results of another model, by the SHA-256 of its weights and configuration; older ones by its path."""
    scored, remedy = results.get("model"), "score this one with spark-evaluate"
    if scored is None:
        raise UserError(f"{file} holds scores of no model, but of predictions or a baseline: {remedy}")
    stated = results.get("model_sha256")
    if stated is None:
        if Path(str(scored)).expanduser().resolve() != folder.resolve():
            raise UserError(
                f"{file} names the model that it scored by a path alone, {scored}, which is not {folder} from here:"
                f" {remedy} again, whose results tell models by their weights"
            )
    elif stated != model.sha256:
        recorded = stated if isinstance(stated, dict) else {}
        other = [name for name, value in (model.sha256 or {}).items() if recorded.get(name) != value]
        raise UserError(
            f"{file} holds scores of {scored} as it was then, not of {folder} as it is, for the SHA-256 of the"
            f" {' and the '.join(other)} differs: {remedy}"
        )


def data_name(described: str) -> str:
    """The description of data in results, with only the last part of every path in it."""
    return " ".join(public_name(word) if "/" in word else word for word in described.split())


def depth_card(model: DepthModel, folder: Path, files: Sequence[Path], publication: Publication) -> str:
    """The text of README.md.

    Args:
        model: As it is exported.
        folder: That it was read from.
        files: Results of spark-evaluate on it.
        publication: What only the publisher knows.
    """
    run, selection = run_of(folder)
    evaluations = read_evaluations(model, folder, run, selection, files)
    origin = NOT_RECORDED if run is None else run.option("encoder")
    network = _network(model)
    body = [
        f"# Monocular depth: {model.head_name} on {network}",
        "Depth from one photo, trained with [SparK](https://arxiv.org/abs/2301.03580) tools. This card is written from"
        " the run's own files.",
        f"```python\n{_load(model, publication)}\n```",
        "## Model",
        table(_about(model, network)),
        "## Training",
        NOT_RECORDED + "." if run is None else table(_recipe(run)),
        "## Encoder before it",
        _before(run, origin),
        "## Results",
        "\n\n".join(_scores(evaluation, model.image_size) for evaluation in evaluations)
        or f"Scores: {NOT_MEASURED}.",
    ]
    scores = [result for one in evaluations if not one.before_calibration for result in _eval_results(one)]
    data = ModelCardData(
        model_name=f"{model.head_name}-{network}" if scores else None,
        eval_results=scores or None,
        pipeline_tag="depth-estimation",
        tags=["monocular-depth", "spark", model.head_name, network],
        license=publication.license,
        datasets=sorted(publication.datasets) or None,
        base_model=publication.base_model or _base_model(run),
    )
    return compose(data, body)


def _eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """Scores as the hub's model-index has them."""
    data, setting = evaluation.data, evaluation.setting
    return [
        EvalResult(
            task_type="depth-estimation",
            dataset_type=re.sub(r"[^a-z0-9._]+", "-", data.lower()).strip("-"),
            dataset_config=setting,  # the hub merges results that agree in type and config
            dataset_name=f"{data}, protocol {setting}",
            metric_type=name,
            metric_value=value,
        )
        for name, value in own_metrics(evaluation.results).items()
    ]


def _network(model: DepthModel) -> str:
    own = getattr(model.encoder, "own_encoder", None)
    return own["own"] if own else model.encoder.pretrained_cfg["architecture"]  # type: ignore[index, call-overload]


def _load(model: DepthModel, publication: Publication) -> str:
    where = f"{PREFIX}{publication.repo}" if publication.repo else "FOLDER"
    own = getattr(model.encoder, "own_encoder", None)
    more = f', encoder_name="{own["own"]}"' if own else ""
    lines = ["from finetune import load_depth_model", "", f'model = load_depth_model("{where}"{more})']
    if "depth" in model.outputs:
        lines += ['depth = model.predict("photo.jpg")  # float32 [H, W] in metres']
    else:
        lines[1:1] = ["from finetune.model.prediction import predict_image, read_photo"]
        lines += ['inverse_depth = predict_image(model, read_photo("photo.jpg"))']
    return "\n".join(lines)


def _about(model: DepthModel, network: str) -> dict[str, Any]:
    metric, limits = "depth" in model.outputs, [model.depth_range.min_depth, model.max_depth]
    return {
        "encoder": network,
        "head": model.head_name,
        "head options": model.head_options,
        "output": "depth [m]" if metric else RELATIVE,
        "nearest and farthest depth [m]": limits if metric else "none",
        "image size [px]": NOT_RECORDED if model.image_size is None else model.image_size,
        "mean": model.mean,
        "std": model.std,
        "calibration": "none" if model.calibration is None else str(model.calibration),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _recipe(run: RunRecord) -> dict[str, Any]:
    sets = run.option("data.sets")
    return {
        "data": public_name(run.option("data.root")),
        "list": public_name(run.option("data.list")),
        "further data": [public_name(one.get("root")) for one in sets] if isinstance(sets, list) else "none",
        "frames [px]": run.option("data.image_size"),
        "crops [px]": run.option("data.crop_size"),
        "augmentation": {name: run.option(f"data.{name}") for name in AUGMENTATION},
        "losses": run.option("losses"),
        "optimizer": run.option("optim.name"),
        "learning rate": run.option("optim.lr"),
        "schedule": run.option("optim.schedule"),
        "weight decay": run.option("optim.weight_decay"),
        "batch size": run.option("optim.batch_size"),
        "epochs": run.option("epochs"),
        "steps done": run.steps,
        "loss of the last logged step": run.last("loss"),
        "weights": run.weights,
        "precision": run.option("precision"),
        "seed": run.option("seed"),
        "validated under": run.option("protocol"),
    }


def _before(run: RunRecord | None, origin: Any) -> str:
    if run is None:
        return f"{NOT_RECORDED}."
    before = read_record(origin, PRETRAINING_MARK) if Path(str(origin)).is_dir() else None
    if before is not None:
        return "Pretrained with SparK on images without labels.\n\n" + pretraining(before)
    if run.option("pretrained") is True:
        return f"timm's published weights of {public_name(origin)}."
    if "/" in str(origin) or Path(str(origin)).suffix == ".pth":
        return f"Read from {public_name(origin)}; how it was trained is {NOT_RECORDED}."
    return f"{origin} from random weights."


def _base_model(run: RunRecord | None) -> str | None:
    """timm's name on the hub, of a run that started from timm's weights."""
    if run is None or run.option("pretrained") is not True:
        return None
    name = str(run.option("encoder"))
    known = timm.get_pretrained_cfg(name)  # a name without a tag means timm's choice of weights
    return f"timm/{known.architecture}.{known.tag}" if known is not None and known.tag else f"timm/{name}"


def _scores(evaluation: Evaluation, image_size: tuple[int, int] | None) -> str:
    results = evaluation.results
    settings, seen = results.get("settings", {}), results.get("image_size")
    lines = [
        f"Protocol `{results['protocol']}` on {results.get('images', 'the')} images ({evaluation.data})"
        + (", averaged with the mirror image" if settings.get("flip_average") else "")
        + (f". {settings['description']}" if settings.get("description") else ".")
    ]
    if evaluation.before_calibration:
        lines.append("Measured before the calibration, which changes depth and scores.")
    if evaluation.by_path:
        lines.append(
            "These results name the model by its path alone, for they are older than the SHA-256 of weights in results."
        )
    if evaluation.chosen_by is not None:
        lines.append(
            f"The run's best validation by {evaluation.chosen_by}: the model was chosen by these very scores, which"
            " flatters them."
        )
    if seen is not None and image_size is not None and list(seen) != list(image_size):
        lines.append(f"The model saw images at {seen[0]}x{seen[1]} px.")
    if border := WHITE_BORDER.get(results.get("white_border", "keep")):
        lines.append(border)
    lines += [f"{sentence[0].upper()}{sentence[1:]}." for sentence in caveats(results)]
    return "\n\n".join([*lines, table(own_metrics(results))])
