"""Render a small RGB-D world of furnished rooms: images with exact metric depth, laid out on disk as NYU Depth V2 is.

    python tools/render_rooms.py --output runs/rooms --scenes 60 --views 5 --unlabeled 300 --size 120 160

A ray caster in numpy: rooms are boxes seen from inside, furniture is made of boxes, ellipsoids and frustums, surfaces
carry procedural textures, one to three lights cast shadows, and the camera has the field of view of the NYU sensor.
Depth is z-depth, the distance along the optical axis, of the ray through the centre of each pixel, in metres; it is an
intersection in double precision, not a measurement, so it has no holes and no noise.

Written into --output:

    bedroom_0000/rgb_0000.jpg, bedroom_0000/sync_depth_0000.png      depth: 16-bit PNG in millimetres
    train.txt, test.txt        lines `/scene/rgb_N.jpg /scene/sync_depth_N.png focal`; no scene is in both
    unlabeled/room_00000.jpg   images without depth, of scenes that are in neither list
    rooms.json                 the settings, the intrinsics and the split

The same settings give the same files whatever the number of workers: each scene draws from its own generator.

World frame: x and y along the walls, z up, origin in a corner of the floor, metres. Camera frame: x right, y down,
z forward. Vectors are arrays whose first axis is the coordinate, `[3, ...]`.
"""

import argparse
import colorsys
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

GENERATOR = 1  # raise it when the same seed gives other files than before
MAX_DEPTH = 10.0  # [m]; no room has a diagonal longer than this

Color = tuple[float, float, float]  # linear RGB in [0, 1]


# ---------------------------------------------------------------------------------------------------------- camera


def intrinsics(size: tuple[int, int]) -> tuple[float, float, float, float]:
    """`(fx, fy, cx, cy)` [px] of the NYU Depth V2 colour camera (480x640), scaled to `size` (H, W).

    Pixel coordinates: integers at pixel centres. A resize maps the left edge of the image, at -0.5, onto itself.
    """
    sy, sx = size[0] / 480, size[1] / 640
    return 518.858 * sx, 519.470 * sy, (325.582 + 0.5) * sx - 0.5, (253.736 + 0.5) * sy - 0.5


@dataclass(frozen=True)
class Camera:
    """A pinhole camera in the world.

    Args:
        position: `[3]` world coordinates [m].
        rotation: `[3, 3]` camera to world; its columns are the directions right, down and forward.
    """

    position: np.ndarray
    rotation: np.ndarray

    @classmethod
    def looking(cls, position, yaw: float, pitch: float = 0.0, roll: float = 0.0) -> "Camera":
        """Look along `yaw` (0 = +x, counter-clockwise seen from above) and `pitch` (positive = up), all in radians."""
        forward = np.array(
            [math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)]
        )
        level = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
        upright = np.cross(forward, level)
        right = math.cos(roll) * level + math.sin(roll) * upright
        return cls(np.asarray(position, float), np.stack([right, np.cross(forward, right), forward], axis=1))

    def rays(self, size: tuple[int, int], samples: int = 1, dtype=np.float64) -> np.ndarray:
        """Ray directions `[3, H * samples, W * samples]` in the world frame, `samples` x `samples` of them a pixel.

        A direction advances one metre along the optical axis: the ray parameter of a hit is its z-depth.
        """
        fx, fy, cx, cy = intrinsics(size)
        x = (((np.arange(size[1] * samples) + 0.5) / samples - 0.5 - cx) / fx).astype(dtype)[None, :]
        y = (((np.arange(size[0] * samples) + 0.5) / samples - 0.5 - cy) / fy).astype(dtype)[:, None]
        r = self.rotation.astype(dtype)
        return np.stack([r[i, 0] * x + r[i, 1] * y + r[i, 2] for i in range(3)])


# ---------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Material:
    """What a surface looks like.

    Args:
        pattern: name of a function in `PATTERNS`.
        colors: the colours that the pattern mixes.
        scale: size of its elements [m].
        gloss: strength of the highlight.
        glow: light that the surface sends out by itself, as a multiple of its colour.
        seed: shifts the noise, so that two surfaces of one pattern differ.
    """

    pattern: str = "plain"
    colors: tuple[Color, ...] = ((0.5, 0.5, 0.5),)
    scale: float = 0.3
    gloss: float = 0.0
    glow: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Solid:
    """A convex body standing upright: the image of a unit body under scaling by `half`, a turn by `yaw` and a shift.

    Args:
        shape: "box" (the cube [-1, 1]^3), "ellipsoid" (the unit sphere) or "frustum" (|z| <= 1, radius 1 + taper * z;
            a cylinder when `taper` is 0).
        center: `[m]`.
        half: half extents along the body's own axes [m].
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

    def local(self, vector, point: bool):
        """A world vector (or point) `[3, ...]` in the coordinates of the unit body."""
        x, y, z = (vector[i] - self.center[i] if point else vector[i] for i in range(3))
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        return (c * x + s * y) / self.half[0], (c * y - s * x) / self.half[1], z / self.half[2]

    def hit(self, origin, direction):
        """Ray parameter at which rays from outside enter the body, inf where they miss it."""
        return HITS[self.shape](self.local(origin, True), self.local(direction, False), self.taper)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Outward normals `[3, N]` and texture coordinates `[2, N]` [m] at points `[3, N]` on the surface."""
        x, y, z = self.local(points, True)
        hx, hy, hz = self.half
        if self.shape == "box":
            face = np.abs(np.stack([x, y, z])).argmax(0)
            values = np.stack([x, y, z])
            nx, ny, nz = (np.where(face == i, np.sign(values[i]), 0) for i in range(3))
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


def hit_box(o, d, taper=0.0):
    """Entry of rays into the cube [-1, 1]^3 (slab method)."""
    near, far = 0.0, np.inf
    for oi, di in zip(o, d, strict=True):
        inverse = 1 / np.where(np.abs(di) < 1e-9, 1e-9, di)
        middle, reach = -oi * inverse, np.abs(inverse)
        near, far = np.maximum(near, middle - reach), np.minimum(far, middle + reach)
    return np.where((near < far) & (near > 0), near, np.inf)


def hit_ellipsoid(o, d, taper=0.0):
    """Entry of rays into the unit sphere."""
    a = sum(di * di for di in d)
    b = sum(oi * di for oi, di in zip(o, d, strict=True))
    c = sum(oi * oi for oi in o) - 1
    discriminant = b * b - a * c
    t = (-b - np.sqrt(np.maximum(discriminant, 0))) / a
    return np.where((discriminant > 0) & (t > 0), t, np.inf)


def hit_frustum(o, d, taper=0.0):
    """Entry of rays into |z| <= 1, x^2 + y^2 <= (1 + taper * z)^2: the nearest hit of the side and of the two caps."""
    (ox, oy, oz), (dx, dy, dz) = o, d
    radius = 1 + taper * oz
    a = dx * dx + dy * dy - (taper * dz) ** 2
    a = np.where(np.abs(a) < 1e-9, 1e-9, a)
    b = ox * dx + oy * dy - taper * dz * radius
    root = np.sqrt(np.maximum(b * b - a * (ox * ox + oy * oy - radius * radius), 0))
    best = np.inf
    for sign in (-1, 1):
        t = (-b + sign * root) / a
        best = np.minimum(best, np.where((root > 0) & (t > 0) & (np.abs(oz + t * dz) <= 1), t, np.inf))
        t = (sign - oz) / np.where(np.abs(dz) < 1e-9, 1e-9, dz)
        inside = (ox + t * dx) ** 2 + (oy + t * dy) ** 2 <= (1 + sign * taper) ** 2
        best = np.minimum(best, np.where((t > 0) & inside, t, np.inf))
    return best


HITS = {"box": hit_box, "ellipsoid": hit_ellipsoid, "frustum": hit_frustum}


# -------------------------------------------------------------------------------------------------------- textures


class Noise:
    """Smooth random fields over the plane, read from one table of random numbers.

    Args:
        rng: fills the table.
    """

    def __init__(self, rng: np.random.Generator):
        self.table = rng.random((256, 256), dtype=np.float32)

    def cell(self, i, j, seed: int = 0):
        """A uniform number in [0, 1) for each pair of integers."""
        return self.table[(i + 37 * seed) & 255, (j + 101 * seed) & 255]

    def smooth(self, u, v, seed: int = 0):
        """Value noise in [0, 1) with lattice step 1."""
        iu, iv = np.floor(u), np.floor(v)
        fu, fv = u - iu, v - iv
        fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
        i, j = iu.astype(np.int32), iv.astype(np.int32)
        top = self.cell(i, j, seed) * (1 - fv) + self.cell(i, j + 1, seed) * fv
        bottom = self.cell(i + 1, j, seed) * (1 - fv) + self.cell(i + 1, j + 1, seed) * fv
        return top * (1 - fu) + bottom * fu

    def cloud(self, u, v, seed: int = 0, octaves: int = 3):
        """Sum of octaves of `smooth`, in [0, 1)."""
        total = sum(self.smooth(u * 2**k, v * 2**k, seed + k) * 0.5**k for k in range(octaves))
        return total / (2 - 0.5 ** (octaves - 1))


def mix(material: Material, weight, first: int = 0, second: int = 1) -> np.ndarray:
    """Blend two colours of a material by `weight` `[N]` (0 = first): `[3, N]`."""
    a, b = (np.array(material.colors[i % len(material.colors)], np.float32)[:, None] for i in (first, second))
    return a + (b - a) * weight


def grooves(x, period: float, width: float):
    """1 in grooves of the given width [m] that repeat every `period` [m], 0 between them."""
    return (np.abs((x / period + 0.5) % 1 - 0.5) * period < width / 2).astype(np.float32)


