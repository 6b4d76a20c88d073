"""Options that every training run has, and those of its optimizer and guard."""

import math
import os
import re
from dataclasses import dataclass, field
from typing import Literal

from spark.training.cli import require


@dataclass
class OptimConfig:
    """Optimizer and schedules.

    Attributes:
        name: optimizer; the paper uses lamb for pretraining.
        base_lr: learning rate at a batch of 256 images; the run uses base_lr * batch_size / 256.
        batch_size: images of one optimizer step, over all processes and all accumulated parts.
        betas: decay rates of the optimizer's running moments; null takes those of the paper's recipes, [0.9, 0.95] (its
            ResNets) for encoders with batch norm and [0.9, 0.999] (its ConvNeXts) for all others.
        eps: term added to the optimizer's denominator.
        weight_decay: weight decay at the start.
        weight_decay_end: weight decay at the end of its cosine; null keeps it constant.
        warmup_steps: optimizer steps of the warm-up; when set it takes the place of warmup_epochs.
        warmup_epochs: epochs of the warm-up, in which the learning rate rises linearly.
        clip_grad: largest norm of the gradient of all parameters together; null does not clip.
        ema_decay: keep an exponential moving average of the weights beside them, which each step leaves at this share
            of itself, such as 0.999; null keeps none. Buffers (batch norm's running statistics) are copied, not
            averaged, being averages already.
    """

    name: Literal["lamb", "adamw", "sgd"] = "lamb"
    base_lr: float = 2e-4
    batch_size: int = 4096
    betas: tuple[float, float] | None = None
    eps: float = 1e-6
    weight_decay: float = 0.04
    weight_decay_end: float | None = 0.2
    warmup_steps: int | None = None
    warmup_epochs: float = 40
    clip_grad: float | None = 5.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        require(self.base_lr > 0, "optim.base_lr", self.base_lr, "above 0")
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
        require(
            self.betas is None or all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas and list(self.betas),
            "two numbers of at least 0 and below 1",
        )
        require(self.eps > 0, "optim.eps", self.eps, "above 0")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "at least 0")
        require(
            self.weight_decay_end is None or self.weight_decay_end >= 0,
            "optim.weight_decay_end",
            self.weight_decay_end,
            "at least 0, or null for a constant one",
        )
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "optim.warmup_steps",
            self.warmup_steps,
            "0 or more",
        )
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "at least 0")
        require(
            self.clip_grad is None or self.clip_grad > 0,
            "optim.clip_grad",
            self.clip_grad,
            "above 0, or null for no clipping",
        )
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "optim.ema_decay",
            self.ema_decay,
            "between 0 and 1, or null for no average",
        )


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
    spike_window: int = 200
    spike_factor: float = 20.0
    max_skips: int = 10
    max_rollbacks: int = 3
    on_save_error: Literal["stop", "continue"] = "stop"

    def __post_init__(self) -> None:
        require(self.spike_window >= 4, "guard.spike_window", self.spike_window, "at least 4")
        require(self.spike_factor > 0, "guard.spike_factor", self.spike_factor, "above 0")
        require(self.max_skips >= 0, "guard.max_skips", self.max_skips, "0 or more")
        require(self.max_rollbacks >= 0, "guard.max_rollbacks", self.max_rollbacks, "0 or more")


@dataclass(kw_only=True)
class RunConfig:
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

    output_dir: str
    epochs: float = 100
    max_steps: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    accumulation: int = 1
    channels_last: bool = True
    seed: int = 0
    log_every: int = 10
    log_with: Literal["tensorboard", "wandb", "trackio", "mlflow", "none"] = "tensorboard"
    checkpoint_every: int = 1000
    keep_checkpoints: int = 2
    time_limit: str | float | None = None
    resume: bool | str = False
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        require(bool(self.output_dir), "output_dir", "an empty text", "the name of a folder")
        self.output_dir = os.path.expanduser(self.output_dir)
        if isinstance(self.resume, str):
            self.resume = os.path.expanduser(self.resume)
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(
            self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "null or at least 1"
        )
        require(self.accumulation >= 1, "accumulation", self.accumulation, "at least 1")
        require(abs(self.seed) < 2**63, "seed", self.seed, "a whole number of at most 63 bits")
        require(self.log_every >= 1, "log_every", self.log_every, "at least 1")
        require(self.checkpoint_every >= 0, "checkpoint_every", self.checkpoint_every, "0 or more")
        require(self.keep_checkpoints >= 1, "keep_checkpoints", self.keep_checkpoints, "at least 1")
        self.time_limit_seconds()

    def time_limit_seconds(self) -> float:
        """`time_limit` in seconds, infinite for none.

        Raises:
            UserError: it is neither a number of hours above 0 nor HH:MM:SS.
        """
        limit, seconds = self.time_limit, math.inf
        if limit is not None:
            parts = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", str(limit))
            hours = re.fullmatch(r"\d+(\.\d*)?", str(limit))
            if parts:
                seconds = sum(int(p) * unit for p, unit in zip(parts.groups(), (3600, 60, 1), strict=True))
            else:
                seconds = 3600 * float(str(limit)) if hours else 0.0
        rule = 'a number of hours above 0, or HH:MM:SS (in a YAML file in quotes: "12:00:00")'
        require(seconds > 0, "time_limit", limit, rule)
        # Without quotes YAML reads 12:00:00 as 43200, a number to the base of 60.
        require(isinstance(limit, str | None) or limit < 1000, "time_limit", limit, rule)
        return seconds
