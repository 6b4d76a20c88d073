"""Where the batches of a run come from: images that can be read in any order, or images that are streamed.

Both feeds have the same surface, so that the loop need not ask which of them it has.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from spark.config import PretrainConfig
from spark.errors import UserError
from spark.images.batches import MaskedBatches, StepImages, StepPlan
from spark.images.dataset import UnlabeledImages, read_sample
from spark.images.decode import describe_failure
from spark.images.sources import ShardError, Source, StreamedSource, open_source, open_stream
from spark.images.stream import STATE, Division, StreamedBatches
from spark.images.transform import PretrainTransform
from spark.seeds import derive_seed
from spark.training.accelerator import worker_count
from spark.training.sampling import StreamSampler
from spark.training.skipped import allowed_failures
from spark.training.stop import ignore_stop_signals


@dataclass
class FeedOptions:
    """What both feeds are made of, beside the source.

    Attributes:
        config: the options of the run.
        transform: of one image, in the model's own size.
        plan: sizes and mask ratios of the steps.
        collate: samples to a batch with its masks.
        accelerator: of the run.
        batch_size: images that a process puts through the network at once.
    """

    config: PretrainConfig
    transform: PretrainTransform
    plan: StepPlan
    collate: MaskedBatches
    accelerator: Accelerator
    batch_size: int

    def transforms(self) -> dict[tuple[int, int], PretrainTransform]:
        """The transform for each size of the plan."""
        return {size: replace(self.transform, input_size=size) for size in self.plan.sizes}

    def loader(self, workers: int, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Batches through torch's loader."""
        pin = self.accelerator.device.type == "cuda"
        loader: DataLoader = DataLoader(
            num_workers=workers, pin_memory=pin, worker_init_fn=ignore_stop_signals, **arguments
        )
        return iter(loader)