def plain(m: Material, u, v, noise: Noise):
    """One colour with faint large stains."""
    return mix(m, 0, 0, 0) * (0.93 + 0.14 * noise.smooth(u * 2, v * 2, m.seed))


def plaster(m: Material, u, v, noise: Noise):
    """A painted wall: stains and fine grain."""
    return mix(m, 0, 0, 0) * (
        0.86 + 0.16 * noise.cloud(u * 1.5, v * 1.5, m.seed) + 0.1 * noise.smooth(u * 40, v * 40, 5)
    )


def carpet(m: Material, u, v, noise: Noise):
    """Speckle of two colours."""
    speckle = 0.65 * noise.smooth(u * 55, v * 55, m.seed) + 0.35 * noise.smooth(u * 5, v * 5, m.seed + 1)
    return mix(m, np.clip(2.2 * speckle - 0.6, 0, 1))


def stripes(m: Material, u, v, noise: Noise):
    """Bands of two colours."""
    return mix(m, ((u / m.scale) % 1 < 0.5).astype(np.float32)) * (
        0.92 + 0.16 * noise.smooth(u * 9, v * 9, m.seed)
    )


def checker(m: Material, u, v, noise: Noise):
    """A chessboard."""
    return mix(m, (np.floor(u / m.scale) + np.floor(v / m.scale)) % 2) * (
        0.9 + 0.2 * noise.cloud(u * 4, v * 4, m.seed)
    )


def tiles(m: Material, u, v, noise: Noise):
    """Tiles of slightly different shades, with grout."""
    i, j = np.floor(u / m.scale).astype(np.int32), np.floor(v / m.scale).astype(np.int32)
    shade = 0.82 + 0.26 * noise.cell(i, j, m.seed) + 0.1 * noise.cloud(u * 6, v * 6, m.seed)
    joint = np.maximum(grooves(u, m.scale, 0.02), grooves(v, m.scale, 0.02))
    return mix(m, 0, 0, 0) * shade * (1 - 0.45 * joint)


def bricks(m: Material, u, v, noise: Noise):
    """Staggered courses with mortar in the second colour."""
    course = np.floor(v / 0.08)
    along = u + 0.12 * (course % 2)
    shade = 0.7 + 0.6 * noise.cell(np.floor(along / 0.24).astype(np.int32), course.astype(np.int32), m.seed)
    joint = np.maximum(grooves(along, 0.24, 0.014), grooves(v, 0.08, 0.014))
    return mix(m, joint) * (1 - (1 - shade) * (1 - joint))


def wood(m: Material, u, v, noise: Noise):
    """Boards along u, each of its own shade, with grain."""
    board = np.floor(v / m.scale).astype(np.int32)
    grain = noise.cloud(u * 1.3 + 7 * noise.cell(board, 0 * board, m.seed), v * 28, m.seed)
    joint = grooves(v - m.scale / 2, m.scale, 0.008)
    ends = grooves(u + 9 * noise.cell(board, 0 * board + 3, m.seed), 1.6, 0.008)
    shade = 0.8 + 0.35 * noise.cell(board, 0 * board + 1, m.seed)
    return mix(m, np.clip(1.5 * grain - 0.2, 0, 1)) * shade * (1 - 0.5 * np.maximum(joint, ends))


def grain(m: Material, u, v, noise: Noise):
    """Wood without joints, for furniture."""
    return mix(m, np.clip(1.6 * noise.cloud(u * 2, v * 22, m.seed) - 0.3, 0, 1))


def books(m: Material, u, v, noise: Noise):
    """A row of book spines on a shelf of height `scale`; dark above them."""
    i = np.floor(u / 0.037 + 0.8 * noise.smooth(u * 6, 0 * u, m.seed)).astype(np.int32)
    pick = (noise.cell(i, 0 * i, m.seed) * 97).astype(np.int32) % len(m.colors)
    spine = np.array(m.colors, np.float32)[pick].T * (0.65 + 0.5 * noise.cell(i, 0 * i + 1, m.seed))
    band = np.abs(v / m.scale + 0.15 + 0.2 * noise.cell(i, 0 * i + 2, m.seed)) < 0.05
    height = (0.1 + 0.4 * noise.cell(i, 0 * i + 3, m.seed)) * m.scale
    return np.where(
        (v > height) | (noise.cell(i, 0 * i + 4, m.seed) < 0.06),
        0.02,
        np.where(band, spine * 2.2 + 0.05, spine),
    )


def painting(m: Material, u, v, noise: Noise):
    """An abstract picture of four colours."""
    field_a = noise.cloud(u / m.scale * 3, v / m.scale * 3, m.seed)
    field_b = noise.cloud(u / m.scale * 2, v / m.scale * 5, m.seed + 9)
    near = mix(m, np.clip(6 * field_a - 2.6, 0, 1))
    return np.where(field_b > 0.52, mix(m, np.clip(5 * field_a - 2, 0, 1), 2, 3), near)


def outdoors(m: Material, u, v, noise: Noise):
    """What a window shows: sky, and trees below it."""
    height = v / m.scale
    trees = height < -0.25 + 0.5 * (noise.cloud(u * 3, 0 * u, m.seed) - 0.3)
    sky = mix(m, np.clip(height + 0.5, 0, 1)) * (0.85 + 0.3 * noise.cloud(u * 1.5, v * 3, m.seed + 4))
    return np.where(trees, mix(m, noise.cloud(u * 9, v * 9, m.seed), 2, 3), sky)


def screen(m: Material, u, v, noise: Noise):
    """A monitor with a picture of blocks on it."""
    i, j = np.floor(u / m.scale * 4).astype(np.int32), np.floor(v / m.scale * 5).astype(np.int32)
    return mix(m, (noise.cell(i, j, m.seed) > 0.6).astype(np.float32))


PATTERNS: dict[str, Callable[..., np.ndarray]] = {
    f.__name__: f
    for f in (
        plain,
        plaster,
        carpet,
        stripes,
        checker,
        tiles,
        bricks,
        wood,
        grain,
        books,
        painting,
        outdoors,
        screen,
    )  # fmt: skip
}


