"""Writing single files so that what has its final name is whole."""

import os
from pathlib import Path


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write a file under a hidden name and rename it; folders are made where missing.

    Raises:
        OSError: Full disk, no permission: an earlier file of that name is untouched and nothing half-written is left.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return path
