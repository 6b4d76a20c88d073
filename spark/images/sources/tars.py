"""Images in tar shards: any of them at once, by an index that is built when shards on the disk are opened, or one after
another, as the bytes of a shard arrive.

Nothing is unpacked, so no entry can be written anywhere; entries other than plain files (links, devices) are skipped.
"""

import os
import tarfile
from collections.abc import Collection, Iterator, Sequence
from io import BufferedReader
from pathlib import Path

import numpy as np

from spark.errors import FileError, UserError
from spark.images.decode import EXTENSIONS
from spark.images.sources.names import Names

SHARD_EXTENSIONS = (*EXTENSIONS, ".image.npy")
"""Images in a shard. Not `.npy` alone: beside a photo that is usually something else, such as its embedding."""

_BLOCK = 512  # of a tar file [bytes]
_CHUNK = 1 << 20  # read at once [bytes]
_COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5")  # how gzip, bzip2, xz and zstandard begin


class TarSource:
    """The image files in tar shards, in the order of the shards and of the entries in them.

    The conventions are those of webdataset: `KEY.jpg` beside `KEY.json` and others; only images are read, by the
    extensions of `SHARD_EXTENSIONS`. An image costs its name and 28 bytes of memory.

    Args:
        shards: the tar files, not compressed.
        extensions: of the files that are read, in lower case.

    Raises:
        UserError: a shard is empty, cut off, compressed, no tar file, or without an image.
    """

    def __init__(self, shards: Sequence[str | Path], extensions: Collection[str] = SHARD_EXTENSIONS):
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
        """Content of an entry."""
        with open(self._shards[self._shard_of[index]], "rb") as file:
            file.seek(self._offsets[index])
            content = file.read(self._sizes[index])
        if len(content) < self._sizes[index]:
            raise FileError("the shard became shorter while it was used")
        return content

    def digest(self) -> str:
        """See `Source`; of the names of shards without their folders, and of the entries."""
        return Names(
            f"{os.path.basename(self._shards[shard])}/{entry}"
            for shard, entry in zip(self._shard_of, self._entries, strict=True)
        ).digest()


def image_entries(
    shard: str | Path, extensions: Collection[str] = SHARD_EXTENSIONS
) -> Iterator[tuple[str, int, int]]:
    """Name, offset and size [bytes] of every image (or file of other `extensions`) in a tar file on the disk.

    Raises what `TarSource` raises.
    """
    with open(shard, "rb") as file:
        for entry, _ in _images(_Reader(file, 0), shard, extensions):
            yield entry.name, entry.offset_data, entry.size


def stream_images(file: BufferedReader, shard: str, start: int = 0) -> Iterator[tuple[str, bytes, int]]:
    """Every image in a tar file that is read from front to back; raises what `TarSource` raises.

    Args:
        file: at `start`; it need not be able to seek.
        shard: its name, for errors.
        start: 0, or a place that an earlier call yielded.

    Yields:
        Name and content, and the place of the next entry [bytes].
    """
    reader = _Reader(file, start)
    for entry, after in _images(reader, shard, SHARD_EXTENSIONS):
        reader.seek(entry.offset_data)
        content = reader.read_all(entry.size)
        if len(content) < entry.size:
            raise UserError(_cut_off(shard, f"in {entry.name}"))
        yield entry.name, content, after


def _images(
    reader: "_Reader", shard: str | Path, extensions: Collection[str]
) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The entries with an image, each with the place of the next entry; errors as of `stream_images`."""
    start, images = reader.tell(), 0
    try:
        with tarfile.open(fileobj=reader, mode="r:") as archive:  # pyright: ignore[reportArgumentType, reportCallIssue]
            for entry in archive:
                if entry.isreg() and not entry.issparse() and _is_image(entry.name, extensions):
                    images += 1
                    yield entry, archive.offset
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # or it would keep them all
    except tarfile.TarError as error:
        raise UserError(
            _cut_off(shard, "in the header or the data of an entry")
            if reader.tell() > _BLOCK or start
            else _no_tar(shard, reader.last, error)
        ) from error
    if reader.last != bytes(_BLOCK):
        raise UserError(_cut_off(shard, "before the mark that ends a tar file"))
    if not images and not start:
        raise UserError(
            f"the shard {shard} holds no image: looked for entries that end in {' '.join(extensions)}"
        )


class _Reader:
    """A file as tarfile wants it, of one that may not be able to seek; tarfile never asks for what it has read."""

    def __init__(self, file: BufferedReader, place: int):
        self._file = file
        self._place = place
        self.last = b""  # what was read last: a block of zeros at the mark that ends a tar file

    def tell(self) -> int:
        return self._place

    def seek(self, place: int) -> None:
        if place < self._place:
            raise tarfile.ReadError("an entry of negative size")
        if self._file.seekable():
            self._place = self._file.seek(place)
        while self._place < place and self.read(min(place - self._place, _CHUNK)):
            pass

    def read_all(self, count: int) -> bytes:
        """This many bytes, or fewer at the end; memory is taken as they come, not as the header promises."""
        parts = []
        while count > 0 and (part := self.read(min(count, _CHUNK))):
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def read(self, count: int) -> bytes:
        self.last = self._file.read(count)
        self._place += len(self.last)
        return self.last


def _no_tar(shard: str | Path, head: bytes, error: Exception) -> str:
    """Why a file with this beginning is no tar file."""
    if not head:
        return f"the shard {shard} is empty (0 bytes): write it again, or leave it out"
    if head.startswith(_COMPRESSED):
        return (
            f"the shard {shard} is compressed, in which no image can be found without reading all before it: "
            "unpack it to a plain .tar (images do not get smaller anyway)"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return (
            f"{shard} is a web page, no tar file: the address may need another form (such as /resolve/ for /blob/) or "
            "a permission"
        )
    return f"{shard} is no tar file ({error}): name shards, or an image folder or list"


def _cut_off(shard: str | Path, where: str) -> str:
    return f"the shard {shard} is cut off {where}: copy or write it again, or leave it out"


def _is_image(name: str, extensions: Collection[str]) -> bool:
    base = os.path.basename(name)
    return base.lower().endswith(tuple(extensions)) and not base.startswith(".")