class Palette:
    """Random materials of a kind; one object a scene, so that a room has a taste of its own.

    Args:
        rng: where the choices come from.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.hue = rng.random()
        self.wood_value = rng.uniform(0.2, 0.75)
        self.wood_hue = rng.uniform(0.04, 0.1)

    def color(self, saturation=(0.2, 0.8), value=(0.25, 0.9), hue: float | None = None) -> Color:
        """A random linear RGB colour; half of them stay near the hue of the room."""
        if hue is None:
            hue = self.hue + self.rng.normal(0, 0.06) if self.rng.random() < 0.5 else self.rng.random()
        r, g, b = colorsys.hsv_to_rgb(hue % 1, self.rng.uniform(*saturation), self.rng.uniform(*value))
        return r**2.2, g**2.2, b**2.2

    def seed(self) -> int:
        """A number for `Material.seed`."""
        return int(self.rng.integers(1000))

    def wooden(self, boards: float = 0.0) -> Material:
        """Furniture wood, or floor boards of the given width [m]."""
        value = float(np.clip(self.wood_value + self.rng.normal(0, 0.06), 0.15, 0.85))
        hue = self.wood_hue + self.rng.normal(0, 0.01)
        colors = tuple(self.color((0.35, 0.65), (value * k, value * k), hue) for k in (0.78, 1.1))
        return Material(
            "wood" if boards else "grain", colors, boards or 0.3, self.rng.uniform(0, 0.25), 0, self.seed()
        )

    def fabric(self) -> Material:
        """Cloth: plain, speckled, striped or checked."""
        pattern = self.rng.choice(["plain", "carpet", "carpet", "stripes", "checker"])
        scale = self.rng.uniform(0.08, 0.3)
        return Material(str(pattern), (self.color(), self.color()), scale, 0, 0, self.seed())

    def paint(self, saturation=(0.0, 0.7), value=(0.2, 0.95), gloss: float = 0.15) -> Material:
        """Lacquer or plastic."""
        return Material("plain", (self.color(saturation, value),), 0.3, gloss, 0, self.seed())

    def metal(self) -> Material:
        """Grey and shiny, or black."""
        return Material("plain", (self.color((0, 0.1), (0.15, 0.7)),), 0.3, 0.6, 0, self.seed())

    def body(self) -> Material:
        """What cabinets are made of."""
        return self.wooden() if self.rng.random() < 0.6 else self.paint((0, 0.35), (0.35, 0.95))

    def floor(self) -> Material:
        """Boards, tiles, carpet or a chessboard."""
        kind = self.rng.choice(["wood", "wood", "tiles", "carpet", "checker"])
        if kind == "wood":
            return self.wooden(boards=self.rng.uniform(0.07, 0.2))
        if kind == "carpet":
            base = self.color((0.05, 0.5), (0.3, 0.75))
            return Material("carpet", (base, tuple(c * 0.55 for c in base)), 0.3, 0, 0, self.seed())
        if kind == "tiles":
            return Material(
                "tiles",
                (self.color((0, 0.35), (0.4, 0.9)),),
                self.rng.uniform(0.2, 0.5),
                0.35,
                0,
                self.seed(),
            )
        light, dark = self.color((0, 0.2), (0.75, 0.95)), self.color((0, 0.5), (0.2, 0.6))
        return Material("checker", (light, dark), self.rng.uniform(0.25, 0.45), 0.3, 0, self.seed())

    def wall(self) -> Material:
        """Paint mostly; some wallpaper, brick and wood."""
        kind = self.rng.choice(["plaster", "stripes", "bricks", "wood"], p=[0.76, 0.12, 0.06, 0.06])
        base = self.color((0.0, 0.35), (0.6, 0.95))
        if kind == "stripes":
            return Material(
                "stripes",
                (base, tuple(c * 0.72 for c in base)),
                self.rng.uniform(0.12, 0.5),
                0,
                0,
                self.seed(),
            )
        if kind == "bricks":
            return Material(
                "bricks",
                (self.color((0.3, 0.65), (0.4, 0.75), 0.03), (0.45, 0.43, 0.4)),
                0.1,
                0,
                0,
                self.seed(),
            )
        if kind == "wood":
            return self.wooden(boards=0.14)
        return Material("plaster", (base,), 0.3, 0, 0, self.seed())


# ------------------------------------------------------------------------------------------------------- furniture


class Kit:
    """Collects the solids of one piece of furniture in its own frame.

    The frame: x along the wall, y away from the wall, z up; the origin is where the middle of its back meets the floor.
    """

    def __init__(self, palette: Palette):
        self.palette = palette
        self.rng = palette.rng
        self.solids: list[Solid] = []

    def uniform(self, low: float, high: float) -> float:
        """A random length [m]."""
        return float(self.rng.uniform(low, high))

    def box(self, x: tuple, y: tuple, z: tuple, material: Material, **options) -> None:
        """A box between the given bounds."""
        self._add("box", x, y, z, material, **options)

    def round(self, x: tuple, y: tuple, z: tuple, material: Material, **options) -> None:
        """An ellipsoid that fills the given bounds."""
        self._add("ellipsoid", x, y, z, material, **options)

    def column(self, x: float, y: float, z: tuple, radius: float, material: Material, **options) -> None:
        """A cylinder, or with `taper` a frustum, about a vertical axis."""
        self._add("frustum", (x - radius, x + radius), (y - radius, y + radius), z, material, **options)

    def _add(self, shape, x, y, z, material, **options):
        center = tuple((a + b) / 2 for a, b in (x, y, z))
        half = tuple(max(abs(b - a) / 2, 1e-3) for a, b in (x, y, z))
        self.solids.append(Solid(shape, center, half, material, **options))  # type: ignore[arg-type]

    def legs(self, x: tuple, y: tuple, z: tuple, material: Material, thickness: float = 0.05) -> None:
        """Four legs under a rectangle."""
        for cx in (x[0] + thickness, x[1] - thickness):
            for cy in (y[0] + thickness, y[1] - thickness):
                self.column(cx, cy, z, thickness / 2, material)

    def clutter(self, x: tuple, y: tuple, z: float, count: int) -> None:
        """Small things standing on a surface: books, bowls, bottles, boxes, balls, plants."""
        for _ in range(count):
            cx, cy = self.uniform(x[0] + 0.1, x[1] - 0.1), self.uniform(y[0] + 0.1, y[1] - 0.1)
            kind = self.rng.choice(["box", "books", "bottle", "bowl", "ball", "plant"])
            p = self.palette
            if kind == "box":
                w, d, h = (self.uniform(0.05, 0.14) for _ in range(3))
                self.box(
                    (cx - w, cx + w), (cy - d, cy + d), (z, z + 2 * h), p.paint(), yaw=self.uniform(-1, 1)
                )
            elif kind == "books":
                for level in range(int(self.rng.integers(1, 5))):
                    w, yaw = self.uniform(0.08, 0.13), self.uniform(-0.3, 0.3)
                    bottom = z + 0.035 * level
                    self.box(
                        (cx - w, cx + w), (cy - 0.1, cy + 0.1), (bottom, bottom + 0.033), p.paint(), yaw=yaw
                    )
            elif kind == "bottle":
                h, glass = self.uniform(0.14, 0.26), p.paint(gloss=0.7)
                self.column(cx, cy, (z, z + h), 0.04, glass)
                self.column(cx, cy, (z + h, z + h + 0.09), 0.018, glass)
            elif kind == "bowl":
                self.column(cx, cy, (z, z + 0.08), self.uniform(0.08, 0.12), p.paint(gloss=0.4), taper=0.4)
            elif kind == "ball":
                r = self.uniform(0.05, 0.1)
                self.round((cx - r, cx + r), (cy - r, cy + r), (z, z + 2 * r), p.paint(gloss=0.5))
            else:
                self.plant(cx, cy, z, self.uniform(0.25, 0.45))

    def plant(self, x: float, y: float, z: float, height: float) -> None:
        """A pot with leaves."""
        self.column(x, y, (z, z + 0.3 * height), 0.22 * height, self.palette.paint(), taper=0.2)
        for _ in range(4):
            leaf = Material(
                "carpet",
                (self.palette.color((0.5, 0.8), (0.3, 0.6), 0.3), self.palette.color((0.5, 0.8), (0.15, 0.3), 0.33)),
                0.1, 0, 0, self.palette.seed(),
            )  # fmt: skip
            dx, dy = self.rng.normal(0, 0.11 * height, 2)
            r, middle = self.uniform(0.14, 0.24) * height, z + self.uniform(0.42, 0.8) * height
            self.round(
                (x + dx - r, x + dx + r), (y + dy - r, y + dy + r), (middle - 1.4 * r, middle + 1.4 * r), leaf
            )


def bed(kit: Kit) -> None:
    """Frame, mattress, blanket, headboard and pillows."""
    p, w, length = kit.palette, kit.uniform(0.45, 0.9), kit.uniform(1.9, 2.1)
    frame, h = p.body(), kit.uniform(0.2, 0.35)
    kit.box((-w, w), (0.05, length), (0.08, h), frame)
    kit.box((-w, w), (0.0, 0.06), (0.0, kit.uniform(0.7, 1.1)), frame)
    kit.box((-w + 0.02, w - 0.02), (0.07, length - 0.02), (h, h + 0.2), p.paint((0, 0.1), (0.8, 0.97), 0))
    kit.box((-w, w), (kit.uniform(0.6, 0.9), length), (h - 0.05, h + 0.23), p.fabric())
    pillow = p.fabric() if kit.rng.random() < 0.5 else p.paint((0, 0.1), (0.8, 0.97), 0)
    for x in (-w / 2, w / 2) if w > 0.65 else (0.0,):
        kit.round((x - 0.32, x + 0.32), (0.1, 0.55), (h + 0.14, h + 0.34), pillow)
    if kit.rng.random() < 0.5:
        x = kit.uniform(-w / 2, w / 2)
        kit.round((x - 0.2, x + 0.2), (0.45, 0.68), (h + 0.15, h + 0.5), p.fabric())


def table(kit: Kit) -> None:
    """A table with things on it and chairs around it."""
    p, w, d, h = kit.palette, kit.uniform(0.45, 0.9), kit.uniform(0.35, 0.5), kit.uniform(0.68, 0.78)
    top, leg, middle = p.body(), p.metal() if kit.rng.random() < 0.4 else p.wooden(), 0.95
    if kit.rng.random() < 0.3:
        kit.column(0, middle, (h - 0.04, h), w * 0.8, top)
        kit.column(0, middle, (0.03, h), 0.05, leg)
        kit.column(0, middle, (0, 0.03), 0.28, leg)
    else:
        kit.box((-w, w), (middle - d, middle + d), (h - 0.04, h), top)
        kit.legs((-w, w), (middle - d, middle + d), (0, h - 0.04), leg, 0.06)
    kit.clutter((-w * 0.7, w * 0.7), (middle - d * 0.8, middle + d * 0.8), h, int(kit.rng.integers(1, 5)))
    seat, frame = p.fabric() if kit.rng.random() < 0.5 else p.body(), leg
    for side in (-1, 1):
        for x in (-w / 2, w / 2) if w > 0.65 else (0.0,):
            if kit.rng.random() < 0.75:
                chair_at(
                    kit,
                    x + kit.uniform(-0.1, 0.1),
                    middle + side * (d + kit.uniform(0.0, 0.12)),
                    side,
                    seat,
                    frame,
                )


def chair_at(kit: Kit, x: float, y: float, facing: int, seat: Material, frame: Material) -> None:
    """A chair whose back is on the side `facing` (+1 or -1) of its seat."""
    kit.box((x - 0.21, x + 0.21), (y - 0.2, y + 0.2), (0.42, 0.47), seat)
    kit.legs((x - 0.21, x + 0.21), (y - 0.2, y + 0.2), (0, 0.42), frame, 0.04)
    back = y + facing * 0.2
    kit.box((x - 0.2, x + 0.2), (back - 0.018, back + 0.018), (0.47, 0.92), seat)


def sofa(kit: Kit) -> None:
    """Base, back, arms, seat cushions and some pillows."""
    p, w, cloth = kit.palette, kit.uniform(0.45, 1.15), kit.palette.fabric()
    cushion = replace(cloth, seed=cloth.seed + 1) if kit.rng.random() < 0.6 else p.fabric()
    kit.box((-w, w), (0.05, 0.85), (0.06, 0.28), cloth)
    kit.box((-w, w), (0.02, 0.26), (0.06, kit.uniform(0.7, 0.9)), cloth)
    arm = kit.uniform(0.5, 0.62)
    for side in (-1, 1):
        kit.box((side * w, side * (w - 0.16)), (0.02, 0.88), (0.0, arm), cloth)
    seats = max(1, round((w - 0.16) / 0.34))
    edges = np.linspace(-w + 0.17, w - 0.17, seats + 1)
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        kit.box((left + 0.01, right - 0.01), (0.26, 0.9), (0.28, 0.42), cushion)
    for _ in range(int(kit.rng.integers(0, 4))):
        x = kit.uniform(-w + 0.35, w - 0.35) if w > 0.5 else 0.0
        kit.round((x - 0.2, x + 0.2), (0.24, 0.44), (0.41, 0.76), p.fabric())


def bookshelf(kit: Kit) -> None:
    """Boards with rows of books and things between them."""
    p, w, d, h = kit.palette, kit.uniform(0.3, 0.65), kit.uniform(0.26, 0.36), kit.uniform(1.0, 2.2)
    body = p.body()
    for side in (-1, 1):
        kit.box((side * w, side * (w - 0.025)), (0, d), (0, h), body)
    kit.box((-w, w), (0, 0.015), (0, h), replace(body, seed=body.seed + 1))
    levels = max(2, round(h / 0.37))
    gap = (h - 0.03) / levels
    spines = tuple(p.color((0.2, 0.9), (0.15, 0.8), float(kit.rng.random())) for _ in range(7))
    for level in range(levels + 1):
        z = 0.02 + level * gap if level < levels else h - 0.03
        kit.box((-w, w), (0, d), (z, z + 0.025), body)
        if level == levels:
            break
        fill = kit.rng.random()
        inner = w - 0.03
        if fill < 0.7:
            right = inner if fill < 0.35 else kit.uniform(-0.2 * inner, 0.9 * inner)
            row = Material("books", spines, gap - 0.03, 0.05, 0, p.seed())
            kit.box((-inner, right), (0.02, d - kit.uniform(0.03, 0.1)), (z + 0.025, z + gap - 0.02), row)
        elif fill < 0.9:
            kit.clutter((-inner, inner), (0, d), z + 0.025, 2)


def wardrobe(kit: Kit) -> None:
    """A tall cabinet with doors and handles."""
    cabinet(kit, kit.uniform(0.45, 1.1), kit.uniform(0.5, 0.62), kit.uniform(1.8, 2.25), 0.5)


def sideboard(kit: Kit) -> None:
    """A low cabinet with things on it."""
    w, d, h = kit.uniform(0.4, 0.9), kit.uniform(0.38, 0.5), kit.uniform(0.55, 0.95)
    cabinet(kit, w, d, h, 0.45)
    if kit.rng.random() < 0.4:
        television(kit, 0.0, d / 2, h, kit.uniform(0.3, min(0.6, w)))
    else:
        kit.clutter((-w, w), (0, d), h, int(kit.rng.integers(1, 5)))


def cabinet(kit: Kit, w: float, d: float, h: float, door: float) -> None:
    """A box with door panels (thin boxes with gaps between them) and handles."""
    p, body = kit.palette, kit.palette.body()
    front = body if kit.rng.random() < 0.5 else p.body()
    kit.box((-w, w), (0, d), (0.05, h), body)
    kit.box((-w + 0.03, w - 0.03), (0, d - 0.04), (0, 0.05), p.paint((0, 0.1), (0.05, 0.2), 0))
    doors, handle = max(1, round(2 * w / door)), p.metal()
    rows = 1 if h > 1.2 else int(kit.rng.integers(1, 4))
    xs, zs = np.linspace(-w, w, doors + 1), np.linspace(0.06, h - 0.03, rows + 1)
    for i in range(doors):
        for j in range(rows):
            x, z = (xs[i] + 0.008, xs[i + 1] - 0.008), (zs[j] + 0.008, zs[j + 1] - 0.008)
            kit.box(x, (d, d + 0.018), z, replace(front, seed=front.seed + i))
            side = x[1] - 0.06 if i % 2 == 0 else x[0] + 0.06
            middle = min((z[0] + z[1]) / 2, 1.1)
            kit.box(
                (side - 0.008, side + 0.008), (d + 0.018, d + 0.04), (middle - 0.06, middle + 0.06), handle
            )


def television(kit: Kit, x: float, y: float, z: float, half: float) -> None:
    """A flat screen on a foot."""
    p, height = kit.palette, half * 1.15
    black = p.paint((0, 0.1), (0.05, 0.15), 0.6)
    on = kit.rng.random() < 0.5
    picture = Material("screen", (p.color(), p.color()), half, 0.3, 0.6, p.seed()) if on else black
    kit.box((x - 0.3 * half, x + 0.3 * half), (y - 0.08, y + 0.08), (z, z + 0.02), black)
    kit.box((x - 0.04, x + 0.04), (y - 0.02, y + 0.02), (z, z + 0.1), black)
    kit.box((x - half, x + half), (y - 0.02, y + 0.02), (z + 0.07, z + 0.07 + height), black)
    kit.box((x - half + 0.02, x + half - 0.02), (y + 0.02, y + 0.024), (z + 0.09, z + 0.05 + height), picture)


def desk(kit: Kit) -> None:
    """A writing table with a monitor, a keyboard and a chair."""
    p, w, d, h = kit.palette, kit.uniform(0.5, 0.8), kit.uniform(0.55, 0.75), kit.uniform(0.7, 0.78)
    top, leg = p.body(), p.metal()
    kit.box((-w, w), (0.02, d), (h - 0.035, h), top)
    kit.legs((-w, w), (0.02, d), (0, h - 0.035), leg)
    television(kit, kit.uniform(-0.2, 0.2), 0.25, h, kit.uniform(0.2, 0.32))
    kit.box((-0.2, 0.2), (d - 0.28, d - 0.14), (h, h + 0.02), p.paint((0, 0.1), (0.1, 0.8)))
    if kit.rng.random() < 0.7:
        kit.box((w - 0.4, w - 0.02), (0.08, d - 0.08), (0.08, h - 0.05), p.body())
    kit.clutter((-w, -w * 0.4), (0.05, d), h, int(kit.rng.integers(0, 3)))
    chair_at(kit, kit.uniform(-0.3, 0.2), d + kit.uniform(0.05, 0.35), 1, p.fabric(), leg)


def counter(kit: Kit) -> None:
    """Kitchen cabinets with a worktop, and wall cabinets above."""
    p, w = kit.palette, kit.uniform(0.6, 1.4)
    cabinet(kit, w, 0.58, 0.86, 0.5)
    kit.box((-w - 0.01, w + 0.01), (0, 0.63), (0.86, 0.9), p.paint((0, 0.3), (0.2, 0.9), 0.4))
    kit.box(
        (-w, w),
        (0, 0.012),
        (0.9, 1.4),
        Material("tiles", (p.color((0, 0.5), (0.5, 0.95)),), 0.12, 0.4, 0, p.seed()),
    )
    kit.clutter((-w, w), (0.1, 0.55), 0.9, int(kit.rng.integers(2, 6)))
    if kit.rng.random() < 0.8:
        upper, body = kit.uniform(1.95, 2.2), p.body()
        kit.box((-w, w), (0, 0.33), (1.4, upper), body)
        for left, right in zip(
            *(np.linspace(-w, w, max(2, round(w / 0.22)))[k:][:99] for k in (0, 1)), strict=False
        ):
            kit.box((left + 0.006, right - 0.006), (0.33, 0.348), (1.41, upper - 0.01), body)


def floor_lamp(kit: Kit) -> None:
    """A pole with a shade that glows."""
    h, metal = kit.uniform(1.3, 1.7), kit.palette.metal()
    kit.column(0, 0.25, (0, 0.03), 0.15, metal)
    kit.column(0, 0.25, (0.03, h), 0.015, metal)
    shade = Material("plain", (kit.palette.color((0.1, 0.45), (0.85, 1.0), 0.1),), 0.3, 0, 1.2)
    kit.column(0, 0.25, (h - 0.05, h + 0.25), 0.19, shade, taper=-0.3, casts=False)


def big_plant(kit: Kit) -> None:
    """A plant that stands on the floor."""
    kit.plant(0.0, 0.32, 0.0, kit.uniform(0.8, 1.4))


def cartons(kit: Kit) -> None:
    """Boxes and balls on the floor."""
    for _ in range(int(kit.rng.integers(1, 4))):
        x, y, r = kit.uniform(-0.3, 0.3), kit.uniform(0.25, 0.6), kit.uniform(0.12, 0.24)
        if kit.rng.random() < 0.6:
            card = kit.palette.paint((0.2, 0.6), (0.4, 0.8), 0)
            kit.box(
                (x - r, x + r), (y - r, y + r), (0, kit.uniform(1.0, 2.2) * r), card, yaw=kit.uniform(-1, 1)
            )
        else:
            kit.round((x - r, x + r), (y - r, y + r), (0, 2 * r), kit.palette.fabric())


def low_table(kit: Kit) -> None:
    """A coffee table."""
    p, w, d, h = kit.palette, kit.uniform(0.35, 0.6), kit.uniform(0.25, 0.35), kit.uniform(0.35, 0.48)
    top = p.body()
    kit.box((-w, w), (0.4 - d, 0.4 + d), (h - 0.04, h), top)
    kit.legs((-w, w), (0.4 - d, 0.4 + d), (0, h - 0.04), p.metal() if kit.rng.random() < 0.5 else top)
    kit.clutter((-w * 0.8, w * 0.8), (0.4 - d * 0.8, 0.4 + d * 0.8), h, int(kit.rng.integers(0, 4)))


# Furniture by room: what stands along the walls in order of importance, and what may stand free in the middle.
ROOMS: dict[str, tuple[tuple[Callable, ...], tuple[Callable, ...]]] = {
    "bedroom": ((bed, wardrobe, sideboard, desk, floor_lamp, big_plant, bookshelf), (cartons,)),
    "living_room": (
        (sofa, sideboard, bookshelf, sofa, floor_lamp, big_plant, desk),
        (low_table, low_table, table),
    ),
    "office": (
        (desk, bookshelf, desk, sideboard, bookshelf, big_plant, cartons, floor_lamp),
        (table, cartons),
    ),
    "kitchen": ((counter, counter, sideboard, bookshelf, big_plant, cartons), (table,)),
    "dining_room": ((sideboard, bookshelf, sofa, floor_lamp, big_plant, wardrobe), (table, table)),
    "playroom": ((bookshelf, bed, cartons, wardrobe, cartons, sofa, desk), (cartons, low_table, cartons)),
}


# ----------------------------------------------------------------------------------------------------------- rooms


@dataclass(frozen=True)
class Light:
    """A lamp, or the sun behind a window.

    Args:
        position: `[3]` [m].
        color: linear RGB.
        radius: how far the lamp reaches around its position [m]; makes the edges of shadows soft.
        reach: distance at which the light has fallen to a half [m]; inf for the sun.
        window: for the sun, the opening it comes through: axis of the wall's normal, its coordinate, and the lower and
            upper corner of the opening in the two other axes.
    """

    position: np.ndarray
    color: Color
    radius: float = 0.1
    reach: float = 2.5
    window: tuple[int, float, tuple[float, float], tuple[float, float]] | None = None


@dataclass(frozen=True)
class Room:
    """A furnished room with its lights.

    Args:
        size: extents along x, y and z [m]; the room fills [0, size].
        solids: what stands in it.
        surfaces: materials of the walls x = 0, x = max, y = 0, y = max, of the floor and of the ceiling.
        lights: lamps and suns.
        ambient: light from everywhere, linear RGB.
        footprints: rectangles (x0, x1, y0, y1) that furniture covers on the floor.
    """

    size: tuple[float, float, float]
    solids: tuple[Solid, ...] = ()
    surfaces: tuple[Material, ...] = (Material(),) * 6
    lights: tuple[Light, ...] = ()
    ambient: Color = (0.5, 0.5, 0.5)
    footprints: tuple[tuple[float, float, float, float], ...] = ()


def furnish(kind: str, rng: np.random.Generator) -> Room:
    """Build a random room of a kind (a key of `ROOMS`)."""
    return Builder(kind, rng).build()


class Builder:
    """Places things in a room so that they do not stand in each other, in the doors or before the windows.

    Args:
        kind: a key of `ROOMS`.
        rng: where all choices come from.
    """

    def __init__(self, kind: str, rng: np.random.Generator):
        self.kind, self.rng, self.palette = kind, rng, Palette(rng)
        self.size = (
            float(rng.uniform(2.9, 7.2)),
            float(rng.uniform(2.7, 5.4)),
            float(rng.uniform(2.35, 3.0)),
        )
        if rng.random() < 0.5:
            self.size = (self.size[1], self.size[0], self.size[2])
        self.solids: list[Solid] = []
        self.lights: list[Light] = []
        self.footprints: list[tuple[float, float, float, float]] = []
        self.on_wall: list[
            tuple[int, float, float, float, float]
        ] = []  # wall, along from, to, height from, to

    def build(self) -> Room:
        """The furnished room."""
        rng, palette = self.rng, self.palette
        accent, wall = palette.wall(), palette.wall()
        walls = [wall if rng.random() < 0.8 else accent for _ in range(4)]
        ceiling = Material("plaster", (palette.color((0, 0.06), (0.85, 0.97)),), 0.3, 0, 0, 3)
        floor = palette.floor()
        self.skirting()
        self.door(int(rng.integers(4)))
        for _ in range(int(rng.integers(1, 4))):
            self.window(int(rng.integers(4)))
        along, free = ROOMS[self.kind]
        for make in along[: int(rng.integers(3, len(along) + 1))]:
            self.against_wall(make)
        for make in free[: int(rng.integers(0, len(free) + 1))]:
            self.in_the_middle(make)
        self.rug()
        for _ in range(int(rng.integers(1, 5))):
            self.picture(int(rng.integers(4)))
        self.lamps()
        level = rng.uniform(0.25, 0.5)
        tint = np.clip(1 + rng.normal(0, 0.05, 3), 0.8, 1.2) * level
        surfaces = (walls[3], walls[1], walls[0], walls[2], floor, ceiling)
        return Room(
            self.size, tuple(self.solids), surfaces, tuple(self.lights), tuple(tint), tuple(self.footprints)
        )  # fmt: skip

    def length(self, wall: int) -> float:
        """Length of a wall [m]. Walls 0 to 3: y = 0, x = max, y = max, x = 0."""
        return self.size[wall % 2]

    def at_wall(self, wall: int, along: float) -> tuple[float, float, float]:
        """`(x, y, yaw)` of a frame at a wall whose x runs along the wall and whose y points into the room."""
        x, y, _ = self.size
        origin = ((along, 0.0), (x, along), (x - along, y), (0.0, y - along))[wall]
        return *origin, wall * math.pi / 2

    def add(self, kit: Kit, x: float, y: float, yaw: float) -> None:
        """Put the solids of a piece into the room."""
        c, s = math.cos(yaw), math.sin(yaw)
        for solid in kit.solids:
            lx, ly, lz = solid.center
            center = (x + c * lx - s * ly, y + s * lx + c * ly, lz)
            self.solids.append(replace(solid, center=center, yaw=solid.yaw + yaw))

    def skirting(self) -> None:
        """Boards along the foot of the walls."""
        if self.rng.random() < 0.25:
            return
        board = (
            self.palette.wooden() if self.rng.random() < 0.4 else self.palette.paint((0, 0.1), (0.7, 0.95))
        )
        height = float(self.rng.uniform(0.06, 0.14))
        for wall in range(4):
            kit = Kit(self.palette)
            half = self.length(wall) / 2
            kit.box((-half, half), (0, 0.012), (0, height), board, casts=False)
            self.add(kit, *self.at_wall(wall, half))

    def free_on_wall(
        self, wall: int, low: float, high: float, bottom: float, top: float, gap: float = 0.08
    ) -> bool:
        """Whether a rectangle of a wall is still empty."""
        return 0.05 < low and high < self.length(wall) - 0.05 and not any(
            w == wall and low < b + gap and a - gap < high and bottom < t + gap and s - gap < top
            for w, a, b, s, t in self.on_wall
        )  # fmt: skip

    def door(self, wall: int) -> None:
        """A door leaf in its frame; its floor space stays empty."""
        kit, w, h = Kit(self.palette), 0.42, 2.02
        along = kit.uniform(0.6, self.length(wall) - 0.6)
        frame, leaf = self.palette.body(), self.palette.body()
        kit.box((-w, w), (0, 0.015), (0, h), leaf)
        for side in (-1, 1):
            kit.box((side * w, side * (w + 0.07)), (0, 0.04), (0, h + 0.07), frame)
            if self.rng.random() < 0.7:
                kit.box((side * 0.08, side * (w - 0.1)), (0.015, 0.024), (1.1, h - 0.15), leaf)
                kit.box((side * 0.08, side * (w - 0.1)), (0.015, 0.024), (0.2, 0.95), leaf)
        kit.box((-w - 0.07, w + 0.07), (0, 0.04), (h, h + 0.07), frame)
        kit.round((w - 0.09, w - 0.03), (0.03, 0.09), (1.0, 1.06), self.palette.metal())
        x, y, yaw = self.at_wall(wall, along)
        self.add(kit, x, y, yaw)
        self.on_wall.append((wall, along - 0.5, along + 0.5, 0, 2.1))
        self.footprints.append(self.footprint(-0.45, 0.45, 0.0, 0.7, x, y, yaw))

    def window(self, wall: int) -> None:
        """A window with frame, sill and perhaps curtains; daylight or sun comes through it."""
        kit, rng = Kit(self.palette), self.rng
        w, bottom, top = kit.uniform(0.4, 0.9), kit.uniform(0.75, 1.0), kit.uniform(1.85, 2.15)
        if self.length(wall) < 2 * w + 0.8:
            return
        along = kit.uniform(w + 0.3, self.length(wall) - w - 0.3)
        if not self.free_on_wall(wall, along - w - 0.25, along + w + 0.25, bottom, top + 0.1):
            return
        day = rng.random() < 0.8
        sky = ((0.75, 0.85, 1.0), (0.25, 0.5, 1.0), (0.05, 0.13, 0.03), (0.2, 0.3, 0.08))
        night = ((0.02, 0.025, 0.06), (0.005, 0.005, 0.02), (0.003, 0.004, 0.004), (0.01, 0.012, 0.01))
        view = Material(
            "outdoors", sky if day else night, top - bottom, 0.2, 1.8 if day else 0.4, self.palette.seed()
        )
        frame = self.palette.paint((0, 0.15), (0.75, 0.95)) if rng.random() < 0.7 else self.palette.wooden()
        kit.box((-w, w), (0, 0.01), (bottom, top), view, casts=False)
        for x in np.linspace(-w, w, int(rng.integers(2, 4))):
            kit.box((x - 0.03, x + 0.03), (0, 0.05), (bottom, top), frame)
        for z in (bottom, top, *((bottom + 0.65 * (top - bottom),) if rng.random() < 0.5 else ())):
            kit.box((-w - 0.03, w + 0.03), (0, 0.05), (z - 0.03, z + 0.03), frame)
        kit.box((-w - 0.08, w + 0.08), (0, 0.16), (bottom - 0.05, bottom - 0.02), frame)
        if rng.random() < 0.45:
            cloth = self.palette.fabric()
            for side in (-1, 1):
                for fold in range(4):
                    x = side * (w + 0.2 - 0.09 * fold)
                    kit.column(x, 0.1, (0.05 if w > 0.6 else bottom - 0.2, top + 0.12), 0.055, cloth)
            kit.box((-w - 0.3, w + 0.3), (0.085, 0.115), (top + 0.12, top + 0.15), self.palette.metal())
        x, y, yaw = self.at_wall(wall, along)
        self.add(kit, x, y, yaw)
        self.on_wall.append((wall, along - w - 0.1, along + w + 0.1, bottom - 0.1, top + 0.1))
        if day and len(self.lights) < 2:
            self.daylight(wall, along, w, bottom, top)

    def daylight(self, wall: int, along: float, w: float, bottom: float, top: float) -> None:
        """Sky light from a window, or a sun that draws its patch on the floor."""
        x, y, yaw = self.at_wall(wall, along)
        inward = np.array([-math.sin(yaw), math.cos(yaw), 0.0])
        center = np.array([x, y, (bottom + top) / 2])
        if self.rng.random() < 0.5:
            turn = yaw + math.pi / 2 + self.rng.uniform(-0.8, 0.8)
            drop = self.rng.uniform(0.45, 1.0)
            beam = np.array(
                [math.cos(turn) * math.cos(drop), math.sin(turn) * math.cos(drop), -math.sin(drop)]
            )
            axis = 1 if wall % 2 == 0 else 0
            middle = center[1 - axis]
            opening = (axis, float(center[axis]), (middle - w, bottom), (middle + w, top))
            self.lights.append(Light(center - 40 * beam, (2.6, 2.3, 1.8), 0.35, math.inf, opening))
        sky = np.array([0.75, 0.9, 1.1]) * self.rng.uniform(0.6, 1.2)
        self.lights.append(Light(center + 0.25 * inward, tuple(sky), 0.3, 2.5))

    def footprint(self, x0, x1, y0, y1, x, y, yaw) -> tuple[float, float, float, float]:
        """Bounds on the floor of a rectangle that is turned and shifted."""
        c, s = math.cos(yaw), math.sin(yaw)
        xs = [x + c * a - s * b for a in (x0, x1) for b in (y0, y1)]
        ys = [y + s * a + c * b for a in (x0, x1) for b in (y0, y1)]
        return min(xs), max(xs), min(ys), max(ys)

    def fits(self, box: tuple[float, float, float, float], gap: float = 0.05) -> bool:
        """Whether a floor rectangle lies in the room and covers no other."""
        x0, x1, y0, y1 = box
        return x0 > -0.01 and y0 > -0.01 and x1 < self.size[0] + 0.01 and y1 < self.size[1] + 0.01 and not any(
            x0 < b + gap and a - gap < x1 and y0 < d + gap and c - gap < y1 for a, b, c, d in self.footprints
        )  # fmt: skip

    def against_wall(self, make: Callable[[Kit], None]) -> None:
        """Try to find a place at a wall for a piece of furniture."""
        kit = Kit(self.palette)
        make(kit)
        x0, x1, y0, y1, height = extent(kit.solids)
        if height > self.size[2] - 0.05:
            return
        for _ in range(12):
            wall = int(self.rng.integers(4))
            room = self.length(wall) - (x1 - x0)
            if room < 0.1:
                continue
            along = float(self.rng.uniform(0.05, room - 0.05)) - x0
            x, y, yaw = self.at_wall(wall, along)
            box = self.footprint(x0, x1, 0.0, y1, x, y, yaw)
            if self.fits(box) and self.free_on_wall(wall, along + x0, along + x1, 0, height, 0.0):
                self.add(kit, x, y, yaw)
                self.footprints.append(box)
                self.on_wall.append((wall, along + x0, along + x1, 0, height))
                return

    def in_the_middle(self, make: Callable[[Kit], None]) -> None:
        """Try to find a place away from the walls, at any angle."""
        kit = Kit(self.palette)
        make(kit)
        x0, x1, y0, y1, _ = extent(kit.solids)
        for _ in range(12):
            x, y = (float(self.rng.uniform(0.2, self.size[i] - 0.2)) for i in range(2))
            yaw = float(self.rng.uniform(0, 2 * math.pi))
            box = self.footprint(x0, x1, y0, y1, x, y, yaw)
            if self.fits(box, 0.1):
                self.add(kit, x, y, yaw)
                self.footprints.append(box)
                return

    def rug(self) -> None:
        """A carpet on the floor."""
        if self.rng.random() < 0.5:
            return
        kit = Kit(self.palette)
        x, y, w, d = (kit.uniform(a, b) for a, b in ((0.35, 0.65), (0.35, 0.65), (0.6, 1.3), (0.5, 1.0)))
        cloth = Material(
            str(self.rng.choice(["carpet", "stripes", "checker", "painting"])),
            tuple(self.palette.color() for _ in range(4)), kit.uniform(0.15, 0.5), 0, 0, self.palette.seed(),
        )  # fmt: skip
        if self.rng.random() < 0.3:
            kit.column(0, 0, (0, 0.012), w, cloth, casts=False)
        else:
            kit.box((-w, w), (-d, d), (0, 0.012), cloth, casts=False)
        self.add(kit, x * self.size[0], y * self.size[1], float(self.rng.normal(0, 0.3)))

    def picture(self, wall: int) -> None:
        """A framed picture, a mirror-like panel or a wall shelf, where the wall is empty."""
        kit, rng = Kit(self.palette), self.rng
        w, h, middle = kit.uniform(0.18, 0.55), kit.uniform(0.15, 0.4), kit.uniform(1.45, 1.75)
        if self.length(wall) < 2 * w + 0.4:
            return
        along = kit.uniform(w + 0.1, self.length(wall) - w - 0.1)
        if not self.free_on_wall(wall, along - w, along + w, middle - h, middle + h):
            return
        if rng.random() < 0.75:
            art = Material(
                "painting", tuple(self.palette.color((0.1, 0.9), (0.1, 0.95)) for _ in range(4)), 2 * h, 0.1, 0,
                self.palette.seed(),
            )  # fmt: skip
            kit.box((-w, w), (0, 0.03), (middle - h, middle + h), self.palette.body())
            kit.box((-w + 0.04, w - 0.04), (0.03, 0.034), (middle - h + 0.04, middle + h - 0.04), art)
        else:
            kit.box((-w, w), (0, 0.22), (middle - 0.012, middle + 0.012), self.palette.body())
            kit.clutter((-w, w), (0.0, 0.22), middle + 0.012, 2)
        self.add(kit, *self.at_wall(wall, along))
        self.on_wall.append((wall, along - w, along + w, middle - h, middle + h))

    def lamps(self) -> None:
        """A ceiling lamp, and light in the shades of floor lamps."""
        kit, rng = Kit(self.palette), self.rng
        warm = np.array([1.15, 1.0, 0.75]) if rng.random() < 0.6 else np.array([0.95, 1.0, 1.05])
        shades = [s for s in self.solids if s.material.glow == 1.2 and s.shape == "frustum"]
        for shade in shades[:1]:
            self.lights.append(Light(np.array(shade.center), tuple(warm * rng.uniform(0.5, 1.0)), 0.08, 1.6))
        if self.lights and rng.random() < 0.3:
            return
        x, y, top = (
            self.size[0] * rng.uniform(0.35, 0.65),
            self.size[1] * rng.uniform(0.35, 0.65),
            self.size[2],
        )
        drop = float(rng.uniform(0.05, 0.5)) if top > 2.5 else 0.05
        glow = Material("plain", ((1.0, 0.93, 0.8),), 0.3, 0, 1.4)
        if drop > 0.15:
            kit.column(0, 0, (top - drop, top), 0.008, self.palette.metal(), casts=False)
        if rng.random() < 0.5:
            kit.round((-0.14, 0.14), (-0.14, 0.14), (top - drop - 0.14, top - drop + 0.14), glow, casts=False)
        else:
            kit.column(0, 0, (top - drop - 0.08, top - drop + 0.05), 0.2, glow, taper=-0.25, casts=False)
        self.add(kit, x, y, 0.0)
        color = warm * rng.uniform(0.8, 1.5)
        self.lights.append(Light(np.array([x, y, top - drop - 0.1]), tuple(color), 0.12, 2.8))


def extent(solids: list[Solid]) -> tuple[float, float, float, float, float]:
    """Bounds `(x0, x1, y0, y1)` on the floor and height of the solids of a piece; turned parts get their circle."""

    def reach(solid: Solid) -> tuple[float, float]:
        diagonal = math.hypot(solid.half[0], solid.half[1])
        return (diagonal, diagonal) if solid.yaw else (solid.half[0], solid.half[1])

    xs = [solid.center[0] + sign * reach(solid)[0] for solid in solids for sign in (-1, 1)]
    ys = [solid.center[1] + sign * reach(solid)[1] for solid in solids for sign in (-1, 1)]
    return min(xs), max(xs), min(ys), max(ys), max(solid.center[2] + solid.half[2] for solid in solids)


# ------------------------------------------------------------------------------------------------------- rendering


def cast(room: Room, camera: Camera, size: tuple[int, int], samples: int = 1, dtype=np.float64):
    """Follow the rays of a camera to the first surface.

    Args:
        size: (H, W) of the image; `samples` x `samples` rays a pixel.

    Returns:
        z-depth `[H * samples, W * samples]` [m] and what was hit: 0 to 5 for `Room.surfaces`, 6 + i for `solids[i]`.
    """
    rays = camera.rays(size, samples, dtype)
    origin = camera.position.astype(dtype)
    depth = np.full(rays.shape[1:], np.inf, dtype)
    hit = np.zeros(rays.shape[1:], np.int16)
    for axis in range(
        3
    ):  # the camera is inside the room: a ray leaves it through the nearest wall that it runs towards
        ahead = rays[axis] > 0
        slope = np.where(np.abs(rays[axis]) < 1e-9, 1e-9, rays[axis])
        t = np.where(ahead, room.size[axis] - origin[axis], -origin[axis]).astype(dtype) / slope
        nearer = (t > 0) & (t < depth)
        depth, hit = np.where(nearer, t, depth), np.where(nearer, 2 * axis + ahead, hit)
    fx, fy, cx, cy = intrinsics(size)
    for index, solid in enumerate(room.solids):
        window = screen_bounds(solid, camera, size, (fx, fy, cx, cy))
        if window is None:
            continue
        rows, columns = (slice(low * samples, high * samples) for low, high in window)
        t = solid.hit(origin, rays[:, rows, columns])
        nearer = t < depth[rows, columns]
        depth[rows, columns][nearer] = t[nearer]
        hit[rows, columns][nearer] = 6 + index
    return depth, hit


def screen_bounds(
    solid: Solid, camera: Camera, size: tuple[int, int], lens: tuple[float, float, float, float]
):
    """Rows and columns, as two (from, to), of the image that a solid can cover; None when it is out of sight."""
    widest = 1 + abs(solid.taper)
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * solid.half
    corners[:, :2] *= widest
    c, s = math.cos(solid.yaw), math.sin(solid.yaw)
    world = np.stack(
        [c * corners[:, 0] - s * corners[:, 1], s * corners[:, 0] + c * corners[:, 1], corners[:, 2]], 1
    )
    x, y, z = camera.rotation.T @ (world + np.array(solid.center) - camera.position).T
    if (z < 0.02).all():
        return None
    if (z < 0.02).any():
        return (0, size[0]), (0, size[1])
    fx, fy, cx, cy = lens
    u, v = fx * x / z + cx, fy * y / z + cy
    columns = max(0, math.floor(u.min()) - 1), min(size[1], math.ceil(u.max()) + 2)
    rows = max(0, math.floor(v.min()) - 1), min(size[0], math.ceil(v.max()) + 2)
    return None if columns[0] >= columns[1] or rows[0] >= rows[1] else (rows, columns)


def render_depth(room: Room, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Exact z-depth `[H, W]` [m] at the pixel centres."""
    return cast(room, camera, size)[0]


