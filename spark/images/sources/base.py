"""What a source of images is: one that gives any image at once, and one that is read from front to back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from spark.errors import UserError


class Source(Protocol):
    """Images that can be read in any order, by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Name for messages: the path of the image, or of the file that holds it and its place there."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded image, or its pixels, for `spark.images.bands.open_image`.

        Raises:
            OSError: it cannot be read.
            UserError: it is no image.
        """
        ...

    def digest(self) -> str:
        """Hexadecimal digest of the names of the images and of their order, to notice that a data set changed."""
        ...


@dataclass(frozen=True)
class Entry:
    """An image in a shard that is read from front to back.

    Attributes:
        name: for messages.
        read: gives the encoded image; raises OSError or ValueError as `Source.read` does.
        after: place in the shard behind it, for `StreamedSource.entries`.
    """

    name: str
    read: Callable[[], bytes]
    after: int


class ShardError(UserError):
    """A shard, or the rest of it, cannot be read; the message is the reason, in one line."""


class StreamedSource(Protocol):
    """Images in shards that are read from front to back, on a disk or behind a network.

    Attributes:
        size: number of images, None where it is unknown.
    """

    size: int | None

    def __len__(self) -> int:
        """Number of shards."""
        ...

    def shard_name(self, shard: int) -> str:
        """Name of a shard, for messages."""
        ...

    def entries(self, shard: int, start: int = 0) -> Iterator[Entry]:
        """The images of a shard in order.

        Args:
            shard: its number.
            start: 0 for its beginning, or `Entry.after` of the last image that was read.

        Raises:
            ShardError: it cannot be opened, breaks off, or holds no image.
        """
        ...

    def digest(self) -> str:
        """Hexadecimal digest of the names of the shards and of their order."""
        ...
