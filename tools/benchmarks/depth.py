"""What the segmentation decoder, which only training has, costs a step of depth training.

Training steps of one model `with` and `without` the segmentation loss of its run card; on equal weights both must first
predict the same depth and have the same value of every other loss. A training step is forward, losses, backward,
clipping and the optimizer's update, all as the run card has them.
"""

import argparse
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from finetune.config import DepthConfig
from finetune.tasks.build import build_model, build_trained
from spark.errors import UserError
from spark.sparse.choice import device_name
from spark.training.cli import parse_config
from spark.training.optim import build_optimizer, parameter_groups
from tools.benchmarks.models import count_macs
from tools.benchmarks.rows import Command, Row, versions
from tools.benchmarks.timing import interleaved, summary
from tools.tables import CARDS, named_encoder

SEGMENTATION = "segmentation"

Batch = Mapping[str, Any]


def read_card(card: str, encoder: str, **options: object) -> DepthConfig:
    """A run card of configs/depth with some options of another value.

    Args:
        card: its name, without .yaml.
        encoder: timm name, where neither the card nor the command in its head names one.
        options: dotted names with _ for the dots, such as `data_root`.

    Raises:
        ValueError: no such card.
    """
    path = CARDS / f"{card}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in CARDS.glob("*.yaml")))
        raise UserError(f"there is no run card {card}: there are {known}")
    given = {"config": path, "encoder": named_encoder(path, encoder), "output_dir": ".", **options}
    return parse_config(
        DepthConfig, [f"--{name.replace('data_', 'data.')}={value}" for name, value in given.items()], ""
    )


class Training:
    """A model in training, as finetune/depth.py has it in one process on a CPU.

    Args:
        config: of the run.
        losses: name and weight of those that take part.
    """

    def __init__(self, config: DepthConfig, losses: Mapping[str, float]) -> None:
        options = {name: values for name, values in config.loss_options.items() if name in losses}
        self.config = replace(config, losses=dict(losses), loss_options=options)
        self.model = build_model(config)[0]
        self.trained = build_trained(self.model, self.config)
        self.trained.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optim = config.optim
        groups = parameter_groups(
            self.trained,
            optim.weight_decay,
            layer_decay=optim.layer_decay,
            encoder_lr_factor=optim.encoder_lr_factor,
        )
        self.optimizer = build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.eps)
        self.trained.train()

    def forward(self, batch: Batch) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """Predicted depth [B, 1, H, W] [m], the loss, and each of its terms."""
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(images)
            loss, parts = self.trained.criterion(output, batch, self.model)
        return output.depth, loss, parts

    def step(self, batch: Batch) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.forward(batch)[1].backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.optim.clip_grad or float("inf"))
        self.optimizer.step()

    def macs(self, batch: Batch) -> float:
        """Multiply-accumulates of convolutions and matrix products in a forward and backward."""
        macs = count_macs(lambda: self.forward(batch)[1].backward())
        self.optimizer.zero_grad()
        return macs