def render_image(room: Room, camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A photo of the room, uint8 `[H, W, 3]`, with four samples a pixel; exposure, tint and noise are drawn from `rng`."""
    samples = 2
    noise = Noise(np.random.default_rng(20))
    rays = camera.rays(size, samples, np.float32)
    depth, hit = (a.ravel() for a in cast(room, camera, size, samples, np.float32))
    points = (rays.reshape(3, -1) * depth + camera.position.astype(np.float32)[:, None]).astype(np.float32)
    albedo, normals = np.empty_like(points), np.empty_like(points)
    gloss, glow = np.zeros_like(depth), np.zeros_like(depth)
    order = np.argsort(hit, kind="stable")
    for chunk in np.split(order, np.flatnonzero(np.diff(hit[order])) + 1):
        number, p = int(hit[chunk[0]]), points[:, chunk]
        if number < 6:
            axis = number // 2
            normal = np.zeros_like(p)
            normal[axis] = -1 if number % 2 else 1
            # Boards and stripes run along the room's first axis on the floor, upright patterns stay upright on walls.
            uv = p[[0, 1]] if axis == 2 else p[[1 - axis, 2]]
            material = room.surfaces[number]
        else:
            solid = room.solids[number - 6]
            normal, uv = solid.surface(p)
            material = solid.material
        albedo[:, chunk] = PATTERNS[material.pattern](material, uv[0], uv[1], noise)
        normals[:, chunk] = normal
        gloss[chunk], glow[chunk] = material.gloss, material.glow
    light = illuminate(room, points, normals, gloss, rays.reshape(3, -1), size, samples, albedo)
    radiance = light + albedo * glow
    radiance = radiance.reshape(3, size[0], samples, size[1], samples).mean((2, 4))
    return develop(radiance, rng)


def illuminate(room: Room, points, normals, gloss, view, size, samples, albedo) -> np.ndarray:
    """Light that surfaces send to the camera, `[3, N]`: ambient with dark corners, lamps with shadows, highlights."""
    ambient = np.ones(points.shape[1], np.float32)
    for axis in range(3):
        beside = 1 - np.abs(normals[axis])
        for distance in (points[axis], room.size[axis] - points[axis]):
            ambient *= 1 - 0.32 * beside * np.exp(-np.maximum(distance, 0) / 0.25)
    on_floor = np.flatnonzero((points[2] < 0.02) & (normals[2] > 0.9))
    for x0, x1, y0, y1 in room.footprints:
        x, y = points[0, on_floor], points[1, on_floor]
        away = np.hypot(np.maximum(np.maximum(x0 - x, x - x1), 0), np.maximum(np.maximum(y0 - y, y - y1), 0))
        ambient[on_floor] *= 1 - 0.3 * np.exp(-away / 0.15)
    ambient *= 0.85 + 0.15 * normals[2]
    total = albedo * ambient * np.array(room.ambient, np.float32)[:, None]
    # Each of the samples of a pixel sees the lamp at another place: the mean over them has a soft shadow.
    rows, columns = np.meshgrid(np.arange(size[0] * samples), np.arange(size[1] * samples), indexing="ij")
    corner = ((rows % samples) * samples + columns % samples).ravel()
    offsets = np.array([[1, 0, 0.4], [0, 1, -0.4], [0, -1, 0.4], [-1, 0, -0.4]], np.float32).T
    origin = points + 2e-3 * normals
    for light in room.lights:
        to_light = light.position.astype(np.float32)[:, None] + light.radius * offsets[:, corner] - origin
        distance = np.sqrt((to_light**2).sum(0))
        cosine = (to_light * normals).sum(0) / distance
        lit = cosine > 0
        if light.window is not None:
            axis, wall, low, high = light.window
            t = (wall - origin[axis]) / np.where(np.abs(to_light[axis]) < 1e-6, 1e-6, to_light[axis])
            side, height = origin[1 - axis] + t * to_light[1 - axis], origin[2] + t * to_light[2]
            lit &= (t > 0) & (side > low[0]) & (side < high[0]) & (height > low[1]) & (height < high[1])
        chosen = np.flatnonzero(lit)
        chosen = chosen[~shadowed(room, light, origin[:, chosen], to_light[:, chosen])]
        strength = cosine[chosen] * (
            1 if math.isinf(light.reach) else 1 / (1 + (distance[chosen] / light.reach) ** 2)
        )
        toward, look = to_light[:, chosen] / distance[chosen], view[:, chosen]
        half = toward - look / np.sqrt((look**2).sum(0))
        shine = np.maximum((half * normals[:, chosen]).sum(0) / np.sqrt((half**2).sum(0)), 0) ** 40
        color = np.array(light.color, np.float32)[:, None]
        total[:, chosen] += color * (
            albedo[:, chosen] * strength + gloss[chosen] * shine * (strength > 0) * 0.6
        )
    return total


def shadowed(room: Room, light: Light, origin: np.ndarray, to_light: np.ndarray) -> np.ndarray:
    """Whether a solid stands between points `[3, N]` and the light; `to_light` reaches to it at parameter 1."""
    dark = np.zeros(origin.shape[1], bool)
    toward = -to_light / np.sqrt((to_light**2).sum(0))  # from the light to the point
    distance = np.sqrt((to_light**2).sum(0))
    for solid in room.solids:
        if not solid.casts:
            continue
        # Only points in the cone that the solid's bounding sphere cuts out of the light, and behind its near side.
        offset = np.array(solid.center) - light.position
        away = float(np.sqrt((offset**2).sum()))
        radius = math.hypot(
            solid.half[0] * (1 + abs(solid.taper)), solid.half[1] * (1 + abs(solid.taper)), solid.half[2]
        )
        radius += light.radius
        candidates = ~dark & (distance > away - radius)
        if away > radius:
            bound = math.sqrt(1 - (radius / away) ** 2)
            candidates &= sum(toward[i] * np.float32(offset[i] / away) for i in range(3)) > bound
        index = np.flatnonzero(candidates)
        if index.size:
            t = solid.hit(origin[:, index], to_light[:, index])
            dark[index[t < 0.999]] = True
    return dark


def develop(radiance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera makes of radiance `[3, H, W]`: exposure, tint, vignette, tone curve and noise. uint8 `[H, W, 3]`."""
    _, h, w = radiance.shape
    exposure = rng.uniform(0.28, 0.5) / max(float(np.median(radiance.mean(0))), 0.02)
    tint = np.clip(rng.normal(1, 0.05, (3, 1, 1)), 0.85, 1.15)
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    vignette = 1 - rng.uniform(0.0, 0.2) * (x * x + y * y) / 2
    image = 1 - np.exp(-1.2 * radiance * exposure * tint * vignette)
    image = np.clip(image, 0, 1) ** (1 / 2.2)
    image += rng.normal(0, 1, image.shape) * rng.uniform(0.004, 0.018) * (1.3 - 0.6 * image)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0).copy()


