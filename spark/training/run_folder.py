"""The folder of a run: whether it may be written, and its making."""

import os
from pathlib import Path

from spark.errors import FileError, UserError


def check_output_dir(output_dir: str | Path, resume: bool | str) -> None:
    """Refuse a folder in which another run would be overwritten; nothing is made yet.

    Every process calls it before any of them writes. With `resume` true, or a checkpoint inside the folder, it may
    hold a run.

    Raises:
        UserError: the folder holds another run, or the path is a file.
        FileError: no permission to write there.
    """
    folder = Path(output_dir)
    present = next(place for place in (folder, *folder.parents) if place.exists())
    if not present.is_dir():
        raise UserError(f"output_dir {folder} cannot be made: {present} is a file; choose a folder")
    if not os.access(present, os.W_OK | os.X_OK):
        raise FileError(
            f"output_dir {folder} cannot be written: {present} is read-only; choose another folder"
        )
    found = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints") if (folder / name).exists()]
    continues = resume is True or (
        isinstance(resume, str) and Path(resume).resolve().is_relative_to(folder.resolve())
    )
    if found and not continues:
        raise UserError(
            f"output_dir {folder} already holds a run ({', '.join(found)}); "
            "continue it with --resume true, or choose another --output_dir"
        )


def make_output_dir(output_dir: str | Path) -> None:
    """Make the folder of a run where it is missing; FileError if that fails."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(
            f"output_dir {output_dir} cannot be made ({error.strerror}): choose a folder that you may write to"
        ) from error
