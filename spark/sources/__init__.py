"""Where images come from: one interface, and the form of a text that says which source is meant."""

import glob
import os
import re
from pathlib import Path

from braceexpand import braceexpand

from spark.decoding import EXTENSIONS
from spark.sources.arrays import ArraySource
from spark.sources.base import Source
from spark.sources.files import FileSource, list_images, walk
from spark.sources.hub import HubSource
from spark.sources.remote import fetch_shards
from spark.sources.tars import TarSource

__all__ = ["ArraySource", "FileSource", "HubSource", "Source", "TarSource", "list_images", "open_source"]


def open_source(text: str, cache: str | Path, max_unreadable: float = 0.0) -> tuple[Source, list[str]]:
    """The source that a text names.

    - a folder: the images in it and its subfolders; if it holds tar files and no image, these
    - a `.tar`: a shard; a `.npy`: an array of images; any other file: a list of image files, one path a line
    - a pattern with `*`, `?`, `[...]` or braces (`{000..127}`, `{a,b}`): the images, or the tar shards, that it fits
    - `http://` or `https://`, with braces or without: tar shards, fetched to `cache` first
    - `hf:NAME[:SPLIT[:COLUMN]]`: a Hugging Face data set

    What exists under the very name comes before patterns.

    Args:
        text: as above.
        cache: folder for what is fetched; made only if something is.
        max_unreadable: share of the shards that may fail to be fetched, from 0 to 1; above 0 it allows one at least.

    Returns:
        The source, and "URL: reason" of each shard that it lacks.

    Raises:
        ValueError: there is nothing of the kind, or it is damaged; more shards than accepted cannot be fetched.
        OSError: it cannot be read, or `cache` not be written.
    """
    if text.startswith("hf:"):
        return HubSource(text.removeprefix("hf:")), []
    if text.startswith(("http://", "https://")):
        return _fetched(_braces(text), cache, max_unreadable)
    path = Path(text).expanduser()
    if not path.exists() and re.search(r"[*?\[{]", text):
        return _matching(str(path)), []
    if path.is_dir() and (shards := sorted(path.glob("*.tar"))) and not _has_images(path):
        return TarSource(shards), []
    if path.is_file() and path.suffix == ".tar":
        return TarSource([path]), []
    if path.is_file() and path.suffix == ".npy":
        return ArraySource(path), []
    return FileSource(list_images(path, confined=True), path if path.is_dir() else path.parent), []


def _has_images(folder: Path) -> bool:
    return any(os.path.splitext(name)[1].lower() in EXTENSIONS for _, names in walk(folder) for name in names)


def _braces(text: str) -> list[str]:
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise ValueError(f"the braces of {text} are not balanced: write as in {{000..127}}.tar") from error


def _matching(pattern: str) -> Source:
    found: list[str] = []
    for part in _braces(pattern):
        matches = sorted(glob.glob(part, recursive=True))
        if not matches:
            raise FileNotFoundError(f"nothing fits {part}: check the path, or the range in the braces")
        found += matches
    shards = [name for name in found if name.endswith(".tar")]
    images = [name for name in found if os.path.splitext(name)[1].lower() in EXTENSIONS]
    if shards and images:
        raise ValueError(
            f"{pattern} fits {len(shards)} tar shards and {len(images)} images: name one kind only"
        )
    if shards:
        return TarSource(shards)
    if not images:
        raise ValueError(
            f"{pattern} fits {len(found)} files or folders, and no image or tar shard among them, first {found[0]}"
        )
    return FileSource(images, os.path.dirname(re.split(r"[*?\[{]", pattern)[0]))


def _fetched(urls: list[str], cache: str | Path, max_unreadable: float) -> tuple[Source, list[str]]:
    shards, failed = fetch_shards(urls, cache)
    if failed and (not shards or len(failed) > max(max_unreadable * len(urls), 1 if max_unreadable else 0)):
        raise ValueError(
            f"{len(failed)} of {len(urls)} shards could not be fetched, more than the accepted share of "
            f"{max_unreadable:g}: repair the address or the shard, or raise data.max_unreadable. The others are kept "
            f"in {cache} for the next attempt. First {'; '.join(failed[:3])}"
        )
    return TarSource(shards), failed
