"""Where the visible sites are, at every resolution.

Legend: B images, fh x fw patches, h x w sites of a feature map, ph = h / fh and pw = w / fw sites along a patch,
M visible patches in all, N = M * ph * pw visible sites, i.e. rows of the packed layout.

SparK masks are aligned to patches, so `(visible, h, w)` determines the sites of every feature map: no hash table and no
search through values (a black visible pixel is visible).

On a GPU nothing here waits for the device, if only the number of visible patches M is known on the host: it decides
every shape.  Where it is not, the mask is read once, and all the rest follows from M.

Order of packed rows: image, visible patch (row-major over the grid), row in patch, column in patch.  Rows of one patch
are contiguous, so a patch is a small dense image, and rows of two feature maps of one forward belong to the same
patches in the same order.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from spark.errors import UserError

T = TypeVar("T")


def as_image(rows: Tensor) -> Tensor:
    """View rows [N, C] as an image [1, C, 1, N] in channels_last memory."""
    return rows[None, None].permute(0, 3, 1, 2)


def as_rows(image: Tensor) -> Tensor:
    """View [M, C, h, w] in channels_last memory as rows [M * h * w, C]."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


class Cells:
    """Cells that read packed rows: patches with their surroundings, or the windows of a convolution as columns.

    Cells without a row are kept as lists: little is written, but the lists' lengths have to be read off the mask.

    Args:
        row: row under each cell, any shape [..., w], int64; any row for cells without one.
        masked: cells over masked patches, bool.
        outside: cells beyond the image's border, bool.
        num_rows: N, rows of the feature map.
        trivial: the cells are the rows, in their order.
    """

    def __init__(self, row: Tensor, masked: Tensor, outside: Tensor, num_rows: int, trivial: bool = False):
        self.shape = row.shape
        self.num_rows = num_rows
        self.trivial = trivial
        self._keep(row.flatten(), masked.flatten(), outside.flatten())

    def _keep(self, row: Tensor, masked: Tensor, outside: Tensor) -> None:
        self.row = row
        self.masked, self.outside, self.nowhere = (
            cells.nonzero().squeeze(1) for cells in (masked, outside, masked | outside)
        )

    def rows_or(self, nowhere: int) -> Tensor:
        """Row under each cell, `nowhere` where there is none: flat, int64."""
        return self.row.index_fill(0, self.nowhere, nowhere)

    def gather(self, rows: Tensor, outside: float = 0.0) -> Tensor:
        """[N, C] -> [..., w, C]: 0 over masked patches, `outside` beyond the border."""
        return (rows if self.trivial else self._read(rows, outside)).view(*self.shape, rows.shape[1])

    def _read(self, rows: Tensor, outside: float) -> Tensor:
        rows = rows.index_select(0, self.row)
        if outside == 0:
            return rows.index_fill_(0, self.nowhere, 0)
        return rows.index_fill_(0, self.masked, 0).index_fill_(0, self.outside, outside)

    def spread(self, cells: Tensor) -> Tensor:
        """The transpose of `gather`: [..., w, C] -> [N, C], each row the sum of its cells."""
        flat = cells.reshape(len(self.row), -1)
        if self.trivial:
            return flat
        nowhere = self.num_rows
        row = self.rows_or(nowhere)
        return torch.ops.aten.embedding_dense_backward(flat, row, nowhere + 1, nowhere, False)[:nowhere]


class StaticCells(Cells):
    """The same for a GPU: no shape depends on the values of the mask, so nothing waits for the device.

    Cells without a row read one more row, behind the others.
    """

    def _keep(self, row: Tensor, masked: Tensor, outside: Tensor) -> None:
        self.row = row.masked_fill(masked | outside, self.num_rows)
        self.outside = outside

    def rows_or(self, nowhere: int) -> Tensor:
        """Row under each cell, `nowhere` where there is none: flat, int64."""
        return (
            self.row if nowhere == self.num_rows else self.row.masked_fill(self.row == self.num_rows, nowhere)
        )

    def _read(self, rows: Tensor, outside: float) -> Tensor:
        more = [rows.new_full((1, rows.shape[1]), value) for value in dict.fromkeys((0.0, outside))]
        row = self.row if len(more) == 1 else self.row + self.outside
        return torch.cat([rows, *more]).index_select(0, row)


def static_on(device: torch.device) -> bool:
    """Whether shapes must not depend on values there: reading a value waits for all work under way, as on a GPU.

    Or it would cut the graph in two while `torch.compile` traces, on any device.
    """
    return device.type == "cuda" or torch.compiler.is_compiling()


class UnalignedError(UserError):
    """A feature map's sites do not belong to patches of the mask.

    Attributes:
        located: the message names the module that made the map.
    """

    located = False


