"""Which decoder should pretraining have?  Cost against transfer, at equal images and at equal time.

    python tools/decoder_study.py --data FOLDER --output_dir runs/decoders --results docs/results/decoders

FOLDER as for tools/study.py, with images/scenes/{train,val}/CLASS besides. A decoder is written WIDTH/STAGES/KERNEL
(decoder_width, decoder_stages, densify_kernel). First the seconds of a step of the pretraining config's model are
taken, in turns, on 32 images. Then each pretrains the same encoder on the same number of images; those named by
--equal_time also for as many epochs as fit into the time that the first one takes. Every encoder is scored by kNN and a
linear probe on the scenes, and, if named by --depth, by the depth network of tools/study.py on nyu_val.txt. The decoder
is thrown away, only the encoder counts. A study that was stopped continues where it was. Writes RESULTS.csv, a row a
pretraining, and RESULTS.md; with --keep, rows of RESULTS.csv that were made elsewhere, on the device they name, stay.
"""

import argparse
import csv
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from benchmarks.decoders import Decoder
from benchmarks.rows import rows_as_csv
from benchmarks.timing import interleaved, refuse_busy_machine, summary
from study import call, complete, depth, hidden_paths, write_image_list

from spark import SparK
from spark.config import ModelConfig, PretrainConfig
from spark.files import write_whole
from spark.sparse.choice import device_name
from spark.training.cli import parse_config
from spark.training.log import read_rows

_BATCH = 32
"""Images of a measured step."""


class Job(NamedTuple):
    """One pretraining: a decoder, its epochs, and what it has in common with the first decoder's."""

    decoder: Decoder
    epochs: float
    equal: str

    @property
    def name(self) -> str:
        """Of its folders."""
        return f"{str(self.decoder).replace('/', '-')}_{self.equal}"


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    decoders = [
        Decoder(768, 5, 3),
        Decoder(256, 5, 3),
        Decoder(384, 4, 1),
        Decoder(256, 4, 1),
        Decoder(256, 3, 1),
    ]
    parser.add_argument("--data", type=Path, required=True, help="folder with images/ and nyu/")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="RESULTS: .csv and .md are added")
    parser.add_argument(
        "--decoders",
        type=Decoder.parse,
        nargs="+",
        default=decoders,
        help=f"WIDTH/STAGES/KERNEL ({' '.join(map(str, decoders))})",
    )
    parser.add_argument("--equal_time", type=Decoder.parse, nargs="*", default=[], help="also at equal time")
    parser.add_argument("--depth", type=Decoder.parse, nargs="*", default=[], help="also scored by depth")
    parser.add_argument(
        "--epochs", type=float, default=2, help="of all decoders, at equal images (%(default)s)"
    )
    parser.add_argument("--depth_epochs", type=float, default=15, help="of depth training (%(default)s)")
    parser.add_argument(
        "--pretrain_config", default="configs/pretrain/nyu_resnet18.yaml", help="of pretraining (%(default)s)"
    )
    parser.add_argument(
        "--depth_config", default="configs/depth/unetpp_nyu_small.yaml", help="of depth runs (%(default)s)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="of all training (%(default)s)"
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="rows of RESULTS.csv stay as they are where their runs are not asked for or not in OUTPUT_DIR",
    )
    parser.add_argument("--busy", action="store_true", help="measure even though other programs run")
    options = parser.parse_args()
    for decoder in (*options.equal_time, *options.depth):
        if decoder not in options.decoders:
            parser.error(f"{decoder} is not among --decoders")
    for folder in (options.data / "images" / "scenes", options.data / "nyu"):
        if not folder.is_dir():
            parser.error(f"{folder} does not exist: --data must hold images/scenes/ and nyu/")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    images = write_image_list(options.data, options.output_dir / "images.txt")

    kept = kept_rows(options) if options.keep else {}
    costs = step_costs(options)
    jobs = [Job(decoder, options.epochs, "images") for decoder in options.decoders]
    jobs += [equal_time_job(decoder, costs, options) for decoder in options.equal_time]
    made_here = [job for job in jobs if job.name not in kept]
    for job in made_here:
        pretrain(job, images, options)
        probe(job, options)
        write_results(jobs, kept, costs, options)
    for job in made_here:
        if job.decoder in options.depth:
            encoder = options.output_dir / f"pretrain_{job.name}" / "encoder"
            depth(options.output_dir / f"depth_{job.name}", encoder, 0, "nyu-bts", options)
            write_results(jobs, kept, costs, options)


