"""Where the visible sites are, at every resolution.

Legend: B images, fh x fw patches, h x w sites of a feature map, ph = h / fh and pw = w / fw sites along a patch,
M visible patches in all, N = M * ph * pw visible sites, i.e. rows of the packed layout.

SparK masks are aligned to patches, so `(visible, h, w)` determines the sites of every feature map: no hash table and no
search through values (a black visible pixel is visible).

Order of packed rows: image, visible patch (row-major over the grid), row in patch, column in patch.  Rows of one patch
are contiguous, so a patch is a small dense image, and rows of two feature maps of one forward belong to the same
patches in the same order.
"""

import torch
from torch import Tensor


class Sites:
    """The mask of one forward, and the index maps that follow from it (each computed once, then kept).

    Args:
        visible: [B, 1, fh, fw] bool, True = seen.
        sync: batch statistics cover the visible sites of all processes.
    """

    def __init__(self, visible: Tensor, sync: bool = False):
        if visible.dtype != torch.bool or visible.ndim != 4 or visible.shape[1] != 1:
            raise ValueError(
                f"visible must be a bool tensor [B, 1, fh, fw], got {visible.dtype} {list(visible.shape)}"
            )
        self.visible = visible
        self.sync = sync
        self.batch = visible.shape[0]
        self.grid = (visible.shape[2], visible.shape[3])
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._rows: dict[tuple[int, int], Tensor] = {}
        self._images: dict[tuple[int, int], Tensor] = {}
        self._patches: Tensor | None = None

    def patch_sides(self, h: int, w: int) -> tuple[int, int]:
        """Sites along a patch (ph, pw) of an h x w feature map.

        Raises:
            ValueError: the map's size is no multiple of the grid, so that masks and sites do not line up.
        """
        fh, fw = self.grid
        if h % fh or w % fw or h < fh or w < fw:
            raise ValueError(
                f"a feature map of {h}x{w} does not line up with the mask's {fh}x{fw} patches: the image size must be "
                "a multiple of the patch size, and the patch size a multiple of the encoder's stride"
            )
        return h // fh, w // fw

    def mask(self, h: int, w: int) -> Tensor:
        """Visible sites of an h x w map: [B, 1, h, w] bool."""
        if (h, w) not in self._masks:
            ph, pw = self.patch_sides(h, w)
            self._masks[h, w] = self.visible.repeat_interleave(ph, 2).repeat_interleave(pw, 3)
        return self._masks[h, w]

    def patches(self) -> Tensor:
        """(image, patch row, patch column) of the visible patches: [M, 3] int64, in the order of the rows."""
        if self._patches is None:
            self._patches = self.visible.squeeze(1).nonzero()
        return self._patches

    def rows(self, h: int, w: int) -> Tensor:
        """Flat index into [B, h, w] of each packed row: [N] int64."""
        if (h, w) not in self._rows:
            ph, pw = self.patch_sides(h, w)
            image, row, column = self.patches().unbind(1)
            y = (row * ph)[:, None, None] + torch.arange(ph, device=row.device)[None, :, None]
            x = (column * pw)[:, None, None] + torch.arange(pw, device=row.device)[None, None, :]
            self._rows[h, w] = ((image[:, None, None] * h + y) * w + x).flatten()
        return self._rows[h, w]

    def row_images(self, h: int, w: int) -> Tensor:
        """Image of each packed row: [N] int64."""
        if (h, w) not in self._images:
            ph, pw = self.patch_sides(h, w)
            self._images[h, w] = self.patches()[:, 0].repeat_interleave(ph * pw)
        return self._images[h, w]

    def sites_per_image(self, h: int, w: int) -> Tensor:
        """Number of visible sites of each image: [B] int64."""
        ph, pw = self.patch_sides(h, w)
        return self.visible.flatten(1).sum(1) * (ph * pw)
