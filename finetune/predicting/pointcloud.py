"""Coloured points and surfaces from depth, as binary PLY, which MeshLab, CloudCompare, Blender and Open3D read.

Axes of the files: x right, y up, z towards the viewer (OpenGL's), in metres, the camera at the origin, so that viewers
show the scene upright from the front.
"""

import math

import numpy as np

from finetune.predicting.camera import Intrinsics

MOST_POINTS = 2_000_000
BREAK = 1.08
"""Ratio of the farthest to the nearest corner beyond which a face is an edge between two things, and left out."""

_VERTEX = np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)])
_FACE = np.dtype([("count", "u1"), ("corners", "<i4", 3)])


def point_cloud(image: np.ndarray, depth: np.ndarray, camera: Intrinsics, most: int = MOST_POINTS) -> bytes:
    """A PLY of the pixels with depth.

    Args:
        image: uint8 [H, W, 3], RGB.
        depth: [H, W] [m]; not finite or not above 0 is no point.
        camera: of the image.
        most: points at most; of larger images every second, third, ... row and column is taken.
    """
    vertices, known = _vertices(image, depth, camera, most)
    return _header(int(known.sum()), None, camera) + vertices[known].tobytes()


def mesh(image: np.ndarray, depth: np.ndarray, camera: Intrinsics, most: int = MOST_POINTS) -> bytes:
    """A PLY of the surface: two triangles for each square of pixels, none where depth jumps (`BREAK`); see above."""
    vertices, known = _vertices(image, depth, camera, most)
    height, width = known.shape
    index = np.arange(height * width, dtype=np.int32).reshape(height, width)
    z = np.where(known, -vertices["xyz"][..., 2], np.nan)
    low, high = slice(None, -1), slice(1, None)
    first, second, third, fourth = (low, low), (high, low), (low, high), (high, high)
    triangles = []
    for corners in ((first, second, third), (third, second, fourth)):  # counterclockwise from the front
        depths = np.stack([z[corner] for corner in corners], -1)
        whole = depths.max(-1) <= BREAK * depths.min(-1)  # NaN compares false
        triangles.append(np.stack([index[corner] for corner in corners], -1)[whole])
    faces = np.concatenate(triangles)
    used = np.zeros(height * width, bool)
    used[faces] = True
    renumbered = np.cumsum(used, dtype=np.int32) - 1
    rows = np.empty(len(faces), _FACE)
    rows["count"], rows["corners"] = 3, renumbered[faces]
    content = _header(int(used.sum()), len(faces), camera)
    return content + vertices.reshape(-1)[used].tobytes() + rows.tobytes()


def step_of(pixels: int, most: int = MOST_POINTS) -> int:
    """Of how many rows and columns one is taken, such that an image of `pixels` gives `most` points at most."""
    return max(1, math.ceil(math.sqrt(pixels / most)))


def _vertices(
    image: np.ndarray, depth: np.ndarray, camera: Intrinsics, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [h, w] of every n-th row and column, and where they have depth."""
    step = step_of(depth.size, most)
    part = (slice(None, None, step),) * 2
    metres = depth[part]
    vertices = np.empty(metres.shape, _VERTEX)
    vertices["xyz"] = camera.points(depth, step) * np.array([1, -1, -1], np.float32)
    vertices["rgb"] = image[part]
    return vertices, np.isfinite(metres) & (metres > 0)


def _header(points: int, faces: int | None, camera: Intrinsics) -> bytes:
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        "comment metres; x right, y up, z towards the viewer",
        f"comment camera: {' '.join(str(camera).encode('ascii', 'replace').decode().split())}",
        f"element vertex {points}",
        *(f"property float {axis}" for axis in "xyz"),
        *(f"property uchar {colour}" for colour in ("red", "green", "blue")),
    ]
    if faces is not None:
        lines += [f"element face {faces}", "property list uchar int vertex_indices"]
    return ("\n".join([*lines, "end_header"]) + "\n").encode("ascii")