def place_camera(room: Room, rng: np.random.Generator) -> Camera:
    """A view at eye height, hand-held, that is not blocked: the best of some random ones, judged on a few rays."""
    best, best_score = None, -math.inf
    for _ in range(12):
        position = np.array(
            [rng.uniform(0.25, room.size[i] - 0.25) for i in range(2)] + [rng.uniform(1.1, 1.75)]
        )
        target = [rng.uniform(0.1, 0.9) * room.size[i] for i in range(2)]
        yaw = math.atan2(target[1] - position[1], target[0] - position[0])
        camera = Camera.looking(position, yaw, rng.normal(-0.16, 0.12), rng.normal(0, 0.035))
        if any(inside(solid, position, 0.25) for solid in room.solids):
            continue
        depth, hit = cast(room, camera, (12, 16))
        near, middle = float(np.quantile(depth, 0.05)), float(np.median(depth))
        score = min(near, 1.0) + min(middle, 2.5) + 0.12 * min(len(np.unique(hit)), 14) + rng.uniform(0, 0.8)
        if near > 0.5 and score > best_score:
            best, best_score = camera, score
    if best is None:  # a crammed room: look along it from the middle, under the ceiling
        position = np.array([room.size[0] / 2, room.size[1] / 2, room.size[2] - 0.3])
        best = Camera.looking(position, rng.uniform(0, 2 * math.pi), -0.5)
    return best


