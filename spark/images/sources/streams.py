"""Shards that are read from front to back, without an index and without a copy on the disk: for `data.streaming`."""

import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from spark.images.sources.base import Entry, ShardError
from spark.images.sources.hub import cell_bytes, hub_title, image_column, open_hub
from spark.images.sources.names import Names
from spark.images.sources.remote import Download
from spark.images.sources.tars import stream_images


class TarStream:
    """Tar shards on the disk or behind http(s) addresses; their entries are as in `TarSource`.

    A place in a shard is counted in bytes, so that a server with range requests sends no byte twice.

    Args:
        shards: paths or addresses.
        size: number of images, None if unknown.
    """

    def __init__(self, shards: Sequence[str], size: int | None = None):
        self._shards = Names(shards)
        self.size = size

    def __len__(self) -> int:
        return len(self._shards)

    def shard_name(self, shard: int) -> str:
        """Path or address."""
        return self._shards[shard]

    def entries(self, shard: int, start: int = 0) -> Iterator[Entry]:
        """See `StreamedSource`."""
        name = self._shards[shard]
        try:
            with _open_at(name, start) as file:
                for entry, content, after in stream_images(file, Path(name).name, start):
                    yield Entry(f"{name}/{entry}", partial(bytes, content), after)
        except OSError as error:
            raise ShardError(error.strerror or str(error)) from error
        except ValueError as error:
            raise ShardError(str(error)) from error

    def digest(self) -> str:
        """See `StreamedSource`; of the names without their folders."""
        return Names(Path(name).name for name in self._shards).digest()


def _open_at(name: str, start: int) -> io.BufferedReader:
    if name.startswith(("http://", "https://")):
        return io.BufferedReader(Download(name, start), buffer_size=1 << 16)
    file = open(name, "rb")  # noqa: SIM115  (the caller closes it)
    file.seek(start)
    return file


class HubStream:
    """The image column of a Hugging Face data set, streamed by the package `datasets`: from the hub, or from a folder.

    Its shards are those of the data set (files, as a rule); a place in one is a number of rows.

    Args:
        text: `NAME[:SPLIT[:COLUMN]]` as for `HubSource`.
        size: number of images; None asks the data set's own description.
    """

    def __init__(self, text: str, size: int | None = None):
        self._name, self._split, column = hub_title(text)
        rows, kinds = open_hub(self._name, self._split, streaming=True)
        features = rows.features
        if features is None:  # formats without a schema: taken from the first row
            features = rows._resolve_features().features
        self._column = image_column(self._name, features, kinds, column)
        self._rows = rows.select_columns(self._column).cast_column(self._column, kinds.Image(decode=False))
        self._shards = int(self._rows.num_shards)
        described = (rows.info.splits or {}).get(self._split)
        self.size = size or (described.num_examples if described is not None else None) or None

    def __len__(self) -> int:
        return self._shards

    def shard_name(self, shard: int) -> str:
        """`hf:NAME:SPLIT:COLUMN, shard NUMBER`."""
        return f"{self._title()}, shard {shard}"

    def entries(self, shard: int, start: int = 0) -> Iterator[Entry]:
        """See `StreamedSource`."""
        rows = self._rows.shard(num_shards=self._shards, index=shard)
        number = start
        try:
            # In batches: row by row, a loader process of torch would get a part of the rows only.
            for batch in (rows.skip(start) if start else rows).iter(batch_size=1):
                name = f"{self._title()}[shard {shard}, row {number}]"
                number += 1
                yield Entry(name, partial(cell_bytes, batch[self._column][0]), number)
        except Exception as error:  # of the library, of the file system, of the network
            raise ShardError(
                f"cannot be read from row {number} on ({type(error).__name__}, {error})"
            ) from error
        if not number:
            raise ShardError("holds no row")

    def _title(self) -> str:
        return f"hf:{self._name}:{self._split}:{self._column}"

    def digest(self) -> str:
        """See `StreamedSource`."""
        return Names([f"{Path(self._name).name}:{self._split}:{self._column}[{self._shards}]"]).digest()
