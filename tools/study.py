"""A study: arms that pretrain, train depth and score, from one YAML file into one table.

    python -m tools.study tools/studies/nyu_val_small.yaml --data FOLDER --output_dir runs/study \\
        --results docs/results/nyu_val_small

FOLDER holds `images/` (unlabeled photos) and `nyu/` (NYU Depth V2 in the BTS "sync" layout, with nyu_train.txt and
nyu_val.txt). For every arm and seed: pretrain, train depth from that encoder, score. Arms that pretrain alike share the
run. Every command is printed before it runs. A study that was stopped continues where it was; several processes may
work on one. What was made by another command, or by another version of the code, PyTorch or timm, is refused. Writes
RESULTS.csv, a row a scored model, RESULTS.md, means over seeds, and where the file asks for them
RESULTS_differences.csv, with bootstrap intervals over seeds and scenes, and RESULTS.png.

The file (see tools/studies/): `seeds`; `pretrain`, `depth`, `probe` and `scores` (name -> options of spark-evaluate),
options of the commands as on the command line; `arms`, each with `encoder` and `start` (scratch, spark, or anything
that --encoder of depth training takes), its own options of the same names, `stages` (name -> options of depth runs
that continue from one another), `labels` (share of the training scenes), `images` and `images_share` (what it pretrains
on), `pretrain_seed`, or `command` (a program that writes {run}/results.json, or what `makes` names); `columns`,
name -> where the value stands; `table`, `differences`, `figure`. Texts may hold {data}, {output}, {seed}, {run},
{label_list} (the training pairs of the arm's share of scenes) and the arm's own entries.
In `pretrain`, `epochs: time` is as many epochs as fit into the time of the first arm, and `scale_phases: true` lets the
warm-up and the frozen epochs of a run card keep their share of a run of another length. An arm with `trunk` (lengths in
epochs) pretrains at a constant learning rate up to each of them and branches off at the last: arms of several lengths,
with `optim.cooldown_epochs`, share what they have in common.
"""

import argparse
import csv
import functools
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import segmentation_models_pytorch as smp
import timm
import torch
import yaml
from filelock import FileLock, Timeout
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.report.figures import save_figure
from finetune.scoring.intervals import interval, resampled
from spark.errors import UserError
from spark.files import write_whole
from spark.images.sources import list_images
from spark.training.accelerator import usable_cores
from spark.training.log import read_rows
from tools.benchmarks import models
from tools.benchmarks.rows import rows_as_csv

ROOT = Path(__file__).resolve().parents[1]
MARK = "<!-- study -->"
RECORD = "study.json"  # beside what a step makes: its command, and the versions that it was made with
RESAMPLES = 2000


class Step(NamedTuple):
    """A command and what it makes.

    Attributes:
        makes: folder of a run, or a file.
        command: arguments of Python.
        result: of a run, the folder in it that holds the weights; "" for a file.
        unit, length: of a run: "epoch" or "step", and how many.
        trunk: run that it branches off from, or None.
    """

    makes: Path
    command: tuple[str, ...]
    result: str = ""
    unit: str = "epoch"
    length: float = 0.0
    trunk: Path | None = None

    @property
    def done(self) -> bool:
        """Whether a run reached its last step and wrote its result (which it may also write on demand, earlier)."""
        if not self.result:
            return self.makes.exists()
        rows = read_rows(self.makes / "metrics.jsonl")
        reached = max((row[self.unit] for row in rows if self.unit in row), default=0.0)
        return reached >= self.length and (self.makes / self.result / "model.safetensors").exists()

    @property
    def now(self) -> list[str]:
        """The command for today: a branch that was begun goes on from its own checkpoints."""
        begun = self.trunk is not None and (self.makes / "checkpoints").is_dir()
        return ["true" if begun and part == str(self.trunk) else part for part in self.command]

    @property
    def record(self) -> Path:
        """File with the command and the versions."""
        return self.makes / RECORD if self.result else self.makes.with_name(f"{self.makes.name}.{RECORD}")


class Row(NamedTuple):
    """A scored model of an arm.

    Attributes:
        arm: its entry in the file.
        seed: of depth training.
        stage: name of the stage of depth training; "" where there is one.
        steps: that lead to it, in their order.
        pretraining, run: folders; None where there is none.
        probe: file of its probe, or None.
        scores: name -> file.
    """

    arm: dict[str, Any]
    seed: int
    stage: str
    steps: list[Step]
    pretraining: Path | None
    run: Path | None
    probe: Path | None
    scores: dict[str, Path]


