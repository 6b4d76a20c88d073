"""Where the predictions that are scored come from: a model, a folder of files, or a baseline that looks at no image.

A source prepares what it needs of a sample (in a loader's process or thread), then predicts batches of these once for
all protocols; `Prediction.under` is what a protocol scores of it.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finetune.depth_data import DepthSample, DepthSet, EvalTransform
from finetune.depth_data.depth_files import MILLIMETRE, read_depth_file
from finetune.depth_data.entries import size_text
from finetune.depth_data.sample import file_error
from finetune.model.depth_model import DepthModel
from finetune.model.prediction import predicted_maps
from finetune.protocols import KB_SIZE, PROTOCOLS, Protocol
from finetune.scoring.depth import merge_flipped, resize
from finetune.scoring.evaluators import evaluator_class
from spark.errors import UserError

SUFFIXES = (".npy", ".pfm", "_mm.png", "_depth.png", ".png", "_disparity.npy", "_disparity.pfm")
"""What follows the name of an image in the name of its prediction, as spark-predict writes them; the first there is."""


class Prediction(NamedTuple):
    """What is predicted of one image: maps [h, w], inverse depth under True, metres under False."""

    maps: Mapping[bool, np.ndarray]
    mirrored: Mapping[bool, np.ndarray] = MappingProxyType({})
    """Of the mirror image, not flipped back; empty where no protocol averages over flips."""
    region: bool = False
    """The maps are of the region that the protocol shows (`Protocol.sees`), not of the whole frame."""

    def under(self, protocol: Protocol, size: tuple[int, ...]) -> tuple[np.ndarray, bool]:
        """What `protocol` scores, of the whole frame, and whether it is inverse depth.

        Args:
            protocol: which space, averaged over flips or not.
            size: (H, W) of the image.
        """
        wanted = protocol.space == "disparity"
        inverse = wanted if wanted in self.maps else not wanted
        values = self.maps[inverse]
        if protocol.flip_average and self.mirrored:
            values = merge_flipped(protocol, values, self.mirrored[inverse])
        return (whole_frame(protocol, values, size) if self.region else values), inverse


def whole_frame(protocol: Protocol, prediction: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """The prediction for an image of (H, W) `size`, of which the model saw what the protocol shows: continued by its
    edge over the rest of the frame, `[H, W]`; as it is where the model saw all of it."""
    if protocol.sees == "frame":
        return prediction
    top, bottom, left, right = protocol.seen_at((size[0], size[1]))
    inner = resize(prediction.astype(np.float64), (bottom - top, right - left), protocol.align_corners)
    return np.pad(inner, ((top, size[0] - bottom), (left, size[1] - right)), "edge")


class Source(ABC):
    """Predicts samples."""

    about: dict[str, Any]
    """Its entries in results."""

    missing: Sequence[str] = ()
    """Names of the images without a prediction."""

    @abstractmethod
    def check(self, protocol: Protocol) -> None:
        """UserError where it gives nothing that `protocol` can score."""

    @abstractmethod
    def prepare(self, sample: DepthSample, protocols: Sequence[Protocol]) -> Any:
        """What is needed of a sample to predict it under `protocols`; pickled if the loader has processes."""

    @abstractmethod
    def predict(self, prepared: Sequence[Any], protocols: Sequence[Protocol]) -> list[list[Prediction]]:
        """Of each sample one prediction for each protocol."""


class ModelSource(Source):
    """A model, on any device, which returns to the mode it was in.

    Args:
        model: The model.
        transform: Size and normalisation that it was trained with.
        about: Its entries in results.
    """

    def __init__(self, model: DepthModel, transform: EvalTransform, about: dict[str, Any]) -> None:
        self.model, self.transform = model, transform
        self.about = {**about, "image_size": list(transform.image_size)}

    def check(self, protocol: Protocol) -> None:
        """See `check_protocol`."""
        check_protocol(self.model, protocol)

    def prepare(self, sample: DepthSample, protocols: Sequence[Protocol]) -> list[Tensor]:
        """Network input of each region of the image that a protocol shows. UserError: the image is too small."""
        inputs = []
        for region in _by_region(protocols).values():
            top, bottom, left, right = region[0].seen_at((sample.image.shape[0], sample.image.shape[1]))
            inputs.append(self.transform.prepare(np.ascontiguousarray(sample.image[top:bottom, left:right])))
        return inputs

    def predict(self, prepared: Sequence[Any], protocols: Sequence[Protocol]) -> list[list[Prediction]]:
        """One forward for each region of the images that a protocol shows, and one of its mirror image if asked."""
        found: dict[str, list[Prediction]] = {}
        for number, sharing in enumerate(_by_region(protocols).values()):
            metric = "depth" in self.model.outputs
            wanted = {not metric or protocol.space == "disparity" for protocol in sharing}
            images = torch.stack([inputs[number] for inputs in prepared])
            maps = predicted_maps(self.model, images, wanted)
            flips = any(protocol.flip_average for protocol in sharing)
            mirrored = predicted_maps(self.model, images.flip(-1), wanted) if flips else {}
            predictions = [
                Prediction(
                    *({key: each[index] for key, each in some.items()} for some in (maps, mirrored)),
                    region=True,
                )
                for index in range(len(prepared))
            ]
            found |= dict.fromkeys((protocol.name for protocol in sharing), predictions)
        return [[found[protocol.name][index] for protocol in protocols] for index in range(len(prepared))]


def _by_region(protocols: Sequence[Protocol]) -> dict[tuple[str, float], list[Protocol]]:
    """The protocols that show a model the same region of an image, together."""
    regions: dict[tuple[str, float], list[Protocol]] = {}
    for protocol in protocols:
        regions.setdefault((protocol.sees, protocol.option("border")), []).append(protocol)
    return regions


def check_protocol(model: DepthModel, protocol: Protocol) -> None:
    """Refuse to score a model without metres under a protocol that needs them: UserError."""
    if "depth" not in model.outputs and evaluator_class(protocol).needs_metres(protocol):
        raise UserError(
            f"head {model.head_name} gives no metres, and protocol {protocol.name} compares metres: use --protocol"
            " nyu-affine, which fits scale and shift of each image"
        )


class FolderSource(Source):
    """Predictions in files named after the images: for `scene/rgb_1.jpg` `scene/rgb_1.npy`, `.pfm`, `_mm.png` or `.png`
    below the folder (`SUFFIXES`), metres, or with `_disparity` before the extension inverse depth.

    A protocol that averages over flips takes them as they are: they may be averages already. One that shows a
    model the crop of KITTI's benchmark takes predictions of that crop too (352x1216), as BTS and AdaBins write them.

    Args:
        folder: Of the predictions.
        data: What they are predictions of.
        scale: Metres of one unit; None: what is stored in a PNG, 0.001 for `_mm.png`, and 1 for NPY and PFM.
        holds: "disparity": files without `_disparity` in their names hold inverse depth too.
        missing: "refuse" or "skip" images without a prediction.

    Attributes:
        missing: Names of the images without one.
    """

    def __init__(
        self,
        folder: str | Path,
        data: DepthSet,
        *,
        scale: float | None = None,
        holds: Literal["depth", "disparity"] = "depth",
        missing: Literal["refuse", "skip"] = "refuse",
    ) -> None:
        self.folder, self.scale, self.holds = Path(folder), scale, holds
        if not self.folder.is_dir():
            raise UserError(f"no folder {folder}: predictions must be where spark-predict or you wrote them")
        self.paths = {name: path for name in data.names() if (path := self._find(name)) is not None}
        self.missing = [name for name in data.names() if name not in self.paths]
        if not self.paths or (self.missing and missing == "refuse"):
            listed = ", ".join(self.missing[:10]) + (", ..." if len(self.missing) > 10 else "")
            example = os.path.splitext(self.missing[0])[0]
            remedy = "" if not self.paths else "; --missing skip scores the others and lists these"
            raise UserError(
                f"{len(self.missing)} of {len(data)} images have no prediction in {folder}: {listed}. Expected such as"
                f" {example}.npy, .pfm, .png or _mm.png{remedy}"
            )
        self.about = {"predictions": str(folder), "missing": self.missing}
        self._data = data

    def _find(self, name: str) -> Path | None:
        stems = (os.path.splitext(name)[0], name)
        inside = self.folder.resolve()
        candidates = (self.folder / f"{stem.lstrip('/')}{suffix}" for stem in stems for suffix in SUFFIXES)
        return next(
            (path for path in candidates if path.is_file() and inside in path.resolve().parents), None
        )

    def _inverse(self, path: Path) -> bool:
        return self.holds == "disparity" or path.stem.endswith("_disparity")

    def check(self, protocol: Protocol) -> None:
        """Inverse depth has no metres, but for a scale that the median mends; a crop is not a frame."""
        if protocol.sees != "kb_crop" and protocol.data in ("kitti", "any"):
            index, name = next((i, name) for i, name in enumerate(self._data.names()) if name in self.paths)
            values = self._read(self.paths[name])
            if _is_kb_crop(values.shape, self._data[index].image.shape):
                raise UserError(f"{self.paths[name]}: {self._cropped(values, protocol)}")
        if (
            any(map(self._inverse, self.paths.values()))
            and evaluator_class(protocol).needs_metres(protocol)
            and protocol.alignment != "median"
        ):
            raise UserError(
                f"{self.folder} holds inverse depth, and protocol {protocol.name} compares metres: use --protocol"
                " nyu-affine, which fits scale and shift of each image"
            )

    def _read(self, path: Path) -> np.ndarray:
        scale = MILLIMETRE if self.scale is None and path.name.endswith("_mm.png") else self.scale
        return read_depth_file(path, scale)

    @staticmethod
    def _cropped(values: np.ndarray, protocol: Protocol) -> str:
        takers = " or ".join(name for name, one in PROTOCOLS.items() if one.sees == "kb_crop")
        return (
            f"the prediction is {size_text(values.shape)}, of the crop of KITTI's benchmark, and protocol"
            f" {protocol.name} is of the whole frame; use --protocol {takers}, or predict again without a crop"
        )

    def prepare(
        self, sample: DepthSample, protocols: Sequence[Protocol]
    ) -> tuple[bool, np.ndarray, bool, bool]:
        """Read the prediction of a sample: whether it is inverse depth, the values, whether they are of the crop of
        KITTI's benchmark alone, whether they are of another size than what they are of.

        Raises:
            DepthFileError: It cannot be read, or is of another part of the image than a protocol takes.
        """
        path = self.paths[sample.name]
        values = self._read(path)
        cropped = _is_kb_crop(values.shape, sample.image.shape)
        if cropped:
            if whole := [protocol for protocol in protocols if protocol.sees != "kb_crop"]:
                raise file_error(path, self._cropped(values, whole[0]))
        elif not _same_proportions(values.shape, sample.image.shape):
            raise file_error(
                path,
                f"the prediction is {size_text(values.shape)}, its image {size_text(sample.image.shape)}; a prediction"
                " is of the whole frame, of its size or of its proportions: predict again without a crop",
            )
        shown = KB_SIZE if cropped else sample.image.shape[:2]
        return self._inverse(path), values, cropped, values.shape != shown

    def predict(self, prepared: Sequence[Any], protocols: Sequence[Protocol]) -> list[list[Prediction]]:
        """What was read; counts those of another size."""
        if resized := sum(other_size for *_, other_size in prepared):
            self.about["resized_images"] = self.about.get("resized_images", 0) + resized
        return [
            [Prediction({inverse: values}, region=cropped)] * len(protocols)
            for inverse, values, cropped, _ in prepared
        ]


def _same_proportions(size: tuple[int, ...], frame: tuple[int, ...]) -> bool:
    """Whether a map of `size` is of a whole frame, but for a pixel of the smaller one."""
    (h, w), (height, width) = size[:2], frame[:2]
    return abs(h * width - w * height) <= max(height, width)


def _is_kb_crop(size: tuple[int, ...], frame: tuple[int, ...]) -> bool:
    """Whether a map of `size` is of the crop of KITTI's benchmark, and not of the whole frame."""
    inside = frame[0] >= KB_SIZE[0] and frame[1] >= KB_SIZE[1]
    return inside and not _same_proportions(size, frame) and _same_proportions(size, KB_SIZE)


