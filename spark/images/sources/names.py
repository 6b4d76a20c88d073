"""Millions of names in two arrays, which loader processes share."""

import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np


class Names:
    """An immutable list of file names as bytes one after another, and where each of them ends.

    In a Python list a name costs about a hundred bytes more than its length, and every loader process gets a copy,
    because counting references writes to shared memory. Here a name costs its length and 8 bytes.

    Args:
        names: as the file system gives them (names that are not UTF-8 are kept).
    """

    def __init__(self, names: Iterable[str]):
        text = bytearray()
        ends = [0]
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self._text = np.frombuffer(bytes(text), np.uint8)
        self._ends = np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return os.fsdecode(self._text[self._ends[index] : self._ends[index + 1]].tobytes())

    def digest(self) -> str:
        """SHA-256 of all names, each followed by a zero byte, which no name has."""
        digest = hashlib.sha256()
        for name in self:
            digest.update(os.fsencode(name) + b"\0")
        return digest.hexdigest()
