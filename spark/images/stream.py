"""Batches of images that are streamed: shards divided over readers, a shuffle buffer, and places to resume at.

A reader is a loader process of a training process; the readers are numbered, and their number is part of a run. Terms:

- A *pass* is one order of all shards, drawn by (seed, pass). Each shard of it belongs to one reader, so that no image
  is read twice within a pass. Nothing is left out where shards do not divide: a reader that has finished its shards
  goes on to its share of the next pass while others are still in this one. The shares take turns over the passes.
- A *block* is as many images as the shuffle buffer holds, next to each other in what a reader reads. It is given out in
  an order drawn by the place where it begins, and while it shrinks the next one is read: one image in for one out.
- The *state* of a reader is the place where its block begins, how many images of it were taken, and the shard that it
  reaches into: six integers. To resume, the block is read again, without decoding what was taken.

Micro-batch m of a process comes from its reader m modulo the number of its readers. Crop and mask of an image follow
from its position in the run, as ever (see `spark.training.accelerator`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from spark.errors import UserError
from spark.images.batches import StepPlan
from spark.images.dataset import MAX_CONSECUTIVE_FAILURES, read_sample
from spark.images.decode import Picture, describe_failure
from spark.images.sources import Entry, ShardError, StreamedSource
from spark.seeds import Purpose, derive_seed

# Integers of a state: pass, turn (number of the shard in the reader's share of it) and place in the shard, where the
# block begins; images of it that were taken; pass and turn of its last image.
STATE = 6


@dataclass(frozen=True)
class Division:
    """Which shards which reader reads, in which order.

    Attributes:
        shards: number of shards.
        readers: number of readers of all processes.
        seed: of the run.
        first: the pass that readers begin with.
        left: pass -> what is left of it, for passes that other readers have begun. Passes that are not in it are whole.
    """

    shards: int
    readers: int
    seed: int
    first: int = 0
    left: Mapping[int, Sequence[int]] = field(default_factory=dict)

    def share(self, reader: int, number: int) -> list[int]:
        """The shards of a reader in a pass, in order."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number, Purpose.SHARDS))
        order = torch.randperm(self.shards, generator=generator).tolist()
        if number in self.left:
            order = list(self.left[number])
        return order[(reader + number) % self.readers :: self.readers]

    def start(self) -> Tensor:
        """States of all readers at the beginning: [readers, STATE] int64."""
        return torch.tensor([[self.first, 0, 0, 0, self.first, -1]] * self.readers)

    def divide_again(self, states: Tensor, readers: int) -> "Division":
        """The division for another number of readers, which goes on with the shards that nobody has begun.

        Args:
            states: of the readers so far.
            readers: how many there are from now on.
        """
        begun = [(state[4], state[5]) for state in states.tolist()]
        passes = [number for number, _ in begun]
        left: dict[int, list[int]] = {}
        for number in range(min(passes), max([*passes, *self.left]) + 1):
            left[number] = [
                shard
                for reader, (current, turn) in enumerate(begun)
                if number >= current
                for shard in self.share(reader, number)[turn + 1 if number == current else 0 :]
            ]
        return Division(self.shards, readers, self.seed, min(passes), left)


