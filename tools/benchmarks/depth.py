"""Two costs of depth training: of the segmentation decoder that only training has, and of reading pairs.

- `distillation`: training steps of one model `with` and `without` the segmentation loss of its run card; on equal
  weights both must first predict the same depth and have the same value of every other loss.
- `cache`: passes over the same batches of the loader of finetune/depth.py in one process, which must `decode` the files
  or finds them in a `cache` (`data.cache`), bit for bit the same; and the training `step`s of as many batches. The
  files are few and read before, so they come from the system's cache: this is the work of a core, not of a disk.

A training step is forward, losses, backward, clipping and the optimizer's update, all as the run card has them.
"""

import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from finetune.config import DepthConfig
from finetune.depth_data import MixedSampler, TrainingMix, check_room, collate_depth, fill
from finetune.losses import WeightedLoss
from finetune.protocols import get_protocol
from finetune.tasks.build import add_segmentation, build_model, cached, open_data
from spark.errors import UserError
from spark.sparse.choice import device_name
from spark.training.accelerator import usable_cores
from spark.training.cli import parse_config
from spark.training.optim import build_optimizer, parameter_groups
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
        self.config = config
        self.model = build_model(config)[0]
        options = {name: values for name, values in config.loss_options.items() if name in losses}
        self.criterion = WeightedLoss(losses, options, self.model.mean, self.model.std)
        add_segmentation(self.model, self.criterion, config)
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        optim = config.optim
        groups = parameter_groups(
            self.model,
            optim.weight_decay,
            layer_decay=optim.layer_decay,
            encoder_lr_factor=optim.encoder_lr_factor,
        )
        self.optimizer = build_optimizer(optim.name, groups, optim.lr, optim.betas, optim.eps)
        self.model.train()

    def forward(self, batch: Batch) -> tuple[Tensor | None, Tensor, dict[str, Tensor]]:
        """Predicted depth [B, 1, H, W] [m], the loss, and each of its terms."""
        images = batch["image"].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            output = self.model(images)
        loss, parts = self.criterion(output, batch)
        return output.depth, loss, parts

    def step(self, batch: Batch) -> None:
        """One training step."""
        self.optimizer.zero_grad()
        self.forward(batch)[1].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad or float("inf"))
        self.optimizer.step()

    def macs(self, batch: Batch) -> float:
        """Multiply-accumulates of convolutions and matrix products in a forward and backward."""
        with FlopCounterMode(display=False) as counter:
            self.forward(batch)[1].backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops() / 2


def distillation_rows(
    card: str, encoder: str, sizes: Sequence[tuple[int, int]], batch: int, precision: str, rounds: int
) -> list[dict[str, str]]:
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


def cost_text(times: Sequence[float], base: Sequence[float]) -> dict[str, str]:
    """Median and quartiles of the paired ratios of these times over those of the base."""
    ratios = [time / other for time, other in zip(times, base, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "cost_median": f"{median:.3f}",
        "cost_quartile_low": f"{low:.3f}",
        "cost_quartile_high": f"{high:.3f}",
    }


def cache_rows(
    data: Path, pair_list: str | None, cards: Sequence[str], batches: int, rounds: int
) -> list[dict[str, str]]:
    """A row for each card and contender: pairs/s of reading with and without a cache, and of training.

    Args:
        data: where the pairs lie, as `data.root`.
        pair_list: list of the pairs, all of which the cache holds; None for a layout without lists.
        cards: of configs/depth; their sizes, augmentation, losses and batch count.
        batches: of a turn.
        rounds: timed turns of each contender.

    Raises:
        ValueError: no such card or pairs, or the cache gives other batches than the files.
        OSError: no room for the cache.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for card in cards:
            given = {"data_root": data, "data_list": pair_list or "null", "data_val_list": "null"}
            config = read_card(card, "resnet18", **given)
            batch = config.optim.batch_size
            training = Training(config, config.losses)
            config.data.mean, config.data.std = training.model.mean, training.model.std
            loaders = {"decode": loader_of(config, batches)}
            config.data.cache = folder
            loaders["cache"] = loader_of(config, batches)
            examples = check_batches(loaders)
            training.criterion.check(training.model.head.outputs, examples[0])
            turns: dict[str, Callable[[], object]] = {
                **{name: partial(read_all, loader) for name, loader in loaders.items()},
                "step": partial(train_all, training, examples),
            }
            seconds = interleaved(turns, rounds, "cpu")
            threads = {"decode": 1, "cache": 1, "step": torch.get_num_threads()}
            rows += [
                {
                    "kind": "cache",
                    "config": card,
                    "encoder": config.encoder,
                    "head": config.model.head,
                    "data": data.resolve().name,
                    "contender": name,
                    "base": "decode",
                    "batch": str(batch),
                    "height": str(config.data.crop_size[0]),
                    "width": str(config.data.crop_size[1]),
                    "precision": config.precision,
                    "threads": str(threads[name]),
                    "device": device_name("cpu"),
                    **summary(times, seconds["decode"], batches * batch),
                    # How many cores must read for one model that trains on `threads` of them.
                    "cores_to_keep_up": ""
                    if name == "step"
                    else f"{statistics.median(t / s for t, s in zip(times, seconds['step'], strict=True)):.3f}",
                    "rounds": str(rounds),
                    **versions(),
                }
                for name, times in seconds.items()
            ]
    return rows


def loader_of(config: DepthConfig, batches: int) -> DataLoader:
    """The loader of a run in one process without workers, its cache filled: a pass is the first `batches` batches."""
    pairs: TrainingMix = open_data(config, get_protocol(config.protocol))[0]
    caches = cached(pairs, None)
    check_room(caches)
    fill(caches, usable_cores(), 0.0, lambda line: None)
    stream = MixedSampler(pairs, config.optim.batch_size, stop=batches)
    return DataLoader(pairs, batch_sampler=stream, collate_fn=collate_depth)


def check_batches(loaders: Mapping[str, DataLoader]) -> list[Batch]:
    """The batches of a pass, which must be the same of all loaders.

    Raises:
        ValueError: a file cannot be read, or batches differ.
    """
    passes = {name: list(loader) for name, loader in loaders.items()}
    for decoded, kept in zip(passes["decode"], passes["cache"], strict=True):
        if decoded["failed"]:
            raise UserError(f"{decoded['failed'][0]}: name a list without it")
        tensors = [key for key, value in decoded.items() if isinstance(value, Tensor)]
        if not all(torch.equal(decoded[key], kept[key]) for key in tensors):
            raise UserError(
                f"{decoded['name'][0]}: its batch from the cache is another one, nothing is measured"
            )
    return passes["decode"]


def read_all(loader: DataLoader) -> None:
    """A pass over a loader."""
    for _ in loader:
        pass


def train_all(training: Training, batches: Sequence[Batch]) -> None:
    """A step on each batch."""
    for batch in batches:
        training.step(batch)


def versions() -> dict[str, str]:
    """Last columns of a row."""
    return {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
