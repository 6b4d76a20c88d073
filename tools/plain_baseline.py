"""Is our training worth having?  UNet++ from scratch by a plain script, and by finetune/depth.py, same seed and budget.

    python tools/plain_baseline.py --data NYU --output_dir runs/plain --results docs/results/unetpp_plain

NYU is NYU Depth V2 in the BTS "sync" layout, with nyu_train.txt and nyu_val.txt. The plain script is what anyone would
write first, and uses nothing of ours for training: segmentation_models_pytorch's UNet++, ResNet-18 with random weights,
whole frames at 128x160, flips, AdamW with OneCycle at 3e-4, SILog, batch 16, 15 epochs. Ours is
configs/depth/unetpp_nyu_128x160.yaml: the same network, frame size, batch, number of epochs and loss, its own schedule
and augmentation. Both are scored by the same protocol on nyu_val.txt. Finished runs are not run again. Writes
RESULTS.csv, a row a method and seed, and RESULTS.md.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
from benchmarks.rows import rows_as_csv
from study import METRICS, SHOWN, call, finished, require_finished, spread
from torch import Tensor

from finetune.depth_data import open_depth_data
from finetune.protocols import get_protocol
from finetune.scoring.depth import DepthEvaluator
from finetune.scoring.metrics import write_results
from spark.files import write_whole

SIZE = (128, 160)
BATCH = 16
PEAK = 3e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONFIG = "configs/depth/unetpp_nyu_128x160.yaml"
METHODS = {"plain": "plain script", "ours": "`finetune/depth.py`"}


class Pairs(NamedTuple):
    """All training pairs, in memory: images uint8 [N, 3, H, W], depth float32 [N, 1, H, W] [m], 0 = no reading."""

    images: Tensor
    depth: Tensor


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of NYU with nyu_train.txt, nyu_val.txt"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--results", type=Path, required=True, help="RESULTS: .csv and .md are added")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs (0)")
    parser.add_argument("--epochs", type=int, default=15, help="of each run (%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of both (%(default)s)")
    options = parser.parse_args()
    for name in ("nyu_train.txt", "nyu_val.txt"):
        if not (options.data / name).is_file():
            parser.error(f"{options.data / name} does not exist: --data must be NYU in the BTS sync layout")
    for seed in options.seeds:
        for method, run in (("plain", run_plain), ("ours", run_ours)):
            folder = options.output_dir / f"{method}_{seed}"
            if not (folder / "results.json").exists():
                run(folder, seed, options)
            write_tables(options)


def run_plain(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """Train and score the plain script."""
    print(f"\nplain script, seed {seed}", flush=True)
    begin = time.time()
    torch.manual_seed(seed)
    model = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1)
    train_plain(model, read_pairs(options.data, "nyu_train.txt"), options.epochs, options.precision)
    print(f"({(time.time() - begin) / 60:.1f} minutes)", flush=True)
    evaluator = DepthEvaluator(get_protocol("nyu-bts"))
    model.eval()
    held_out = open_depth_data(options.data, "nyu_val.txt", "test")
    for i in range(len(held_out)):
        sample = held_out[i]
        with torch.inference_mode():
            depth = predict(model, resized(sample.image)[None])
        evaluator.add(sample, depth[0, 0].numpy())
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.json", {**evaluator.results(), "epochs": options.epochs})


def train_plain(model: torch.nn.Module, pairs: Pairs, epochs: int, precision: str) -> None:
    """AdamW, OneCycle, SILog, flips."""
    steps = epochs * (len(pairs.images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), PEAK)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=steps)
    model.train()
    for step, (images, depth) in enumerate(batches(pairs, epochs)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            predicted = predict(model, images)
        loss = silog(predicted, depth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.3f}", flush=True)


def predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> depth [B, 1, H, W] [m], up to 10 m."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return 10 * model((images / 255 - mean) / std).float().sigmoid()


def silog(predicted: Tensor, depth: Tensor) -> Tensor:
    """10 sqrt(mean(g^2) - 0.85 mean(g)^2) of the log ratios g where there is a reading below 10 m."""
    valid = (depth > 1e-3) & (depth < 10)
    g = predicted[valid].clamp(min=1e-3).log() - depth[valid].log()
    return 10 * (g.square().mean() - 0.85 * g.mean().square()).sqrt()


def batches(pairs: Pairs, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled, each pair mirrored half of the time; the rest of an epoch that fills no batch is left out."""
    for _ in range(epochs):
        for chosen in torch.randperm(len(pairs.images)).split(BATCH):
            if len(chosen) == BATCH:
                images, depth = pairs.images[chosen], pairs.depth[chosen]
                flip = (torch.rand(BATCH) < 0.5).view(-1, 1, 1, 1)
                yield images.flip(-1).where(flip, images), depth.flip(-1).where(flip, depth)


