"""Images in one NumPy array on the disk, of which only what is asked for is read."""

from pathlib import Path
from typing import Any

import numpy as np

from spark.errors import UserError
from spark.images.bands import KINDS
from spark.images.sources.names import Names


class ArraySource:
    """A `.npy` file of pixels: uint8, uint16 or float32, [N, H, W] or [N, H, W, C]."""

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            values = self._map()
        except (ValueError, EOFError) as error:
            raise UserError(
                f"{path} is cut off, or no NumPy array that can be read piece by piece ({error}): write it again"
            ) from error
        shape, kind = values.shape, values.dtype
        if kind.newbyteorder("=") not in KINDS or len(shape) not in (3, 4):
            raise UserError(
                f"{path} holds {kind} {list(shape)}, not images: they are {', '.join(KINDS)}, [N, H, W] or [N, H, W, C]"
            )
        if not values.size:
            raise UserError(f"{path} holds no image: its shape is {list(shape)}")
        self._length = shape[0]
        self._values: np.ndarray | None = values

    def _map(self) -> np.ndarray:
        return np.load(self._path, mmap_mode="r", allow_pickle=False)

    def __getstate__(self) -> dict[str, Any]:
        # NumPy pickles a mapped file by its content; a process that this is sent to maps the file itself.
        return {**vars(self), "_values": None}

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """`FILE[NUMBER]`."""
        return f"{self._path}[{index}]"

    def read(self, index: int) -> np.ndarray:
        """One image, [H, W] or [H, W, C]."""
        values = self._values = self._map() if self._values is None else self._values
        return np.asarray(values[index])

    def digest(self) -> str:
        """See `Source`."""
        return Names([f"{self._path.name}[{self._length}]"]).digest()
