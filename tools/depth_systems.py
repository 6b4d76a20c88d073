"""The depth systems of configs/depth from their run cards, scratch and SparK-initialised, at one equal budget.

    python tools/depth_systems.py --data FOLDER --output_dir runs/systems --results docs/results/depth_systems \
        --size 96 128 --epochs 10 --batch_size 8

FOLDER holds `images/` (unlabeled photos) and `nyu/` (NYU Depth V2 in the BTS "sync" layout with nyu_train.txt,
nyu_val.txt and, for distillation, labels13_N.png). For each encoder: pretrain once on the photos and the training RGB.
For each system, start and seed: train on nyu_train.txt from the system's card, with the size, epochs and batch given
here and no crop, zoom or border, score on nyu_val.txt. Systems of two stages go on with Depth in the Wild and are
scored again, on both. Without --diw, its files are written from the NYU pairs: one relation a picture, of two points
whose measured depths differ by more than 2 %; the table says so.

Losses, learning rates, schedules and heads are the cards'; the card's warm-up and its epochs with a frozen encoder keep
their share of the run. Every command is printed before it runs. A study that was stopped continues where it was. Writes
RESULTS.csv, a row a scored model, and RESULTS.md.
"""

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
import yaml
from benchmarks.rows import rows_as_csv
from benchmarks.timing import interleaved, refuse_busy_machine
from depth_cost import count_macs, parameters
from study import (
    ROOT,
    call,
    finished,
    good_start,
    hidden_paths,
    require_finished,
    require_good_start,
    spread,
    write_image_list,
)

from finetune.depth_data import NYUSync
from finetune.model.depth_model import load_depth_model
from spark.files import write_whole
from spark.seeds import derive_seed

STARTS = ("scratch", "spark")
SHOWN = {"delta1": "δ1 ↑", "abs_rel": "AbsRel ↓", "rmse": "RMSE [m] ↓", "log10": "log10 ↓"}
RATIO = 1.02
"""Two measured depths at least this far apart make a relation."""


@dataclass(frozen=True)
class System:
    """A system of the table.

    Args:
        title: what the table calls it.
        card: its run card on NYU.
        encoder: timm name; None takes --encoder.
        then: run card of its second stage, on Depth in the Wild.
    """

    title: str
    card: str
    encoder: str | None = None
    then: str | None = None

    def named(self, options: argparse.Namespace) -> str:
        """Its encoder."""
        return self.encoder or options.encoder