class BaselineSource(Source):
    """The same prediction for every image.

    Args:
        values: Metres [H, W].
        about: Its entries in results.
    """

    def __init__(self, values: np.ndarray, about: dict[str, Any]) -> None:
        self.values, self.about = values, about

    def check(self, protocol: Protocol) -> None:
        """Metres can be scored by anything."""

    def prepare(self, sample: DepthSample, protocols: Sequence[Protocol]) -> None:
        """Nothing is needed."""

    def predict(self, prepared: Sequence[Any], protocols: Sequence[Protocol]) -> list[list[Prediction]]:
        """The one there is; its mirror image has it too."""
        both = {False: self.values}
        return [[Prediction(both, both)] * len(protocols) for _ in prepared]


def baseline_source(baseline: str, training: Callable[[], DepthSet]) -> BaselineSource:
    """The baseline that an option names.

    Args:
        baseline: "constant:METRES", or "mean".
        training: opens the data whose mean depth "mean" is.
    """
    kind, _, value = baseline.partition(":")
    about = {"baseline": baseline}
    if kind == "constant":
        with suppress(ValueError):
            if 0 < (metres := float(value)) < float("inf"):
                return BaselineSource(np.full((2, 2), metres), about)
    elif baseline == "mean":
        data = training()
        return BaselineSource(mean_depth(data), {**about, "baseline_data": repr(data)})
    raise UserError(f"baseline must be constant:METRES with a depth above 0, or mean, not {baseline!r}")


def mean_depth(data: DepthSet) -> np.ndarray:
    """Per-pixel mean of the depths of a data set, over those that have a reading [m], float64 `[H, W]`: the row "Mean"
    of Eigen et al. 2014. Pixels that never have one get the mean of the others.
    """
    shape = data[0].metres.shape if len(data) else ()
    total, count = np.zeros(shape), np.zeros(shape)
    for index in range(len(data)):
        depth = data[index].metres
        if depth.shape != shape:
            raise UserError(
                f"a mean over pixels needs depth maps of one size, and {data.names()[index]} is"
                f" {size_text(depth.shape)}, others are {size_text(shape)}: use --baseline constant:METRES"
            )
        total += depth
        count += depth > 0
    if not count.any():
        raise UserError(
            f"{data} has no depth to take the mean of: name a list of training pairs (--baseline_list)"
        )
    return np.where(count > 0, total / np.maximum(count, 1), total.sum() / count.sum())
