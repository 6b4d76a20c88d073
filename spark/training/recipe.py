"""Whether batch, length and warm-up of a run fit the number of its samples: a sentence before the first step."""

import math
from typing import Any

from spark.errors import UserError

FEWEST_STEPS = 200
"""A run that is shorter, and was not made so by max_steps, has hardly begun when it ends."""
FITTING_STEPS = 2000
"""Steps of the run that is proposed instead; the small recipes have some thousands."""
MOST_PASSES = 1000
"""No batch takes each sample more often."""


def misfit(config: Any, samples: int, steps: int, warmup: int, unit: str) -> str:
    """What does not fit, with the options that would; "" where all does.

    Args:
        config: options of the run.
        samples: that it trains on.
        steps: of the run.
        warmup: steps of its warm-up.
        unit: of the samples, "images" or "pairs".

    Raises:
        UserError: a batch takes each sample more than `MOST_PASSES` times.
    """
    batch, epochs = config.optim.batch_size, config.epochs
    if batch > MOST_PASSES * samples:
        raise UserError(
            f"a batch of {batch} {unit} takes each of the {samples} {unit} that there are {batch // samples} times: "
            "take a smaller optim.batch_size, or more data"
        )
    reasons, options = [], []
    if batch > samples:
        reasons.append(
            f"a batch of {batch} takes each of the {samples} {unit} {batch / samples:.1f} times: the run is "
            f"{steps * batch / samples:.1f} epochs"
        )
        batch = max(2, 2 ** int(math.log2(max(1, samples / 4))))
        options.append(f"--optim.batch_size {batch}")
    if config.max_steps is None and epochs * samples / batch < FEWEST_STEPS:
        reasons.append(f"the whole run has {steps} step{'s' * (steps > 1)}")
        epochs = math.ceil(FITTING_STEPS * batch / samples)
        options.append(f"--epochs {epochs}")
    if 2 * warmup > steps:
        share = "all of them are" if warmup >= steps else f"{warmup} of the {steps} steps are"
        reasons.append(f"{share} warm-up")
        tenth = epochs / 10 if config.max_steps is None else config.max_steps // 10
        options.append(f"--optim.warmup_{'epochs' if config.max_steps is None else 'steps'} {tenth:g}")
    return f"{'; '.join(reasons)}. What fits: {' '.join(options)}" if reasons else ""
