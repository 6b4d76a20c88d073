"""Files below a folder or inside a zip archive, read the same way."""

import os
import zipfile
from pathlib import Path, PurePosixPath

from finetune.depth_data.sample import unreadable


class Files:
    """Read access to what lies below a folder or in a zip archive, by names relative to it with `/`.

    Nothing is unpacked. Each process opens the archive for itself at its first read.

    Args:
        root: the folder or the .zip file.

    Raises:
        ValueError: neither, or a damaged archive.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._archive: zipfile.ZipFile | None = None
        self._pid = 0
        self._entries: frozenset[str] | None = None
        if self.root.is_dir():
            return
        if not zipfile.is_zipfile(self.root):
            raise ValueError(
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
            if self._entries is None:
                return (self.root / name).read_bytes()
            if self._archive is None or self._pid != os.getpid():
                self._archive, self._pid = zipfile.ZipFile(self.root), os.getpid()
            return self._archive.read(name)
        except (OSError, KeyError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
            raise unreadable(self.where(name), what, error) from error

    def __getstate__(self) -> dict:
        """Leave the open archive behind: the copy opens its own."""
        return {**self.__dict__, "_archive": None, "_pid": 0}
