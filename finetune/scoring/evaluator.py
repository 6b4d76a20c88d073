"""What scoring a data set image by image has in common; evaluators fill in how an image is scored.

To add one: an `Evaluator` in a file of this folder, its name in `EVALUATORS` of `finetune.scoring.evaluators`, its
metrics in `finetune.protocols.metrics.METRIC`, and records in `finetune.protocols`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from finetune.depth_data.sample import DepthSample
from finetune.protocols import Protocol
from finetune.scoring.metrics import Columns, Row, columns_of
from finetune.scoring.pictures import Triptych
from spark.errors import UserError


class NoValidPixels(UserError):
    """Nothing of the ground truth of an image counts, so it has no score."""


class Evaluator(ABC):
    """Scores a data set image by image.

    >>> evaluator = evaluator_of(get_protocol("nyu-bts"))  # of finetune.scoring.evaluators
    >>> evaluator.add(sample, prediction)  # for every image
    >>> write_results("results.json", evaluator.results())

    Args:
        protocol: how.
        skip_empty: leave out images of which nothing counts, and list them in the results, instead of raising.
    """

    columns: ClassVar[tuple[str, ...]]
    """Metrics that a table of several protocols shows."""

    draws: ClassVar[bool] = False
    """Whether `picture` gives pictures."""

    def __init__(self, protocol: Protocol, *, skip_empty: bool = False):
        self.protocol, self.skip_empty = protocol, skip_empty
        self.rows: dict[str, Row] = {}
        self.skipped: list[str] = []
        self.unusable: list[str] = []

    @classmethod
    def needs_metres(cls, protocol: Protocol) -> bool:
        """Whether inverse depth up to scale and shift cannot be scored under a protocol."""
        return protocol.supervision == "metric" and protocol.alignment != "disparity"

    @classmethod
    def check_sample(cls, protocol: Protocol, sample: DepthSample) -> None:
        """Refuse a data set that the protocol cannot be scored on, by its first sample: UserError."""
        protocol.seen_at((sample.image.shape[0], sample.image.shape[1]))

    @classmethod
    @abstractmethod
    def unusable_text(cls, settings: Mapping[str, Any]) -> str:
        """How an image without any usable predicted value is scored, for caveats; `settings` is the record."""

    @classmethod
    @abstractmethod
    def nonfinite_text(cls, settings: Mapping[str, Any]) -> str:
        """How predicted values that are not finite are scored, likewise."""

    def picture(
        self, sample: DepthSample, prediction: np.ndarray, inverse: bool, row: Row | None
    ) -> Triptych | None:
        """What to draw of an image and the prediction that `add` took; None: there is no picture."""
        return None

    @abstractmethod
    def score(self, sample: DepthSample, prediction: np.ndarray, inverse: bool) -> Row:
        """The row of an image: numbers by name, None for a metric that is not defined for it.

        `nonfinite` counts the predicted values that are NaN or infinite, `nonpositive` the others that should be above
        0 and are not. A prediction without any other value gets the worst scores, and is not left out.

        Raises:
            NoValidPixels: nothing of its ground truth counts.
            ValueError: arrays that do not fit the protocol.
        """

    @classmethod
    @abstractmethod
    def aggregate(cls, columns: Columns, counts: np.ndarray, aggregation: str) -> dict[str, np.ndarray]:
        """Metrics of N images, each counted `counts` `[R, N]` times: name -> `[R]`, NaN where a metric is not defined.

        It has no other input than the rows of results.json, so that intervals and comparisons can be had from files.
        """

    def add(self, sample: DepthSample, prediction: np.ndarray, *, inverse: bool = False) -> Row | None:
        """Score one image.

        Args:
            sample: its ground truth, under a name that is unique.
            prediction: metres `[h, w]` of the whole frame, any size. When the protocol averages over flips, the result
                of `finetune.scoring.depth.merge_flipped`.
            inverse: the prediction is inverse depth instead, larger is nearer.

        Returns:
            its row; None if it was skipped.

        Raises:
            NoValidPixels: nothing to compare, unless `skip_empty`.
            ValueError: a name for the second time, or what `score` raises; the message starts with the name.
        """
        name = sample.name
        if name in self.rows or name in self.skipped:
            raise UserError(f"{name} was scored already: does the list name it twice?")
        if prediction.ndim != 2:
            raise UserError(f"{name}: a prediction is a map [H, W], this has shape {list(prediction.shape)}")
        try:
            self.rows[name] = self.score(sample, prediction, inverse)
        except NoValidPixels as error:
            if not self.skip_empty:
                raise NoValidPixels(
                    f"{name}: {error}; skip_empty leaves such images out and lists them"
                ) from error
            self.skipped.append(name)
            return None
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        row = self.rows[name]
        if row["nonfinite"] + row["nonpositive"] == prediction.size:
            self.unusable.append(name)
        return row

    def extras(self) -> dict[str, Any]:
        """Further entries of results."""
        return {}

    def results(self) -> dict[str, Any]:
        """What results.json holds.

        Returns:
            protocol, images (how many were scored), metrics, per_image (name and row); and what a reader must know:
            settings (the whole record of the protocol), protocol_hash, skipped (names of which nothing counted),
            unusable (names of which no predicted value could be used; they are scored), nonfinite_pixels and
            nonfinite_images (replaced predictions), nonpositive_pixels and nonpositive_images, undefined (metric -> how
            many images have none).

        Raises:
            ValueError: no image was scored, or a mean is not finite.
        """
        rows = [{"name": name, **row} for name, row in self.rows.items()]
        columns = columns_of(rows)
        means = self.aggregate(columns, np.ones((1, len(rows))), self.protocol.aggregation)
        metrics = {name: float(values[0]) for name, values in means.items() if not np.isnan(values[0])}
        if broken := [name for name in self.protocol.metrics if not np.isfinite(metrics.get(name, np.nan))]:
            raise UserError(f"the mean of {', '.join(broken)} is not a finite number: no image has it")
        results: dict[str, Any] = {"protocol": self.protocol.name, "images": len(rows), "metrics": metrics}
        for what in ("nonfinite", "nonpositive"):
            results[f"{what}_pixels"] = int(columns[what].sum())
            results[f"{what}_images"] = int((columns[what] > 0).sum())
        undefined = {
            name: int(np.isnan(columns[name]).sum()) for name in self.protocol.metrics if name in columns
        }
        return results | {
            "undefined": {name: number for name, number in undefined.items() if number},
            "skipped": list(self.skipped),
            "unusable": list(self.unusable),
            **self.extras(),
            "settings": self.protocol.record(),
            "protocol_hash": self.protocol.hash(),
            "per_image": rows,
        }
