"""Model cards, written from what a run recorded.

A card states what the files of a run say and nothing else; what no file says is "not recorded" or "not measured". Of
paths it names the last part only: a card is for others.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from spark.errors import UserError
from spark.report.runs import option_of
from spark.training.log import read_rows
from spark.weights.hub import PREFIX

PRETRAINING_MARK = "model.mask_ratio"
"""An option that only pretraining runs have."""

NOT_RECORDED, NOT_MEASURED = "not recorded", "not measured"
MONITORED = ("knn", "linear", "rank", "channel_std")
"""What the monitors of a pretraining run put into metrics.jsonl (`spark.monitor.measures`)."""


@dataclass(frozen=True)
class Publication:
    """What only the publisher knows.

    Args:
        license: Identifier of the hub, such as mit or cc-by-nc-4.0.
        datasets: Names on the hub of the data that it was trained on.
        base_model: Name on the hub of what it was made from.
        repo: OWNER/NAME that it is to have there.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    base_model: str | None = None
    repo: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """What a run wrote up to the step that the weights in question are of.

    Args:
        folder: Of the run.
        config: Its config.yaml.
        rows: Of its metrics.jsonl, up to that step.
        step: Of the weights; None: the last of the rows.
        averaged: The weights are the moving average of those of the steps (`optim.ema_decay`).
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    step: int | None = None
    averaged: bool = False

    def at(self, step: int) -> "RunRecord":
        """The run as it was at a step, for weights that are of that one."""
        return replace(self, rows=[row for row in self.rows if row.get("step", 0) <= step], step=step)

    @property
    def steps(self) -> Any:
        """How many steps made the weights."""
        return self.last("step") if self.step is None else self.step

    @property
    def weights(self) -> str:
        """Whether these are the averaged ones."""
        return (
            f"averaged, ema_decay {plain(self.option('optim.ema_decay'))}"
            if self.averaged
            else "not averaged"
        )

    def last(self, key: str) -> Any:
        """The last value that metrics.jsonl has of something."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), NOT_RECORDED)

    def option(self, name: str) -> Any:
        """An option by its dotted name."""
        return option_of(self.config, name, NOT_RECORDED)


def read_record(inside: str | Path, mark: str) -> RunRecord | None:
    """The run that a folder belongs to, as it was at the step of a checkpoint; None if it belongs to none.

    Args:
        inside: The folder of a run, of its encoder or model, or of one of its checkpoints.
        mark: Dotted name of an option that only runs of the wanted kind have.

    Raises:
        UserError: Its config.yaml or metrics.jsonl is damaged.
    """
    path = Path(inside).expanduser().resolve()
    for folder in (path, *list(path.parents)[:2]):
        if not (folder / "config.yaml").is_file():
            continue
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            rows = read_rows(folder / "metrics.jsonl")
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(
                f"the card is written from config.yaml and metrics.jsonl of {folder}, and one is damaged"
                f" ({' '.join(str(error).split())}): mend it, or export a copy of the model outside of its run"
            ) from error
        run = RunRecord(folder, config if isinstance(config, Mapping) else {}, rows)
        if run.option(mark) == NOT_RECORDED:
            continue
        run = replace(run, averaged=path == folder / "encoder" and run.option("export_ema") is True)
        checkpoint = re.fullmatch(r"step_(\d+)", path.name) if path.parent == folder / "checkpoints" else None
        return run if checkpoint is None else run.at(int(checkpoint[1]))
    return None


def public_name(text: Any) -> str:
    """A place as a card names it: names on the hub and of networks unchanged, of a path or address the last part."""
    text = str(text)
    if text.startswith(("hf:", PREFIX)):
        return text
    return text.rstrip("/").rsplit("/", 1)[-1].rsplit("\\", 1)[-1]


def hub_datasets(*places: Any) -> list[str]:
    """Names on the hub among `hf:NAME[:SPLIT[:COLUMN]]`."""
    return [str(place).split(":")[1] for place in places if str(place).startswith("hf:")]


