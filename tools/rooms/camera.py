"""A pinhole camera with the field of view of the NYU Depth V2 colour camera."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike


def intrinsics(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """`(fx, fy, cx, cy)` [px] of the NYU colour camera (at 480x640), scaled to `size` (H, W).

    Pixel coordinates are integers at pixel centres; a resize maps the left edge of the image, at -0.5, onto itself.
    Source: the NYU Depth V2 toolbox, camera_params.m.
    """
    sy, sx = size[0] / 480, size[1] / 640
    return 518.858 * sx, 519.470 * sy, (325.582 + 0.5) * sx - 0.5, (253.736 + 0.5) * sy - 0.5


@dataclass(frozen=True)
class Camera:
    """Where the camera is and where it looks.

    Args:
        position: `[3]` in the world [m].
        rotation: `[3, 3]`, camera to world; its columns are the directions right, down and forward.
    """

    position: np.ndarray
    rotation: np.ndarray

    @classmethod
    def looking(cls, position, yaw: float, pitch: float = 0.0, roll: float = 0.0) -> "Camera":
        """A camera that looks along `yaw` (0 = +x, counter-clockwise from above) and `pitch` (up) [rad]."""
        level = math.cos(pitch)
        forward = np.array([level * math.cos(yaw), level * math.sin(yaw), math.sin(pitch)])
        sideways = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
        right = math.cos(roll) * sideways + math.sin(roll) * np.cross(forward, sideways)
        rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
        return cls(np.asarray(position, float), rotation)

    def rays(self, size: tuple[int, int], samples: int = 1, dtype: DTypeLike = np.float64) -> np.ndarray:
        """Ray directions `[3, H * samples, W * samples]` in the world, `samples` x `samples` of them a pixel.

        A direction advances one metre along the optical axis, so the ray parameter of a hit is its z-depth.
        """
        fx, fy, cx, cy = intrinsics(size)
        x = (((np.arange(size[1] * samples) + 0.5) / samples - 0.5 - cx) / fx).astype(dtype)[None, :]
        y = (((np.arange(size[0] * samples) + 0.5) / samples - 0.5 - cy) / fy).astype(dtype)[:, None]
        r = self.rotation.astype(dtype)
        return np.stack([r[i, 0] * x + r[i, 1] * y + r[i, 2] for i in range(3)])

    def bounds(self, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """The part of the image that bodies can cover, from the corners of their bounding boxes.

        Args:
            corners: `[N, 8, 3]` in the world [m].
            size: (H, W) of the image.

        Returns:
            Int `[N, 4]`: first row, end row, first column, end column; empty (end <= first) when out of sight.
        """
        fx, fy, cx, cy = intrinsics(size)
        offset = corners - self.position
        x, y, z = np.moveaxis(np.einsum("nki,ij->nkj", offset, self.rotation), -1, 0)
        ahead = z > 0.02
        depth = np.where(ahead, z, 1.0)
        u, v = fx * x / depth + cx, fy * y / depth + cy
        box = np.stack([v.min(1) - 1, v.max(1) + 2, u.min(1) - 1, u.max(1) + 2], axis=1)
        box = np.clip(np.floor(box), 0, [size[0], size[0], size[1], size[1]]).astype(int)
        box[~ahead.all(1)] = (0, size[0], 0, size[1])  # partly behind the camera: no finite bounds
        box[~ahead.any(1)] = 0
        return box
