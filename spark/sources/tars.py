"""Images in tar shards on the disk, any of them at once: an index of where each lies is built when they are opened.

Nothing is unpacked, so no entry can be written anywhere; what is not a plain file (links, devices) is passed over.
"""

import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from spark.decoding import EXTENSIONS
from spark.sources.names import Names

_BLOCK = 512  # of a tar file [bytes]


class TarSource:
    """The image files in tar shards, in the order of the shards and of the entries in them.

    The conventions are those of webdataset: `KEY.jpg` beside `KEY.json` and whatever else; only images are taken, by
    the extensions of `EXTENSIONS`. An image costs its name and 28 bytes of memory.

    Args:
        shards: the tar files, not compressed.
        extensions: in lower case, of the files that are taken.

    Raises:
        ValueError: a shard that is empty, cut off, compressed, or no tar file, or without an image.
        OSError: a shard cannot be read.
    """

    def __init__(self, shards: Sequence[str | Path], extensions: Collection[str] = EXTENSIONS):
        self._extensions = extensions
        self._shards = [os.fspath(shard) for shard in shards]
        self._entries = Names(self._index())
        assert len(self._offsets) == len(self._entries)

    def _index(self) -> Iterator[str]:
        """Fill the arrays of shard, offset and size; yield the names."""
        counts, offsets, sizes = [], [], []
        for shard in self._shards:
            before = len(offsets)
            for name, offset, size in image_entries(shard, self._extensions):
                offsets.append(offset)
                sizes.append(size)
                yield name
            counts.append(len(offsets) - before)
        self._shard_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        self._offsets, self._sizes = np.array(offsets, np.int64), np.array(sizes, np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    def name(self, index: int) -> str:
        """`SHARD/ENTRY`."""
        return f"{self._shards[self._shard_of[index]]}/{self._entries[index]}"

    def read(self, index: int) -> bytes:
        """Content of an entry.

        Raises:
            OSError: the shard cannot be read, or is shorter than when it was opened.
        """
        with open(self._shards[self._shard_of[index]], "rb") as file:
            file.seek(self._offsets[index])
            content = file.read(self._sizes[index])
        if len(content) < self._sizes[index]:
            raise OSError("the shard became shorter while it was used")
        return content

    def digest(self) -> str:
        """See `Source`; of the names of shards without their folders, and of the entries."""
        return Names(
            f"{os.path.basename(self._shards[shard])}/{entry}"
            for shard, entry in zip(self._shard_of, self._entries, strict=True)
        ).digest()


def image_entries(
    shard: str | Path, extensions: Collection[str] = EXTENSIONS
) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size [bytes] of every image (or file of other `extensions`) in a tar file.

    Raises:
        ValueError: it is empty, cut off, compressed, or no tar file, or without an image.
        OSError: it cannot be read.
    """
    size = os.path.getsize(shard)
    if not size:
        raise ValueError(f"the shard {shard} is empty (0 bytes): write it again, or leave it out")
    images = 0
    with open(shard, "rb") as file:
        if file.read(2) in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5"):
            raise ValueError(
                f"the shard {shard} is compressed, in which no image can be found without reading all before it: "
                "unpack it to a plain .tar (images do not get smaller anyway)"
            )
        file.seek(0)
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for entry in archive:
                    end = entry.offset_data + (-(-entry.size // _BLOCK) * _BLOCK if entry.isreg() else 0)
                    if end > size:
                        raise ValueError(_cut_off(shard, f"in {entry.name}"))
                    if entry.isreg() and not entry.issparse() and _is_image(entry.name, extensions):
                        images += 1
                        yield entry.name, entry.offset_data, entry.size
                    archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # or it would keep them all
        except tarfile.TarError as error:
            raise ValueError(
                _cut_off(shard, "in the header or the data of an entry")
                if end
                else f"{shard} is no tar file ({error}): name shards, or an image folder or list"
            ) from error
        file.seek(end)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise ValueError(_cut_off(shard, "before the mark that ends a tar file"))
    if not images:
        raise ValueError(
            f"the shard {shard} holds no image: looked for entries that end in {' '.join(extensions)}"
        )


def _cut_off(shard: str | Path, where: str) -> str:
    return f"the shard {shard} is cut off {where}: copy or write it again, or leave it out"


def _is_image(name: str, extensions: Collection[str]) -> bool:
    stem, extension = os.path.splitext(os.path.basename(name))
    return extension.lower() in extensions and not stem.startswith(".")