def read_pairs(root: Path, name: str) -> Pairs:
    """The pairs of a BTS list: "/scene/rgb.jpg /scene/depth.png focal"."""
    rows = [line.split() for line in (root / name).read_text().splitlines() if line.strip()]
    images = [
        cv2.cvtColor(read(root / row[0].lstrip("/"), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB) for row in rows
    ]
    depths = [read(root / row[1].lstrip("/"), cv2.IMREAD_UNCHANGED) for row in rows]
    small = [cv2.resize(d, SIZE[::-1], interpolation=cv2.INTER_NEAREST) for d in depths]
    metres = torch.from_numpy(np.stack(small).astype(np.float32) / 1000)
    return Pairs(torch.stack([resized(image) for image in images]), metres[:, None])


def read(path: Path, flags: int) -> np.ndarray:
    """A picture as OpenCV reads it.

    Raises:
        SystemExit: it cannot.
    """
    picture = cv2.imread(str(path), flags)
    if picture is None:
        sys.exit(f"error: {path} is missing or no picture")
    return picture


def resized(image: np.ndarray) -> Tensor:
    """uint8 [h, w, 3] -> uint8 [3, H, W]."""
    return torch.from_numpy(cv2.resize(image, SIZE[::-1], interpolation=cv2.INTER_AREA)).permute(2, 0, 1)


def run_ours(folder: Path, seed: int, options: argparse.Namespace) -> None:
    """Train and score by our own scripts."""
    data = {"data.root": options.data, "data.list": "nyu_train.txt", "data.val_list": "nyu_val.txt"}
    if not finished(folder, "model", options.epochs):
        call(
            "finetune/depth.py",
            config=CONFIG,
            encoder="resnet18",
            output_dir=folder,
            epochs=options.epochs,
            precision=options.precision,
            seed=seed,
            resume="true",
            **data,
        )
        require_finished(folder, "model", options.epochs)
    call(
        "finetune/evaluate.py",
        model=folder / "model",
        protocol="nyu-bts",
        output=folder / "results.json",
        **{"data.root": options.data, "data.list": "nyu_val.txt"},
    )


def write_tables(options: argparse.Namespace) -> None:
    """RESULTS.csv and RESULTS.md from the results.json of each run; values are read, never typed."""
    rows = [
        {
            "method": method,
            "seed": seed,
            **{name: f"{results['metrics'][name]:.5f}" for name in METRICS},
            "images": results["images"],
            "protocol": results["protocol"],
            "epochs": options.epochs,
            "size": "x".join(map(str, SIZE)),
            "batch": BATCH,
            "precision": options.precision,
            "device": f"{os.cpu_count()} CPU cores",
            "torch": torch.__version__,
            "segmentation_models_pytorch": smp.__version__,
        }
        for method in METHODS
        for seed in options.seeds
        if (path := options.output_dir / f"{method}_{seed}" / "results.json").exists()
        for results in [json.loads(path.read_text())]
    ]
    write_whole(options.results.with_suffix(".csv"), rows_as_csv(rows).encode())
    lines = [
        f"UNet++ with a ResNet-18 from scratch: {options.epochs} epochs of nyu_train.txt at {SIZE[0]}x{SIZE[1]}, "
        f"batch {BATCH}, {options.precision}; protocol `{rows[0]['protocol']}` on the {rows[0]['images']} images of "
        "nyu_val.txt.",
        "",
        "| training | seeds | " + " | ".join(SHOWN.values()) + " |",
        "|---|---|" + "---|" * len(SHOWN),
    ]
    for method, name in METHODS.items():
        if mine := [row for row in rows if row["method"] == method]:
            cells = [spread([float(row[metric]) for row in mine]) for metric in SHOWN]
            lines.append(f"| {name} | {len(mine)} | " + " | ".join(cells) + " |")
    arguments = ["$NYU" if i and sys.argv[i] == "--data" else a for i, a in enumerate(sys.argv[1:])]
    command = shlex.join(["python", "tools/plain_baseline.py", *arguments])
    write_whole(
        options.results.with_suffix(".md"), "\n".join([*lines, "", f"Written by `{command}`.", ""]).encode()
    )


if __name__ == "__main__":
    main()
