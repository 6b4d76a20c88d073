"""Batches of a run: one loader for sources that give any image (shuffled by index) and for streamed shards."""

import atexit
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spark.config import DataConfig
from spark.errors import UserError
from spark.images.dataset import SampleReader, UnlabeledImages
from spark.images.sources import Source, StreamedSource, open_source, open_stream
from spark.images.stream import Division, Progress, StreamedBatches, first_samples
from spark.training.accelerator import worker_count
from spark.training.sampling import StreamSampler
from spark.training.skipped import allowed_failures
from spark.training.stop import end_loaders, ignore_stop_signals

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


def load_batches(dataset: Dataset, workers: int, device: torch.device, **options: Any) -> Iterator[Any]:
    """Batches of a data set, read ahead by loader processes that survive stop signals, and no failure of this one.

    Args:
        dataset: of samples; without options, an iterable one of batches.
        workers: loader processes; 0 reads in this process.
        device: that computes; batches for a GPU lie in pinned memory.
        options: of torch's `DataLoader`, such as `batch_sampler` and `collate_fn`.
    """
    atexit.unregister(end_loaders)
    atexit.register(end_loaders)
    options = {"pin_memory": device.type == "cuda", **(options or {"batch_size": None})}
    return iter(DataLoader(dataset, num_workers=workers, worker_init_fn=ignore_stop_signals, **options))


