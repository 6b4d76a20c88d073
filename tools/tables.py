"""Tables of the documentation, from the code that they are about.

    python -m tools.tables protocols    the evaluation protocols, into docs/protocols.md
    python -m tools.tables costs        what the models of configs/depth cost, into docs/results/depth_cost.csv

In the costs a row is a run card: its model on the encoder that it or its command names, else ResNet-50, at its own
image size, counted on shapes alone. GMACs are multiply-accumulates of convolutions and matrix products of one forward,
in units of 10^9. What losses own (the segmentation decoder) is counted apart: a training step costs
about three times as much of each. The table of encoders has a command of its own, `python -m tools.encoders`.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from finetune import DepthModel
from finetune.config import DepthConfig
from finetune.losses.weighted import WeightedLoss
from finetune.protocols import PROTOCOLS, Protocol
from finetune.scoring.depth import valid_text
from spark.files import write_whole
from spark.training.cli import parse_config
from tools.benchmarks.models import count_macs, parameters
from tools.benchmarks.rows import rows_as_csv

ROOT = Path(__file__).resolve().parents[1]
CARDS = ROOT / "configs" / "depth"
PAGE = ROOT / "docs" / "protocols.md"
COSTS = ROOT / "docs" / "results" / "depth_cost.csv"
BEGIN, END = "<!-- table: python -m tools.tables protocols -->\n", "<!-- end of table -->\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Write a table."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("table", choices=["protocols", "costs"])
    if parser.parse_args(argv).table == "protocols":
        write_whole(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())
    else:
        write_whole(COSTS, rows_as_csv([cost_of(card) for card in sorted(CARDS.glob("*.yaml"))]).encode())


def named_encoder(card: Path, default: str) -> str:
    """The timm name that a config, or the command in its head, gives; else the default."""
    text = card.read_text(encoding="utf-8")
    found = re.search(r"^encoder: (\S+)", text, re.M) or re.search(r"^#.*?--encoder ([a-z]\w+)", text, re.M)
    return found[1] if found else default


def cost_of(card: Path) -> dict[str, str]:
    """The row of a config: what its model has and does at its own image size."""
    encoder = named_encoder(card, "resnet50")
    given = ["--config", str(card), "--encoder", encoder, "--data.root", ".", "--output_dir", "."]
    config = parse_config(DepthConfig, given, "")
    losses = WeightedLoss(config.losses, config.loss_options)
    with torch.device("meta"), torch.no_grad():  # shapes without values: a large model costs nothing
        model = DepthModel(
            encoder,
            head=config.model.head,
            encoder_options=config.model.encoder_options,
            mean=config.data.mean,
            std=config.data.std,
            **config.model.head_options,
        ).eval()
        images = torch.empty(1, 3, *config.data.image_size)
        macs = count_macs(lambda: model(images))
        losses.attach(model)
        output = model.train()(images.expand(2, -1, -1, -1))  # batch norm wants two
        batch = {"labels": torch.empty(2, *config.data.image_size)}
        owners = [loss for loss in losses.terms.values() if any(True for _ in loss.parameters())]
        extra = sum(count_macs(lambda one=one: one.prediction(output, batch, model)) / 2 for one in owners)
    return {
        "config": card.stem,
        "encoder": encoder,
        "head": config.model.head,
        "height": str(config.data.image_size[0]),
        "width": str(config.data.image_size[1]),
        "parameters_M": f"{parameters(model.encoder, model.head):.2f}",
        "gmacs": f"{macs / 1e9:.2f}",
        "training_only_parameters_M": f"{parameters(losses):.2f}",
        "training_only_gmacs": f"{extra / 1e9:.2f}",
    }


def page(text: str) -> str:
    """The page with the table as the records have it."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + table() + END + rest.partition(END)[2]


def table() -> str:
    """A row of Markdown for each protocol, and a line with its source."""
    rows = [
        "| protocol | ground truth that counts | pixels | prediction | mean over | tables |",
        "|---|---|---|---|---|---|",
    ]
    rows += [
        f"| `{name}` | {counted(one)} | {pixels(one)} | {prepared(one)} | "
        f"{'pixels' if one.aggregation == 'pooled' else 'images'} | {one.tables} |"
        for name, one in PROTOCOLS.items()
        if one.supervision == "metric" and not one.scores_pairs
    ]
    sources = [
        f"- `{name}`: {one.description}" + (f" Read in: {one.source}." if one.source else "")
        for name, one in PROTOCOLS.items()
    ]
    return "\n" + "\n".join(rows) + "\n\n" + "\n".join(sources) + "\n\n"


def counted(protocol: Protocol) -> str:
    """Which depths count."""
    said = protocol.data in ("nyu", "kitti")
    return f"{protocol.depth}, {valid_text(protocol)}" if said else valid_text(protocol)


def pixels(protocol: Protocol) -> str:
    """Which pixels count."""
    view = ", ".join(f"{step.replace('_', ' ')} {h}x{w}" for step, h, w in protocol.view)
    crop = ""
    if protocol.crop is not None:
        top, bottom, left, right = protocol.crop
        crop = f"{top}:{bottom}, {left}:{right}" + (", scaled" if protocol.scale_crop else "")
    elif protocol.crop_shares is not None:
        crop = "shares " + ", ".join(map(str, protocol.crop_shares))
    return "; ".join(filter(None, (view, crop))) or "all"


def prepared(protocol: Protocol) -> str:
    """What becomes of a prediction."""
    flips = "flip average" + (" of clipped ones" if protocol.clip_before_average else "")
    said = [
        flips if protocol.flip_average else "",
        "sees the benchmark crop" if protocol.sees == "kb_crop" else "",
        "inverse depth" if protocol.space == "disparity" else "",
        "align_corners" if protocol.align_corners else "",
        f"fitted: {protocol.alignment}" if protocol.alignment != "none" else "",
        "" if protocol.clip else "not clipped",
    ]
    return ", ".join(filter(None, said)) or "clipped at full size"


if __name__ == "__main__":
    main()
