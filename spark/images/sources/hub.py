"""Images in a Hugging Face data set, on this machine or from the hub; needs the package `datasets`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spark.errors import UserError
from spark.images.sources.names import Names


class HubSource:
    """The image column of a Hugging Face data set, read from its memory-mapped files.

    Args:
        text: `NAME[:SPLIT[:COLUMN]]`; NAME is one on the hub or a folder (as `save_to_disk` writes it, or one that
            `load_dataset` takes); SPLIT is "train" unless named; COLUMN need only be named if several hold images.
    """

    def __init__(self, text: str):
        self._title, self._split, column = hub_title(text)
        table, kinds = open_hub(self._title, self._split)
        self._column = image_column(self._title, table.features, kinds, column)
        self._table = table.cast_column(self._column, kinds.Image(decode=False)).select_columns(self._column)
        if not len(self._table):
            raise UserError(f"the split {self._split} of the data set {self._title} is empty")

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """`hf:NAME:SPLIT:COLUMN[NUMBER]`."""
        return f"hf:{self._title}:{self._split}:{self._column}[{index}]"

    def read(self, index: int) -> bytes:
        """The encoded image of a row; see `cell_bytes`."""
        return cell_bytes(self._table[int(index)][self._column])

    def digest(self) -> str:
        """See `Source`; the library's fingerprint of the content would change with its version."""
        return Names([f"{Path(self._title).name}:{self._split}:{self._column}[{len(self)}]"]).digest()


def hub_title(text: str) -> tuple[str, str, str]:
    """Name, split and column ("" if not named) of `NAME[:SPLIT[:COLUMN]]`; UserError for another form."""
    name, split, column = (*text.split(":"), "", "")[:3]
    if not name or text.count(":") > 2:
        raise UserError(f"hf:{text} is not of the form hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN")
    return name, split or "train", column


def open_hub(name: str, split: str, streaming: bool = False) -> tuple[Any, Any]:
    """A split of a data set on the hub or in a folder, and the package `datasets`.

    With `streaming`, rows come in their order only, and nothing is kept on the disk. UserError if there is no such
    split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "data sets of Hugging Face need the package datasets: pip install 'spark-pretrain[hub]'"
        ) from error
    folder = Path(name).expanduser()
    is_saved = [(folder / note).is_file() for note in ("state.json", "dataset_dict.json")]
    if streaming and any(is_saved):
        raise UserError(
            f"{name} was written by save_to_disk and can be read in any order already: leave data.streaming false"
        )
    try:
        if is_saved[0]:
            return datasets.load_from_disk(str(folder)), datasets
        if is_saved[1]:
            return datasets.load_from_disk(str(folder))[split], datasets
        found = str(folder) if folder.is_dir() else name
        return datasets.load_dataset(found, split=split, streaming=streaming), datasets
    except Exception as error:  # of the library, of the file system, of the network
        raise UserError(
            f"split {split} of the Hugging Face data set {name} cannot be opened "
            f"({type(error).__name__}: {error}): check its name, its splits, and the network"
        ) from error


def image_column(name: str, features: Mapping[str, Any], kinds: Any, column: str) -> str:
    """The column of images among `features`: the one asked for, or with "" the only one."""
    images = [found for found, kind in features.items() if isinstance(kind, kinds.Image)]
    there = ", ".join(f"{found} ({type(kind).__name__})" for found, kind in features.items())
    if column and column not in features:
        raise UserError(f"the data set {name} has no column {column}: it has {there}")
    if column and column not in images:
        raise UserError(f"the column {column} of the data set {name} holds no images: it has {there}")
    if not column and len(images) != 1:
        raise UserError(
            f"the data set {name} has {len(images)} columns of images, not one"
            f"{': name one as in hf:NAME:SPLIT:COLUMN; ' if images else ': '}it has {there}"
        )
    return column or images[0]


def cell_bytes(cell: Mapping[str, Any] | None) -> bytes:
    """The encoded image of a row; UserError if it has none."""
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise UserError("no image in this row")
    if cell["bytes"] is not None:
        return cell["bytes"]
    import fsspec  # comes with datasets; the path may lie on the hub or in an archive

    with fsspec.open(cell["path"], "rb") as file:
        return file.read()  # pyright: ignore[reportAttributeAccessIssue]
