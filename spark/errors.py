"""Errors that a user can mend, and how a command ends with one: a line that says what to do, and exit code 2."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What a user can mend; its message is a sentence that says what is wrong and what to do."""


class FileError(OSError, UserError):
    """A `UserError` about a file, a folder or a host; whoever catches OSError catches it, too."""


@contextmanager
def one_line_errors(interrupted: str = "interrupted") -> Iterator[None]:
    """End a command with one line ``error: ...`` and exit code 2 for what a user can mend; bugs keep their traceback.

    That is a `UserError`, raised in this process or in a loader's, what the system says of a file (it is missing, not
    readable, the disk is full), and too little memory. The main process speaks. The others wait for the launcher to
    end them, and speak only if it does not, which means that the error was theirs alone.

    Ctrl-C, where nothing inside handles it, ends the command with exit code 130 after the line `interrupted`.
    """
    try:
        yield
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        sentence = one_line(error)
        if sentence is None:
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(3)
        print(f"error{f' in process {rank}' if rank else ''}: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print(interrupted, file=sys.stderr, flush=True)
        raise SystemExit(130) from None


NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How torch says it, on CPUs and GPUs, in a RuntimeError, and the system in an OSError."""


def one_line(error: Exception) -> str | None:
    """The sentence of a user's error; None for what may be a bug, such as an OSError that names no file."""
    text = str(error)
    if isinstance(error, UserError):
        if text.startswith("Caught ") and "DataLoader worker" in text:  # torch raises the loader's error anew
            text = text.strip().splitlines()[-1].partition(": ")[2]
        elif isinstance(error, OSError) and error.strerror:
            text = error.strerror
    elif isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        reason = f" ({text.splitlines()[0]})" if text else ""
        text = (
            f"there is too little memory{reason}: take smaller images, a smaller network or fewer images at once (a "
            "smaller batch_size; in training a larger accumulation)"
        )
    elif not isinstance(error, OSError):
        return None
    elif error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" ({error.filename})" if error.filename else ""
        text = (
            f"the disk is full{where}: free space, then run the same command again; a training run goes on where it "
            "was with --resume true"
        )
    elif error.filename and error.strerror:
        text = f"{error.strerror}: {error.filename}"
    else:
        return None
    return " ".join(text.split())
