"""Which patches of an image the encoder sees.

Shapes: B images, a grid of fh x fw patches, L = fh * fw.  One polarity everywhere: `visible`, True = seen.
Method: SparK (Tian et al., ICLR 2023), section 3.1: every image keeps the same number of patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spark.seeding import derive_seed


def num_visible(grid: tuple[int, int], mask_ratio: float) -> int:
    """Visible patches of each image: round(fh * fw * (1 - mask_ratio)), the official rule.

    At 224 px and stride 32 a ratio of 0.6 keeps 20 of 49 patches, so the true ratio is 0.592.

    Raises:
        ValueError: the ratio leaves no patch visible, or none masked, on this grid.
    """
    total = grid[0] * grid[1]
    keep = round(total * (1 - mask_ratio))
    if not 0 < keep < total:
        raise ValueError(
            f"mask_ratio {mask_ratio} on a grid of {grid[0]}x{grid[1]} patches would leave {keep} of {total} visible; "
            "at least one patch must be visible and one masked: use larger images or another ratio"
        )
    return keep


def visible_from_noise(noise: Tensor, grid: tuple[int, int], mask_ratio: float) -> Tensor:
    """Keep the patches with the smallest noise: [B, L] float -> [B, 1, fh, fw] bool."""
    keep = num_visible(grid, mask_ratio)
    order = noise.argsort(dim=1)[:, :keep]
    visible = torch.zeros(noise.shape, dtype=torch.bool, device=noise.device)
    return visible.scatter_(1, order, True).view(-1, 1, *grid)


def random_visible(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a mask for `batch` images: [B, 1, fh, fw] bool, equally many visible patches in each."""
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator)
    return _moved(visible_from_noise(noise, grid, mask_ratio), device)


def visible_at(
    positions: Sequence[int],
    grid: tuple[int, int],
    mask_ratio: float,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    """Masks of the images at these positions of the training stream: [B, 1, fh, fw] bool.

    The mask of an image is a function of (seed, position) alone, so that it does not depend on how the
    batch is split over processes or on where a run was resumed.
    """
    noise = torch.stack(
        [
            torch.rand(
                grid[0] * grid[1], generator=torch.Generator().manual_seed(derive_seed(seed, int(n), 1))
            )
            for n in positions
        ]
    )
    return _moved(visible_from_noise(noise, grid, mask_ratio), device)


def _moved(visible: Tensor, device: torch.device | str | None) -> Tensor:
    """To a device; to a GPU without waiting for its work under way (CUDA copies ordinary memory before it returns)."""
    return visible.to(device, non_blocking=True)
