"""Where images come from: one interface, and the texts that name a source (`data.train`)."""

import glob
import os
import re
from pathlib import Path

from braceexpand import braceexpand

from spark.errors import FileError, UserError
from spark.images.decode import EXTENSIONS
from spark.images.sources.arrays import ArraySource
from spark.images.sources.base import Source, StreamedSource
from spark.images.sources.files import FileSource, list_images, walk
from spark.images.sources.hub import HubSource
from spark.images.sources.remote import fetch_shards
from spark.images.sources.streams import HubStream, TarStream
from spark.images.sources.tars import TarSource
from spark.training.skipped import allowed_failures

_REMOTE = ("http://", "https://")


def open_source(text: str, cache: str | Path, max_unreadable: float = 0.0) -> tuple[Source, list[str]]:
    """The source that a text names.

    - a folder: the images in it and its subfolders; if it holds tar files and no image, these; else its `.npy` files
    - a `.tar`: a shard; a `.npy`: an array of images; any other file: a list of image files, one path a line
    - a pattern with `*`, `?`, `[...]` or braces (`{000..127}`, `{a,b}`): the images, or the tar shards, that match
    - `http://` or `https://`, with braces or without: tar shards, fetched to `cache` first
    - `hf:NAME[:SPLIT[:COLUMN]]`: a Hugging Face data set

    A file or folder of exactly this name goes before patterns.

    Args:
        text: as above.
        cache: folder for what is fetched; made only if something is.
        max_unreadable: share of the shards that may fail to be fetched, from 0 to 1; above 0 it allows one at least.

    Returns:
        The source, and "URL: reason" of each shard that could not be fetched.

    Raises:
        UserError: there is no such source, or it is damaged; too many shards cannot be fetched.
        OSError: it cannot be read, or `cache` not be written.
    """
    if text.startswith("hf:"):
        return HubSource(text.removeprefix("hf:")), []
    if text.startswith(_REMOTE):
        return _fetched(_braces(text), cache, max_unreadable)
    path = Path(text).expanduser()
    shards, images = _named(path)
    if shards:
        return TarSource(shards), []
    if images:
        return FileSource(images, os.path.dirname(re.split(r"[*?\[{]", str(path))[0])), []
    if path.is_file() and path.suffix == ".npy":
        return ArraySource(path), []
    return FileSource(
        list_images(path, confined=True, arrays=True), path if path.is_dir() else path.parent
    ), []


def open_stream(text: str, size: int | None = None) -> StreamedSource:
    """The source that a text names, to be read from front to back: tar shards, or a Hugging Face data set.

    Args:
        text: of the forms of `open_source` with shards: a folder of tar files, a `.tar`, a pattern or addresses of
            these, `hf:...`.
        size: number of images, if it is known.

    Raises:
        UserError: there is no such source, or it cannot be opened.
        OSError: it cannot be read.
    """
    if text.startswith("hf:"):
        return HubStream(text.removeprefix("hf:"), size)
    if text.startswith(_REMOTE):
        return TarStream(_braces(text), size)
    path = Path(text).expanduser()
    shards, _ = _named(path)
    if shards:
        return TarStream(shards, size)
    if not path.exists():
        raise FileError(f"there are no tar shards at {path.absolute()}: check the path")
    raise UserError(
        f"{text} is no set of tar shards and no Hugging Face data set, the sources that can be streamed: leave "
        "data.streaming false, its images can be read in any order"
    )


def _named(path: Path) -> tuple[list[str], list[str]]:
    """(tar shards, images) that a path or pattern names; both empty for other forms."""
    if not path.exists() and re.search(r"[*?\[{]", str(path)):
        return _matching(str(path))
    if path.is_dir() and (shards := sorted(path.glob("*.tar"))) and not _has_images(path):
        return [str(shard) for shard in shards], []
    return ([str(path)] if path.is_file() and path.suffix == ".tar" else []), []


def _has_images(folder: Path) -> bool:
    return any(os.path.splitext(name)[1].lower() in EXTENSIONS for _, names in walk(folder) for name in names)


def _braces(text: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise UserError(f"the braces of {text} are not balanced: write as in {{000..127}}.tar") from error


def _matching(pattern: str) -> tuple[list[str], list[str]]:
    """(tar shards, images) that match a pattern; one of the two is empty."""
    found: list[str] = []
    for part in _braces(pattern):
        matches = sorted(glob.glob(part, recursive=True))
        if not matches:
            raise FileError(f"nothing matches {part}: check the path, or the range in the braces")
        found += matches
    shards = [name for name in found if name.endswith(".tar")]
    images = [name for name in found if os.path.splitext(name)[1].lower() in (*EXTENSIONS, ".npy")]
    if shards and images:
        raise UserError(
            f"{pattern} matches {len(shards)} tar shards and {len(images)} images: name one kind only"
        )
    if not shards and not images:
        raise UserError(
            f"{pattern} matches {len(found)} files or folders, and no image or tar shard among them, first {found[0]}"
        )
    return shards, images


def _fetched(urls: list[str], cache: str | Path, max_unreadable: float) -> tuple[Source, list[str]]:
    shards, failed = fetch_shards(urls, cache)
    if failed and (not shards or len(failed) > allowed_failures(max_unreadable, len(urls))):
        raise UserError(
            f"{len(failed)} of {len(urls)} shards could not be fetched, more than the accepted share of "
            f"{max_unreadable:g}: repair the address or the shard, or raise data.max_unreadable. The others are kept "
            f"in {cache} for the next attempt. First {'; '.join(failed[:3])}"
        )
    return TarSource(shards), failed