def plain(value: Any) -> str:
    """A value for people, on one line of a table."""
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float):
        text = f"{value:.6g}"
    elif isinstance(value, Mapping):
        text = ", ".join(f"{key}: {plain(one)}" for key, one in value.items()) or "none"
    elif isinstance(value, list | tuple):
        text = ", ".join(plain(one) for one in value) or "none"
    else:
        text = str(value)
    return " ".join(text.replace("|", "\\|").split())


def table(rows: Mapping[str, Any]) -> str:
    """Two columns in Markdown."""
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {plain(value)} |" for name, value in rows.items())]
    )


def pretraining(run: RunRecord) -> str:
    """Data, recipe and end of a pretraining run, in Markdown."""
    trained = run.option("data.train")
    places = trained if isinstance(trained, list) else [trained]
    monitored = {
        name: run.last(name) for name in MONITORED if run.last(name) != NOT_RECORDED
    }  # of the encoder as it was at the last measurement
    recipe = {
        "images": [public_name(place) for place in places],
        "network": run.option("model.name"),
        "image size": run.option("model.input_size"),
        "mask ratio": run.option("model.mask_ratio"),
        "optimizer": f"{run.option('optim.name')}, base_lr {plain(run.option('optim.base_lr'))}",
        "batch size": run.option("optim.batch_size"),
        "epochs": run.option("epochs") if run.option("max_steps") == NOT_RECORDED else NOT_RECORDED,
        "steps done": run.steps,
        "loss of the last logged step": run.last("loss"),
        "weights": run.weights,
        "precision": run.option("precision"),
        "seed": run.option("seed"),
        "frozen features": monitored or NOT_MEASURED,
    }
    return table(recipe)


def encoder_card(
    config: Mapping[str, Any], run: RunRecord | None, source: str, publication: Publication
) -> str:
    """The card of an exported encoder.

    Args:
        config: Its config.json.
        run: That trained it.
        source: What it was read from.
        publication: What only the publisher knows.
    """
    own = "own" in config
    name = config["own"] if own else config["architecture"]
    trained = NOT_RECORDED if run is None else run.option("data.train")
    places = trained if isinstance(trained, list) else [trained]
    where = f"{PREFIX}{publication.repo}" if publication.repo else "local-dir:FOLDER"
    if own:
        local = "FOLDER" if publication.repo is None else f"a copy of {publication.repo}"
        load = f'from spark import load_encoder\n\nencoder = load_encoder("FOLDER", model_name="{name}")  # {local}'
    else:
        load = f'import timm\n\nencoder = timm.create_model("{where}", pretrained=True, features_only=True)'
    images = config["pretrained_cfg"]
    body = [
        f"# {name}, pretrained with SparK",
        "An encoder from sparse and hierarchical masked modelling ([Tian et al., ICLR 2023]"
        "(https://arxiv.org/abs/2301.03580)). It has no classifier. This card is written from the run's own files.",
        f"```python\n{load}\n```",
        "## Images",
        table({key: images.get(key, NOT_RECORDED) for key in ("input_size", "mean", "std")}),
        "## Pretraining",
        pretraining(run) if run else f"Read from {public_name(source)}; data and recipe: {NOT_RECORDED}.",
        "## Results",
        f"On other tasks: {NOT_MEASURED}.",
    ]
    data = ModelCardData(
        library_name=None if own else "timm",
        pipeline_tag="image-feature-extraction",
        tags=["spark", "masked-image-modeling", "self-supervised", *([] if own else ["timm"])],
        license=publication.license,
        datasets=sorted({*publication.datasets, *hub_datasets(*places)}) or None,
        base_model=publication.base_model,
    )
    return compose(data, body)


def compose(data: ModelCardData, body: Iterable[str]) -> str:
    """Front matter and paragraphs as the text of README.md."""
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"))