class ImageLoader:
    """Micro-batches of one process of a run.

    Args:
        source: of the images: one that gives any of them, or with `progress` one that is streamed.
        data: the options.
        reader: of the samples.
        collate: samples to a batch.
        accelerator: of the run.
        batch_size: images of a micro-batch.
        workers: loader processes of each training process.
        progress: where to begin in a stream.

    Attributes:
        size: images of an epoch, None where it is not known.
        shards: streamed shards, whose reading may break off.
        missing_shards: "URL: reason" of shards that could not be fetched.
        facts: what a checkpoint says about the data, to notice that they changed.
        state: what a checkpoint keeps of a stream; changed in place.
        notes: what a user should know when a run goes on, in sentences.
        title: what the images are, for the summary of a run.
        workers: as given.
    """

    def __init__(
        self,
        source: Source | StreamedSource,
        data: DataConfig,
        reader: SampleReader,
        collate: Collate,
        accelerator: Accelerator,
        batch_size: int,
        workers: int,
        progress: Progress | None = None,
    ):
        self._source: Any = source
        self._data, self._reader, self._collate = data, reader, collate
        self._accelerator, self._batch_size, self._progress = accelerator, batch_size, progress
        self.workers = workers
        self.missing_shards: list[str] = []
        self.notes: list[str] = []
        if progress is None:
            self.size: int | None = len(source)
            self.shards = 0
            self.facts: dict[str, Any] = {"images": self.size}
            self.title = f"{self.size} images in {data.train}"
            self.state: dict[str, Any] = {}
        else:
            self.size = self._source.size
            self.shards = len(source)
            self.facts = {"images": self.size, "shards": self.shards}
            self.title = progress.title(data.train, self.size)
            self.state = progress.to_dict()
            own = max(workers, 1)
            self._received = progress.states[accelerator.process_index * own :][:own].clone()
        self.facts["names"] = source.digest()

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Micro-batches of this process, from number `start` to the one before `stop`.

        A stream goes on behind the last batch that was taken, whatever `start` is.
        """
        place = {
            "rank": self._accelerator.process_index,
            "world_size": self._accelerator.num_processes,
            "start": start,
            "stop": stop,
        }
        device = self._accelerator.device
        if self._progress is None:
            assert self.size is not None
            sampler = StreamSampler(self.size, self._batch_size, seed=self._reader.seed, **place)
            images = UnlabeledImages(self._source, self._reader)
            yield from load_batches(
                images, self.workers, device, batch_sampler=sampler, collate_fn=self._collate
            )
            return
        stream = StreamedBatches(
            self._source,
            self._reader,
            self._collate,
            self._progress.division,
            self._received.clone(),
            batch_size=self._batch_size,
            buffer=self._data.shuffle_buffer,
            max_failures=int(allowed_failures(self._data.max_unreadable, self.shards)),
            **place,
        )
        for batch in load_batches(stream, self.workers, device):
            self._received[batch.pop("reader")] = batch.pop("state")
            yield batch

    def advance(self) -> None:
        """Count all batches that were taken as done; a checkpoint written from now on goes on behind them.

        All processes call it together, after each step and after each rollback.
        """
        if self._progress is not None:
            received = self._received
            if self._accelerator.num_processes > 1:
                gathered = self._accelerator.gather(received.to(self._accelerator.device))
                assert isinstance(gathered, Tensor)
                received = gathered.cpu()
            self.state["states"] = received.tolist()

    def fixed(self, count: int) -> list[dict[str, Any]]:
        """At most `count` samples in the model's own size, always the same.

        Spread evenly over the source; of a stream, the first ones that can be read.
        """
        reader = replace(self._reader, plan=None)
        if self._progress is not None:
            allowed = allowed_failures(self._data.max_unreadable, self.shards)
            return first_samples(self._source, reader, count, allowed, self._data.train)
        images = UnlabeledImages(self._source, reader)
        count = min(count, len(images))
        return [images[position, position * len(images) // count] for position in range(count)]

    def epochs(self, images: int) -> float:
        """Passes over the data in this many images; of unknown size, the passes that all readers have finished."""
        return images / self.size if self.size else float(min(state[0] for state in self.state["states"]))


def open_loader(
    data: DataConfig,
    reader: SampleReader,
    collate: Collate,
    accelerator: Accelerator,
    batch_size: int,
    *,
    cache: str | Path,
    before: Mapping[str, Any] | None = None,
    length_is_known: bool = True,
) -> ImageLoader:
    """The loader of a run.

    Args:
        data: where the images come from.
        reader: of the samples.
        collate: samples to a batch.
        accelerator: of the run.
        batch_size: images that a process puts through the network at once.
        cache: folder for fetched shards, unless `data.cache` names one.
        before: what a checkpoint keeps beside weights and optimizer, if the run continues from one.
        length_is_known: the length of the run and of its warm-up is given in steps, not in epochs.

    Raises:
        UserError: the data are wrong, or not fit for what is asked.
        OSError: they cannot be read.
    """
    kept = None if before is None else before.get("stream") or None
    workers = worker_count(data.workers, accelerator)
    if not data.streaming:
        source, missing = open_source(data.train, data.cache or cache, data.max_unreadable)
        loader = ImageLoader(source, data, reader, collate, accelerator, batch_size, workers)
        loader.missing_shards = missing
        if kept is not None:
            loader.notes.append("the images were streamed before: their order is another one")
        return loader
    stream = open_stream(data.train, data.size)
    if stream.size is None and not length_is_known:
        raise UserError(
            f"how many images {data.train} has is known only when all were read: add --data.size N (images of an "
            "epoch), or say the length of the run with --max_steps and --optim.warmup_steps"
        )
    world, shards = accelerator.num_processes, len(stream)
    if data.workers is None:
        workers = min(workers, max(shards // world, 1))
        if kept is not None and kept["readers"] % world == 0:  # their number decides what each one reads
            workers = kept["readers"] // world
    own = max(workers, 1)  # without loader processes, the training process reads itself
    if world * own > shards:
        raise UserError(
            f"{data.train} has {shards} shards for {world * own} readers ({world} processes x {own} loader processes), "
            f"and each reads shards of its own: set --data.workers {shards // world}"
            if shards >= world
            else f"{data.train} has {shards} shards for {world} processes, and each reads shards of its own: use fewer "
            "processes, or write the images as more shards (spark-prepare)"
        )
    division = Division(shards, world * own, reader.seed)
    progress = Progress(stream.digest(), data.shuffle_buffer, division, division.start())
    notes = [] if before is None else ["the images were not streamed before: their stream begins anew"]
    if kept is not None:
        progress, notes = progress.resumed(kept)
    loader = ImageLoader(stream, data, reader, collate, accelerator, batch_size, workers, progress)
    loader.notes = notes
    return loader