SYSTEMS = {
    "unetpp": System("UNet++", "unetpp_nyu"),
    "unetpp_resnext50": System("UNet++", "unetpp_resnext50", "resnext50_32x4d", "unetpp_resnext50_diw"),
    "lraspp": System("LR-ASPP", "lraspp_nyu", "mobilenetv3_large_100", "lraspp_diw"),
    "zoedepth": System("ZoeDepth", "zoedepth_convnet"),
    "zoedepth_distil": System("ZoeDepth + distillation", "zoedepth_distil"),
}


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and nyu/")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="RESULTS: .csv and .md are added")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="all of them by default"
    )
    parser.add_argument(
        "--encoder", default="resnet18", help="timm name where a system does not say its own (%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=[96, 128], metavar=("H", "W"), help="of images, in px (96 128)"
    )
    parser.add_argument("--epochs", type=float, default=10, help="on NYU, of every system (%(default)s)")
    parser.add_argument("--diw_epochs", type=float, default=2, help="of a second stage (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="of all training (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of depth training (0)")
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="both by default")
    parser.add_argument(
        "--pretrain_config", default="configs/pretrain/nyu_resnet18.yaml", help="of pretraining (%(default)s)"
    )
    parser.add_argument("--pretrain_epochs", type=float, default=5, help="of pretraining (%(default)s)")
    parser.add_argument(
        "--diw", type=Path, help="Depth in the Wild; without it, files in its layout are written"
    )
    parser.add_argument("--protocol", default="nyu-bts", help="which scores the table has (%(default)s)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of all training (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed forwards of each system (%(default)s)")
    parser.add_argument("--busy", action="store_true", help="take times on a machine that others use")
    options = parser.parse_args()
    for folder in (options.data / "images", options.data / "nyu"):
        if not folder.is_dir():
            parser.error(f"{folder} does not exist: --data must hold images/ and nyu/")
    if min(options.size) < 32 or any(side % 32 for side in options.size):
        parser.error(f"--size must be two multiples of 32 pixels, not {options.size}")
    for name in ("epochs", "diw_epochs", "batch_size", "pretrain_epochs", "rounds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name} must be above 0, not {getattr(options, name)}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    images = write_image_list(options.data, options.output_dir / "images.txt")
    systems = [SYSTEMS[name] for name in options.systems]
    if any(system.then for system in systems) and options.diw is None:
        write_diw(options.data / "nyu", options.output_dir / "diw")
    if "spark" in options.starts:
        for encoder in dict.fromkeys(system.named(options) for system in systems):
            pretrain(encoder, images, options)

    jobs = [
        (name, start, seed) for seed in options.seeds for name in options.systems for start in options.starts
    ]
    for name, start, seed in jobs:
        train(name, start, seed, options)
        write_results([job for job in jobs if result_of(*job, options).exists()], {}, options)
    try:
        refuse_busy_machine(options.busy)
    except ValueError as error:
        sys.exit(f"error: {error}; all runs are done, and the same command takes the times that are missing")
    write_results(jobs, latencies(jobs, options), options)


def write_diw(nyu: Path, folder: Path) -> None:
    """Files in the layout of Depth in the Wild from NYU pairs: DIW_train_val.csv and DIW_test.csv, each once."""
    for list_file, csv in (("nyu_train.txt", "DIW_train_val.csv"), ("nyu_val.txt", "DIW_test.csv")):
        if (folder / csv).exists():
            continue
        lines = []
        data = NYUSync(nyu, list_file)
        for index, name in enumerate(data.names()):
            sample = data[index]
            pair = draw_relation(sample.metres, np.random.default_rng(derive_seed(0, index)))
            if pair is None:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(nyu / name, folder / name)
            height, width = sample.metres.shape
            lines += [f"./{name}", ",".join(map(str, (*pair, width, height)))]
        if not lines:
            sys.exit(f"error: no pair of {nyu / list_file} has two depths that differ by {RATIO - 1:.0%}")
        write_whole(folder / csv, ("\n".join(lines) + "\n").encode())


def draw_relation(
    depth: np.ndarray, rng: np.random.Generator, tries: int = 100
) -> tuple[int, int, int, int, str] | None:
    """Two random pixels with readings whose depths differ: (yA, xA, yB, xB), counted from 1, and > where A is farther.

    None where none was found.
    """
    known = np.argwhere(depth > 0)
    for a, b in rng.integers(0, max(len(known), 1), (tries if len(known) else 0, 2)):
        (ya, xa), (yb, xb) = known[a].tolist(), known[b].tolist()
        one, other = depth[ya, xa], depth[yb, xb]
        if max(one, other) > RATIO * min(one, other):
            return ya + 1, xa + 1, yb + 1, xb + 1, ">" if one > other else "<"
    return None


def pretrain(encoder: str, images: Path, options: argparse.Namespace) -> None:
    """SparK on the unlabeled corpus."""
    run = pretraining_of(encoder, options)
    if finished(run, "encoder", options.pretrain_epochs):
        return
    call(
        "spark/pretrain.py",
        config=options.pretrain_config,
        output_dir=run,
        epochs=options.pretrain_epochs,
        precision=options.precision,
        resume="true",
        **{"model.name": encoder, "data.train": images, "optim.betas": "null"},
    )
    require_finished(run, "encoder", options.pretrain_epochs)


def train(name: str, start: str, seed: int, options: argparse.Namespace) -> None:
    """Each stage of a system, and its scores."""
    system, nyu = SYSTEMS[name], options.data / "nyu"
    encoder = system.named(options)
    weights = pretraining_of(encoder, options) / "encoder" if start == "spark" else encoder
    first = run_of(name, start, seed, options)
    scratch = good_start(encoder) if start == "scratch" else {}
    lists = {"data.root": nyu, "data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt"}
    if start == "scratch":
        for run in (first, run_of(name, start, seed, options, "diw")):  # the second began from the first
            require_good_start(run, encoder)
    stage(system.card, first, options.epochs, weights, seed, {**lists, **scratch}, options)
    scored = {"model": first / "model", "protocol": options.protocol}
    val = {"data.root": nyu, "data.list": "nyu_val.txt", "data.white_border": "fill"}
    evaluate(result_of(name, start, seed, options), {**scored, **val})
    if system.then is None:
        return
    second, root = run_of(name, start, seed, options, "diw"), options.diw or options.output_dir / "diw"
    more = {"data.root": root, "model.init": first / "model", **scratch}
    stage(system.then, second, options.diw_epochs, encoder, seed, more, options)
    scored["model"] = second / "model"
    evaluate(result_of(name, start, seed, options, "diw"), {**scored, **val})
    for run in (first, second):
        relations = {"data.root": root, "data.kind": "diw", "data.split": "test"}
        evaluate(run / "diw.json", {"model": run / "model", "protocol": "diw", **relations})


def stage(
    card: str,
    run: Path,
    epochs: float,
    encoder: object,
    seed: int,
    more: dict[str, object],
    options: argparse.Namespace,
) -> None:
    """One training run from a card; its scores, if it had any, are those of an unfinished one and go."""
    if finished(run, "model", epochs):
        return
    path = f"configs/depth/{card}.yaml"
    size = f"[{options.size[0]}, {options.size[1]}]"
    call(
        "finetune/depth.py",
        config=ROOT / path,
        encoder=encoder,
        output_dir=run,
        epochs=epochs,
        precision=options.precision,
        seed=seed,
        resume="true",
        validate_every=0,
        triptychs=0,
        **more,
        **{
            "data.image_size": size,
            "data.crop_size": size,
            "data.border": "null",
            "data.zoom": "[1.0, 1.0]",
            "optim.batch_size": options.batch_size,
        },
        **shares(yaml.safe_load((ROOT / path).read_text()), epochs),
    )
    require_finished(run, "model", epochs)
    for old in ("results.json", "diw.json"):
        (run / old).unlink(missing_ok=True)


def shares(card: dict, epochs: float) -> dict[str, float]:
    """The phases of a card in a run of other length: each keeps its share of the epochs."""
    optim = card["optim"]
    return {
        f"optim.{name}": round(optim[name] * epochs / card["epochs"], 6)
        for name in ("warmup_epochs", "frozen_epochs")
        if optim.get(name)
    }


def evaluate(output: Path, given: dict[str, object]) -> None:
    """Score a model, unless that is done."""
    if not output.exists():
        call("finetune/evaluate.py", output=output, **given)


def pretraining_of(encoder: str, options: argparse.Namespace) -> Path:
    """Folder of a pretraining run."""
    return options.output_dir / f"pretrain_{encoder}"


def run_of(name: str, start: str, seed: int, options: argparse.Namespace, stage: str = "nyu") -> Path:
    """Folder of a depth run."""
    return options.output_dir / f"{name}_{stage}_{start}_{seed}"


def result_of(name: str, start: str, seed: int, options: argparse.Namespace, stage: str = "nyu") -> Path:
    """Scores of a depth run on nyu_val.txt."""
    return run_of(name, start, seed, options, stage) / "results.json"


def latencies(jobs: list[tuple[str, str, int]], options: argparse.Namespace) -> dict[str, float]:
    """Time of a forward of one image as a ratio to that of the first system: median over paired rounds, one thread.

    One model a system: weights do not change what is computed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {}
    for name, start, seed in jobs:
        if name not in models:
            models[name] = load_depth_model(run_of(name, start, seed, options) / "model").to(device)
    images = torch.zeros(1, 3, *options.size, device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            steps = {name: lambda model=model: model(images) for name, model in models.items()}
            seconds = interleaved(steps, options.rounds, device)
    finally:
        torch.set_num_threads(threads)
    base = seconds[jobs[0][0]]
    return {
        name: statistics.median(one / other for one, other in zip(times, base, strict=True))
        for name, times in seconds.items()
    }


def write_results(
    jobs: list[tuple[str, str, int]], latency: dict[str, float], options: argparse.Namespace
) -> None:
    """RESULTS.csv and RESULTS.md from the results.json of each run; values are read, never typed."""
    rows = []
    costs: dict[str, tuple[float, float]] = {}
    for name, start, seed in jobs:
        model = load_depth_model(run_of(name, start, seed, options) / "model")
        if name not in costs:
            images = torch.zeros(1, 3, *options.size)
            costs[name] = parameters(model.encoder, model.head), count_macs(model, images) / 1e9
        for stage_name in ("nyu", "diw"):
            path = result_of(name, start, seed, options, stage_name)
            if path.exists():
                relations = path.with_name("diw.json")
                rows.append(
                    row_of(name, start, seed, stage_name, path, relations, costs[name], latency, options)
                )
    write_whole(options.results.with_suffix(".csv"), rows_as_csv(rows).encode())
    write_whole(options.results.with_suffix(".md"), markdown(rows, options).encode())


def row_of(
    name: str,
    start: str,
    seed: int,
    stage_name: str,
    path: Path,
    relations: Path,
    cost: tuple[float, float],
    latency: dict[str, float],
    options: argparse.Namespace,
) -> dict[str, object]:
    """A row of the table, of one scored model."""
    results = json.loads(path.read_text())
    config = yaml.safe_load((path.with_name("config.yaml")).read_text())
    whdr = json.loads(relations.read_text())["metrics"]["whdr"] if relations.exists() else None
    written = "" if SYSTEMS[name].then is None else "official" if options.diw else "written from NYU"
    return {
        "system": name,
        "encoder": SYSTEMS[name].named(options),
        "start": start,
        "seed": seed,
        "stage": "nyu" if stage_name == "nyu" else "nyu, then diw",
        "parameters_M": f"{cost[0]:.2f}",
        "gmacs": f"{cost[1]:.2f}",
        "latency_ratio": f"{latency[name]:.2f}" if name in latency else "",
        **{metric: f"{results['metrics'][metric]:.5f}" for metric in SHOWN},
        "whdr": "" if whdr is None else f"{whdr:.5f}",
        "diw": written,
        "images": results["images"],
        "protocol": results["protocol"],
        "flip_average": results["settings"]["flip_average"],
        "epochs": config["epochs"],
        "batch_size": config["optim"]["batch_size"],
        "size": "x".join(map(str, config["data"]["image_size"])),
        "pretrain_epochs": options.pretrain_epochs if start == "spark" else 0,
        "precision": config["precision"],
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    """The table: mean over seeds, with the smallest and largest value where there are several."""
    first = rows[0]
    relations = (
        ""
        if not any(row["whdr"] for row in rows)
        else " WHDR is the share of relations ordered wrongly"
        + (
            " on Depth in the Wild."
            if options.diw
            else ", on files in the layout of Depth in the Wild, written from NYU."
        )
    )
    lines = [
        f"Protocol `{first['protocol']}` on {first['images']} validation images, white border filled. Every system:"
        f" {options.epochs:g} epochs on NYU at {first['size']} px, batch {options.batch_size};"
        f" a second stage adds {options.diw_epochs:g} on relations, and says nothing of metres."
        f" SparK: {options.pretrain_epochs:g} epochs, one pretraining an encoder. Scratch: random weights, with no"
        " branch of a ResNet at zero. Latency is that of one image on one thread, relative to the first system."
        f"{relations}",
        "",
        "| system | encoder | stage | start | parameters [M] | GMACs | latency | "
        + " | ".join(SHOWN.values())
        + " | WHDR ↓ |",
        "|---|---|---|---|---|---|---|" + "---|" * (len(SHOWN) + 1),
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["system"], row["stage"], row["start"]), []).append(row)
    for (name, stage_name, start), mine in groups.items():
        cells = [spread([float(row[metric]) for row in mine]) for metric in SHOWN]
        whdr = [float(row["whdr"]) for row in mine if row["whdr"]]
        begin = "SparK" if start == "spark" else start
        costs = (mine[0][column] for column in ("parameters_M", "gmacs", "latency_ratio"))
        told = (SYSTEMS[name].title, mine[0]["encoder"], stage_name, begin, *costs)
        lines.append(f"| {' | '.join([*told, *cells, spread(whdr) if whdr else ''])} |")
    command = shlex.join(["python", "tools/depth_systems.py", *hidden_paths(sys.argv[1:])])
    return "\n".join([*lines, "", f"Written by `{command}`.", ""])


if __name__ == "__main__":
    main()