def inside(solid: Solid, point: np.ndarray, margin: float) -> bool:
    """Whether a point is inside the bounding box of a solid, grown by a margin [m]."""
    local = solid.local(point, True)
    grown = (1 + abs(solid.taper), 1 + abs(solid.taper), 1.0)
    return all(abs(float(x)) < g + margin / h for x, g, h in zip(local, grown, solid.half, strict=True))


# ----------------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class Settings:
    """What decides the files, apart from the code.

    Args:
        scenes: scenes with depth.
        views: images of each of them.
        unlabeled: images without depth, of further scenes (`views` images of each).
        size: (H, W) of the images.
        seed: another seed, another world.
        test_share: share of the scenes in test.txt.
    """

    scenes: int = 60
    views: int = 5
    unlabeled: int = 300
    size: tuple[int, int] = (120, 160)
    seed: int = 0
    test_share: float = 0.25

    def __post_init__(self):
        if self.scenes < 2 or self.views < 1 or self.unlabeled < 0:
            raise ValueError(
                "at least 2 scenes (one to train, one to test) of 1 view are needed, and unlabeled >= 0"
            )
        if self.scenes > 9999 or self.views > 9999:
            raise ValueError("scenes and views are numbered with four digits: at most 9999 of each")
        if min(self.size) < 16:
            raise ValueError(
                f"size {self.size[0]} {self.size[1]} is too small to show a room: at least 16 pixels a side"
            )
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share is a share of the scenes, between 0 and 1, not {self.test_share}")

    @property
    def test_scenes(self) -> int:
        """How many of the scenes are for testing: at least one, and at least one is left for training."""
        return min(max(1, round(self.scenes * self.test_share)), self.scenes - 1)

    def scene_name(self, index: int) -> str:
        """Folder of a scene with depth; the last `test_scenes` are the test scenes."""
        return f"{list(ROOMS)[index % len(ROOMS)]}_{index:04d}"

    def is_test(self, index: int) -> bool:
        """Spread evenly, so that both lists hold every kind of room when there are enough scenes."""
        return (index + 1) * self.test_scenes // self.scenes > index * self.test_scenes // self.scenes


