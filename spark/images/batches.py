"""What all images of an optimizer step share: their size and the share of patches that is hidden.

Both are functions of the seed and of the step, which the position of an image in the stream tells. So shapes agree over
processes and accumulated parts, and a resumed run draws what the uninterrupted one does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from spark.images.dataset import collate_images
from spark.model.masking import MaskRatio, ratio_range, visible_at
from spark.seeds import Purpose, derive_seed


@dataclass(frozen=True)
class StepPlan:
    """Sizes and mask ratios of the steps of a run.

    Attributes:
        sizes: (H, W) [px], of which every step takes one, all equally often.
        mask_ratio: share of hidden patches, or the range of which every step takes a number, uniformly.
        batch_size: images of a step, over all processes and accumulated parts.
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


class StepImages(Dataset):
    """Images in the size of their step.

    Args:
        images: (H, W) -> data set of images of that size, indexed by (position, index) as `UnlabeledImages` is.
        plan: sizes of the steps.
    """

    def __init__(self, images: Mapping[tuple[int, int], Dataset], plan: StepPlan):
        self.images = images
        self.plan = plan

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        """The sample at (position, index)."""
        return self.images[self.plan.size(self.plan.step_of(item[0]))][item]


class MaskedBatches:
    """Collate function: a batch of images and, under "visible", the masks of its positions: [B, 1, fh, fw] bool.

    Masks are drawn here so that the loader's processes do it.

    Args:
        plan: mask ratios of the steps; all images of a batch are of one step.
        patch_size: [px].
        block: side of the blocks of a mask, in patches.
    """

    def __init__(self, plan: StepPlan, patch_size: int, block: int = 1):
        self.plan = plan
        self.patch_size = patch_size
        self.block = block

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Batch samples of `UnlabeledImages`."""
        batch = collate_images(samples)
        height, width = batch["image"].shape[2:]
        grid = (height // self.patch_size, width // self.patch_size)
        positions = batch["position"].tolist()
        ratio = self.plan.ratio(self.plan.step_of(positions[0]))
        batch["visible"] = visible_at(positions, grid, ratio, self.plan.seed, block=self.block)
        return batch
