"""Bodies that rays can hit: boxes, ellipsoids and frustums that stand upright."""

import math
from dataclasses import dataclass, field

import numpy as np

from rooms.textures import Material

Vector = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Solid:
    """A convex body: the image of a unit body under scaling by `half`, a turn by `yaw` and a shift.

    Args:
        shape: "box" (the cube [-1, 1]^3), "ellipsoid" (the unit sphere) or "frustum" (|z| <= 1 and radius
            1 + taper * z; a cylinder when `taper` is 0).
        center: its middle [m].
        half: half extents along the body's own axes [m].
        material: what its surface looks like.
        yaw: turn about the vertical axis [rad].
        taper: growth of a frustum's radius from its middle to its top, between -1 and 1.
        casts: whether it throws shadows.
    """

    shape: str
    center: tuple[float, float, float]
    half: tuple[float, float, float]
    material: Material = field(default_factory=Material)
    yaw: float = 0.0
    taper: float = 0.0
    casts: bool = True

    def local(self, vector: np.ndarray, point: bool) -> Vector:
        """A world direction (or, with `point`, a point) `[3, ...]` in the coordinates of the unit body."""
        x, y, z = (vector[i] - self.center[i] if point else vector[i] for i in range(3))
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return (c * x + s * y) / self.half[0], (c * y - s * x) / self.half[1], z / self.half[2]

    def hit(self, origin: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """Ray parameter at which rays from outside enter the body, inf where they miss it."""
        return HITS[self.shape](self.local(origin, True), self.local(direction, False), self.taper)

    def corners(self) -> np.ndarray:
        """The corners `[8, 3]` of a box around the body, in the world [m]."""
        wide = 1 + abs(self.taper)
        unit = np.array([[x, y, z] for x in (-wide, wide) for y in (-wide, wide) for z in (-1, 1)])
        x, y, z = (unit * self.half).T
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return np.stack([c * x - s * y, s * x + c * y, z], axis=1) + self.center

    def contains(self, point: np.ndarray, margin: float) -> bool:
        """Whether a point `[3]` lies in the box around the body, grown by a margin [m] on every side."""
        wide = (1 + abs(self.taper), 1 + abs(self.taper), 1.0)
        local = self.local(point, True)
        return all(abs(x) < w + margin / h for x, w, h in zip(local, wide, self.half, strict=True))

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Outward unit normals `[3, N]` and texture coordinates `[2, N]` [m] at points `[3, N]` of the surface."""
        x, y, z = self.local(points, True)
        hx, hy, hz = self.half
        if self.shape == "box":
            local = np.stack([x, y, z])
            face = np.abs(local).argmax(0)
            nx, ny, nz = (np.where(face == i, np.sign(local[i]), 0) for i in range(3))
            u, v = np.where(face == 0, y * hy, x * hx), np.where(face == 2, y * hy, z * hz)
        elif self.shape == "ellipsoid":
            nx, ny, nz = x / hx, y / hy, z / hz
            u, v = np.arctan2(y, x) * hx, z * hz
        else:
            radius = 1 + self.taper * z
            cap = np.abs(np.abs(z) - 1) < np.abs(np.hypot(x, y) - radius)
            nx, ny = np.where(cap, 0, x / hx), np.where(cap, 0, y / hy)
            nz = np.where(cap, np.sign(z), -self.taper * radius / hz)
            u, v = np.where(cap, x * hx, np.arctan2(y, x) * hx), np.where(cap, y * hy, z * hz)
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        normal = np.stack([c * nx - s * ny, s * nx + c * ny, nz])
        return normal / np.sqrt((normal**2).sum(0)), np.stack([u, v])


def never_zero(x: np.ndarray) -> np.ndarray:
    """`x` with values too small to divide by replaced."""
    return np.where(np.abs(x) < 1e-9, 1e-9, x)


def hit_box(o: Vector, d: Vector, taper: float) -> np.ndarray:
    """Entry of rays into the cube [-1, 1]^3 (slab method)."""
    near, far = 0.0, np.inf
    for origin, direction in zip(o, d, strict=True):
        inverse = 1 / never_zero(direction)
        middle, reach = -origin * inverse, np.abs(inverse)
        near, far = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
    return np.where((near < far) & (near > 0), near, np.inf)


def hit_ellipsoid(o: Vector, d: Vector, taper: float) -> np.ndarray:
    """Entry of rays into the unit sphere."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + oy * dy + oz * dz
    discriminant = b * b - a * (ox * ox + oy * oy + oz * oz - 1)
    t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & (t > 0), t, np.inf)


def hit_frustum(o: Vector, d: Vector, taper: float) -> np.ndarray:
    """Entry of rays into |z| <= 1, x^2 + y^2 <= (1 + taper * z)^2: the nearest hit of side and caps."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    radius = 1 + taper * oz
    a = never_zero(dx * dx + dy * dy - (taper * dz) ** 2)
    b = ox * dx + oy * dy - taper * dz * radius
    root = np.sqrt(np.maximum(b * b - a * (ox * ox + oy * oy - radius * radius), 0))
    best = np.full(np.broadcast_shapes(root.shape), np.inf, root.dtype)
    for sign in (-1, 1):
        t = (-b + sign * root) / a
        best = np.minimum(best, np.where((root > 0) & (t > 0) & (np.abs(oz + t * dz) <= 1), t, np.inf))
        t = (sign - oz) / never_zero(dz)
        inside = (ox + t * dx) ** 2 + (oy + t * dy) ** 2 <= (1 + sign * taper) ** 2
        best = np.minimum(best, np.where((t > 0) & inside, t, np.inf))
    return best


HITS = {"box": hit_box, "ellipsoid": hit_ellipsoid, "frustum": hit_frustum}
