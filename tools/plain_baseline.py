"""A plain training of UNet++ from scratch: the independent reference that our own training is compared with.

    python -m tools.plain_baseline --data NYU --output results.json --seed 0

What anyone would write first, and nothing of ours in training: segmentation_models_pytorch's UNet++, ResNet-18 with
random weights, whole frames at 128x160, flips, AdamW with OneCycle at 3e-4, SILog, batch 16, 15 epochs. NYU is NYU
Depth V2 in the BTS "sync" layout, with nyu_train.txt, and nyu_val.txt, on which it is scored by the protocol nyu-bts.
An arm of tools/studies/unetpp_plain.yaml.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

from finetune.depth_data import open_depth_data
from finetune.protocols import get_protocol
from finetune.scoring.depth import DepthEvaluator
from finetune.scoring.metrics import write_results

SIZE = (128, 160)
BATCH = 16
PEAK = 3e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pairs(NamedTuple):
    """All training pairs, in memory: images uint8 [N, 3, H, W], depth float32 [N, 1, H, W] [m], 0 = no reading."""

    images: Tensor
    depth: Tensor


def main() -> None:
    """Train, score, write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of NYU with nyu_train.txt, nyu_val.txt"
    )
    parser.add_argument("--output", type=Path, required=True, help="file of the scores, JSON")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--epochs", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="(%(default)s)")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    model = smp.UnetPlusPlus("resnet18", encoder_weights=None, classes=1)
    train_plain(model, read_pairs(options.data, "nyu_train.txt"), options.epochs, options.precision)
    evaluator = DepthEvaluator(get_protocol("nyu-bts"))
    model.eval()
    held_out = open_depth_data(options.data, "nyu_val.txt", "test")
    for i in range(len(held_out)):
        sample = held_out[i]
        with torch.inference_mode():
            depth = predict(model, resized(sample.image)[None])
        evaluator.add(sample, depth[0, 0].numpy())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_results(options.output, {**evaluator.results(), "epochs": options.epochs})


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


if __name__ == "__main__":
    main()