def distillation_rows(
    card: str, encoder: str, sizes: Sequence[tuple[int, int]], batch: int, precision: str, rounds: int
) -> list[Row]:
    """A row for each size and contender: seconds of a training step, and what the decoder adds to time and GMACs.

    Args:
        card: of configs/depth, with the segmentation loss.
        encoder: timm name.
        sizes: (H, W) of the images [px].
        batch: images of a step.
        precision: "fp32" or "bf16".
        rounds: timed steps of each contender.

    Raises:
        ValueError: no such card, or one without that loss; or the contenders' depths or other losses differ.
    """
    rows = []
    for size in sizes:
        config = read_card(
            card,
            encoder,
            data_root=".",
            data_image_size=list(size),
            data_crop_size=list(size),
            precision=precision,
        )
        if len(config.losses) < 2 or SEGMENTATION not in config.losses:
            raise UserError(f"card {card} has no loss {SEGMENTATION} beside another one: name one that has")
        others = {name: weight for name, weight in config.losses.items() if name != SEGMENTATION}
        trainings = {"without": Training(config, others), "with": Training(config, config.losses)}
        example = made_up_batch(batch, size, int(config.loss_options[SEGMENTATION]["classes"]))
        check_distillation(trainings, example)
        macs = {name: training.macs(example) / batch for name, training in trainings.items()}
        seconds = interleaved(
            {name: partial(one.step, example) for name, one in trainings.items()}, rounds, "cpu"
        )
        rows += [
            {
                "kind": "distillation",
                "config": card,
                "encoder": config.encoder,
                "contender": name,
                "base": "without",
                "batch": str(batch),
                "height": str(size[0]),
                "width": str(size[1]),
                "precision": precision,
                "threads": str(torch.get_num_threads()),
                "device": device_name("cpu"),
                **summary(times, seconds["without"], batch),
                **cost_text(times, seconds["without"]),
                "gmacs_training": f"{macs[name] / 1e9:.3f}",
                "gmacs_cost": f"{macs[name] / macs['without']:.3f}",
                "rounds": str(rounds),
                **versions(),
            }
            for name, times in seconds.items()
        ]
    return rows


def made_up_batch(batch: int, size: tuple[int, int], classes: int) -> dict[str, Tensor]:
    """Images, depths and classes without any meaning: time does not depend on it."""
    random = torch.Generator().manual_seed(0)
    depth = 1 + 8 * torch.rand(batch, 1, *size, generator=random)
    return {
        "image": torch.randn(batch, 3, *size, generator=random),
        "depth": depth,
        "valid": torch.ones_like(depth, dtype=torch.bool),
        "labels": torch.randint(classes, (batch, *size), generator=random),
    }


def check_distillation(trainings: Mapping[str, Training], batch: Batch) -> None:
    """Both contenders must be one model, apart from the decoder.

    Raises:
        ValueError: they predict another depth, or another loss of the same name has another value.
    """
    found = {}
    for name, training in trainings.items():
        torch.manual_seed(0)
        depth, _, parts = training.forward(batch)
        found[name] = {**parts, **({} if depth is None else {"depth": depth})}
    found["with"].pop(SEGMENTATION)
    for what, value in found["without"].items():
        if not torch.equal(value, found["with"][what]):
            raise UserError(f"{what} differs with and without the segmentation loss: nothing is measured")


def cost_text(times: Sequence[float], base: Sequence[float]) -> Row:
    """Median and quartiles of the paired ratios of these times over those of the base."""
    ratios = [time / other for time, other in zip(times, base, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "cost_median": f"{median:.3f}",
        "cost_quartile_low": f"{low:.3f}",
        "cost_quartile_high": f"{high:.3f}",
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add = parser.add_argument
    add("--config", default="zoedepth_distil", help="name of a run card in configs/depth (%(default)s)")
    add("--encoder", default="resnet18", help="timm name, where the card names none (%(default)s)")
    sizes = ["96x128", "192x256"]
    add(
        "--size",
        nargs="+",
        default=sizes,
        metavar="HxW",
        help="image sizes [px], each measured (%(default)s)",
    )
    add("--batch", type=int, default=4, help="images of a step (%(default)s)")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of training (%(default)s)")


def check(options: argparse.Namespace) -> None:
    """Raise UserError for a card that is not there or a size that is none; sizes become pairs."""
    read_card(options.config, "resnet18", data_root=".")
    pairs = [text.split("x") for text in options.size]
    if not all(len(pair) == 2 and all(side.isdigit() for side in pair) for pair in pairs):
        raise UserError(f"--size is HEIGHTxWIDTH in pixels, such as 96x128, not {' '.join(options.size)}")
    options.size = [(int(height), int(width)) for height, width in pairs]


def measure(options: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows of all sizes."""
    torch.set_num_threads(options.threads)
    given = (options.config, options.encoder, options.size, options.batch, options.precision)
    yield distillation_rows(*given, options.rounds)


COMMANDS = {
    "distillation": Command(
        "time and GMACs of a training step with the segmentation loss of a run card over those without",
        add_options,
        measure,
        check,
    )
}