@dataclass(frozen=True)
class Task:
    """One scene to render: `labeled` with depth and `index` the scene's number, or images only."""

    settings: Settings
    output: str
    labeled: bool
    index: int


def render_scene(task: Task) -> int:
    """Render and write the views of one scene; returns how many. Runs in a worker process."""
    settings, output = task.settings, Path(task.output)
    stream = (settings.seed, int(task.labeled), task.index)
    kind = list(ROOMS)[task.index % len(ROOMS)]
    room = furnish(kind, np.random.default_rng((*stream, 0)))
    views = (
        settings.views
        if task.labeled
        else min(settings.views, settings.unlabeled - task.index * settings.views)
    )
    for view in range(views):
        rng = np.random.default_rng((*stream, 1 + view))
        camera = place_camera(room, rng)
        image = Image.fromarray(render_image(room, camera, settings.size, rng))
        if not task.labeled:
            image.save(
                output / "unlabeled" / f"room_{task.index * settings.views + view:05d}.jpg", quality=92
            )
            continue
        folder = output / settings.scene_name(task.index)
        image.save(folder / f"rgb_{view:04d}.jpg", quality=92)
        depth = render_depth(room, camera, settings.size)
        write_depth(folder / f"sync_depth_{view:04d}.png", depth)
    return views