class Study:
    """The steps and rows of a study.

    Args:
        content: of the YAML file.
        data, output: folders.
        measure: whether steps may be timed; otherwise only what was timed before is known.
    """

    def __init__(self, content: dict[str, Any], data: Path, output: Path, measure: bool = True):
        self.content, self.data, self.output, self.measure = content, data, output, measure
        names = [self.name(arm) for arm in content["arms"]]
        if len(set(names)) < len(names):
            raise UserError(
                f"arms must have different names, these have {', '.join(names)}: give them a `name`"
            )
        self._costs: dict[str, dict[str, str]] | None = None

    def name(self, arm: Mapping[str, Any]) -> str:
        """Of an arm, for its folders."""
        return str(arm.get("name") or f"{arm['encoder']}_{arm['start']}")

    def filled(self, text: Any, arm: Mapping[str, Any], seed: int = 0, run: Path | None = None) -> Any:
        """An option with {data}, {output}, {seed}, {run}, {label_list} and the entries of the arm put in."""
        if not isinstance(text, str) or "{" not in text:
            return text
        given = {"data": self.data, "output": self.output, "seed": seed, "run": run}
        if "{label_list}" in text:
            given["label_list"] = label_list(arm["labels"], self.data, self.output)
        for name, value in {**arm, **given}.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text

    def merged(self, kind: str, arm: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a command: those of the study, and the arm's over them."""
        options = {**self.content.get(kind, {}), **(arm.get(kind) or {})}
        return {name: self.filled(value, arm) for name, value in options.items()}

    def pretraining(self, arm: Mapping[str, Any]) -> list[Step]:
        """SparK on unlabeled images: the runs of the trunk, if there are any, and the one that the arm ends with."""
        options = self.merged("pretrain", arm)
        seed = arm.get("pretrain_seed", 0)
        name = f"pretrain_{self.filled(options.pop('name', '{encoder}'), arm)}"
        steps: list[Step] = []
        ends = arm.get("trunk", [])
        for epochs in [*ends, None]:
            part = f"_trunk_{epochs}" if epochs else f"_{options['epochs']}" if ends else ""
            run = self.output / (name + part + f"_{seed}" * bool(seed))
            own = dict(options)
            if epochs:
                own |= {"epochs": epochs, "optim.cooldown_epochs": 0}
            elif own.get("epochs") == "time":
                own["epochs"] = self.equal_time(arm, run)
            given = {
                "output_dir": run,
                "seed": seed,
                "data.train": image_list(arm, self.data, self.output),
                "resume": steps[-1].makes if steps else True,
            }
            steps.append(run_step("spark/pretrain.py", run, "encoder", {**own, **given}))
        return steps

    def equal_time(self, arm: Mapping[str, Any], run: Path) -> float:
        """As many epochs as fit into the time of the first arm's; a run that was begun keeps its number."""
        if (run / "config.yaml").exists():
            return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["epochs"]
        speedup = float(self.step_cost(arm).get("step_speedup", 1))
        return round(self.merged("pretrain", self.content["arms"][0])["epochs"] * speedup, 2)

    def step_cost(self, arm: Mapping[str, Any]) -> dict[str, str]:
        """Seconds of a pretraining step, and its speed over the first arm's, measured once (`time_steps`)."""
        if "time_steps" not in self.content:
            return {}
        if self._costs is None:
            options = {self.decoder(one): self.merged("pretrain", one) for one in self.content["arms"]}
            path = self.output / "step_costs.json"
            timed = self.measure and models.step_costs(options, path, **self.content["time_steps"])
            self._costs = timed or models.kept(path)
        return self._costs.get(self.decoder(arm), {})

    def decoder(self, arm: Mapping[str, Any]) -> str:
        """What tells the models of pretraining steps apart: the options of the model."""
        options = self.merged("pretrain", arm)
        return json.dumps({name: value for name, value in options.items() if name.startswith("model.")})

    def rows(self) -> Iterator[Row]:
        """All rows: seed by seed, arm by arm, stage by stage."""
        for seed in self.content["seeds"]:
            for arm in self.content["arms"]:
                yield from self.rows_of(arm, seed)

    def rows_of(self, arm: dict[str, Any], seed: int) -> Iterator[Row]:
        """Rows of an arm: one for each stage of its depth training, or one for a pretraining or a command."""
        steps: list[Step] = []
        prepare = [
            Step(Path(self.filled(one["makes"], arm)), arguments(self.filled(one["command"], arm)))
            for one in self.content.get("prepare", [])
        ]
        folder = self.output / f"depth_{self.name(arm)}_{seed}"
        if "command" in arm:
            makes = folder / arm.get("makes", "results.json")
            command = Step(makes, arguments(self.filled(arm["command"], arm, seed, folder)))
            yield Row(arm, seed, "", [*prepare, command], None, folder, None, {"results": makes})
            return
        start: object = arm["encoder"] if arm["start"] == "scratch" else self.filled(arm["start"], arm)
        pretraining, probed = None, None
        if arm["start"] == "spark":
            steps += self.pretraining(arm)
            pretraining = steps[-1].makes
            start = pretraining / "encoder"
            if "probe" in self.content:
                probed = pretraining / "probe.json"
                options = {"encoder": start, **self.merged("probe", arm), "output": probed}
                steps.append(Step(probed, ("-m", "spark.commands.probe", *flags(options))))
        more = good_start(arm["encoder"]) if arm["start"] == "scratch" else {}
        if arm.get("labels", 1) != 1:
            more["data.list"] = label_list(arm["labels"], self.data, self.output)
        before: Path | None = None
        stages = arm.get("stages") or ({"": {}} if "depth" in self.content or "depth" in arm else {})
        if not stages or arm.get("depth", {}) is None:
            yield Row(arm, seed, "", [*prepare, *steps], pretraining, None, probed, {})
            return
        steps = [*prepare, *steps]
        for number, (stage, own) in enumerate(stages.items()):
            options = {"encoder": start, "seed": seed, **self.merged("depth", arm), **more}
            options |= {name: self.filled(value, arm) for name, value in own.items()}
            plain = re.sub(r"\W+", "-", stage)
            run = self.output / (f"depth_{self.name(arm)}_{plain}_{seed}" if number else folder.name)
            if before is not None:
                options |= {"encoder": arm["encoder"], "model.init": before / "model"}
            steps = [*steps, run_step("finetune/depth.py", run, "model", {**options, "output_dir": run})]
            scores = {}
            for name, wanted in {**self.content["scores"], **arm.get("scores", {})}.items():
                scores[name] = run / f"{name}.json"
                given = {"model": run / "model", "output": scores[name]}
                given |= {key: self.filled(value, arm) for key, value in wanted.items()}
                steps = [*steps, Step(scores[name], ("finetune/evaluate.py", *flags(given)))]
            yield Row(arm, seed, stage, steps, pretraining, run, probed, scores)
            before = run


def arguments(command: str) -> tuple[str, ...]:
    """A command line without its python."""
    return tuple(shlex.split(command.removeprefix("python ")))


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of a command line; a list is written as YAML."""
    texts = {
        k: json.dumps(v) if isinstance(v, list | dict | bool) or v is None else str(v)
        for k, v in options.items()
    }
    return [part for name, text in texts.items() for part in (f"--{name}", text)]


def run_step(script: str, run: Path, result: str, options: dict[str, Any]) -> Step:
    """A training run, resumed where it was begun."""
    options = {"config": options.pop("config"), **options}
    if options.pop("scale_phases", False):
        card = yaml.safe_load((ROOT / options["config"]).read_text(encoding="utf-8"))
        for name in ("warmup_epochs", "frozen_epochs"):
            if card.get("optim", {}).get(name):
                scaled = round(card["optim"][name] * options["epochs"] / card["epochs"], 6)
                options[f"optim.{name}"] = scaled
    options = {**options, "resume": options.get("resume", True)}
    trunk = None if options["resume"] is True else options["resume"]
    unit, length = (
        ("step", options["max_steps"]) if options.get("max_steps") else ("epoch", options["epochs"])
    )
    return Step(run, (script, *flags(options)), result, unit, float(length), trunk)


def good_start(encoder: str) -> dict[str, Any]:
    """Options for random weights, so that pretraining is not compared with a bad start.

    timm's ResNets, and networks like them, begin with every residual branch multiplied by zero, with which errors of
    depth from scratch are larger (docs/log.md).
    """
    try:
        timm.create_model(encoder, zero_init_last=False)
    except TypeError:  # no such argument
        return {}
    return {"model.encoder_options": {"zero_init_last": False}}


def image_list(arm: Mapping[str, Any], data: Path, output: Path) -> Path:
    """The list of images to pretrain on: folders, and the RGB of NYU lists; of each, a share.

    By default every photo of images/ and the NYU training images; validation images are in neither.
    """
    default = ["images", "nyu/nyu_train.txt"]
    entries, share = arm.get("images", default), arm.get("images_share", 1)
    entries = [entry.replace("{output}", str(output)) for entry in entries]
    name = (
        "images"
        if entries == default
        else "images_" + "_".join(re.sub(r"\W+", "-", e.removeprefix(f"{output}/")) for e in entries)
    )
    target = output / f"{name}{'' if share == 1 else f'_{share:g}'}.txt"
    if target.exists() or not data.is_dir():
        return target
    lines: list[str] = []
    for entry in entries:
        path = data / entry
        if path.suffix == ".txt":
            rows = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
            found = [str((path.parent / row[0].lstrip("/")).resolve()) for row in rows if row]
        else:
            found = [str(path.resolve())] if share == 1 else [str(file) for file in list_images(path)]
        lines += found if share == 1 else chosen(found, share)
    return write_whole(target, ("\n".join(lines) + "\n").encode())


def label_list(share: float, data: Path, output: Path) -> Path:
    """A list with a share of the scenes of nyu_train.txt; a smaller share is part of a larger one."""
    target = output / f"nyu_train_{share:g}.txt"
    if target.exists() or not data.is_dir():
        return target
    lines = (data / "nyu" / "nyu_train.txt").read_text(encoding="utf-8").splitlines()
    kept = set(chosen(sorted({scene_of(line.split()[0]) for line in lines if line.strip()}), share))
    text = "".join(f"{line}\n" for line in lines if line.strip() and scene_of(line.split()[0]) in kept)
    return write_whole(target, text.encode())


def chosen(names: Sequence[str], share: float) -> list[str]:
    """A random share of some names, always the same ones."""
    order = np.random.default_rng(0).permutation(len(names))
    return [str(names[i]) for i in order[: max(1, round(share * len(names)))]]


def scene_of(name: str) -> str:
    """Scene of an image: its folder."""
    return name.lstrip("/").rpartition("/")[0]


@functools.cache
def versions() -> dict[str, str]:
    """What a run depends on: the code of spark/ and finetune/ as git has it, "+" where files differ, and libraries."""

    def git(*given: str) -> str:
        done = subprocess.run(["git", *given], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    trees = git("rev-parse", "HEAD:spark", "HEAD:finetune").split()
    changed = "+" * bool(git("status", "--porcelain", "--", "spark", "finetune"))
    code = "-".join(tree[:8] for tree in trees) + changed
    return {"code": code or "unknown", "torch": torch.__version__, "timm": timm.__version__}


def run(step: Step, hidden: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Bring a step to its end, unless it is there; False where another process is at it.

    Args:
        step: what to do.
        hidden: places of this machine -> what records call them.
        now: the versions of today.

    Raises:
        UserError: it was made by another command or with other versions, or the command failed or was stopped.
    """
    command = hide(shlex.join(["python", *step.command]), hidden)
    step.record.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{step.record}.lock", timeout=0):
            begun = step.record.exists()
            check(step, command, now)
            if step.done:
                return True
            if not begun:
                content = {"command": command, "versions": dict(now)}
                write_whole(step.record, (json.dumps(content, indent=1) + "\n").encode())
            print(f"\n$ {shlex.join(['python', *step.now])}", flush=True)
            start = time.monotonic()
            code = subprocess.run([sys.executable, *step.now], cwd=ROOT).returncode
            if code:
                raise UserError(
                    f"the command above failed with exit code {code}; the same study command continues from here"
                )
            if not step.done:  # a run that is asked to stop saves its state and reports no failure
                raise UserError(f"{step.makes} is not at its end; the same study command continues from here")
            print(f"({(time.monotonic() - start) / 60:.1f} minutes)", flush=True)
            return True
    except Timeout:
        print(f"{step.makes}: another process is at it", flush=True)
        return False


def check(step: Step, command: str, now: Mapping[str, str]) -> None:
    """Refuse what this study, as it is today, did not make.

    Raises:
        UserError: see `run`.
    """
    if not step.record.exists():
        begun = step.makes.exists() and (not step.result or (step.makes / "config.yaml").exists())
        if begun:
            raise UserError(
                f"{step.makes} was not made by this study: move it away, or name another --output_dir"
            )
        return
    record = json.loads(step.record.read_text(encoding="utf-8"))
    if record["command"] != command:
        raise UserError(
            f"{step.makes} was made by another command:\n  {record['command']}\nnow it would be\n  {command}\n"
            "move it away, or name another --output_dir"
        )
    if record["versions"] != now:
        raise UserError(
            f"{step.makes} was made with {record['versions']}, and now there are {dict(now)}: one study has one "
            "version. Go on from a worktree of that commit, or move the older runs away"
        )


def hide(text: str, places: Mapping[str, str]) -> str:
    """A command as anyone would type it: where things lay on this machine matters to nobody."""
    for place, name in places.items():
        text = text.replace(place, name)
    return text


def row_values(row: Row, study: Study, latency: Mapping[str, str]) -> dict[str, Any] | None:
    """The columns of a row; None where its last file is not there yet."""
    files = [*row.scores.values()] or [row.probe]  # an arm that only pretrains has a probe
    if not all(path is not None and path.exists() for path in files):
        return None
    known: dict[str, Any] = {
        "arm": row.arm,
        "seed": row.seed,
        "stage": row.stage,
        "scores": {n: json.loads(p.read_text(encoding="utf-8")) for n, p in row.scores.items() if p.exists()},
        "host": {
            "device": torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{usable_cores()} CPU cores",
            "segmentation_models_pytorch": smp.__version__,
            **versions(),
        },
        "cost": {**study.step_cost(row.arm), "latency_ratio": latency.get(study.name(row.arm), "")},
    }
    if row.run and (row.run / "config.yaml").exists():
        known["depth"] = yaml.safe_load((row.run / "config.yaml").read_text(encoding="utf-8"))
        if any(
            source.startswith(("cost.parameters", "cost.gmacs"))
            for source in study.content["columns"].values()
        ):
            known["cost"] |= models.depth_cost(row.run / "model", tuple(study.content["latency"]["size"]))
    if row.pretraining:
        known["pretrain"] = yaml.safe_load((row.pretraining / "config.yaml").read_text(encoding="utf-8"))
        losses = [one["loss"] for one in read_rows(row.pretraining / "metrics.jsonl") if "loss" in one]
        known["log"] = {"loss": losses[-1]}
    if row.probe and row.probe.exists():
        known["probe"] = json.loads(row.probe.read_text(encoding="utf-8"))["encoders"][0]
    return {column: looked_up(source, known) for column, source in study.content["columns"].items()}


def looked_up(source: str, known: Mapping[str, Any]) -> str:
    """The value at "a.b.c", formatted by what follows a colon; what follows a bar where there is none."""
    path, _, default = str(source).partition("|")
    path, _, form = path.partition(":")
    value: Any = known
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
        if value is None:
            return default
    if isinstance(value, list):
        return "x".join(map(str, value))
    return format(float(value), form) if form else str(value)


def markdown(rows: list[dict[str, Any]], study: Mapping[str, Any], command: str, more: list[str]) -> str:
    """The table: mean over seeds, with the smallest and largest value where there are several."""
    table = study["table"]
    headings = [*table["rows"].values(), "seeds", *table["values"].values()]
    lines = [
        " ".join(study["about"].split()),
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for key, mine in grouped(rows, table["rows"]).items():
        cells = [spread([float(row[name]) for row in mine if row[name] != ""]) for name in table["values"]]
        lines.append(f"| {' | '.join([*key, str(len(mine)), *cells])} |")
    return "\n".join([*lines, "", *more, f"Written by `{command}`.", ""])


def grouped(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows by the values of some columns, in the order of their first row."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[name]) for name in names), []).append(row)
    return groups


def spread(values: list[float]) -> str:
    """Mean, and the range if there is one."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def differences(scored: list[tuple[dict[str, Any], Path]], study: Mapping[str, Any]) -> list[dict[str, str]]:
    """Means of arms minus those of the baseline that shares the other columns, with 95 % bootstrap intervals.

    Every resample draws scenes (or images), the same for both arms, and seeds, for each arm its own.

    Args:
        scored: rows with the file of their scores.
        study: its `differences` names the `column` and the `baseline` in it, the columns that must be `equal`, and
            the `metrics`; `over` is scenes, which are folders, or images.
    """
    wanted, rng = study["differences"], np.random.default_rng(0)
    found = []
    results = {path: json.loads(path.read_text(encoding="utf-8")) for _, path in scored}
    for key, mine in by_columns(scored, [*wanted["equal"], wanted["column"]]).items():
        base = by_columns(scored, wanted["equal"]).get(key[:-1], [])
        base = [path for row, path in base if row[wanted["column"]] == wanted["baseline"]]
        if key[-1] == wanted["baseline"] or not base:
            continue
        drawn_by = scene_of if wanted.get("over", "scenes") == "scenes" else str
        scenes = [drawn_by(one["name"]) for one in results[base[0]]["per_image"]]
        names, index = np.unique(scenes, return_inverse=True)
        counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)[:, index]
        means = []
        for paths in ([path for _, path in mine], base):
            drawn = [resampled(results[path], counts) for path in paths]
            seeds = rng.multinomial(len(paths), np.full(len(paths), 1 / len(paths)), RESAMPLES) / len(paths)
            means.append(
                {m: (seeds.T * np.stack([one[m] for one in drawn])).sum(0) for m in wanted["metrics"]}
            )
        for metric in wanted["metrics"]:
            value = [
                statistics.mean(results[p]["metrics"][metric] for p in ps)
                for ps in ([p for _, p in mine], base)
            ]
            low, high = interval(means[0][metric] - means[1][metric]) or (float("nan"),) * 2
            found.append(
                {
                    **dict(zip([*wanted["equal"], wanted["column"]], key, strict=True)),
                    "baseline": wanted["baseline"],
                    "metric": metric,
                    "difference": f"{value[0] - value[1]:+.4f}",
                    "low": f"{low:+.4f}",
                    "high": f"{high:+.4f}",
                    "seeds": f"{len(mine)} and {len(base)}",
                    wanted.get("over", "scenes"): str(len(names)),
                }
            )
    return found


def by_columns(
    scored: list[tuple[dict[str, Any], Path]], names: Sequence[str]
) -> dict[tuple[str, ...], list[tuple[dict[str, Any], Path]]]:
    """Scored rows by the values of some columns."""
    groups: dict[tuple[str, ...], list[tuple[dict[str, Any], Path]]] = {}
    for row, path in scored:
        groups.setdefault(tuple(str(row[name]) for name in names), []).append((row, path))
    return groups


def draw(
    rows: list[dict[str, Any]], found: list[dict[str, str]], wanted: Mapping[str, Any], path: Path
) -> None:
    """A score over a column, a line an arm: mean and range over seeds; beside it, differences and their intervals."""
    found = [row for row in found if row.keys() >= {wanted["x"], *wanted["lines"]}]
    figure = Figure(figsize=(10 if found else 6, 4), dpi=120, layout="constrained")
    first, *second = figure.subplots(1, 1 + bool(found), squeeze=False)[0]
    for key, mine in grouped([row for row in rows if row[wanted["y"]] != ""], wanted["lines"]).items():
        points = []
        for (x,), group in grouped(mine, [wanted["x"]]).items():
            values = [float(row[wanted["y"]]) for row in group]
            points.append((float(x), statistics.mean(values), min(values), max(values)))
        bars(first, points, " ".join(key))
    first.set(ylabel=f"{wanted['y']}, mean and range over seeds")
    for axes in second:
        mine = [row for row in found if row["metric"] == wanted["y"]]
        for key, group in grouped(mine, wanted["lines"]).items():
            names = (wanted["x"], "difference", "low", "high")
            bars(axes, [tuple(float(row[name]) for name in names) for row in group], " ".join(key))
        axes.axhline(0, color="0.6", linewidth=1)
        axes.set(ylabel=f"{wanted['y']} minus that of {found[0]['baseline']}, 95 % interval")
    for axes in figure.axes:
        axes.set(xlabel=wanted.get("xlabel", wanted["x"]), xscale=wanted.get("scale", "linear"))
        axes.legend()
    save_figure(figure, path)


def bars(axes: Axes, points: Sequence[tuple[float, ...]], label: str) -> None:
    """A line with error bars through points (x, y, low, high)."""
    x, y, low, high = np.array(sorted(points)).T
    ends = np.maximum([y - low, high - y], 0)
    axes.errorbar(x, y, ends, marker="o", capsize=3, label=label)


def write_results(
    study: Study, options: argparse.Namespace, command: str, latency: Mapping[str, str]
) -> None:
    """All files of results, from the files of the runs that are done; values are read, never typed."""
    content, results = study.content, options.results
    made = [(row, values) for row in study.rows() if (values := row_values(row, study, latency)) is not None]
    rows = [values for _, values in made]
    path = results.with_suffix(".csv")
    if options.keep and path.exists():
        keys = [*content["table"]["rows"], *(["seed"] if "seed" in content["columns"] else [])]
        here = grouped(rows, keys)
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if tuple(row[k] for k in keys) not in here] + rows
    if not rows:
        return
    write_whole(path, rows_as_csv(rows).encode())
    more: list[str] = []
    found: list[dict[str, str]] = []
    if "differences" in content:
        scored = [(values, row.scores["results"]) for row, values in made if "results" in row.scores]
        if found := differences(scored, content):
            write_whole(results.with_name(f"{results.name}_differences.csv"), rows_as_csv(found).encode())
            more = [f"| {' | '.join(found[0])} |", "|---" * len(found[0]) + "|"]
            more += [*(f"| {' | '.join(one.values())} |" for one in found), ""]
    table = markdown(rows, content, command, more)
    write_whole(results.with_suffix(".md"), table.encode())
    if "figure" in content:
        draw(rows, found, content["figure"], results.with_suffix(".png"))
    if options.readme:
        parts = options.readme.read_text(encoding="utf-8").split(MARK)
        if len(parts) != 3:
            raise UserError(
                f"{options.readme} must hold the mark {MARK} twice, around the place of the table"
            )
        write_whole(options.readme, f"{parts[0]}{MARK}\n\n{table}\n{MARK}{parts[2]}".encode())


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then write the results."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="study", description=__doc__, formatter_class=formatter)
    parser.add_argument("study", type=Path, help="YAML file of the arms")
    parser.add_argument("--data", type=Path, help="folder with images/ and nyu/; not needed with --table")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="RESULTS: .csv and .md are added")
    parser.add_argument(
        "--readme", type=Path, help=f"put the table between the two `{MARK}` of this file, too"
    )
    parser.add_argument("--only", nargs="+", metavar="ARM", help="run only these arms; the table has all")
    parser.add_argument("--keep", action="store_true", help="rows of RESULTS.csv without runs here stay")
    parser.add_argument("--table", action="store_true", help="run nothing, write the results of what is done")
    options = parser.parse_args(argv)
    try:
        run_study(options, sys.argv[1:] if argv is None else list(argv))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run_study(options: argparse.Namespace, argv: list[str]) -> None:
    """Run what is missing, arm by arm, and write the results after each.

    Raises:
        UserError: no data, an arm that is not there, or see `run`.
    """
    content = yaml.safe_load(options.study.read_text(encoding="utf-8"))
    data = (options.data or Path("no_data")).absolute()
    study = Study(content, data, options.output_dir.absolute(), measure=not options.table)
    hidden = {str(data): "$SPARK_DATA", str(study.output): "$OUTPUT"}
    shown = [
        "$SPARK_DATA" if before == "--data" else text for before, text in zip(["", *argv], argv, strict=False)
    ]
    command = " ".join(
        ["python -m tools.study", *(text if "$" in text else shlex.quote(text) for text in shown)]
    )
    if options.table:
        write_results(study, options, command, models.kept(study.output / "latency.json"))
        return
    for folder in (data / "images", data / "nyu"):
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: --data must hold images/ and nyu/")
    names = [study.name(arm) for arm in content["arms"]]
    if unknown := set(options.only or ()) - set(names):
        raise UserError(f"there is no arm {', '.join(sorted(unknown))}: there are {', '.join(names)}")
    study.output.mkdir(parents=True, exist_ok=True)
    now = versions()
    for row in study.rows():
        if options.only and study.name(row.arm) not in options.only:
            continue
        if all(run(step, hidden, now) for step in row.steps):
            write_results(study, options, command, {})
    latency: dict[str, str] = {}
    if "latency" in content:
        runs: dict[str, Path] = {}
        for row in study.rows():
            if row.run:  # of an arm's first stage and seed: weights do not change what is computed
                runs.setdefault(study.name(row.arm), row.run / "model")
        latency = models.latencies(runs, study.output / "latency.json", **content["latency"])
    write_results(study, options, command, latency)


if __name__ == "__main__":
    main()
