"""Images in a Hugging Face data set, on this machine or from the hub; needs the package `datasets`."""

from pathlib import Path
from typing import Any

from spark.sources.names import Names


class HubSource:
    """The image column of a Hugging Face data set, read from its memory-mapped files.

    Args:
        text: `NAME[:SPLIT[:COLUMN]]`; NAME is one on the hub or a folder (as `save_to_disk` writes it, or one that
            `load_dataset` takes); SPLIT is "train" unless named; COLUMN need only be named if several hold images.

    Raises:
        ValueError: `datasets` is not installed, no such data set, split or column, or a column that holds no images.
    """

    def __init__(self, text: str):
        name, split, column = (*text.split(":"), "", "")[:3]
        if not name or text.count(":") > 2:
            raise ValueError(f"hf:{text} is not of the form hf:NAME, hf:NAME:SPLIT or hf:NAME:SPLIT:COLUMN")
        self._title, self._split = name, split or "train"
        table, kinds = self._load()
        images = [found for found, kind in table.features.items() if isinstance(kind, kinds.Image)]
        there = ", ".join(f"{found} ({type(kind).__name__})" for found, kind in table.features.items())
        if column and column not in table.features:
            raise ValueError(f"the data set {name} has no column {column}: it has {there}")
        if column and column not in images:
            raise ValueError(f"the column {column} of the data set {name} holds no images: it has {there}")
        if not column and len(images) != 1:
            raise ValueError(
                f"the data set {name} has {len(images)} columns of images, not one"
                f"{': name one as in hf:NAME:SPLIT:COLUMN; ' if images else ': '}it has {there}"
            )
        self._column = column or images[0]
        self._table = table.cast_column(self._column, kinds.Image(decode=False)).select_columns(self._column)
        if not len(self._table):
            raise ValueError(f"the split {self._split} of the data set {name} is empty")

    def _load(self) -> tuple[Any, Any]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                "data sets of Hugging Face need the package datasets: pip install datasets"
            ) from error
        folder = Path(self._title).expanduser()
        try:
            if (folder / "state.json").is_file():
                return datasets.load_from_disk(str(folder)), datasets
            if (folder / "dataset_dict.json").is_file():
                return datasets.load_from_disk(str(folder))[self._split], datasets
            name = str(folder) if folder.is_dir() else self._title
            return datasets.load_dataset(name, split=self._split), datasets
        except Exception as error:  # of the library, of the file system, of the network
            raise ValueError(
                f"split {self._split} of the Hugging Face data set {self._title} cannot be opened "
                f"({type(error).__name__}: {error}): check its name, its splits, and the network"
            ) from error

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        """`hf:NAME:SPLIT:COLUMN[NUMBER]`."""
        return f"hf:{self._title}:{self._split}:{self._column}[{index}]"

    def read(self, index: int) -> bytes:
        """The encoded image of a row.

        Raises:
            ValueError: the row has none.
            OSError: it names a file that cannot be read.
        """
        cell = self._table[int(index)][self._column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("no image in this row")
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]

    def digest(self) -> str:
        """See `Source`; the library's fingerprint of the content would change with its version."""
        return Names([f"{Path(self._title).name}:{self._split}:{self._column}[{len(self)}]"]).digest()
