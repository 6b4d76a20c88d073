"""Scored images to draw: one row of a figure, and the worst rows of many."""

import heapq
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Triptych:
    """One row of a figure: an image, its ground truth and its prediction.

    Args:
        image: uint8 [H, W, 3].
        truth: Ground truth [h, w] [m]; 0 or not finite where there is no reading.
        prediction: Prediction [h', w'] [m]. The three may differ in size, they are drawn at one.
        name: Name of the image, drawn above it.
        caption: Its scores, drawn above the prediction.
    """

    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    name: str = ""
    caption: str = ""


class WorstRows:
    """The rows with the largest errors of many that come one by one.

    Args:
        count: How many to keep.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._heap: list[tuple[float, int, Triptych]] = []
        self._seen = 0

    def wants(self, error: float) -> bool:
        """Whether a row of this error would be kept now."""
        return len(self._heap) < self.count or (self.count > 0 and error > self._heap[0][0])

    def add(self, error: float, row: Triptych) -> None:
        """Keep a row if it is among the worst."""
        self._seen += 1
        heapq.heappush(self._heap, (error, -self._seen, row))  # of equal errors the earlier one stays
        if len(self._heap) > self.count:
            heapq.heappop(self._heap)

    @property
    def rows(self) -> list[Triptych]:
        """The worst first."""
        return [row for _, _, row in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]
