"""Tar shards behind http(s) addresses: each is fetched once to a folder on the disk, and is then like any other.

So what holds for shards on the disk holds for these: any image at once, exact resume, the same run whatever the number
of processes. Price: the data set must fit on the disk, and training begins when it is there.
"""

import fcntl
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from spark.sources.tars import image_entries

RETRIES = 4
PAUSE = 1.0  # before the first retry; doubled for each further one [s]
TIMEOUT = 60  # for a server that says nothing [s]
CONNECTIONS = 4
_CHUNK = 1 << 20


def fetch_shards(urls: Sequence[str], folder: str | Path) -> tuple[list[Path], list[str]]:
    """Fetch shards that are not there yet, several at once.

    A shard takes its name when it is whole and has been looked through. Several processes may call this with the same
    folder: one of them fetches a shard, the others wait for it.

    Args:
        urls: http or https.
        folder: where the shards are kept, under names made of those that they have and of their addresses.

    Returns:
        The files of the shards that could be had, in order; "URL: reason" of each that could not.

    Raises:
        OSError: the folder cannot be written; a full disk.
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
    """The whole shard at `path`, or why it cannot be had."""
    part = path.with_name(f".{path.name}.part")
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, whatever ends the process
        if path.exists():
            return path
        reason = ""
        for attempt in range(RETRIES + 1):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                _continue(url, part)
                for _ in image_entries(part):
                    pass
                os.replace(part, path)
                return path
            except urllib.error.HTTPError as error:
                reason = f"the server answers {error.code} {error.reason}"
                if error.code < 500 and error.code not in (408, 416, 429):
                    break
                if error.code == 416:  # what is here is not a beginning of what is there
                    part.unlink(missing_ok=True)
            except ValueError as error:
                reason = str(error).replace(str(part), path.name)
                part.unlink(missing_ok=True)
                break
            except (http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as error:
                reason = f"the connection broke off ({_words(error)}) {RETRIES + 1} times"
        part.unlink(missing_ok=True)
        return " ".join(reason.split()).replace(": ", ", ")


def _continue(url: str, part: Path) -> None:
    """Fetch what is missing at the end of `part`."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        expected = answer.headers.get("Content-Length")
        # A server that knows no ranges starts again, and so does the file.
        with open(part, "ab" if answer.status == 206 else "wb") as file:
            got = 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                got += len(chunk)
    if expected is not None and got < int(expected):
        raise ConnectionError(f"after {got} of {expected} bytes")


def _words(error: Exception) -> str:
    return str(getattr(error, "reason", None) or error) or type(error).__name__