class Sites:
    """The mask of one forward, and the index maps that follow from it (each computed once, then kept).

    Args:
        visible: [B, 1, fh, fw] bool, True = seen.
        sync: batch statistics cover the visible sites of all processes.
        visible_count: visible patches of all images together, M. Without it, the mask is read, and a GPU waited for,
            once.

    Attributes:
        static: shapes do not depend on the values of the mask, see `static_on`.

    Raises:
        UserError: a mask of another type or shape, or a CPU mask with another number of visible patches. On a GPU a
            wrong number fails an assertion of the device.
    """

    def __init__(self, visible: Tensor, sync: bool = False, visible_count: int | None = None):
        if visible.dtype != torch.bool or visible.ndim != 4 or visible.shape[1] != 1:
            raise UserError(
                f"visible must be a bool tensor [B, 1, fh, fw], got {visible.dtype} {list(visible.shape)}"
            )
        self.visible = visible
        self.sync = sync
        self.batch = visible.shape[0]
        self.grid = (visible.shape[2], visible.shape[3])
        self.static = static_on(visible.device)
        self.visible_count = visible_count
        if visible_count is not None:
            self._check_count(visible_count)
        self._cache: dict[Hashable, Any] = {}

    def _check_count(self, count: int) -> None:
        seen = self.visible.sum()
        if self.static:
            torch.ops.aten._assert_async.msg(
                seen == count, f"visible_count {count} is not the mask's number of visible patches"
            )
        elif seen.item() != count:
            raise UserError(f"visible_count is {count}, but the mask has {seen.item()} visible patches")

    def cached(self, key: Hashable, build: Callable[[], T]) -> T:
        """What `build` returns, computed once for this mask."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]

    def patch_sides(self, h: int, w: int) -> tuple[int, int]:
        """Sites along a patch (ph, pw) of an h x w feature map; UnalignedError if masks and sites do not line up."""
        fh, fw = self.grid
        if h % fh or w % fw or h < fh or w < fw:
            raise UnalignedError(
                f"a feature map of {h}x{w} does not line up with the mask's {fh}x{fw} patches: the image size must be "
                "a multiple of the patch size, the patch size a multiple of every stride inside the encoder, and its "
                "convolutions padded so that sizes divide evenly"
            )
        return h // fh, w // fw

    def mask(self, h: int, w: int) -> Tensor:
        """Visible sites of an h x w map: [B, 1, h, w] bool."""
        ph, pw = self.patch_sides(h, w)
        return self.cached(
            ("mask", h, w), lambda: self.visible.repeat_interleave(ph, 2).repeat_interleave(pw, 3)
        )

    def patches(self) -> Tensor:
        """(image, patch row, patch column) of the visible patches: [M, 3] int64, in the order of the rows."""

        def build() -> Tensor:
            if self.visible_count is None or not self.static:
                return self.visible.squeeze(1).nonzero()
            # A stable sort puts the visible patches first, in their order.
            patch = self.visible.flatten().byte().argsort(descending=True, stable=True)[: self.visible_count]
            fh, fw = self.grid
            return torch.stack([patch // (fh * fw), patch // fw % fh, patch % fw], 1)

        return self.cached("patches", build)

    def tiles(self, h: int, w: int, before: tuple[int, int], after: tuple[int, int]) -> Cells:
        """The visible patches of an h x w map, grown by `before` sites (up, left) and `after` sites (down, right).

        Cells [M, th, tw].  A patch may be smaller than its surroundings: they then reach over several patches.
        """
        alone = before == after == (0, 0)
        return self.cached(
            ("tiles", h, w, before, after),
            lambda: self.cells(*self._surroundings(h, w, before, after), self.num_rows(h, w), alone),
        )

    def columns(
        self,
        h: int,
        w: int,
        before: tuple[int, int],
        after: tuple[int, int],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: tuple[int, int],
    ) -> Cells:
        """The window of each output of a convolution over `tiles`: cells [N', kh * kw], rows of the output in order."""

        def windows(cells: Tensor) -> Tensor:
            for dim in (0, 1):
                cells = cells.unfold(1 + dim, dilation[dim] * (kernel[dim] - 1) + 1, stride[dim])
            return cells[..., :: dilation[0], :: dilation[1]].reshape(-1, kernel[0] * kernel[1])

        def build() -> Cells:
            row, masked, outside = map(windows, self._surroundings(h, w, before, after))
            return self.cells(row, masked, outside, self.num_rows(h, w))

        return self.cached(("columns", h, w, before, after, kernel, stride, dilation), build)

    @property
    def cells(self) -> type[Cells]:
        """The kind of cells that suits the mask's device."""
        return StaticCells if self.static else Cells

    def _surroundings(
        self, h: int, w: int, before: tuple[int, int], after: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `Cells` needs to know of each cell of the grown patches, each [M, th, tw]."""
        ph, pw = self.patch_sides(h, w)
        fh, fw = self.grid
        image, row, column = (part[:, None, None] for part in self.patches().unbind(1))
        y = row * ph + torch.arange(-before[0], ph + after[0], device=row.device)[None, :, None]
        x = column * pw + torch.arange(-before[1], pw + after[1], device=row.device)[None, None, :]
        outside = (y < 0) | (y >= h) | (x < 0) | (x >= w)
        y, x = y.clamp(0, h - 1), x.clamp(0, w - 1)
        slot = self.slots()[(image * fh + y // ph) * fw + x // pw]
        masked = (slot < 0) & ~outside
        return (slot.clamp(min=0) * ph + y % ph) * pw + x % pw, masked, outside

    def slots(self) -> Tensor:
        """Number of each patch among the visible ones, -1 for masked patches: [B * fh * fw] int64."""
        flat = self.visible.flatten()
        return self.cached("slots", lambda: torch.where(flat, flat.cumsum(0) - 1, -1))

    def num_rows(self, h: int, w: int) -> int:
        """N, the packed rows of an h x w map."""
        ph, pw = self.patch_sides(h, w)
        return len(self.patches()) * ph * pw

    def rows(self, h: int, w: int) -> Tensor:
        """Flat index into [B, h, w] of each packed row: [N] int64."""

        def build() -> Tensor:
            ph, pw = self.patch_sides(h, w)
            image, row, column = self.patches().unbind(1)
            y = (row * ph)[:, None, None] + torch.arange(ph, device=row.device)[None, :, None]
            x = (column * pw)[:, None, None] + torch.arange(pw, device=row.device)[None, None, :]
            return ((image[:, None, None] * h + y) * w + x).flatten()

        return self.cached(("rows", h, w), build)

    def sites_per_image(self, h: int, w: int) -> Tensor:
        """Number of visible sites of each image: [B] int64."""
        ph, pw = self.patch_sides(h, w)
        return self.visible.flatten(1).sum(1) * (ph * pw)
