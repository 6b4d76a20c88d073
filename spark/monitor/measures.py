"""Is a run learning: features of unmasked images, scored while it runs.

Nothing here changes a run: networks run in evaluation mode without gradients and are left in the mode they were in, no
running statistic moves, and no random number of the run is drawn.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _BatchNorm

from spark.model.encoder import pyramid, pyramid_info
from spark.monitor.probes import (
    LabelledFiles,
    Preparation,
    PreparedImages,
    probe_scores,
    require_images_of_each_class,
)

NEIGHBOURS = 20
PROBE_STRENGTHS = (1e-2, 1e-1, 1.0)  # the weaker ones of spark-probe take most of its time

_FEWEST = 8  # images: with fewer, a low rank says nothing about collapse


@dataclass
class MonitoredImages:
    """The unmasked images of all measurements of a run.

    Attributes:
        images: [N, C, H, W], normalised, on the CPU.
        labels: [N] int64, or None for images without labels.
        train: [N] bool, True in the training split; None without labels.
        unreadable: "path: reason" of labelled files that were left out.
    """

    images: Tensor
    labels: Tensor | None = None
    train: Tensor | None = None
    unreadable: Sequence[str] = ()


def read_labelled(
    found: LabelledFiles, most: int, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]
) -> MonitoredImages:
    """Read at most `most` images of each split, spread evenly over its sorted files.

    Args:
        found: from `spark.monitor.probes.list_labelled`.
        most: images of each split.
        size: (H, W) [px] that images are resized and centre cropped to.
        mean: per channel, on the scale 0 to 1; one value reads the images in grey, three in colour.
        std: likewise.
    """
    chosen = torch.cat([_spread(part.nonzero()[:, 0], most) for part in (found.train, ~found.train)])
    prepared = PreparedImages(
        [found.files[index] for index in chosen.tolist()], Preparation(size, tuple(mean), tuple(std))
    )
    kept, images, unreadable = [], [], []
    for index, image in (prepared[number] for number in range(len(prepared))):
        if isinstance(image, Tensor):
            kept.append(int(chosen[index]))
            images.append(image)
        else:
            unreadable.append(image)
    labels, train = found.labels[kept], found.train[kept]
    require_images_of_each_class(found.classes, labels[train], labels[~train])
    return MonitoredImages(torch.stack(images), labels, train, unreadable)


def _spread(indices: Tensor, most: int) -> Tensor:
    """At most `most` of the indices [N], evenly spread."""
    count = min(most, len(indices))
    return indices[torch.arange(count) * len(indices) // count]


class Monitor:
    """Measures an encoder on unmasked images, within a share of the time of the run.

    The time of a measurement is predicted by that of the last one; the loop asks `affordable` first.

    `measure` returns, with the deepest feature map averaged over its positions as the feature [D] of an image:

    - `rank`: effective rank of the features, see `rank_me`.
    - `channel_std`: see `channel_std`.
    - `bn_gap`, `bn_drift`: see `batch_norm_gap` and `batch_norm_drift`; only of encoders with batch norm, the drift
      only from the second measurement on.
    - `knn`, `linear`: top-1 accuracies in [0, 1] on the validation split of a labelled folder (see
    `spark.monitor.probes`).

    Args:
        read: reads the images, at the first measurement.
        count: how many these are, about.
        max_share: share of the time since the construction that measuring may take, between 0 and 1; 1 always measures.
        batch_size: images of one forward.

    Attributes:
        seconds: spent in measurements and pictures so far [s].
    """

    def __init__(self, read: Callable[[], MonitoredImages], count: int, max_share: float, batch_size: int):
        self.read = read
        self.count = count
        self.watched: MonitoredImages | None = None
        self.max_share = max_share
        self.batch_size = batch_size
        self.seconds = 0.0
        self._began = time.perf_counter()
        self._last: float | None = None
        self._statistics: list[tuple[Tensor, Tensor]] | None = None

    @property
    def images(self) -> int:
        """Images of a measurement, 0 before the first one."""
        return 0 if self.watched is None else len(self.watched.images)

    def expected(self, images_per_second: float) -> float:
        """Time of the next measurement [s]: that of the last one, or before it that of training on the images."""
        return self.count / images_per_second if self._last is None else self._last

    def affordable(self, images_per_second: float) -> bool:
        """Whether the next measurement keeps within the share."""
        elapsed = time.perf_counter() - self._began
        return (
            self.max_share == 1 or self.seconds + self.expected(images_per_second) <= self.max_share * elapsed
        )

    def measure(self, encoder: nn.Module) -> dict[str, float]:
        """Measure; the values are described above, and `monitor_seconds` and `monitor_share` are what it cost."""
        begin = time.perf_counter()
        if self.watched is None:
            self.watched = self.read()
        watched = self.watched
        with unchanged(encoder):
            features = unmasked_features(encoder, watched.images, self.batch_size)
            values = {"rank": rank_me(features), "channel_std": channel_std(features)}
            statistics = running_statistics(encoder)
            if statistics:
                values["bn_gap"] = batch_norm_gap(encoder, watched.images[: self.batch_size])
                if self._statistics is not None:
                    values["bn_drift"] = batch_norm_drift(self._statistics, statistics)
        self._statistics = statistics
        if watched.labels is not None and watched.train is not None and features.isfinite().all():
            k = min(NEIGHBOURS, int(watched.train.sum()))
            scores = probe_scores(features, watched.labels, watched.train, [k], PROBE_STRENGTHS)
            values |= {"knn": scores["knn"][str(k)], "linear": scores["linear"]["val"]}
        self._last = time.perf_counter() - begin
        self.seconds += self._last
        share = self.seconds / (time.perf_counter() - self._began)
        return {**values, "monitor_seconds": self._last, "monitor_share": share}


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients for a while; modes and the CPU generator's state come back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def unmasked_features(encoder: nn.Module, images: Tensor, batch_size: int) -> Tensor:
    """Deepest feature map of whole images [N, C, H, W], averaged over its positions: [N, D] float32 on the CPU."""
    device = next(encoder.parameters()).device
    deepest = pyramid_info(encoder)[-1:]
    maps = (pyramid(encoder, part.to(device), deepest)[0] for part in images.split(batch_size))
    return torch.cat([x.float().mean((2, 3)).cpu() for x in maps])


def rank_me(features: Tensor) -> float:
    """Effective rank of features [N, D]: exp(-sum p_k log p_k), p_k = s_k / sum(s) + 1e-7, s_k the singular values.

    Between 1 (all features on a line) and min(N, D). Garrido et al., "RankMe: Assessing the Downstream Performance of
    Pretrained Self-Supervised Representations by Their Rank", ICML 2023, equation 1. Not finite features give NaN.
    """
    if not features.isfinite().all():
        return math.nan
    singular = torch.linalg.svdvals(features.double())
    shares = singular / singular.sum().clamp_min(1e-300) + 1e-7
    return (-(shares * shares.log()).sum()).exp().item()


def channel_std(features: Tensor) -> float:
    """Mean standard deviation over images of the channels of features [N, D] of unit length, times sqrt(D).

    1 for features spread over all directions, 0 for features that are all the same: the measure of collapse of Chen
    and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, section 4.1. Post-activation features share a
    direction and lie in between.
    """
    return normalize(features.double(), dim=1).std(0, correction=0).mean().item() * math.sqrt(
        features.shape[1]
    )


def running_statistics(encoder: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of (running mean, running variance), [C] each, of every batch norm that keeps them."""
    return [
        (module.running_mean.clone(), module.running_var.clone())
        for module in encoder.modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.running_var is not None
    ]


