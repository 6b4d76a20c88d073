"""What a source of images is."""

from typing import Protocol

import numpy as np


class Source(Protocol):
    """Images that can be had in any order, by number."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a user finds the image by: its path, or that of the file that holds it and its place there."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The encoded image, or its pixels as `spark.decoding.RawPicture` takes them.

        Raises:
            OSError: it cannot be read.
            ValueError: it is no image.
        """
        ...

    def digest(self) -> str:
        """Hexadecimal digest of what the images are called and of their order, to notice that a data set changed."""
        ...
