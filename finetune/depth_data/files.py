"""Files below a folder or inside a zip archive, read the same way; and arrays among them, image by image."""

import os
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import IO, Generic, TypeVar

import numpy as np
from numpy.lib import format as npy

from finetune.depth_data.sample import file_error, unreadable
from spark.errors import UserError

T = TypeVar("T")
DAMAGED = (OSError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError)
"""What reading a damaged file or archive raises."""


class PerProcess(Generic[T]):
    """An open file that each process opens for itself at its first use: a handle must not cross a fork or a pickle.

    Args:
        opener: opens it.
    """

    def __init__(self, opener: Callable[[], T]) -> None:
        self._opener, self._pid = opener, 0

    def __call__(self) -> T:
        """The open file of this process."""
        if self._pid != os.getpid():
            self._file, self._pid = self._opener(), os.getpid()
        return self._file

    def __getstate__(self) -> dict:
        return {"_opener": self._opener, "_pid": 0}


class Files:
    """Read access to what lies below a folder or in a zip archive, by names relative to it with `/`.

    Nothing is unpacked.

    Args:
        root: the folder or the .zip file.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._archive = PerProcess(partial(zipfile.ZipFile, self.root))
        self._entries: frozenset[str] | None = None
        if self.root.is_dir():
            return
        if not zipfile.is_zipfile(self.root):
            raise UserError(
                f"{self.root} is neither a folder nor a whole zip archive: copy or download it again"
            )
        with zipfile.ZipFile(self.root) as archive:
            self._entries = frozenset(archive.namelist())

    def __contains__(self, name: str) -> bool:
        return (self.root / name).is_file() if self._entries is None else name in self._entries

    def find(self, name: str) -> str | None:
        """The entry of this file name that lies least deep (at most two folders down), or None."""
        if self._entries is None:
            found = [
                path.relative_to(self.root).as_posix()
                for pattern in (name, f"*/{name}", f"*/*/{name}")
                for path in self.root.glob(pattern)
            ]
        else:
            found = [entry for entry in self._entries if PurePosixPath(entry).name == name]
        return min(found, key=lambda entry: (entry.count("/"), entry), default=None)

    def where(self, name: str) -> str:
        """How errors call a file."""
        return f"{self.root}/{name}"

    def read(self, name: str, what: str) -> bytes:
        """Content of a file that should be `what`, such as "an image".

        Raises:
            DepthFileError: it is missing or damaged.
        """
        try:
            with self.open(name) as file:
                return file.read()
        except DAMAGED as error:
            raise unreadable(self.where(name), what, error) from error

    def open(self, name: str) -> IO[bytes]:
        """A file, to be read from its beginning; errors are those of the system and of the archive."""
        if self._entries is None:
            return (self.root / name).open("rb")
        return self._archive().open(name)


class ArrayRows:
    """An array `.npy`, of which one entry of its first axis is read at a time: it may be larger than the memory.

    Inside a compressed archive, going forward is cheap, and going back reads from the beginning.

    Args:
        files: where it lies.
        name: of the file there.

    Attributes:
        shape: of the whole array.
        where: how errors call the file.

    Raises:
        DepthFileError: no array of numbers, or one in the order of Fortran.
    """

    def __init__(self, files: Files, name: str):
        self.where = files.where(name)
        self._stream = PerProcess(partial(files.open, name))
        try:
            with files.open(name) as stream:
                version = npy.read_magic(stream)
                read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
                self.shape, fortran, self.dtype = read(stream)
                self._begin = stream.tell()
        except DAMAGED as error:
            raise unreadable(self.where, "an array of NumPy", error) from error
        if self.dtype.hasobject or not self.shape:
            raise file_error(self.where, "holds Python objects or a single value, not an array of numbers")
        if fortran:
            raise file_error(
                self.where,
                "is in the order of Fortran, image after image is needed; save it again:"
                " numpy.save(name, numpy.ascontiguousarray(array))",
            )

    def __getitem__(self, index: int) -> np.ndarray:
        """An entry of the first axis; DepthFileError where the file is damaged or cut short."""
        size = self.dtype.itemsize * prod(self.shape[1:])
        try:
            stream = self._stream()
            stream.seek(self._begin + index * size)
            content = stream.read(size)
            if len(content) < size:
                raise EOFError(f"cut short at image {index} of {self.shape[0]}")
        except DAMAGED as error:
            raise unreadable(f"{self.where}, image {index}", "an array of NumPy", error) from error
        return np.frombuffer(content, self.dtype).reshape(self.shape[1:]).copy()