def batch_norm_drift(before: list[tuple[Tensor, Tensor]], now: list[tuple[Tensor, Tensor]]) -> float:
    """How far running statistics have moved: root mean square over all channels of a distance in deviations.

    The distance of two channels is that of their means, divided by the earlier standard deviation.
    """
    moved = [(new - old) / (var + 1e-5).sqrt() for (old, var), (new, _) in zip(before, now, strict=True)]
    return torch.cat(moved).square().mean().sqrt().item()


def batch_norm_gap(encoder: nn.Module, images: Tensor) -> float:
    """How far the running statistics, those of masked images, are from the statistics of these unmasked ones.

    Measured as `batch_norm_drift`, in one forward in evaluation mode. Images [B, C, H, W], normalised.
    """
    known, seen = [], []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        x = inputs[0].float()
        dims = [0, *range(2, x.ndim)]
        assert module.running_mean is not None
        assert module.running_var is not None
        known.append((module.running_mean, module.running_var))
        seen.append((x.mean(dims), x.var(dims, correction=0)))

    handles = [
        module.register_forward_pre_hook(look)
        for module in encoder.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    try:
        unmasked_features(encoder, images, len(images))
    finally:
        for handle in handles:
            handle.remove()
    return batch_norm_drift(known, seen)


def collapse_warning(
    values: dict[str, float], images: int, least_rank: float, least_std: float
) -> str | None:
    """The sentence to warn with if the features of a measurement have collapsed; None if they have not.

    With fewer than 8 images there is no warning: the rank is at most their number.
    """
    if images < _FEWEST:
        return None
    signs = [
        f"{name} {values[name]:.3g} is below {least:g}"
        for name, least in (("rank", least_rank), ("channel_std", least_std))
        if not values[name] >= least  # NaN is a sign too
    ]
    if not signs:
        return None
    return (
        f"features collapse: {' and '.join(signs)}, so images look alike to the encoder; if the loss does not fall, "
        "lower optim.base_lr or lengthen the warm-up"
    )