class Reader:
    """The endless stream of one reader.

    A shard that cannot be read, or breaks off, is passed over from there on; `lost` says so.

    Args:
        source: of the images.
        division: of its shards.
        reader: number of this reader.
        state: [STATE], where to begin.
        buffer: images of a block.
        max_lost: shards that may break off, one after another without an image between them.

    Attributes:
        state: [STATE], behind the image that was given out last.
        lost: "SHARD: reason" of shards that were not read to their end.

    Raises:
        ValueError: too many shards broke off in a row.
    """

    def __init__(
        self,
        source: StreamedSource,
        division: Division,
        reader: int,
        state: Sequence[int],
        buffer: int,
        max_lost: int,
    ):
        self.source = source
        self.division = division
        self.reader = reader
        self.state = tuple(state)
        self.buffer = buffer
        self.max_lost = max_lost
        self.lost: list[str] = []

    def __iter__(self) -> Iterator[Entry]:
        begin, taken = self.state[:3], self.state[3]
        chain = self._chain(*begin)
        block: list[Any] = list(islice(chain, self.buffer))
        while True:
            generator = torch.Generator().manual_seed(
                derive_seed(self.division.seed, self.reader, *begin, Purpose.BUFFER)
            )
            order = torch.randperm(self.buffer, generator=generator).tolist()
            following: list[tuple[Entry, tuple[int, int, int]]] = []
            end = block[-1][1]
            for passed in order[:taken]:
                block[passed] = None
            for number in range(taken, self.buffer):
                entry = block[order[number]][0]
                block[order[number]] = None  # memory: one out, one in
                following.append(next(chain))
                self.state = (*begin, number + 1, *end[:2])
                yield entry
            following += islice(chain, self.buffer - len(following))
            block, begin, taken = following, end, 0

    def _chain(self, number: int, turn: int, place: int) -> Iterator[tuple[Entry, tuple[int, int, int]]]:
        """Images in the order of reading, each with the place behind it (pass, turn, place in the shard)."""
        barren: list[str] = []
        while True:
            share = self.division.share(self.reader, number)
            for turn_now in range(turn, len(share)):
                shard = share[turn_now]
                try:
                    for entry in self.source.entries(shard, place):
                        barren = []
                        place = entry.after
                        yield entry, (number, turn_now, place)
                except ShardError as error:
                    self.lost.append(describe_failure(self.source.shard_name(shard), error))
                    barren.append(self.lost[-1])
                if len(barren) > self.max_lost:
                    raise UserError(
                        f"{len(barren)} of {len(self.source)} shards could not be read to their end, one after "
                        "another: repair the addresses or the shards, or raise data.max_unreadable. "
                        f"First {'; '.join(barren[:3])}"
                    )
                place = 0
            number, turn = number + 1, 0


class StreamedBatches(IterableDataset):
    """The batches of one process: each loader process is a reader, and makes every so many-th micro-batch.

    Args:
        source: of the images.
        transforms: (H, W) -> picture to [C, H, W], for the sizes of the plan.
        plan: sizes of the steps.
        collate: samples to a batch.
        division: of the shards over the readers of all processes.
        states: of the readers of this process, [readers of a process, STATE].
        batch_size: images of a micro-batch.
        rank: number of this process.
        world_size: number of processes.
        start: first micro-batch.
        stop: one past the last one.
        buffer: images that each reader shuffles.
        max_pixels: larger images count as unreadable.
        max_lost: see `Reader`.
        channels: of the model, see `spark.images.dataset.UnlabeledImages`.

    Yields:
        What `collate` makes, with `index` -1, and: `reader`, number of the reader in this process; `state`, [STATE]
        behind this batch; `lost`, "SHARD: reason" of shards that were given up meanwhile.
    """

    def __init__(
        self,
        source: StreamedSource,
        transforms: Mapping[tuple[int, int], Callable[[Picture], Tensor]],
        plan: StepPlan,
        collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        division: Division,
        states: Tensor,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        stop: int,
        buffer: int,
        max_pixels: int,
        max_lost: int = 0,
        channels: int = 3,
    ):
        self.source = source
        self.transforms = transforms
        self.plan = plan
        self.collate = collate
        self.division = division
        self.states = states
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.stop = stop
        self.buffer = buffer
        self.max_pixels = max_pixels
        self.max_lost = max_lost
        self.channels = channels

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id  # the loader asks worker 0 first
        workers = len(self.states)
        own = (self.start + worker) % workers
        reader = Reader(
            self.source,
            self.division,
            self.rank * workers + own,
            self.states[own].tolist(),
            self.buffer,
            self.max_lost,
        )
        images = iter(reader)
        for micro_batch in range(self.start + worker, self.stop, workers):
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            batch = self.collate(
                [self._sample(images, position) for position in range(first, first + self.batch_size)]
            )
            lost, reader.lost = reader.lost, []
            yield batch | {"reader": own, "state": torch.tensor(reader.state), "lost": lost}

    def _sample(self, images: Iterator[Entry], position: int) -> dict[str, Any]:
        """The next image that can be read, as a sample of `spark.images.dataset.UnlabeledImages`."""
        failed: list[str] = []
        transform = self.transforms[self.plan.size(self.plan.step_of(position))]
        seed = derive_seed(self.plan.seed, position)
        for entry in islice(images, MAX_CONSECUTIVE_FAILURES):
            image = read_sample(entry.read, entry.name, transform, seed, self.max_pixels, self.channels)
            if isinstance(image, Tensor):
                return {
                    "image": image,
                    "position": position,
                    "index": -1,
                    "name": entry.name,
                    "failed": failed,
                }
            failed.append(image)
        raise UserError(
            f"{len(failed)} images were tried one after another and none could be read: check the data. "
            f"First {'; '.join(failed[:3])}"
        )
