"""Writing single files so that what has its final name is whole."""

import errno
import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write a file under a hidden name and rename it; folders are made where missing.

    Raises:
        OSError: Full disk, no permission: an earlier file of that name is untouched and nothing half-written is left.
            Of a full disk it names the path and says what to do.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):  # such as a folder that could not be made
            part.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"the disk is full, {path} was not written: free some space or write elsewhere, and try again",
                str(path),
            ) from error
        raise
    return path