def kept_rows(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows of RESULTS.csv, by the name of their job, which is not asked for or has no pretraining in OUTPUT_DIR.

    Raises:
        SystemExit: one of them is of another number of epochs or precision than is asked for.
    """
    kept = {}
    asked = {Job(decoder, 0, "images").name for decoder in options.decoders}
    asked |= {Job(decoder, 0, "time").name for decoder in options.equal_time}
    path = options.results.with_suffix(".csv")
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines()) if path.exists() else []
    for row in rows:
        decoder = decoder_of(row)
        job = Job(decoder, float(row["epochs"]), row["equal"])
        if job.name in asked and (options.output_dir / f"pretrain_{job.name}").exists():
            continue
        if row["precision"] != options.precision or (job.equal == "images" and job.epochs != options.epochs):
            sys.exit(
                f"error: {path} has {decoder} with {job.epochs:g} epochs in {row['precision']}, "
                f"not {options.epochs:g} in {options.precision}: a table has one setting"
            )
        kept[job.name] = row
    return kept


def decoder_of(row: Mapping[str, Any]) -> Decoder:
    """That of a row, as it was written or as it is read again."""
    width, stages, kernel = (row[name] for name in Decoder().options)
    return Decoder(int(width), None if stages in (None, "") else int(stages), int(kernel))


def step_costs(options: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Seconds of a training step of each decoder, and their ratio to the first's.

    They are kept in OUTPUT_DIR/costs_*.json. Decoders that are not in it, or on another device, are measured in turns
    with the first one; what is known stays as it is.

    Raises:
        SystemExit: the machine is busy.
    """
    required = ["--data.train", "read by pretraining", "--output_dir", str(options.output_dir)]
    config = parse_config(PretrainConfig, ["--config", options.pretrain_config, *required], "").model
    models = {str(d): dataclasses.replace(config, **d.options) for d in options.decoders}
    path = options.output_dir / f"costs_{config.name}_{_size(config)}_{options.precision}.json"
    device, first = "cuda" if torch.cuda.is_available() else "cpu", str(options.decoders[0])
    setting = {"base": first, "device": device_name(device)}
    costs = json.loads(path.read_text()) if path.exists() else {}
    costs = {name: cost for name, cost in costs.items() if setting.items() <= cost.items()}
    missing = [decoder for decoder in models if decoder not in costs]
    if not missing:
        return costs
    try:
        refuse_busy_machine(options.busy)
    except ValueError as error:
        sys.exit(f"error: {error}")
    torch.manual_seed(0)
    steps = {
        name: training_step(models[name], device, options.precision)
        for name in dict.fromkeys([first, *missing])
    }
    seconds = interleaved(steps, 5, device)
    costs |= {name: summary(seconds[name], seconds[first], _BATCH) | setting for name in missing}
    write_whole(path, json.dumps(costs, indent=1).encode())
    return costs


def equal_time_job(decoder: Decoder, costs: dict[str, dict[str, str]], options: argparse.Namespace) -> Job:
    """As many epochs as fit into the time of the first decoder's; a run that was begun keeps its number."""
    job = Job(decoder, round(options.epochs * float(costs[str(decoder)]["speedup_median"]), 2), "time")
    config = options.output_dir / f"pretrain_{job.name}" / "config.yaml"
    if config.exists():
        job = job._replace(epochs=yaml.safe_load(config.read_text(encoding="utf-8"))["epochs"])
    return job


def _size(config: ModelConfig) -> str:
    """For the name of a file."""
    sides = config.input_size
    return str(sides) if isinstance(sides, int) else "x".join(map(str, sides))


def training_step(config: ModelConfig, device: str, precision: str) -> Callable[[], object]:
    """A forward and backward of the model that is pretrained, on `_BATCH` images."""
    options = {
        name: getattr(config, name) for name in ("mask_ratio", "in_chans", "patch_size", "densify_norm")
    }
    options |= {name: getattr(config, name) for name in Decoder().options}
    model = SparK(config.name, config.input_size, sync_bn=False, **options).to(device)
    images = torch.randn(_BATCH, config.in_chans, *model.input_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def step() -> None:
        with torch.autocast(device, dtype, enabled=precision != "fp32"):
            loss = model(images).loss
        loss.backward()
        model.zero_grad()

    return step


def pretrain(job: Job, images: Path, options: argparse.Namespace) -> None:
    """SparK on the unlabeled corpus."""
    run = options.output_dir / f"pretrain_{job.name}"
    given = {"data.train": images, "optim.warmup_epochs": job.epochs / 5}
    given |= {f"model.{k}": v for k, v in job.decoder.options.items() if v is not None}
    card = options.pretrain_config
    if complete("spark/pretrain.py", run, "encoder", job.epochs, card, options, **given):
        # What was scored before is another encoder.
        (options.output_dir / f"probe_{job.name}.json").unlink(missing_ok=True)
        shutil.rmtree(options.output_dir / f"depth_{job.name}", ignore_errors=True)


def probe(job: Job, options: argparse.Namespace) -> None:
    """kNN and linear probe of the frozen encoder."""
    output = options.output_dir / f"probe_{job.name}.json"
    if not output.exists():
        call(
            "spark/commands/probe.py",
            encoder=options.output_dir / f"pretrain_{job.name}" / "encoder",
            data=options.data / "images" / "scenes",
            size=64,
            level="all",
            precision=options.precision,
            output=output,
        )


def write_results(
    jobs: list[Job],
    kept: dict[str, dict[str, Any]],
    costs: dict[str, dict[str, str]],
    options: argparse.Namespace,
) -> None:
    """RESULTS.csv and RESULTS.md from the files of the runs that are done; values are read, never typed."""
    others = [row for name, row in kept.items() if name not in {job.name for job in jobs}]
    rows = [kept.get(job.name) or result(job, costs, options) for job in jobs]
    rows = [row for row in (*rows, *others) if row is not None]
    write_whole(options.results.with_suffix(".csv"), rows_as_csv(rows).encode())
    write_whole(options.results.with_suffix(".md"), markdown(rows).encode())


def result(job: Job, costs: dict[str, dict[str, str]], options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of a pretraining, or None where it is not there yet; without depth training those columns are empty."""
    path = options.output_dir / f"probe_{job.name}.json"
    if not path.exists():
        return None
    scores = json.loads(path.read_text())["encoders"][0]
    losses = [
        row["loss"]
        for row in read_rows(options.output_dir / f"pretrain_{job.name}" / "metrics.jsonl")
        if "loss" in row
    ]
    scored = options.output_dir / f"depth_{job.name}" / "results.json"
    metrics = json.loads(scored.read_text())["metrics"] if scored.exists() else {}
    cost = costs[str(job.decoder)]
    return {
        **job.decoder.options,
        "equal": job.equal,
        "epochs": job.epochs,
        "step_seconds": cost["seconds_median"],
        "step_speedup": cost["speedup_median"],
        "final_loss": f"{losses[-1]:.4f}",
        **{f"knn_{k}": f"{share:.4f}" for k, share in scores["knn"].items()},
        "linear": f"{scores['linear']['val']:.4f}",
        **{
            name: f"{metrics[name]:.4f}" if metrics else "" for name in ("delta1", "abs_rel", "rmse", "silog")
        },
        "precision": options.precision,
        "device": cost["device"],
        "torch": torch.__version__,
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table: speed of a step over the first decoder's, probes [%], depth scores where there are some."""
    lines = [
        "| decoder | equal | epochs | step, speed | kNN-20 | linear | δ1 ↑ | AbsRel ↓ | RMSE [m] ↓ | device |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        decoder = decoder_of(row)
        shown = [
            f"{float(row['step_speedup']):.2f}x",
            *(f"{100 * float(row[k]):.1f} %" for k in ("knn_20", "linear")),
        ]
        shown += [f"{float(row[k]):.3f}" if row[k] else "" for k in ("delta1", "abs_rel", "rmse")]
        shown.append(row["device"])
        lines.append(f"| {decoder} | {row['equal']} | {float(row['epochs']):g} | " + " | ".join(shown) + " |")
    command = shlex.join(["python", "tools/decoder_study.py", *hidden_paths(sys.argv[1:])])
    return "\n".join([*lines, "", f"Written by `{command}`.", ""])


if __name__ == "__main__":
    main()
