"""Does SparK pretraining help depth?  The whole path, for several encoders and seeds, into one table.

    python tools/study.py --data FOLDER --output_dir runs/study --results docs/results/nyu_val_small

FOLDER holds `images/` (unlabeled photos) and `nyu/` (NYU Depth V2 in the BTS "sync" layout, with nyu_train.txt and
nyu_val.txt). For each encoder: pretrain on the photos and the training RGB; then for each seed train the same depth
network from that encoder and from scratch, same data, same steps; score both on nyu_val.txt. Validation RGB is in no
training set. Every command is printed before it runs. A study that was stopped continues where it was; finished runs
are not run again. Writes RESULTS.csv, a row a depth run, and RESULTS.md, the table.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch
import yaml
from benchmarks.rows import rows_as_csv

from spark.files import write_whole
from spark.training.log import read_rows

ROOT = Path(__file__).resolve().parents[1]
METRICS = ["delta1", "delta2", "delta3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog"]
SHOWN = {
    "delta1": "δ1 ↑",
    "abs_rel": "AbsRel ↓",
    "rmse": "RMSE [m] ↓",
    "log10": "log10 ↓",
    "silog": "SILog ↓",
}
STARTS = ("spark", "scratch")
MARK = "<!-- study -->"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and nyu/")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="RESULTS: .csv and .md are added")
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["resnet18", "convnext_atto"],
        help="timm names (resnet18 convnext_atto)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of depth training (0 1)")
    parser.add_argument("--pretrain_epochs", type=float, default=5, help="of pretraining (%(default)s)")
    parser.add_argument("--depth_epochs", type=float, default=15, help="of depth training (%(default)s)")
    parser.add_argument(
        "--pretrain_config",
        default="configs/pretrain/nyu_{encoder}.yaml",
        help="{encoder} is filled in (%(default)s)",
    )
    parser.add_argument(
        "--depth_config", default="configs/depth/unetpp_nyu_small.yaml", help="of depth runs (%(default)s)"
    )
    parser.add_argument("--protocol", default="nyu-bts", help="which scores the table has (%(default)s)")
    parser.add_argument(
        "--readme", type=Path, help="also put the table between this file's `<!-- study -->` marks"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of all training (%(default)s)"
    )
    options = parser.parse_args()
    for folder in (options.data / "images", options.data / "nyu"):
        if not folder.is_dir():
            parser.error(f"{folder} does not exist: --data must hold images/ and nyu/")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    images = write_image_list(options.data, options.output_dir / "images.txt")

    jobs = [
        (encoder, start, seed) for seed in options.seeds for encoder in options.encoders for start in STARTS
    ]
    for encoder in options.encoders:
        pretrain(encoder, images, options)
    for encoder, start, seed in jobs:
        finetune(encoder, start, seed, options)
        write_results([job for job in jobs if result_of(*job, options).exists()], options)


def write_image_list(data: Path, path: Path) -> Path:
    """The unlabeled corpus: every photo of images/, and the RGB of the NYU training list (none of the validation)."""
    rgb = [
        line.split()[0].lstrip("/")
        for line in (data / "nyu" / "nyu_train.txt").read_text().splitlines()
        if line
    ]
    lines = [str((data / "images").resolve()), *(str((data / "nyu" / name).resolve()) for name in rgb)]
    path.write_text("\n".join(lines) + "\n")
    return path


def pretrain(encoder: str, images: Path, options: argparse.Namespace) -> None:
    """SparK on the unlabeled corpus."""
    card = options.pretrain_config.format(encoder=encoder)
    run, epochs = pretraining_of(encoder, options), options.pretrain_epochs
    complete("spark/pretrain.py", run, "encoder", epochs, card, options, **{"data.train": images})


def finetune(encoder: str, start: str, seed: int, options: argparse.Namespace) -> None:
    """Depth from an encoder, or from scratch."""
    run = run_of(encoder, start, seed, options)
    if start == "spark":
        depth(run, pretraining_of(encoder, options) / "encoder", seed, options.protocol, options)
    else:
        depth(run, encoder, seed, options.protocol, options, **good_start(encoder))


def good_start(encoder: str) -> dict[str, str]:
    """Options for random weights, so that pretraining is not compared with a bad start.

    timm's ResNets, and networks like them, begin with every residual branch multiplied by zero, with which errors of
    depth from scratch are larger (docs/log.md).
    """
    try:
        timm.create_model(encoder, zero_init_last=False)
    except TypeError:  # no such argument
        return {}
    return {"model.encoder_options": json.dumps({"zero_init_last": False})}


def require_good_start(run: Path, encoder: str) -> None:
    """Stop if a run from scratch that has begun, perhaps with an older version, did not have `good_start`."""
    if not (run / "config.yaml").exists():
        return
    config = yaml.safe_load((run / "config.yaml").read_text())
    wanted, had = good_start(encoder), config["model"].get("encoder_options") or {}
    if wanted and had != json.loads(wanted["model.encoder_options"]):
        sys.exit(f"error: {run} began from other random weights (encoder_options {had}): move it away")


def depth(
    run: Path, encoder: object, seed: int, protocol: str, options: argparse.Namespace, **more: object
) -> None:
    """UNet++ on the training pairs, then its score on the validation list, in results.json of the run."""
    data = {"data.root": options.data / "nyu"}
    lists = {"data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt"}
    scores, given = run / "results.json", {"encoder": encoder, "seed": seed, **data, **lists, **more}
    if complete(
        "finetune/depth.py", run, "model", options.depth_epochs, options.depth_config, options, **given
    ):
        scores.unlink(missing_ok=True)
    if not scores.exists():
        val = {**data, "data.list": "nyu_val.txt", "data.white_border": "fill"}
        call("finetune/evaluate.py", model=run / "model", protocol=protocol, output=scores, **val)


def complete(
    script: str,
    run: Path,
    result: str,
    epochs: float,
    config: str,
    options: argparse.Namespace,
    **more: object,
) -> bool:
    """Bring a run to its end, unless it is there; whether there was anything to do."""
    if finished(run, result, epochs):
        return False
    given = {"config": config, "output_dir": run, "epochs": epochs, "precision": options.precision}
    call(script, **given, resume="true", **more)
    require_finished(run, result, epochs)
    return True


def finished(run: Path, result: str, epochs: float) -> bool:
    """Whether a run reached its last step and wrote its result (which it may also write on demand, earlier)."""
    rows = read_rows(run / "metrics.jsonl")
    reached = max((row["epoch"] for row in rows if "epoch" in row), default=0.0)
    return reached >= epochs and (run / result / "model.safetensors").exists()


def require_finished(run: Path, result: str, epochs: float) -> None:
    """A run that was asked to stop saves its state and reports no failure: then the study stops too."""
    if not finished(run, result, epochs):
        sys.exit(f"stopped: {run} is not at its end; the same study command continues from here")


def pretraining_of(encoder: str, options: argparse.Namespace) -> Path:
    """Folder of a pretraining run."""
    return options.output_dir / f"pretrain_{encoder}"


def run_of(encoder: str, start: str, seed: int, options: argparse.Namespace) -> Path:
    """Folder of a depth run."""
    return options.output_dir / f"depth_{encoder}_{start}_{seed}"


def result_of(encoder: str, start: str, seed: int, options: argparse.Namespace) -> Path:
    """Scores of a depth run."""
    return run_of(encoder, start, seed, options) / "results.json"


def call(script: str, **options: object) -> None:
    """Print a command, run it, and stop the study if it fails."""
    command = [
        sys.executable,
        str(ROOT / script),
        *(part for k, v in options.items() for part in (f"--{k}", str(v))),
    ]
    print(f"\n$ {shlex.join(['python', script, *command[2:]])}", flush=True)
    begin = time.time()
    code = subprocess.run(command, cwd=Path.cwd(), env=os.environ).returncode
    if code:
        sys.exit(
            f"error: the command above failed with exit code {code}; the same study command continues from here"
        )
    print(f"({(time.time() - begin) / 60:.1f} minutes)", flush=True)


def write_results(jobs: list[tuple[str, str, int]], options: argparse.Namespace) -> None:
    """RESULTS.csv and RESULTS.md from the results.json of each run; values are read, never typed."""
    rows = []
    for encoder, start, seed in jobs:
        results = json.loads(result_of(encoder, start, seed, options).read_text())
        config = yaml.safe_load((run_of(encoder, start, seed, options) / "config.yaml").read_text())
        pretraining = yaml.safe_load((pretraining_of(encoder, options) / "config.yaml").read_text())
        if start == "scratch":
            require_good_start(run_of(encoder, start, seed, options), encoder)
        rows.append(
            {
                "encoder": encoder,
                "start": start,
                "seed": seed,
                **{name: f"{results['metrics'][name]:.5f}" for name in METRICS},
                "images": results["images"],
                "protocol": results["protocol"],
                "depth_epochs": config["epochs"],
                "depth_size": "x".join(map(str, config["data"]["crop_size"])),
                "pretrain_epochs": pretraining["epochs"] if start == "spark" else 0,
                "pretrain_size": pretraining["model"]["input_size"] if start == "spark" else "",
                "precision": config["precision"],
                "device": torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else f"{os.cpu_count()} CPU cores",
                "torch": torch.__version__,
                "timm": timm.__version__,
            }
        )
    write_whole(options.results.with_suffix(".csv"), rows_as_csv(rows).encode())
    table = markdown(rows, options)
    write_whole(options.results.with_suffix(".md"), table.encode())
    if options.readme:
        put_between_marks(options.readme, table)


def markdown(rows: list[dict], options: argparse.Namespace) -> str:
    """The table: mean over seeds, with the smallest and largest value where there are several."""
    lines = [
        f"Protocol `{rows[0]['protocol']}` on {rows[0]['images']} validation images, white border filled. "
        f"Every row: UNet++, {rows[0]['depth_epochs']:g} epochs at {rows[0]['depth_size']} px. "
        f"SparK: {options.pretrain_epochs:g} epochs, one pretraining an encoder; seeds are of depth training. "
        "Scratch: random weights, with no branch of a ResNet at zero. Mean, and range over seeds.",
        "",
        "| encoder | start | seeds | " + " | ".join(SHOWN.values()) + " |",
        "|---|---|---|" + "---|" * len(SHOWN),
    ]
    for encoder in options.encoders:
        for start in STARTS:
            mine = [row for row in rows if row["encoder"] == encoder and row["start"] == start]
            if mine:
                cells = [spread([float(row[metric]) for row in mine]) for metric in SHOWN]
                name = "SparK" if start == "spark" else "scratch"
                lines.append(f"| {encoder} | {name} | {len(mine)} | " + " | ".join(cells) + " |")
    command = shlex.join(["python", "tools/study.py", *hidden_paths(sys.argv[1:])])
    return "\n".join([*lines, "", f"Written by `{command}`.", ""])


def put_between_marks(path: Path, table: str) -> None:
    """Replace what stands between the two marks of a Markdown file."""
    parts = path.read_text(encoding="utf-8").split(MARK)
    if len(parts) != 3:
        sys.exit(f"error: {path} must hold the mark {MARK} twice, around the place of the table")
    write_whole(path, f"{parts[0]}{MARK}\n\n{table}\n{MARK}{parts[2]}".encode())


def spread(values: list[float]) -> str:
    """Mean, and the range if there is one."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f}-{max(values):.3f})"


def hidden_paths(arguments: list[str]) -> list[str]:
    """The command as anyone would type it: where the data lay on this machine is nobody's business."""
    hidden = {"--data": "$SPARK_DATA", "--diw": "$DIW"}
    return [hidden.get(before, a) for before, a in zip(["", *arguments], arguments, strict=False)]


if __name__ == "__main__":
    main()
