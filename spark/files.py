"""Files, and folders of weights (checkpoints, exported encoders, depth models), that are whole or absent."""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from spark.errors import FileError, UserError

if TYPE_CHECKING:  # writing a text file needs no torch
    from torch import Tensor, nn

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write a file under a hidden name and rename it; folders are made where missing.

    Raises:
        OSError: An earlier file of that name is untouched and nothing half-written is left.
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
        if error.errno in _DISK_FULL:
            raise FileError(
                error.errno,
                f"the disk is full, {path} was not written: free some space or write elsewhere, and try again",
            ) from error
        raise
    return path


def checksum(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal, as `sha256sum` prints it. OSError: it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while content := file.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()


def check_replaceable(folder: str | Path, files: Collection[str]) -> None:
    """Raise ValueError for a folder that is there and holds anything but `files`, or is a file."""
    folder = Path(folder).resolve()
    if not folder.exists():
        return
    inside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else ["a file"]
    if foreign := sorted(set(inside) - set(files)):
        raise UserError(
            f"{folder} will not be replaced, because it is not (only) what is to be written there: it holds"
            f" {', '.join(foreign[:3])}. Choose another folder, or move these away"
        )


def check_writable(folder: str | Path) -> None:
    """Raise OSError, before anything is computed, for a folder that could not be made or written."""
    folder = Path(folder).resolve()
    present = next(place for place in folder.parents if place.exists())
    if not present.is_dir():
        raise FileError(f"{folder} cannot be a folder, {present} is a file: choose another folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise FileError(f"{present} is not writable, {folder} cannot be written: choose another folder")


@contextmanager
def whole_folder(folder: str | Path, files: Collection[str]) -> Iterator[Path]:
    """Write a folder so that it appears whole or not at all.

    The body writes `files` into the path that it is given. An earlier folder of that name gives way only when all of it
    is on the disk; if the body fails, everything else stays as it was.

    Args:
        folder: Final path; parents are made.
        files: Names of the files that such a folder has.

    Raises:
        UserError: `folder` exists and holds anything else.
        OSError: It could not be written.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder, files)
    temporary = folder.with_name(f".{folder.name}.new-{os.getpid()}")
    retired = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if folder.exists():
            folder.rename(retired)
        temporary.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        number = _system_error(error) if isinstance(error, OSError | RuntimeError | SafetensorError) else None
        if number is None:
            raise
        if number in _DISK_FULL:
            raise FileError(
                number,
                f"the disk is full, {folder} was not written. Nothing half-written is left and older files are"
                " untouched: free some space or write elsewhere, and try again (a run goes on with resume)",
            ) from error
        where = getattr(error, "filename", None) or folder
        raise FileError(number, f"{folder} was not written: {os.strerror(number)} ({where})") from error
    shutil.rmtree(retired, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the operating system put a file, or the entries of a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _system_error(error: BaseException) -> int | None:
    """The errno behind an error of writing, or None.

    torch.save raises a RuntimeError with the OSError as its context; safetensors writes the number into its text.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        if isinstance(cause, SafetensorError) and (found := re.search(r"os error (\d+)", str(cause))):
            return int(found[1])
        cause = cause.__cause__ or cause.__context__
    return None


def write_tensors(module: "nn.Module", path: Path, metadata: Mapping[str, str]) -> None:
    """Save a state dict as safetensors, which wants contiguous tensors that share no memory.

    The file has the permissions of any new file: safetensors would keep it from all other users.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    path.chmod(mode)
