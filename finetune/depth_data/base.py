"""What every data set of depth offers, and the options that it is opened with.

To add one: a `DepthSet` in a file of `sets/`, its name in `Kind` and `KINDS` of `finetune.depth_data.registry`, a
test on files written in its layout, and a row in docs/use/depth_data.md. docs/extend/data_set.md walks through it.
"""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from torch.utils.data import Dataset

from finetune.depth_data.labels import LabelOptions
from finetune.depth_data.sample import DepthSample, Supervision

WhiteBorder: TypeAlias = Literal["keep", "black", "fill"]
BadDepth: TypeAlias = Literal["refuse", "hole"]


@dataclass(frozen=True)
class OpenOptions:
    """How to open a data set; each kind reads those that it knows.

    Args:
        list: list file of the pairs, a name inside the root or a path; None: the whole of `split`.
        split: which official split, where the layout has them.
        depth: "raw" (with holes) or "filled" depth of the labelled file.
        white_border: what becomes of the white border of labelled NYU images, see `nyu.paint_border`.
        labels: classes of each pixel to read along; None reads none.
        polarity: whether the relation `>` of DIW means that its point A is farther or closer.
        depth_scale: metres of one unit of the depth files of a plain folder; None: what is stored in a PNG, else 0.001,
            and 1 for NPY and PFM.
        bad_depth: "refuse" a depth map with NaN, infinite or negative values, or take them for holes.
    """

    list: str | Path | None = None
    split: Literal["train", "test"] = "train"
    depth: Literal["raw", "filled"] = "raw"
    white_border: WhiteBorder = "keep"
    labels: LabelOptions | None = None
    polarity: Literal["farther", "closer"] = "farther"
    depth_scale: float | None = None
    bad_depth: BadDepth = "refuse"


class DepthSet(Dataset[DepthSample]):
    """Images with what is known of their depth, in the order of `names`.

    Opening one raises UserError for what cannot be used as a whole: no such folder, a line of a list that does not fit
    the layout, missing files, a first sample that cannot be read.
    Reading a sample raises `DepthFileError` ("path: reason") for what is wrong with that one, which training counts
    and skips up to `data.max_unreadable`. Data loader processes get a copy each.
    """

    supervision: ClassVar[Supervision] = "metric"
    benchmark: ClassVar[str] = "any"
    """The benchmark that it belongs to, as in `Protocol.data`; "any" for a folder of one's own."""
    labelled: bool = False
    """Whether samples carry `labels`."""
    options: OpenOptions = OpenOptions()
    """What `open_depth_data` opened it with."""
    ground_truth: str | None = None
    """Which depth it is, where the layout knows: "raw", "filled", "benchmark" or "laser" (`Protocol.depth`)."""

    def reading(self) -> dict[str, str | float | None]:
        """Options of reading that scores depend on, as JSON values for results."""
        names = ("white_border", "polarity", "depth_scale", "bad_depth")
        return {"ground_truth": self.ground_truth} | {name: getattr(self.options, name) for name in names}

    @classmethod
    @abstractmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether this layout lies at `root`, which exists; cheap, and never an error."""

    @classmethod
    @abstractmethod
    def opened(cls, root: Path, options: OpenOptions) -> "DepthSet":
        """Open what lies at `root`."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, index: int) -> DepthSample:
        """Read a sample."""

    def labels_of(self, index: int) -> np.ndarray:
        """The classes of a sample alone, uint8 `[H, W]`, where the set is `labelled`; raises what reading it does."""
        labels = self[index].labels
        assert labels is not None
        return labels

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the samples, in order, each once."""

    def origin(self, index: int) -> str:
        """Where a list names the sample, " (LIST, line N)"; "" without a list."""
        return ""

    def has_test_split(self) -> bool:
        """Whether pairs to validate on lie at the same root, as a split of the layout."""
        return False

    def check_headers(self) -> None:
        """Check every sample as far as headers tell, without decoding pixels.

        Raises:
            DepthFileError: the first that cannot be used.
        """
