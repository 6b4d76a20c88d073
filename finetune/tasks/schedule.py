"""The phases of a run as pure functions of the step: length, learning rate, momentum, and when it validates."""

import math
from dataclasses import dataclass
from functools import partial

from finetune.config import TuningConfig
from spark.training.optim import lr_at, one_cycle_at
from spark.training.sampling import run_length


@dataclass(frozen=True)
class RunLength:
    """How long the phases of a run are.

    Args:
        steps: Optimizer steps of the run.
        warmup: Steps of the warm-up.
        frozen: Steps at the start with a frozen encoder.
        steps_per_epoch: Steps of one pass over the samples; need not be whole.
        validate_every: Epochs between validations, 0 for the end only.
    """

    steps: int
    warmup: int
    frozen: int
    steps_per_epoch: float
    validate_every: float

    def validates_after(self, step: int) -> bool:
        """Whether `step` (counted from 1) is the last of the run, or the one that completes a validation's epochs."""
        if step == self.steps or not self.validate_every:
            return step == self.steps
        interval = self.validate_every * self.steps_per_epoch
        return math.floor(step / interval + 1e-9) > math.floor((step - 1) / interval + 1e-9)


def run_phases(config: TuningConfig, samples: int) -> RunLength:
    """The phases of a run in steps."""
    optim = config.optim
    per_epoch = samples / optim.batch_size
    one_cycle = optim.schedule == "onecycle"
    warmup_epochs, warmup_steps = (0, 0) if one_cycle else (optim.warmup_epochs, optim.warmup_steps)
    steps, warmup = run_length(per_epoch, config.epochs, config.max_steps, warmup_epochs, warmup_steps)
    if one_cycle:
        warmup = round(optim.rise * steps)
    frozen = round(optim.frozen_epochs * per_epoch)
    return RunLength(steps, warmup, frozen, per_epoch, config.validate_every)


def learning_rate(config: TuningConfig, length: RunLength, step: int) -> float:
    """Learning rate of the head at a step, counted from 0."""
    optim = config.optim
    if optim.schedule == "onecycle":
        schedule = partial(one_cycle_at, rise=optim.rise)
    else:
        schedule = partial(lr_at, warmup_steps=length.warmup)
    return schedule(
        step,
        peak=optim.lr,
        total_steps=length.steps,
        start_factor=optim.start_factor,
        end_factor=optim.end_factor,
    )


def momentum(config: TuningConfig, length: RunLength, step: int) -> float | None:
    """Momentum at a step, counted from 0; None keeps what the optimizer has."""
    optim = config.optim
    if optim.momentum is None:
        return None
    low, high = optim.momentum
    ends = {"start_factor": high / low, "end_factor": high / low}
    return one_cycle_at(step, peak=low, total_steps=length.steps, rise=optim.rise, **ends)
