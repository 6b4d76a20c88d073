"""Batches of images that are streamed: shards divided over readers, a shuffle buffer, and places to resume at.

A reader is a loader process of a training process; the readers are numbered, and their number is part of a run. Terms:

- A *pass* is one order of all shards, drawn by (seed, pass). Each shard of it belongs to one reader, so that no image
  is read twice within a pass. Nothing is left out where shards do not divide: a reader that has finished its shards
  goes on to its share of the next pass while others are still in this one. The shares take turns over the passes.
- A *block* is as many images as the shuffle buffer holds, consecutive in what a reader reads. Its images come out in an
  order drawn by the place where the block begins; for each image that comes out, one of the next block is read.
- The *state* of a reader is the place where its block begins, how many images of it were taken, and the shard that it
  reaches into: six integers. To resume, the block is read again, without decoding what was taken.

Micro-batch m of a process comes from its reader m modulo the number of its readers. Crop and mask of an image follow
from its position in the run, as without streaming.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from spark.errors import UserError
from spark.images.dataset import SampleReader
from spark.images.decode import describe_failure
from spark.images.sources.base import Entry, ShardError, StreamedSource
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
        """The division for another number of readers, which goes on with the shards that nobody has begun."""
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


@dataclass
class Reader:
    """The endless stream of one reader.

    The rest of a shard that cannot be read, or breaks off, is skipped and noted in `failed_shards`.

    Attributes:
        source: of the images.
        division: of its shards.
        reader: number of this reader.
        state: [STATE], where to begin; later behind the image that was given out last.
        buffer: images of a block.
        max_failures: shards that may break off in a row, without an image between them; more raise a `UserError`.
        failed_shards: "SHARD: reason" of shards that were not read to their end.
    """

    source: StreamedSource
    division: Division
    reader: int
    state: Sequence[int]
    buffer: int
    max_failures: int
    failed_shards: list[str] = field(default_factory=list)

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
                    self.failed_shards.append(describe_failure(self.source.shard_name(shard), error))
                    barren.append(self.failed_shards[-1])
                if len(barren) > self.max_failures:
                    raise UserError(
                        f"{len(barren)} of {len(self.source)} shards could not be read to their end, one after "
                        "another: repair the addresses or the shards, or raise data.max_unreadable. "
                        f"First {'; '.join(barren[:3])}"
                    )
                place = 0
            number, turn = number + 1, 0


@dataclass
class StreamedBatches(IterableDataset):
    """The batches of one process: each of its loader processes is a reader, and they make micro-batches in turn.

    Yields what `collate` makes, with `index` -1, and: `reader`, number of the reader in this process; `state`, [STATE]
    behind this batch; `failed_shards`, "SHARD: reason" of shards that broke off meanwhile.

    Attributes:
        source: of the images.
        reader: of the samples.
        collate: samples to a batch.
        division: of the shards over the readers of all processes.
        states: of the readers of this process, [readers of a process, STATE].
        buffer: images that each reader shuffles.
        batch_size: images of a micro-batch.
        stop: one past the last micro-batch.
        start: first micro-batch.
        rank: number of this process.
        world_size: number of processes.
        max_failures: see `Reader`.
    """

    source: StreamedSource
    reader: SampleReader
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]]
    division: Division
    states: Tensor
    buffer: int
    batch_size: int
    stop: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    max_failures: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker = 0 if info is None else info.id  # the loader asks worker 0 first
        workers = len(self.states)
        own = (self.start + worker) % workers
        number, state = self.rank * workers + own, self.states[own].tolist()
        shards = Reader(self.source, self.division, number, state, self.buffer, self.max_failures)
        images = ((-1, entry.name, entry.read) for entry in shards)
        for micro_batch in range(self.start + worker, self.stop, workers):
            first = (micro_batch * self.world_size + self.rank) * self.batch_size
            positions = range(first, first + self.batch_size)
            batch = self.collate([self.reader.first_readable(images, position) for position in positions])
            failed, shards.failed_shards = shards.failed_shards, []
            yield batch | {"reader": own, "state": torch.tensor(shards.state), "failed_shards": failed}


@dataclass(frozen=True)
class Progress:
    """Where a stream is: how shards are divided over readers, and the place of each reader.

    Attributes:
        digest: of the names of the shards.
        buffer: images that each reader shuffles.
        division: of the shards.
        states: of all readers, [readers, STATE].
    """

    digest: str
    buffer: int
    division: Division
    states: Tensor

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        division = self.division
        return {
            "shards": self.digest,
            "seed": division.seed,
            "buffer": self.buffer,
            "readers": division.readers,
            "first": division.first,
            "left": {number: list(shards) for number, shards in division.left.items()},
            "states": self.states.tolist(),
        }

    def resumed(self, kept: Mapping[str, Any]) -> tuple["Progress", list[str]]:
        """The progress to go on with from that of a checkpoint, and what changed, in sentences."""
        fresh = self.division
        states = torch.tensor(kept["states"]).view(-1, STATE)
        if kept["shards"] != self.digest:
            division = replace(fresh, first=int(states[:, 4].max()) + 1)
            sentence = "the shards are others: their stream begins anew"
            return replace(self, division=division, states=division.start()), [sentence]
        old = Division(fresh.shards, kept["readers"], kept["seed"], kept["first"], kept["left"])
        names = ("readers (processes x loader processes) were", "the seed was", "the shuffle buffer was")
        before = (kept["readers"], kept["seed"], kept["buffer"])
        now = (fresh.readers, fresh.seed, self.buffer)
        if before == now:
            return replace(self, division=old, states=states), []
        division = replace(old.divide_again(states, fresh.readers), seed=fresh.seed)
        changes = [f"{name} {a}, now {b}" for name, a, b in zip(names, before, now, strict=True) if a != b]
        sentence = (
            f"{' and '.join(changes)}: shards that nobody had begun are divided anew, what was left of those under "
            "way is left out of this pass"
        )
        return replace(self, division=division, states=division.start()), [sentence]

    def title(self, name: str, size: int | None) -> str:
        """What a stream of this name and number of images is, for the summary of a run."""
        shards, readers = self.division.shards, self.division.readers
        each = shards // readers
        return (
            f"{size or 'an unknown number of'} images in {shards} shards of {name}, streamed: "
            f"{each if shards % readers == 0 else f'{each} or {each + 1}, by turns,'} to a reader in each pass, "
            f"none left out; shuffled {self.buffer} at a time"
        )


def first_samples(
    source: StreamedSource, reader: SampleReader, count: int, max_failures: float, name: str
) -> list[dict[str, Any]]:
    """The first `count` images that can be read, or all if there are fewer, as samples of positions 0, 1, ...

    UserError if no image can be read, or more than `max_failures` shards broke off. `name` is the source's, for
    messages.
    """
    samples: list[dict[str, Any]] = []
    failed: list[str] = []
    for shard in range(len(source)):
        try:
            for entry in source.entries(shard):
                sample = reader.read((-1, entry.name, entry.read), len(samples))
                if isinstance(sample, dict):
                    samples.append({**sample, "failed": []})
                if len(samples) == count:
                    return samples
        except ShardError as error:
            failed.append(describe_failure(source.shard_name(shard), error))
        if len(failed) > max_failures:
            break
    if failed or not samples:
        raise UserError(
            f"{name} gave {len(samples)} images: check the address, or the shards. "
            f"{'First ' + '; '.join(failed[:3]) if failed else 'None of them could be read'}"
        )
    return samples