class Feed:
    """Batches of images that can be read in any order: the stream of `spark.training.sampling.StreamSampler`.

    Args:
        options: see there.
        source: of the images.
        lost: "URL: reason" of each shard that the source lacks.

    Attributes:
        size: images of an epoch, None where it is not known.
        shards: shards whose reading may break off.
        lost: as given.
        facts: what a checkpoint says about the data, to notice that they changed.
        state: what a checkpoint keeps of the feed; it is changed in place.
        notes: what a user should know when a run goes on, in sentences.
        title: what the images are, for the summary of a run.
        workers: loader processes of each process.
    """

    def __init__(self, options: FeedOptions, source: Source, lost: Sequence[str] = ()):
        self.options = options
        self.size: int | None = len(source)
        self.shards = 0
        self.lost = list(lost)
        self.facts: dict[str, Any] = {"images": len(source), "names": source.digest()}
        self.state: dict[str, Any] = {}
        self.notes: list[str] = []
        self.title = f"{len(source)} images in {options.config.data.train}"
        self.workers = worker_count(options.config.data.workers, options.accelerator)
        config = options.config
        self._images = UnlabeledImages(
            source, options.transform, config.seed, config.data.max_pixels, config.model.in_chans
        )

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of this process, from number `start` to the one before `stop`."""
        options = self.options
        sized = {}
        for size, transform in options.transforms().items():
            sized[size] = copy.copy(self._images)  # the source is shared
            sized[size].transform = transform
        assert self.size is not None
        sampler = StreamSampler(
            self.size,
            options.batch_size,
            rank=options.accelerator.process_index,
            world_size=options.accelerator.num_processes,
            seed=options.config.seed,
            start=start,
            stop=stop,
        )
        return options.loader(
            self.workers,
            dataset=StepImages(sized, options.plan),
            batch_sampler=sampler,
            collate_fn=options.collate,
        )

    def fixed(self, most: int) -> list[dict[str, Any]]:
        """At most so many images as samples, always the same: evenly spread."""
        count = min(most, len(self._images))
        return [self._images[position, position * len(self._images) // count] for position in range(count)]

    def received(self, batch: dict[str, Any]) -> None:
        """Take note of a batch that is going to be trained on."""

    def advance(self) -> None:
        """Count what was received as done: a checkpoint made from now on goes on behind it. All processes call it."""

    def epoch(self, images: int) -> float:
        """Passes over the data that so many images are."""
        assert self.size is not None
        return images / self.size


class StreamFeed(Feed):
    """Batches of streamed images, see `spark.images.stream`.

    Args:
        options: see `FeedOptions`.
        source: of the images.
        before: `state` of the checkpoint that the run continues from, None to begin.

    Raises:
        ValueError: nobody knows how long the run is to be; there are fewer shards than readers.
    """

    def __init__(self, options: FeedOptions, source: StreamedSource, before: dict[str, Any] | None):
        config, world = options.config, options.accelerator.num_processes
        self.options = options
        self.source = source
        self.size = source.size
        self.shards = len(source)
        self.lost = []
        self.facts = {"images": self.size, "shards": self.shards, "names": source.digest()}
        if self.size is None and (
            config.max_steps is None or (config.optim.warmup_steps is None and config.optim.warmup_epochs)
        ):
            raise UserError(
                f"how many images {config.data.train} has is known only when all were read: add --data.size N (images "
                "of an epoch), or say the length of the run with --max_steps and --optim.warmup_steps"
            )
        self.workers = self._worker_count(before)
        self.own = max(self.workers, 1)  # without loader processes, the training process reads itself
        if (readers := world * self.own) > self.shards:
            raise UserError(
                f"{config.data.train} has {self.shards} shards for {readers} readers ({world} processes x {self.own} "
                f"loader processes), and each reads shards of its own: set --data.workers {self.shards // world}"
                if self.shards >= world
                else f"{config.data.train} has {self.shards} shards for {world} processes, and each reads shards of "
                "its own: use fewer processes, or write the images as more shards (spark/commands/prepare.py)"
            )
        self._division, states, self.notes = self._resumed(
            before, Division(self.shards, readers, config.seed)
        )
        self._states = states
        first = options.accelerator.process_index * self.own
        self._received = states[first : first + self.own].clone()
        division = self._division
        self.state = {
            "shards": self.facts["names"],
            "seed": config.seed,
            "buffer": config.data.shuffle_buffer,
            "readers": readers,
            "first": division.first,
            "left": {number: list(shards) for number, shards in division.left.items()},
            "states": states.tolist(),
        }
        each = self.shards // readers
        self.title = (
            f"{self.size or 'an unknown number of'} images in {self.shards} shards of {config.data.train}, streamed: "
            f"{each if self.shards % readers == 0 else f'{each} or {each + 1}, by turns,'} to a reader in each pass, "
            f"none left out; shuffled {config.data.shuffle_buffer} at a time"
        )

    def _worker_count(self, before: dict[str, Any] | None) -> int:
        """Loader processes of each process; as before in the run, for their number decides what it reads."""
        config, world = self.options.config, self.options.accelerator.num_processes
        if config.data.workers is None and before is not None and before["readers"] % world == 0:
            return before["readers"] // world
        workers = worker_count(config.data.workers, self.options.accelerator)
        return min(workers, max(self.shards // world, 1)) if config.data.workers is None else workers

    def _resumed(self, before: dict[str, Any] | None, fresh: Division) -> tuple[Division, Tensor, list[str]]:
        """How the shards are divided and where the readers stand, and what to say about it."""
        if before is None:
            return fresh, fresh.start(), []
        old = replace(
            fresh,
            readers=before["readers"],
            seed=before["seed"],
            first=before["first"],
            left=before["left"],
        )
        states = torch.tensor(before["states"]).view(-1, STATE)
        if before["shards"] != self.facts["names"]:
            later = int(states[:, 4].max()) + 1
            division = replace(fresh, first=later)
            return division, division.start(), ["the shards are others: their stream begins anew"]
        buffer = self.options.config.data.shuffle_buffer
        kept = (before["readers"], before["seed"], before["buffer"])
        if kept == (fresh.readers, fresh.seed, buffer):
            return old, states, []
        division = replace(old.divide_again(states, fresh.readers), seed=fresh.seed)
        names = ("readers (processes x loader processes)", "the seed", "the shuffle buffer")
        what = [
            f"{name} {'were' if name.startswith('readers') else 'was'} {was}, now {now}"
            for name, was, now in zip(names, kept, (fresh.readers, fresh.seed, buffer), strict=True)
            if was != now
        ]
        return (
            division,
            division.start(),
            [
                f"{' and '.join(what)}: shards that nobody had begun are divided anew, what was left of those under "
                "way is left out of this pass"
            ],
        )

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """See `Feed`; goes on behind what was received, whatever `start` is."""
        options, config = self.options, self.options.config
        batches = StreamedBatches(
            self.source,
            options.transforms(),
            options.plan,
            options.collate,
            self._division,
            self._received,
            batch_size=options.batch_size,
            rank=options.accelerator.process_index,
            world_size=options.accelerator.num_processes,
            start=start,
            stop=stop,
            buffer=config.data.shuffle_buffer,
            max_pixels=config.data.max_pixels,
            max_lost=int(allowed_failures(config.data.max_unreadable, self.shards)),
            channels=config.model.in_chans,
        )
        return options.loader(self.workers, dataset=batches, batch_size=None)

    def fixed(self, most: int) -> list[dict[str, Any]]:
        """At most so many images as samples, always the same: the first ones that can be read."""
        config = self.options.config
        samples: list[dict[str, Any]] = []
        failed: list[str] = []
        for shard in range(self.shards):
            try:
                for entry in self.source.entries(shard):
                    position = len(samples)
                    image = read_sample(
                        entry.read,
                        entry.name,
                        self.options.transform,
                        derive_seed(config.seed, position),
                        config.data.max_pixels,
                        config.model.in_chans,
                    )
                    if isinstance(image, Tensor):
                        rest = {"position": position, "index": -1, "name": entry.name, "failed": []}
                        samples.append({"image": image, **rest})
                    if len(samples) == most:
                        return samples
            except ShardError as error:
                failed.append(describe_failure(self.source.shard_name(shard), error))
            if len(failed) > allowed_failures(config.data.max_unreadable, self.shards):
                break
        if failed or not samples:
            raise UserError(
                f"{config.data.train} gave {len(samples)} images: check the address, or the shards. "
                f"{'First ' + '; '.join(failed[:3]) if failed else 'None of them could be read'}"
            )
        return samples

    def received(self, batch: dict[str, Any]) -> None:
        """See `Feed`."""
        self._received[batch["reader"]] = batch["state"]

    def advance(self) -> None:
        """See `Feed`."""
        accelerator = self.options.accelerator
        self._states = self._received.clone()
        if accelerator.num_processes > 1:
            gathered = accelerator.gather(self._received.to(accelerator.device))
            assert isinstance(gathered, Tensor)
            self._states = gathered.cpu()
        self.state["states"] = self._states.tolist()

    def epoch(self, images: int) -> float:
        """See `Feed`; where the size is not known, the passes that all readers have finished."""
        return images / self.size if self.size else float(self._states[:, 0].min())


def open_feed(options: FeedOptions, before: dict[str, Any] | None) -> Feed:
    """The feed of a run.

    Args:
        options: see there.
        before: what a checkpoint keeps beside weights and optimizer, if the run continues from one.

    Raises:
        ValueError: the data are wrong, or not fit for what is asked.
        OSError: they cannot be read.
    """
    data = options.config.data
    if data.streaming:
        kept = None if before is None else before.get("stream") or None
        feed = StreamFeed(options, open_stream(data.train, data.size), kept)
        if before is not None and kept is None:
            feed.notes.append("the images were not streamed before: their stream begins anew")
        return feed
    cache = data.cache or Path(options.config.output_dir) / "shards"
    source, lost = open_source(data.train, cache, data.max_unreadable)
    feed = Feed(options, source, lost)
    if before is not None and before.get("stream"):
        feed.notes.append("the images were streamed before: their order is another one")
    return feed
