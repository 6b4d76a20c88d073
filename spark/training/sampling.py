"""The order in which a run sees its samples, and how long it is."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from spark.errors import UserError
from spark.seeds import Purpose, derive_seed


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batch sampler of one process: the part of an endless stream of shuffled passes that this process trains on.

    Micro-batch m of W processes with b samples each covers the positions from m * W * b to (m + 1) * W * b; the process
    of rank r takes the r-th slice of b. A pass ends in the middle of a micro-batch where the numbers do not divide: no
    sample is left out and none is repeated within a pass.

    Args:
        num_samples: size of the data set.
        batch_size: samples of one micro-batch of one process.
        rank: number of this process.
        world_size: number of processes.
        seed: seed of the shuffling.
        start: first micro-batch.
        stop: one past the last micro-batch.
        shuffle: a new order in every pass; otherwise every pass has the order of the data set.

    Yields:
        Lists of (position in the stream, index in the data set).
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        stop: int,
        shuffle: bool = True,
    ):
        if num_samples < 1:
            raise UserError("the data set is empty, there is nothing to draw batches from")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = start
        self.stop = stop
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Micro-batches from `start` to `stop`."""
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        current, order = -1, torch.empty(0, dtype=torch.long)
        for micro_batch in range(self.start, self.stop):
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                epoch, place = divmod(position, self.num_samples)
                if epoch != current:
                    current, order = epoch, self.order(epoch)
                batch.append((position, int(order[place])))
            yield batch

    def order(self, epoch: int) -> Tensor:
        """Order of the data set in one pass: [num_samples] int64."""
        if not self.shuffle:
            return torch.arange(self.num_samples)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch, Purpose.ORDER))
        return torch.randperm(self.num_samples, generator=generator)


def run_length(
    steps_per_epoch: float,
    epochs: float,
    max_steps: int | None,
    warmup_epochs: float,
    warmup_steps: int | None,
) -> tuple[int, int]:
    """Optimizer steps of a run, and of its warm-up; numbers of steps take the place of numbers of epochs.

    Raises:
        UserError: warmup_steps are more than the steps of the run.
    """
    total = max_steps or math.ceil(epochs * steps_per_epoch)
    if warmup_steps is None:
        # A trial run by max_steps may well be shorter than the warm-up of the recipe: it is then all warm-up.
        return total, min(round(warmup_epochs * steps_per_epoch), total)
    if warmup_steps > total:
        raise UserError(
            f"optim.warmup_steps {warmup_steps} are more than the {total} steps of the whole run; "
            "lower them, or raise epochs or max_steps"
        )
    return total, warmup_steps
