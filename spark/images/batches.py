"""Batches of images: what all images of an optimizer step share (their size, the share of hidden patches), and masks.

Size and share are functions of the seed and of the step, which follows from the position of an image in the stream. So
shapes agree over processes and accumulated micro-batches, and a resumed run draws what an uninterrupted one draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spark.errors import UserError
from spark.model.masking import MaskRatio, ratio_range, visible_at
from spark.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class StepPlan:
    """Sizes and mask ratios of the steps of a run.

    Attributes:
        sizes: (H, W) [px]; each step draws one of them, all equally often.
        mask_ratio: share of hidden patches, or a range from which each step draws uniformly.
        batch_size: images of a step, over all processes and accumulated micro-batches.
        seed: of the run.
    """

    sizes: tuple[tuple[int, int], ...]
    mask_ratio: MaskRatio
    batch_size: int
    seed: int

    def size(self, step: int) -> tuple[int, int]:
        """(H, W) of the images of a step, counted from 0 [px]."""
        return self.sizes[derive_seed(self.seed, step, Purpose.SIZE) % len(self.sizes)]

    def ratio(self, step: int) -> float:
        """Share of hidden patches in a step, before it is rounded to whole patches."""
        low, high = ratio_range(self.mask_ratio)
        return low + (high - low) * derive_seed(self.seed, step, Purpose.MASK_RATIO) / 2**63

    def step_of(self, position: int) -> int:
        """The step that trains on this position of the stream."""
        return position // self.batch_size


def collate_images(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batch samples of `spark.images.dataset.SampleReader`; bytes and floats together are refused.

    Returns:
        `image` [B, C, H, W] uint8 (or float32), channels_last; `position` and `index`, int64 [B]; `name`, B strings;
        `failed`, one list of strings; `failed_shards`, an empty list (streams fill it).
    """
    kinds = {sample["image"].dtype: sample["name"] for sample in samples}
    if len(kinds) > 1:
        raise UserError(
            f"images of 8 bits and of more were mixed, such as {' and '.join(sorted(kinds.values()))}: convert them to "
            "one kind, for data.mean and data.std fit one scale only"
        )
    rows = torch.stack([sample["image"].permute(1, 2, 0) for sample in samples])
    return {
        "image": rows.permute(0, 3, 1, 2),
        "position": torch.tensor([sample["position"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
        "name": [sample["name"] for sample in samples],
        "failed": [failure for sample in samples for failure in sample["failed"]],
        "failed_shards": [],
    }


@dataclass(frozen=True)
class MaskedBatches:
    """Collate function: a batch of images and, under "visible", the masks of its positions, [B, 1, fh, fw] bool.

    Masks are drawn here so that the loader processes do it.

    Attributes:
        plan: mask ratios of the steps; all images of a batch belong to one step.
        patch_size: [px].
        block: side of the blocks of a mask, in patches.
    """

    plan: StepPlan
    patch_size: int
    block: int = 1

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch samples, see `collate_images`."""
        batch = collate_images(samples)
        height, width = batch["image"].shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        positions = batch["position"].tolist()
        ratio = self.plan.ratio(self.plan.step_of(positions[0]))
        batch["visible"] = visible_at(positions, grid, ratio, self.plan.seed, block=self.block)
        return batch
