"""Which patches of an image the encoder sees.

Shapes: B images, a grid of fh x fw patches, L = fh * fw.  One polarity everywhere: `visible`, True = seen.
Method: SparK (Tian et al., ICLR 2023), section 3.1: every image keeps the same number of patches.

Masks are made of single patches (the official ones) or of blocks: the grid is cut into squares of k x k patches, at an
offset that is drawn for each image, so that blocks at the border may be smaller; the squares are shuffled, and their
patches are kept in that order until the number is reached.  Of one square a part may thus be kept, any patches of it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from spark.errors import UserError
from spark.seeds import Purpose, derive_seed

MaskRatio = float | tuple[float, float]
"""Share of hidden patches, or the range (low, high) that it is drawn from."""


def ratio_range(mask_ratio: MaskRatio) -> tuple[float, float]:
    """Lowest and highest share of hidden patches."""
    return (mask_ratio, mask_ratio) if isinstance(mask_ratio, int | float) else mask_ratio


def mean_ratio(mask_ratio: MaskRatio) -> float:
    """Share of hidden patches on average; a single number is itself."""
    return sum(ratio_range(mask_ratio)) / 2


def check_masks(grid: tuple[int, int], mask_ratio: MaskRatio, block: int = 1) -> None:
    """Refuse ratios and blocks of which no mask can be drawn on this grid."""
    low, high = ratio_range(mask_ratio)
    if low > high:
        raise UserError(f"mask_ratio [{low}, {high}] is no range: give the lower share first")
    num_visible(grid, low)
    num_visible(grid, high)
    if block < 1 or (block > 1 and block >= min(grid)):
        raise UserError(
            f"mask_block_size {block} must be at least 1 and, unless it is 1, below {min(grid)}, the patches along the "
            "shorter side of the image: use smaller blocks or larger images"
        )


def num_visible(grid: tuple[int, int], mask_ratio: float) -> int:
    """Visible patches of each image: round(fh * fw * (1 - mask_ratio)), the official rule.

    At 224 px and stride 32 a ratio of 0.6 keeps 20 of 49 patches, so the true ratio is 0.592.

    Raises:
        UserError: no patch, or every one, would be visible.
    """
    total = grid[0] * grid[1]
    keep = round(total * (1 - mask_ratio))
    if not 0 < keep < total:
        raise UserError(
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
    block: int = 1,
) -> Tensor:
    """Draw a mask for `batch` images, of blocks of `block` x `block` patches: [B, 1, fh, fw] bool.

    Equally many patches are visible in each.
    """
    noise = torch.rand(batch, grid[0] * grid[1], generator=generator)
    if block > 1:
        noise += torch.stack([_block_ranks(grid, block, generator) for _ in range(batch)])
    return _moved(visible_from_noise(noise, grid, mask_ratio), device)


def visible_at(
    positions: Sequence[int],
    grid: tuple[int, int],
    mask_ratio: float,
    seed: int,
    device: torch.device | str | None = None,
    block: int = 1,
) -> Tensor:
    """Masks [B, 1, fh, fw] of the images at these positions of the training stream, of blocks of patches.

    The mask of an image is a function of (seed, position) alone, whatever processes or resuming do to the batch.
    """
    noise = []
    for position in positions:
        generator = torch.Generator().manual_seed(derive_seed(seed, int(position), Purpose.MASK))
        noise.append(torch.rand(grid[0] * grid[1], generator=generator))
        if block > 1:
            noise[-1] += _block_ranks(grid, block, generator)
    return _moved(visible_from_noise(torch.stack(noise), grid, mask_ratio), device)


def _block_ranks(grid: tuple[int, int], block: int, generator: torch.Generator | None) -> Tensor:
    """Place of each patch's block in the order of the blocks of one image: [L], whole numbers."""
    rows, columns = ((side + block - 2) // block + 1 for side in grid)  # at the offset that cuts most blocks
    order = torch.randperm(rows * columns, generator=generator).view(rows, columns)
    top, left = torch.randint(block, (2,), generator=generator).tolist()
    row, column = (torch.arange(grid[0]) + top) // block, (torch.arange(grid[1]) + left) // block
    return order[row[:, None], column[None, :]].flatten()


def _moved(visible: Tensor, device: torch.device | str | None) -> Tensor:
    """To a device; to a GPU without waiting for its work under way (CUDA copies ordinary memory before it returns)."""
    return visible.to(device, non_blocking=True)
