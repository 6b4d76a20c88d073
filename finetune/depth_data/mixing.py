"""Several data sets in one run: which micro-batch comes from which set, and the positions in each set's own stream.

A micro-batch comes from one set, in all processes from the same one, so that each has the targets of one kind of
supervision and every loss sees whole batches of its kind. Sets take turns by weight: micro-batch m comes from the set
that is farthest behind its share of m + 1 micro-batches. With weights 3 and 1 that is 0 0 1 0, again and again, and
with an accumulation of 4 every optimizer step sees both in these shares. No chance is involved, and nothing to save: a
resumed run counts from the beginning whose turn it is.

Within a set, the stream is that of a run on this set alone (`spark.training.sampling.StreamSampler`), seeded by the
run's seed and the set's number; the first set has the run's seed itself, so a run on one set is the special case.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from finetune.depth_data.base import DepthSet
from finetune.depth_data.transforms import DepthTrainingSet, TrainTransform
from spark.seeds import Purpose, derive_seed
from spark.training.sampling import StreamSampler


@dataclass(frozen=True)
class MixedSet:
    """A data set of a run.

    Args:
        name: what logs and batches call it.
        data: its samples.
        transform: what augments them.
        weight: share of the micro-batches, relative to that of the other sets.
    """

    name: str
    data: DepthSet
    transform: TrainTransform
    weight: float = 1.0


class TrainingMix(Dataset[dict]):
    """The augmented samples of several sets, by set, position in its stream and index in it.

    Args:
        sets: at least one, with names that differ.
        seed: of the run.
    """

    def __init__(self, sets: Sequence[MixedSet], seed: int):
        self.sets = list(sets)
        self.seeds = [
            derive_seed(seed, number, Purpose.SET) if number else seed for number in range(len(sets))
        ]
        self.parts = [
            DepthTrainingSet(one.data, one.transform, own)
            for one, own in zip(self.sets, self.seeds, strict=True)
        ]

    def __len__(self) -> int:
        """Samples of all sets: an epoch is as many, whatever the weights."""
        return sum(len(part) for part in self.parts)

    def __getitem__(self, where: tuple[int, int, int]) -> dict:
        """The sample of (set, position in its stream, index in it), with "set" (its name) and "supervision"."""
        number, position, index = where
        of = self.sets[number]
        sample = self.parts[number][position, index]
        return {**sample, "set": of.name, "supervision": of.data.supervision}

    def names(self) -> list[str]:
        """Names of all samples, set by set; those of the first set as they are, of others behind the set's name."""
        return [
            name if not number else f"{one.name}:{name}"
            for number, one in enumerate(self.sets)
            for name in one.data.names()
        ]

    def entries(self) -> set[str]:
        """Keys of the tensors that batches have, those of all sets together."""
        samples = [self[number, 0, 0] for number in range(len(self.sets))]
        return {key for sample in samples for key, value in sample.items() if isinstance(value, Tensor)}

    def shares(self) -> list[float]:
        """Share of the micro-batches of each set."""
        total = sum(one.weight for one in self.sets)
        return [one.weight / total for one in self.sets]


class MixedSampler(Sampler[list[tuple[int, int, int]]]):
    """Batch sampler of one process for a `TrainingMix`.

    Args:
        mix: the sets.
        batch_size: samples of one micro-batch of one process.
        rank: number of this process.
        world_size: number of processes.
        start: first micro-batch.
        stop: one past the last micro-batch.

    Yields:
        Lists of (set, position in its stream, index in it), all of one set.
    """

    def __init__(
        self,
        mix: TrainingMix,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int,
    ):
        self.mix, self.start, self.stop = mix, start, stop
        self.share: dict[str, Any] = {"batch_size": batch_size, "rank": rank, "world_size": world_size}

    def __len__(self) -> int:
        """Micro-batches from `start` to `stop`."""
        return max(self.stop - self.start, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        turns = take_turns(self.mix.shares(), self.stop)
        counts = [0] * len(self.mix.sets)
        for number in turns[: self.start]:
            counts[number] += 1
        streams = [
            iter(StreamSampler(len(part), **self.share, seed=seed, start=count, stop=self.stop))
            for part, seed, count in zip(self.mix.parts, self.mix.seeds, counts, strict=True)
        ]
        for number in turns[self.start :]:
            yield [(number, position, index) for position, index in next(streams[number])]


def take_turns(shares: Sequence[float], count: int) -> list[int]:
    """Which set each of `count` micro-batches comes from: that farthest behind its share, the first of equals."""
    if len(shares) == 1:
        return [0] * count
    had = [0] * len(shares)
    turns = []
    for done in range(1, count + 1):
        behind = [round(share * done - taken, 9) for share, taken in zip(shares, had, strict=True)]
        number = behind.index(max(behind))
        had[number] += 1
        turns.append(number)
    return turns
