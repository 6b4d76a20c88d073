"""iBims-1 (Koch et al. 2018): 100 indoor scenes with laser depth, masks, and the edges and planes that are scored."""

from pathlib import Path

import numpy as np
from scipy.io import loadmat

from finetune.depth_data.base import OpenOptions
from finetune.depth_data.entries import size_text
from finetune.depth_data.lists import ListedSet, NamedEntry, existing_root, find_list, numbered_lines
from finetune.depth_data.sample import (
    DepthSample,
    Plane,
    SceneGeometry,
    check_pair_headers,
    file_error,
    read_depth_png,
    read_grey,
    read_rgb,
)
from spark.errors import UserError

LIST = "imagelist.txt"
RAW, MAT = "ibims1_core_raw", "ibims1_core_mat"
"""What the two archives unpack to."""
SCALE = 50 / 65535
"""Metres of one unit of a depth file."""
MASKS = ("mask_invalid", "mask_transp")
"""Folders of masks: 1 keeps a pixel, 0 is no measurement or a transparent thing."""
SURFACES = ("wall", "table", "floor")


class IBims(ListedSet):
    """The scenes that `imagelist.txt` names: NAME is `rgb/NAME.png`, `depth/NAME.png` (16 bits, 50/65535 m a unit),
    `calib/NAME.txt`, `mask_invalid/NAME.png`, `mask_transp/NAME.png`, and NAME.mat of the other archive.

    Depth is 0 (no reading) where either mask is 0. Edges and planes, which the official scores need, are in
    `ibims1_core_mat/NAME.mat` (a struct `data`): samples have them as `geometry` where all these files are there.

    Args:
        root: `ibims1_core_raw`, or the folder that holds it.
        list_file: list of names instead of imagelist.txt.
    """

    benchmark = "ibims"

    def __init__(self, root: str | Path, list_file: str | Path | None = None):
        root = existing_root(root)
        self.root = root / RAW if (root / RAW).is_dir() else root
        found = next((place / LIST for place in (self.root, root) if (place / LIST).is_file()), None)
        if list_file is None and found is None:
            raise UserError(
                f"no {LIST} in {root}: it comes with iBims-1, or name a list of scenes (data.list)"
            )
        self.list_file = find_list(root, list_file or str(found))
        self.entries = [NamedEntry(text, number) for number, text in numbered_lines(self.list_file)]
        self.refuse_missing(
            (f"{folder}/{entry.name}.png", entry.line)
            for entry in self.entries
            for folder in ("rgb", "depth", *MASKS)
        )
        self.geometry_folder = self._find_geometry(root)
        self[0]

    @classmethod
    def recognises(cls, root: Path, list_file: str | Path | None) -> bool:
        """Whether the folders of iBims-1 are there."""
        folders = ("rgb", "depth", *MASKS)
        return any(all((place / name).is_dir() for name in folders) for place in (root, root / RAW))

    @classmethod
    def opened(cls, root: Path, options: OpenOptions) -> "IBims":
        """Open the scenes of `options.list`, or all; they are there to be tested on."""
        return cls(root, options.list)

    def __repr__(self) -> str:
        """What a run prints about its data."""
        geometry = f"with edges and planes of {self.geometry_folder}"
        if self.geometry_folder is None:
            geometry = f"without edges and planes ({MAT} is not there)"
        return f"iBims-1 layout, {len(self)} scenes of {self.list_file}, {geometry}"

    def check_header(self, entry: NamedEntry) -> None:
        """Check image and depth."""
        check_pair_headers(self._path("rgb", entry.name), self._path("depth", entry.name))

    def read(self, entry: NamedEntry) -> DepthSample:
        """The scene, without depth where a mask is 0."""
        name = entry.name
        image = read_rgb(self._path("rgb", name))
        depth = read_depth_png(self._path("depth", name), SCALE)
        for folder in MASKS:
            path = self._path(folder, name)
            keep = read_grey(path)
            if keep.shape != depth.shape:
                raise file_error(
                    path, f"the mask is {size_text(keep.shape)}, the depth map {size_text(depth.shape)}"
                )
            depth = np.where(keep > 0, depth, np.float32(0))
        geometry = None
        if self.geometry_folder is not None:
            geometry = read_geometry(self.geometry_folder / f"{name}.mat", depth.shape)
        return DepthSample(image, depth, name, geometry=geometry)

    def _path(self, folder: str, name: str) -> Path:
        return self.root / folder / f"{name}.png"

    def _find_geometry(self, root: Path) -> Path | None:
        """The folder with the MAT file of every scene, None where there is none."""
        for folder in (self.root, root / MAT, self.root.parent / MAT):
            names = self.names()
            there = [name for name in names if (folder / f"{name}.mat").is_file()]
            if len(there) == len(names):
                return folder
            if there:
                lacks = next(name for name in names if name not in there)
                raise UserError(
                    f"{folder} has the edges and planes of {len(there)} of {len(self)} scenes, {lacks}.mat is missing:"
                    f" unpack {MAT}.zip again"
                )
        return None


def read_geometry(path: Path, size: tuple[int, ...]) -> SceneGeometry:
    """Edges, planes and camera of a scene from its MAT file (version 5), for a depth map of (H, W) `size`.

    The struct `data` has `edges` (H, W), `mask_SURFACE` (H, W), where plane number n has the value n, and
    `mask_SURFACE_paras`, of which row n has the unit normal of plane n in columns 5 to 7 (x right, y ahead, z up), for
    SURFACE wall, table and floor; and `calib` (3, 3), transposed: fx = calib[0, 0], cx = calib[2, 0].

    Raises:
        DepthFileError: damaged, or without these arrays.
    """
    try:
        data = loadmat(path, variable_names=["data"])["data"][0, 0]
        edges = np.asarray(data["edges"])
        calib = np.asarray(data["calib"], np.float64)
        planes = []
        for surface in SURFACES:
            numbers, rows = (
                np.asarray(data[f"mask_{surface}"]),
                np.asarray(data[f"mask_{surface}_paras"], np.float64),
            )
            for number, row in enumerate(rows if rows.size else [], start=1):
                planes.append(Plane(surface, numbers == number, row[4:7]))
        fx, fy, cx, cy = (float(calib[place]) for place in ((0, 0), (1, 1), (2, 0), (2, 1)))
    except Exception as error:  # scipy raises a dozen kinds of error for a file that is not MATLAB 5
        raise file_error(
            path, f"holds no struct `data` with edges, calib and planes of iBims-1 ({error}), unpack it again"
        ) from error
    sizes = {edges.shape, *(plane.mask.shape for plane in planes)}
    if sizes != {tuple(size)} or any(plane.normal.shape != (3,) for plane in planes):
        raise file_error(
            path, f"has maps of {sorted(sizes)}, the depth map is {size_text(size)}; normals have 3 numbers"
        )
    return SceneGeometry(edges > 0, tuple(planes), (fx, fy, cx, cy))
