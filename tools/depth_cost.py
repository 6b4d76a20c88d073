"""Parameters and multiplications of the depth systems in configs/depth, counted on shapes alone.

    python tools/depth_cost.py --output docs/results/depth_cost.csv

One row a config: its model on the encoder that it or its command names, else on --encoder, at its own image size.
GMACs are multiply-accumulates of convolutions and matrix products of one forward, in units of 10^9. What training has
beside the model (the segmentation decoder) is counted apart: a training step costs about three times as much of each.
"""

import argparse
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from finetune.model.segmentation import attach_segmentation
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finetune import DepthModel
from finetune.config import DepthConfig
from finetune.losses import WeightedLoss
from spark.files import write_whole
from spark.training.cli import parse_config

CARDS = Path(__file__).resolve().parents[1] / "configs" / "depth"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="CSV file to write")
    parser.add_argument(
        "--encoder", default="resnet50", help="timm name where a config names none (%(default)s)"
    )
    args = parser.parse_args(argv)
    rows = [cost_of(card, args.encoder) for card in sorted(CARDS.glob("*.yaml"))]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(args.output, table.getvalue().encode())
    print(table.getvalue(), end="")


def named_encoder(card: Path, default: str) -> str:
    """The timm name that a config, or the command in its head, gives; else the default."""
    text = card.read_text(encoding="utf-8")
    found = re.search(r"^encoder: (\S+)", text, re.M) or re.search(r"^#.*?--encoder ([a-z]\w+)", text, re.M)
    return found[1] if found else default


def cost_of(card: Path, default_encoder: str) -> dict[str, str]:
    """The row of a config: what its model has and does at its own image size."""
    encoder = named_encoder(card, default_encoder)
    given = ["--config", str(card), "--encoder", encoder, "--data.root", ".", "--output_dir", "."]
    config = parse_config(DepthConfig, given, "")
    losses = WeightedLoss(config.losses, config.loss_options)
    with torch.device("meta"):  # shapes without values: a large model costs nothing
        model = DepthModel(
            encoder,
            head=config.model.head,
            mean=config.data.mean,
            std=config.data.std,
            **config.model.head_options,
        )
        images = torch.empty(1, 3, *config.data.image_size)
        macs = count_macs(model.eval(), images)
        decoder: nn.Module = nn.Identity()
        extra = 0.0
        if losses.segmentation is not None:
            attach_segmentation(model, losses.segmentation.classes, losses.segmentation.decoder_channels)
            assert model.segmentation is not None
            decoder = model.segmentation
            extra = count_macs(model.train(), images.expand(2, -1, -1, -1)) / 2 - macs
    return {
        "config": card.stem,
        "encoder": encoder,
        "head": config.model.head,
        "height": str(config.data.image_size[0]),
        "width": str(config.data.image_size[1]),
        "parameters_M": f"{parameters(model.encoder, model.head):.2f}",
        "gmacs": f"{macs / 1e9:.2f}",
        "training_only_parameters_M": f"{parameters(decoder):.2f}",
        "training_only_gmacs": f"{extra / 1e9:.2f}",
    }


def parameters(*modules: nn.Module) -> float:
    """Parameters that take part in the model's output, in millions (a classifier's norm does not)."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad) / 1e6


def count_macs(model: nn.Module, images: torch.Tensor) -> float:
    """Multiply-accumulates of a forward."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops() / 2


if __name__ == "__main__":
    main()
