"""Files behind http(s) addresses: read from front to back, or fetched once to a folder on the disk.

Fetched tar shards are like any other: random access, exact resume, the same run with any number of processes. The data
set must fit on the disk, and training begins once it is there.
"""

import hashlib
import http.client
import io
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from spark.errors import FileError
from spark.images.sources.tars import image_entries

RETRIES = 4
PAUSE = 1.0  # before the first retry; doubled for each further one [s]
TIMEOUT = 60  # of a server that does not answer [s]
CONNECTIONS = 4
_CHUNK = 1 << 20


class DownloadError(FileError):
    """A file cannot be downloaded, or not all of it; the message is the reason.

    Attributes:
        stale: the file changed on the server: it has another length.
    """

    def __init__(self, reason: str, stale: bool = False):
        super().__init__(reason)
        self.stale = stale


class Download(io.RawIOBase):
    """The bytes behind an address, from front to back. A broken connection is resumed where it ended.

    `RETRIES` attempts in a row may fail; an attempt that brings a megabyte resets the count. A server without range
    requests sends the file again, and its known part is skipped.

    Args:
        url: http or https.
        start: first byte to read.

    Raises:
        DownloadError: on reading; the server refuses, or the connection breaks off again and again.
    """

    def __init__(self, url: str, start: int = 0):
        self._url = url
        self._place = start
        self._end: int | None = None
        self._answer: http.client.HTTPResponse | None = None
        self._failures = 0
        self._got = 0  # since the last failure

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        while True:
            try:
                if self._answer is None:
                    self._connect()
                assert self._answer is not None
                content = self._answer.read(len(buffer))
                if not content and self._end is not None and self._place < self._end:
                    raise ConnectionError(f"after {self._place} of {self._end} bytes")
                buffer[: len(content)] = content
                self._place += len(content)
                self._got += len(content)
                return len(content)
            except DownloadError:
                raise
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 429):
                    raise DownloadError(reason, stale=error.code == 416) from error
                self._pause(reason)
            except (http.client.HTTPException, OSError) as error:  # of the network: no file is touched here
                self._pause(f"the connection broke off ({_words(error)})")

    def close(self) -> None:
        """End the connection."""
        if self._answer is not None:
            self._answer.close()
        super().close()

    def _connect(self) -> None:
        headers = {"Range": f"bytes={self._place}-"} if self._place else {}
        answer = urllib.request.urlopen(urllib.request.Request(self._url, headers=headers), timeout=TIMEOUT)
        begin = self._place if answer.status == 206 else 0
        length = answer.headers.get("Content-Length")
        before, self._end = self._end, None if length is None else begin + int(length)
        if self._end is not None and self._end < self._place:
            raise DownloadError(f"the server has {self._end} bytes only, fewer than before", stale=True)
        if None not in (before, self._end) and before != self._end:
            raise DownloadError(
                f"it changed on the server while it was read ({before} bytes then, {self._end} now)",
                stale=True,
            )
        while begin < self._place:
            passed = len(answer.read(min(self._place - begin, _CHUNK)))
            if not passed:
                raise ConnectionError(f"after {begin} of {self._end or 'unknown'} bytes")
            begin += passed
        self._answer = answer

    def _pause(self, reason: str) -> None:
        self._answer = None
        self._failures = 1 if self._got >= _CHUNK else self._failures + 1
        self._got = 0
        if self._failures > RETRIES:
            raise DownloadError(f"{reason}, {self._failures} times in a row")
        time.sleep(PAUSE * 2 ** (self._failures - 1))


def fetch_shards(urls: Sequence[str], folder: str | Path) -> tuple[list[Path], list[str]]:
    """Fetch shards that are not there yet, several at once.

    A shard gets its final name once it is whole and its entries were checked. Of several processes with the same folder
    one fetches a shard, the others wait for it.

    Returns:
        The files of the fetched shards, in order; "URL: reason" of each that could not.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        fetched = list(pool.map(lambda url: _fetch(url, folder / local_name(url)), urls))
    failed = [
        f"{url}: {reason}" for url, reason in zip(urls, fetched, strict=True) if isinstance(reason, str)
    ]
    return [path for path in fetched if isinstance(path, Path)], failed


def local_name(url: str) -> str:
    """Name of the file for an address, different for different ones; no address can lead out of the folder."""
    stem = PurePosixPath(urlsplit(url).path).name or "shard.tar"
    return f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{stem}"


def _fetch(url: str, path: Path) -> Path | str:
    """The whole shard at `path`, or why it could not be fetched."""
    part = path.with_name(f".{path.name}.part")
    with FileLock(path.with_name(f".{path.name}.lock")):  # released with the process, however it ends
        if path.exists():
            return path
        for _ in range(2):
            begun = part.exists()
            try:
                with open(part, "ab") as file:
                    shutil.copyfileobj(Download(url, file.tell()), file, _CHUNK)
                for _ in image_entries(part):
                    pass
                os.replace(part, path)
                return path
            except (DownloadError, ValueError) as error:
                part.unlink()
                reason = str(error).replace(str(part), path.name)
                # Once more from the beginning, if the earlier part may belong to another file.
                if not (error.stale if isinstance(error, DownloadError) else begun):
                    break
        return " ".join(reason.split()).replace(": ", ", ")


def _words(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__
