"""Options that every training run has, and those of its optimizer and guard."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from spark.training.option_types import (
    NOT_EMPTY,
    BatchSize,
    InnerShare,
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PathText,
    PositiveFloat,
    PositiveInt,
    Rule,
    ShareBelow1,
)


def time_limit_seconds(limit: str | float | None) -> float:
    """A time limit in seconds: a number of hours, or "HH:MM:SS"; infinite for None, 0 for what is neither."""
    if limit is None:
        return math.inf
    if parts := re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", str(limit)):
        return sum(int(part) * unit for part, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
    hours = float(limit) if re.fullmatch(r"\d+(\.\d*)?", str(limit)) else 0.0
    # Without quotes YAML reads 12:00:00 as 43200, a number to the base of 60.
    return 3600 * hours if isinstance(limit, str) or hours < 1000 else 0.0


TimeLimit = Annotated[
    str | float | None,
    Rule(
        'null, a number of hours above 0, or HH:MM:SS (in a YAML file in quotes: "12:00:00")',
        lambda limit: time_limit_seconds(limit) > 0,
        names=True,
    ),
]
Seed = Annotated[int, Rule("of at most 63 bits", lambda seed: abs(seed) < 2**63, most=2**63)]
Epochs = Annotated[float, Rule("above 0", lambda epochs: epochs > 0, most=1_000_000)]
Folder = Annotated[PathText, NOT_EMPTY]


@dataclass
class OptimizerConfig:
    """Optimizer and schedules.

    Attributes:
        name: optimizer; the paper uses lamb for pretraining.
        batch_size: images of one optimizer step, over all processes and all accumulated parts.
        betas: decay rates of the optimizer's running moments.
        eps: term added to the optimizer's denominator.
        weight_decay: weight decay at the start.
        warmup_steps: optimizer steps of the warm-up; when set it takes the place of warmup_epochs.
        warmup_epochs: epochs of the warm-up, in which the learning rate rises.
        clip_grad: largest norm of the gradient of all parameters together; null does not clip.
        ema_decay: keep an exponential moving average of the weights beside them, which each step leaves at this share
            of itself, such as 0.999; null keeps none. Buffers (batch norm's running statistics) are copied, not
            averaged, being averages already.
    """

    name: Literal["lamb", "adamw", "sgd"] = "lamb"
    batch_size: BatchSize = 4096
    betas: tuple[ShareBelow1, ShareBelow1] | None = None
    eps: PositiveFloat = 1e-6
    weight_decay: NonNegativeFloat = 0.04
    warmup_steps: NonNegativeInt | None = None
    warmup_epochs: NonNegativeFloat = 40
    clip_grad: PositiveFloat | None = 5.0
    ema_decay: InnerShare | None = None


@dataclass
class GuardConfig:
    """Guard: what a run does about trouble, unattended; every event is a row of metrics.jsonl.

    Attributes:
        on_nonfinite: a loss or gradient that is not finite: stop after saving the state before the step, skip the step,
            or rollback to the newest checkpoint and go on with the images that come next. Where it fails again before
            the next checkpoint, the next older one is taken (keep_checkpoints says how many there are).
        on_spike: likewise for a loss above the median of the last spike_window ones by more than spike_factor times
            their median absolute deviation; ignore looks for none.
        spike_window: losses that a spike is told from; there is none before half as many are known.
        spike_factor: median absolute deviations above the median.
        max_skips: steps in a row that may be skipped; one more stops the run.
        max_rollbacks: rollbacks of a run; one more stops it. Before the first checkpoint, a step is skipped instead.
        on_save_error: a checkpoint or a row that cannot be written, for want of space above all: stop, or continue
            training and try again when the next one is due. The last whole checkpoint stays in any case.
    """

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    on_spike: Literal["ignore", "skip", "rollback", "stop"] = "ignore"
    spike_window: Annotated[int, Rule("of at least 4", lambda value: value >= 4)] = 200
    spike_factor: PositiveFloat = 20.0
    max_skips: NonNegativeInt = 10
    max_rollbacks: NonNegativeInt = 3
    on_save_error: Literal["stop", "continue"] = "stop"


@dataclass(kw_only=True)
class RunConfig(Options):
    """Run: length, precision, logs and checkpoints.

    Attributes:
        output_dir: folder of the run: config.yaml, metrics.jsonl, figures/, checkpoints/ and what it exports.
        epochs: length of the run in passes over the data.
        max_steps: length of the run in optimizer steps; when set it takes the place of epochs.
        precision: fp32, or mixed precision in bf16 or fp16.
        accumulation: parts that each process splits its share of a batch into, to fit the memory.
        channels_last: images and weights in the channels-last memory format, the faster one nearly everywhere.
        seed: seed of everything random: weights, order of the data, augmentation, masks, stochastic depth.
        log_every: optimizer steps between rows of metrics.jsonl.
        log_with: tracker that metrics go to beside metrics.jsonl; all but tensorboard are packages of their own.
        checkpoint_every: optimizer steps between checkpoints; 0 writes one at the end only.
        keep_checkpoints: number of the newest checkpoints that are kept.
        time_limit: time after which the run saves, prints the command that continues it, and ends with exit code 0:
            hours, as a number, or a text "HH:MM:SS". The step under way and the saving come on top of it.
        resume: true continues from the newest checkpoint of output_dir, and starts from the beginning where there is
            none; a path continues from that checkpoint.
    """

    output_dir: Folder
    epochs: Epochs = 100
    max_steps: PositiveInt | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: PositiveInt = 1
    channels_last: bool = True
    seed: Seed = 0
    log_every: PositiveInt = 10
    log_with: Literal["tensorboard", "wandb", "trackio", "mlflow", "none"] = "tensorboard"
    checkpoint_every: NonNegativeInt = 1000
    keep_checkpoints: PositiveInt = 2
    time_limit: TimeLimit = None
    resume: bool | PathText = False
    guard: GuardConfig = field(default_factory=GuardConfig)

    def time_limit_seconds(self) -> float:
        """`time_limit` in seconds, infinite for none."""
        return time_limit_seconds(self.time_limit)
