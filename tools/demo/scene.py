"""The geometry of a room: a pinhole camera, solids that rays can hit, and exact depth.

World frame: x and y along the walls, z up, origin in a corner of the floor, metres. Camera frame: x right, y down,
z forward. Arrays of vectors have the coordinate as their first axis, `[3, ...]`.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike

Color = tuple[float, float, float]  # linear RGB in [0, 1]
Vector = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Material:
    """What a surface looks like.

    Args:
        pattern: a key of `tools.demo.photo.PATTERNS`.
        colors: the colours that the pattern mixes.
        scale: size of its elements [m].
        glow: light that the surface sends out, as a multiple of its colour.
        seed: shifts the noise, so that two surfaces of one pattern differ.
    """

    pattern: str = "plaster"
    colors: tuple[Color, ...] = ((0.5, 0.5, 0.5),)
    scale: float = 0.3
    glow: float = 0.0
    seed: int = 0


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


@dataclass(frozen=True)
class Light:
    """A lamp, or daylight at a window.

    Args:
        position: `[3]` [m].
        color: linear RGB.
        radius: how far the lamp reaches around its position [m]; makes the edges of shadows soft.
        reach: distance at which the light has fallen to a half [m].
    """

    position: np.ndarray
    color: Color
    radius: float = 0.1
    reach: float = 2.5


@dataclass(frozen=True)
class Room:
    """A furnished room with its lights.

    Args:
        size: extents along x, y and z [m]; the room fills [0, size].
        solids: what stands in it.
        surfaces: materials of the walls x = 0, x = max, y = 0, y = max, of the floor and of the ceiling.
        lights: lamps and windows.
        ambient: light from everywhere, linear RGB.
        pieces: which runs of `solids` belong together, as (first, end).
    """

    size: tuple[float, float, float]
    solids: tuple[Solid, ...] = ()
    surfaces: tuple[Material, ...] = (Material(),) * 6
    lights: tuple[Light, ...] = ()
    ambient: Color = (0.5, 0.5, 0.5)
    pieces: tuple[tuple[int, int], ...] = ()

    @cached_property
    def corners(self) -> np.ndarray:
        """Corners of the bounding boxes of the solids, `[S, 8, 3]` [m]."""
        return np.array([solid.corners() for solid in self.solids]).reshape(-1, 8, 3)


def intrinsics(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """`(fx, fy, cx, cy)` [px] of the NYU colour camera (at 480x640), scaled to `size` (H, W).

    Pixel coordinates are integers at pixel centres; a resize maps the left edge of the image, at -0.5, onto itself.
    Source: the NYU Depth V2 toolbox, camera_params.m.
    """
    sy, sx = size[0] / 480, size[1] / 640
    return 518.858 * sx, 519.470 * sy, (325.582 + 0.5) * sx - 0.5, (253.736 + 0.5) * sy - 0.5


@dataclass(frozen=True)
class Camera:
    """Where the camera is and where it looks: the exact pose, camera to world. A walk is a list of these.

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
        x, y, z = np.moveaxis(np.einsum("nki,ij->nkj", corners - self.position, self.rotation), -1, 0)
        ahead = z > 0.02
        depth = np.where(ahead, z, 1.0)
        u, v = fx * x / depth + cx, fy * y / depth + cy
        box = np.stack([v.min(1) - 1, v.max(1) + 2, u.min(1) - 1, u.max(1) + 2], axis=1)
        box = np.clip(np.floor(box), 0, [size[0], size[0], size[1], size[1]]).astype(int)
        box[~ahead.all(1)] = (0, size[0], 0, size[1])  # partly behind the camera: no finite bounds
        box[~ahead.any(1)] = 0
        return box


def cast(
    room: Room, camera: Camera, size: tuple[int, int], samples: int = 1, dtype: DTypeLike = np.float64
) -> tuple[np.ndarray, np.ndarray]:
    """Follow the rays of a camera, which is inside the room and outside its solids, to the first surface.

    Args:
        room: what there is to see.
        camera: from where.
        size: (H, W) of the image; `samples` x `samples` rays a pixel.
        samples: see `size`.
        dtype: precision of the intersections.

    Returns:
        z-depth `[H * samples, W * samples]` [m], and what was hit there: 0 to 5 stand for `room.surfaces`, 6 + i for
        `room.solids[i]`.
    """
    rays, origin = camera.rays(size, samples, dtype), camera.position.astype(dtype)
    depth = np.full(rays.shape[1:], np.inf, dtype)
    hit = np.zeros(rays.shape[1:], np.int32)
    for axis in range(3):  # a ray leaves the room through the nearest of the three walls that it runs towards
        ahead = rays[axis] > 0
        run = np.where(np.abs(rays[axis]) < 1e-9, np.inf, rays[axis])
        t = np.where(ahead, room.size[axis] - origin[axis], -origin[axis]).astype(dtype) / run
        nearer = (t > 0) & (t < depth)
        depth, hit = np.where(nearer, t, depth), np.where(nearer, 2 * axis + ahead, hit)
    bounds = camera.bounds(room.corners, size) * samples
    for index in np.flatnonzero((bounds[:, 1] > bounds[:, 0]) & (bounds[:, 3] > bounds[:, 2])):
        top, bottom, left, right = bounds[index]
        t = room.solids[index].hit(origin, rays[:, top:bottom, left:right])
        depth_there, hit_there = depth[top:bottom, left:right], hit[top:bottom, left:right]
        nearer = t < depth_there
        depth_there[nearer], hit_there[nearer] = t[nearer], 6 + index
    return depth, hit


def render_depth(room: Room, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Exact z-depth, float64 `[H, W]` [m], of the rays through the pixel centres."""
    return cast(room, camera, size)[0]


def random_view(room: Room, rng: np.random.Generator) -> Camera:
    """A hand-held view at eye height that nothing blocks: the first good one of some random ones, or the best."""
    center = np.array([room.size[0] / 2, room.size[1] / 2, room.size[2] - 0.2])
    best, best_score = Camera.looking(center, rng.uniform(0, 2 * math.pi), -0.5), -math.inf
    for _ in range(40):
        place = [rng.uniform(0.25, room.size[i] - 0.25) for i in range(2)]
        position = np.array([*place, rng.uniform(1.3, 1.65)])
        target = [rng.uniform(0.1, 0.9) * room.size[i] for i in range(2)]
        yaw = math.atan2(target[1] - position[1], target[0] - position[0])
        camera = Camera.looking(position, yaw, rng.normal(-0.2, 0.06), rng.normal(0, 0.02))
        if any(solid.contains(position, 0.25) for solid in room.solids):
            continue
        depth, hit = cast(room, camera, (9, 12))
        near, middle, things = np.quantile(depth, 0.05), np.median(depth), len(np.unique(hit[hit > 5]))
        score = float(min(near / 0.9, 1) + min(middle / 2.0, 1) + min(things / 7, 1))
        if score > best_score:
            best, best_score = camera, score
        if score == 3:
            break
    return best
