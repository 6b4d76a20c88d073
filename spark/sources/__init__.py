"""Where images come from: one interface, and the form of a text that says which source is meant."""

from spark.sources.base import Source
from spark.sources.files import FileSource, list_images

__all__ = ["FileSource", "Source", "list_images", "open_source"]


def open_source(text: str) -> Source:
    """The source that a text names."""
    return FileSource(list_images(text), text)