def write_depth(path: Path, depth: np.ndarray) -> None:
    """Write depth [m] as a 16-bit PNG in millimetres, as NYU's "sync" layout has it."""
    if not cv2.imwrite(str(path), np.round(depth * 1000).astype(np.uint16)):
        raise OSError(f"could not write {path}: is the disk full or the folder read-only?")


def claim_folder(output: Path, settings: Settings) -> bool:
    """Make the output folder ours; True when it already holds exactly these rooms, whole.

    Raises:
        ValueError: the folder holds something else; nothing in it is touched.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: --output is a folder")
    card = output / "rooms.json"
    if output.is_dir() and any(output.iterdir()):
        try:
            found = json.loads(card.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, TypeError, KeyError):
            raise ValueError(
                f"{output} is not empty and was not made by this tool: choose another --output, or empty it yourself"
            ) from None
        if found != describe(settings)["settings"]:
            raise ValueError(
                f"{output} holds rooms of other settings ({found}): choose another --output, or delete that folder"
            )
        return (output / "train.txt").is_file() and (output / "test.txt").is_file()
    output.mkdir(parents=True, exist_ok=True)
    card.write_text(json.dumps(describe(settings), indent=2) + "\n", encoding="utf-8")
    return False


def describe(settings: Settings) -> dict:
    """What rooms.json says."""
    fx, fy, cx, cy = intrinsics(settings.size)
    by_split = {
        name: [settings.scene_name(i) for i in range(settings.scenes) if settings.is_test(i) == test]
        for name, test in (("train", False), ("test", True))
    }
    return {
        "made_by": "tools/render_rooms.py",
        "settings": {"generator": GENERATOR, **asdict(settings), "size": list(settings.size)},
        "intrinsics": {"fx": fx, "fy": fy, "cx": cx, "cy": cy},
        "depth": "z-depth at pixel centres, 16-bit PNG, millimetres",
        "scenes": by_split,
    }


def write_lists(output: Path, settings: Settings) -> None:
    """Write train.txt and test.txt; they come last, so a folder that has them is whole."""
    focal = intrinsics(settings.size)[0]
    for name, test in (("train", False), ("test", True)):
        lines = [
            f"/{scene}/rgb_{view:04d}.jpg /{scene}/sync_depth_{view:04d}.png {focal:.4f}\n"
            for index in range(settings.scenes)
            if settings.is_test(index) == test
            for scene in (settings.scene_name(index),)
            for view in range(settings.views)
        ]
        partial = output / f".{name}.txt.part"
        partial.write_text("".join(lines), encoding="utf-8")
        os.replace(partial, output / f"{name}.txt")


def render(output: str | Path, settings: Settings, workers: int | None = None, show: bool = True) -> dict:
    """Render the whole world into a folder.

    A folder that already holds these rooms is left as it is; one that was interrupted is rendered again.

    Args:
        output: new or empty folder, or one that this function made from the same settings.
        settings: what to render.
        workers: processes; None takes one for each core this process may use.
        show: print progress.

    Returns:
        The contents of rooms.json.

    Raises:
        ValueError: the folder holds something else, or the settings make no sense.
    """
    output = Path(output)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    if claim_folder(output, settings):
        if show:
            print(f"{output} already holds these rooms: nothing to do")
        return describe(settings)
    (output / "unlabeled").mkdir(exist_ok=True)
    for index in range(settings.scenes):
        (output / settings.scene_name(index)).mkdir(exist_ok=True)
    extra = math.ceil(settings.unlabeled / settings.views)
    tasks = [Task(settings, str(output), True, i) for i in range(settings.scenes)]
    tasks += [Task(settings, str(output), False, i) for i in range(extra)]
    total = settings.scenes * settings.views + settings.unlabeled
    start = time.monotonic()
    if workers == 1:
        report_progress(map(render_scene, tasks), total, start, show)
    else:
        with ProcessPoolExecutor(workers) as pool:
            report_progress(pool.map(render_scene, tasks), total, start, show)
    write_lists(output, settings)
    return describe(settings)


def report_progress(counts, total: int, start: float, show: bool) -> None:
    """Consume the scenes' image counts; redraw one line on a terminal, print a line every tenth otherwise."""
    done, shown, live = 0, 0, sys.stdout.isatty()
    for count in counts:
        done += count
        tenth = 10 * done // total
        if not show or not (live or tenth > shown):
            continue
        shown = tenth
        seconds = time.monotonic() - start
        left = seconds / done * (total - done)
        text = f"{done}/{total} images, {done / seconds:.1f} images/s, {left:.0f} s left"
        print(f"\r{text}  " if live else text, end="" if live and done < total else "\n", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description="Render furnished rooms with exact metric depth, laid out on disk as NYU Depth V2 (BTS sync) is."
    )
    parser.add_argument(
        "--output", required=True, help="folder to write; new, empty, or made by this tool before"
    )
    parser.add_argument("--scenes", type=int, default=default.scenes, help="scenes with depth (%(default)s)")
    parser.add_argument("--views", type=int, default=default.views, help="images of each scene (%(default)s)")
    parser.add_argument(
        "--unlabeled", type=int, default=default.unlabeled, help="images without depth (%(default)s)"
    )
    parser.add_argument(
        "--size", type=int, nargs=2, default=default.size, metavar=("H", "W"), help="pixels (120 160)"
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="another seed, another world (%(default)s)"
    )
    parser.add_argument(
        "--test_share",
        type=float,
        default=default.test_share,
        help="share of scenes in test.txt (%(default)s)",
    )
    parser.add_argument("--workers", type=int, help="processes (one a core); the files do not depend on it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse_arguments(argv)
    try:
        settings = Settings(
            args.scenes, args.views, args.unlabeled, tuple(args.size), args.seed, args.test_share
        )
        card = render(args.output, settings, args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"render_rooms: {error}")
    train, test = (len(card["scenes"][name]) for name in ("train", "test"))
    print(
        f"{args.output}: {train} training and {test} test scenes of {settings.views} views,"
        f" {settings.unlabeled} unlabeled images, {settings.size[0]}x{settings.size[1]}"
    )


if __name__ == "__main__":
    main()
