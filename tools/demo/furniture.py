"""Furnishes rooms at random: pieces made of solids, and a plan in which no two of them stand in each other."""

import colorsys
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tools.demo.scene import Color, Light, Material, Room, Solid

Range = tuple[float, float]
SKY = ((0.75, 0.85, 1.0), (0.25, 0.5, 1.0), (0.05, 0.13, 0.03), (0.2, 0.3, 0.08))


class Palette:
    """Random materials; one palette a room, so that its things go together."""

    def __init__(self, rng: np.random.Generator):
        self.rng, self.hue, self.tone = rng, rng.random(), rng.uniform(0.2, 0.75)

    def color(
        self, saturation: Range = (0.2, 0.8), value: Range = (0.25, 0.9), hue: float | None = None
    ) -> Color:
        """A random colour; where no hue is given, half of them stay near the hue of the room."""
        if hue is None:
            hue = self.hue + self.rng.normal(0, 0.06) if self.rng.random() < 0.5 else self.rng.random()
        r, g, b = colorsys.hsv_to_rgb(hue % 1, self.rng.uniform(*saturation), self.rng.uniform(*value))
        return r**2.2, g**2.2, b**2.2

    def make(self, pattern: str, *colors: Color, scale: float = 0.3, glow: float = 0.0) -> Material:
        """A material with noise of its own."""
        return Material(pattern, colors, scale, glow, int(self.rng.integers(1000)))

    def paint(self, saturation: Range = (0.0, 0.7), value: Range = (0.2, 0.95)) -> Material:
        """One colour: paint, plastic, metal."""
        return self.make("plaster", self.color(saturation, value))

    def wood(self, width: float = 9.0) -> Material:
        """Furniture wood, or boards of the given width [m]."""
        value, hue = self.tone + self.rng.normal(0, 0.06), self.rng.uniform(0.05, 0.09)
        shades = (self.color((0.35, 0.65), (v, v), hue) for v in np.clip((0.75 * value, 1.1 * value), 0.1, 1))
        return self.make("wood", *shades, scale=width)

    def body(self) -> Material:
        """What cabinets are made of."""
        return self.wood() if self.rng.random() < 0.6 else self.paint((0, 0.35), (0.35, 0.95))

    def cloth(self) -> Material:
        """Speckled, striped or checked."""
        pattern = str(self.rng.choice(["speckle", "speckle", "stripes", "tiles"]))
        return self.make(pattern, self.color(), self.color(), scale=self.rng.uniform(0.08, 0.3))

    def floor(self) -> Material:
        """Boards, tiles or carpet."""
        kind, light = self.rng.choice(["boards", "tiles", "carpet"]), self.color((0, 0.35), (0.4, 0.9))
        if kind == "boards":
            return self.wood(self.rng.uniform(0.07, 0.2))
        dark = (0.6 * light[0], 0.6 * light[1], 0.6 * light[2])
        return self.make("tiles" if kind == "tiles" else "speckle", light, dark, scale=0.4)

    def wall(self) -> Material:
        """Paint mostly; some wallpaper and panels of wood."""
        kind, base = self.rng.random(), self.color((0.0, 0.3), (0.55, 0.93), self.rng.random())
        if kind < 0.8:
            return self.make("plaster", base)
        return (
            self.make("stripes", base, self.color((0.1, 0.3), (0.4, 0.7))) if kind < 0.92 else self.wood(0.14)
        )


class Kit:
    """Collects the solids and lights of one piece in its own frame.

    The frame: x along the wall, y away from the wall, z up; its origin is where the middle of the back of the
    piece meets the floor. `clear` is how far before the wall the floor must stay empty [m].
    """

    def __init__(self, palette: Palette):
        self.palette, self.rng, self.clear = palette, palette.rng, 0.0
        self.solids: list[Solid] = []
        self.lights: list[tuple[tuple[float, float, float], Color, float]] = []  # where, colour, reach [m]

    def uniform(self, low: float, high: float) -> float:
        """A random number."""
        return float(self.rng.uniform(low, high))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.random() < probability)

    def add(self, shape: str, x: Range, y: Range, z: Range, material: Material, **options) -> None:
        """A solid that fills the given bounds; small ones throw no shadow."""
        (cx, hx), (cy, hy), (cz, hz) = (((a + b) / 2, max(abs(b - a) / 2, 1e-3)) for a, b in (x, y, z))
        options.setdefault("casts", max(hx, hy, hz) > 0.07)
        self.solids.append(Solid(shape, (cx, cy, cz), (hx, hy, hz), material, **options))

    def box(self, x: Range, y: Range, z: Range, material: Material, **options) -> None:
        """A box between the given bounds."""
        self.add("box", x, y, z, material, **options)

    def ball(self, x: float, y: float, z: float, r: tuple[float, float, float], material: Material) -> None:
        """An ellipsoid about a point."""
        self.add("ellipsoid", (x - r[0], x + r[0]), (y - r[1], y + r[1]), (z - r[2], z + r[2]), material)

    def column(self, x: float, y: float, z: Range, radius: float, material: Material, **options) -> None:
        """A cylinder, or with `taper` a frustum, about a vertical axis."""
        self.add("frustum", (x - radius, x + radius), (y - radius, y + radius), z, material, **options)

    def slab(self, x: Range, y: Range, top: float, material: Material, leg: Material) -> None:
        """A board on four legs: tables, desks, seats."""
        self.box(x, y, (top - 0.04, top), material)
        for cx, cy in itertools.product((x[0] + 0.04, x[1] - 0.04), (y[0] + 0.04, y[1] - 0.04)):
            self.column(cx, cy, (0, top - 0.04), 0.025, leg)

    def clutter(self, x: Range, y: Range, z: float, most: int) -> None:
        """Small things on a surface at height `z`: packets, bottles, balls, plants."""
        for _ in range(self.rng.integers(most + 1)):
            cx, cy = self.uniform(x[0] + 0.1, x[1] - 0.1), self.uniform(y[0] + 0.1, y[1] - 0.1)
            kind, r, h = self.rng.integers(4), self.uniform(0.05, 0.1), self.uniform(0.08, 0.28)
            if kind == 0:
                self.box((cx - r, cx + r), (cy - r, cy + r), (z, z + h), self.palette.paint(), yaw=9 * h)
            elif kind == 1:
                self.column(cx, cy, (z, z + h), 0.045, self.palette.paint(), taper=-0.3)
            elif kind == 2:
                self.ball(cx, cy, z + r, (r, r, r), self.palette.paint())
            else:
                plant(self, cx, cy, z, self.uniform(0.25, 0.45))


def plant(kit: Kit, x: float = 0.0, y: float = 0.4, z: float = 0.0, height: float = 1.1) -> None:
    """A pot with leaves."""
    p = kit.palette
    green = p.make("speckle", p.color((0.5, 0.8), (0.3, 0.6), 0.3), p.color((0.5, 0.8), (0.15, 0.3), 0.33))
    kit.column(x, y, (z, z + 0.3 * height), 0.2 * height, p.paint(), taper=0.2)
    for _ in range(4):
        (dx, dy), r = kit.rng.normal(0, 0.1 * height, 2), kit.uniform(0.12, 0.22) * height
        kit.ball(x + dx, y + dy, z + kit.uniform(0.42, 0.82) * height, (r, r, 1.4 * r), green)


def bed(kit: Kit) -> None:
    """Frame, headboard, mattress, blanket and pillows."""
    p, w, length, h = kit.palette, kit.uniform(0.45, 0.9), kit.uniform(1.9, 2.1), kit.uniform(0.2, 0.35)
    frame, white = p.body(), p.paint((0, 0.1), (0.8, 0.95))
    kit.box((-w, w), (0.05, length), (0.08, h), frame)
    kit.box((-w, w), (0.0, 0.06), (0.0, kit.uniform(0.7, 1.1)), frame)
    kit.box((-w + 0.02, w - 0.02), (0.07, length - 0.02), (h, h + 0.2), white)
    kit.box((-w, w), (kit.uniform(0.6, 0.9), length), (h - 0.05, h + 0.23), p.cloth())
    for x in (-w / 2, w / 2) if w > 0.65 else (0.0,):
        kit.ball(x, 0.33, h + 0.24, (0.32, 0.22, 0.1), white)


def chair(kit: Kit, x: float, y: float, facing: int, seat: Material, leg: Material) -> None:
    """A chair whose back is on the side `facing` (+1 or -1) of its seat."""
    kit.slab((x - 0.21, x + 0.21), (y - 0.2, y + 0.2), 0.46, seat, leg)
    back = y + facing * 0.2
    kit.box((x - 0.2, x + 0.2), (back - 0.018, back + 0.018), (0.46, 0.92), seat)


def table(kit: Kit) -> None:
    """A table with things on it and chairs around it, or a coffee table."""
    p, w, d, y = kit.palette, kit.uniform(0.45, 0.9), kit.uniform(0.35, 0.5), 0.95
    low, leg, seat = kit.chance(0.3), p.wood(), p.body()
    h = 0.42 if low else kit.uniform(0.68, 0.78)
    kit.slab((-w, w), (y - d, y + d), h, p.body(), leg)
    kit.clutter((-w * 0.7, w * 0.7), (y - d * 0.7, y + d * 0.7), h, 4)
    for side, x in itertools.product((-1, 1), (-w / 2, w / 2) if w > 0.65 else (0.0,)):
        if not low and kit.chance(0.75):
            chair(kit, x + kit.uniform(-0.1, 0.1), y + side * (d + kit.uniform(0.0, 0.12)), side, seat, leg)


def sofa(kit: Kit) -> None:
    """Base, back, arms and cushions; an armchair when it is narrow."""
    p, w, cloth = kit.palette, kit.uniform(0.45, 1.15), kit.palette.cloth()
    kit.box((-w, w), (0.05, 0.85), (0.06, 0.28), cloth)
    kit.box((-w, w), (0.02, 0.26), (0.06, kit.uniform(0.7, 0.9)), cloth)
    for side in (-1, 1):
        kit.box((side * w, side * (w - 0.16)), (0.02, 0.88), (0.0, 0.56), cloth)
    seats = np.linspace(-w + 0.17, w - 0.17, max(1, round(w / 0.34)) + 1)
    for left, right in itertools.pairwise(seats):
        kit.box((left + 0.01, right - 0.01), (0.26, 0.9), (0.28, 0.42), cloth)
        if kit.chance(0.5):
            kit.ball((left + right) / 2, 0.34, 0.58, (0.2, 0.1, 0.18), p.cloth())


def bookshelf(kit: Kit) -> None:
    """Boards with rows of books and other things between them."""
    p, w, d, h = kit.palette, kit.uniform(0.3, 0.65), kit.uniform(0.26, 0.36), kit.uniform(1.0, 2.2)
    body, spines = p.body(), [p.color((0.2, 0.9), (0.15, 0.8)) for _ in range(7)]
    for side in (-1, 1):
        kit.box((side * w, side * (w - 0.025)), (0, d), (0, h), body)
    kit.box((-w, w), (0, 0.015), (0, h), body)
    heights = np.linspace(0.02, h - 0.025, max(2, round(h / 0.37)) + 1)
    for low, high in itertools.pairwise([*heights, heights[-1]]):
        kit.box((-w, w), (0, d), (low, low + 0.025), body)
        if high > low and kit.chance(0.75):
            row, end = p.make("books", *spines, scale=high - low), kit.uniform(-0.2, 1.0) * (w - 0.03)
            kit.box((0.03 - w, end), (0.02, d - 0.06), (low + 0.025, high - 0.02), row)
        elif high > low:
            kit.clutter((-w, w), (0, d), low + 0.025, 2)


def cabinet(kit: Kit, w: float, d: float, h: float) -> None:
    """A box with doors or drawers (thin boxes with gaps between them) and handles."""
    p, body = kit.palette, kit.palette.body()
    front, handle = body if kit.chance(0.5) else p.body(), p.paint((0, 0.1))
    kit.box((-w, w), (0, d), (0.0, h), body)
    rows = np.linspace(0.06, h - 0.03, 2 if h > 1.2 else kit.rng.integers(2, 5))
    columns = np.linspace(-w, w, max(1, round(w / 0.24)) + 1)
    for (left, right), (low, high) in itertools.product(
        itertools.pairwise(columns), itertools.pairwise(rows)
    ):
        panel = replace(front, seed=front.seed + int(99 * left))
        kit.box(
            (left + 0.008, right - 0.008), (d, d + 0.018), (low + 0.008, high - 0.008), panel, casts=False
        )
        x, z = right - 0.07, min((low + high) / 2, 1.1)
        kit.box((x - 0.009, x + 0.009), (d + 0.018, d + 0.04), (z - 0.06, z + 0.06), handle)


def wardrobe(kit: Kit) -> None:
    """A tall cabinet."""
    cabinet(kit, kit.uniform(0.45, 1.1), kit.uniform(0.5, 0.62), kit.uniform(1.8, 2.25))


def screen(kit: Kit, y: float, z: float, half: float) -> None:
    """A flat screen on a foot, switched on or off."""
    p = kit.palette
    black = p.paint((0, 0.1), (0.05, 0.18))
    picture = (
        p.make("painting", *(p.color() for _ in range(4)), scale=half, glow=0.3) if kit.chance(0.5) else black
    )
    kit.box((-0.12, 0.12), (y - 0.08, y + 0.08), (z, z + 0.06), black)
    kit.box((-half, half), (y - 0.02, y + 0.02), (z + 0.06, z + 0.06 + 1.15 * half), black)
    kit.box((0.02 - half, half - 0.02), (y + 0.02, y + 0.024), (z + 0.08, z + 0.04 + 1.15 * half), picture)


def sideboard(kit: Kit) -> None:
    """A low cabinet with a television or other things on it."""
    w, d, h = kit.uniform(0.4, 0.9), kit.uniform(0.38, 0.5), kit.uniform(0.55, 0.95)
    cabinet(kit, w, d, h)
    if kit.chance(0.4):
        screen(kit, d / 2, h, min(w, 0.5))
    else:
        kit.clutter((-w, w), (0, d), h, 4)


def desk(kit: Kit) -> None:
    """A desk with a monitor, and a chair before it."""
    p, w, d, h = kit.palette, kit.uniform(0.55, 0.85), kit.uniform(0.55, 0.75), kit.uniform(0.7, 0.76)
    leg = p.paint((0, 0.1))
    kit.slab((-w, w), (0, d), h, p.body(), leg)
    screen(kit, 0.2, h, 0.27)
    kit.clutter((-w, -w * 0.4), (0.05, d), h, 2)
    chair(kit, kit.uniform(-0.3, 0.2), d + kit.uniform(0.05, 0.35), 1, p.cloth(), leg)


def counter(kit: Kit) -> None:
    """Kitchen cabinets with a worktop, tiles behind it, and cabinets on the wall."""
    p, w = kit.palette, kit.uniform(0.6, 1.4)
    cabinet(kit, w, 0.58, 0.86)
    kit.box((-w - 0.01, w + 0.01), (0, 0.63), (0.86, 0.9), p.paint((0, 0.3)))
    kit.box((-w, w), (0, 0.012), (0.9, 1.4), p.make("tiles", p.color(), p.color(), scale=0.12), casts=False)
    kit.clutter((-w, w), (0.1, 0.55), 0.9, 5)
    kit.box((-w, w), (0, 0.33), (1.4, kit.uniform(1.95, 2.2)), p.body())


def floor_lamp(kit: Kit) -> None:
    """A pole with a shade that glows, and a light in it."""
    p, h = kit.palette, kit.uniform(1.3, 1.7)
    metal, shade = p.paint((0, 0.1)), p.make("plaster", p.color((0.1, 0.45), (0.85, 1.0), 0.1), glow=1.2)
    kit.column(0, 0.25, (0, 0.03), 0.15, metal)
    kit.column(0, 0.25, (0.03, h), 0.015, metal)
    kit.column(0, 0.25, (h - 0.05, h + 0.25), 0.19, shade, taper=-0.3, casts=False)
    kit.lights.append(((0, 0.25, h + 0.1), (0.8, 0.7, 0.5), 1.6))


def toys(kit: Kit) -> None:
    """Boxes and balls on the floor."""
    for _ in range(kit.rng.integers(1, 4)):
        x, y, r = kit.uniform(-0.3, 0.3), kit.uniform(0.25, 0.6), kit.uniform(0.12, 0.24)
        if kit.chance(0.6):
            kit.box((x - r, x + r), (y - r, y + r), (0, 1.5 * r), kit.palette.paint((0.2, 0.6)), yaw=9 * r)
        else:
            kit.ball(x, y, r, (r, r, r), kit.palette.cloth())


def rug(kit: Kit) -> None:
    """A rug; whatever else is there stands on it."""
    w, d = kit.uniform(0.6, 1.3), kit.uniform(0.5, 1.0)
    shape = "frustum" if kit.chance(0.3) else "box"
    kit.add(shape, (-w, w), (-d, d), (0, 0.012), kit.palette.cloth(), casts=False)


def ceiling_lamp(kit: Kit) -> None:
    """A glowing globe; its height is measured down from the ceiling."""
    warm = kit.palette.make("plaster", (1.0, 0.93, 0.8), glow=1.3)
    kit.add("ellipsoid", (-0.14, 0.14), (-0.14, 0.14), (-0.26, -0.02), warm, casts=False)
    strength = kit.uniform(0.8, 1.4)
    kit.lights.append(((0, 0, -0.3), (1.1 * strength, strength, 0.8 * strength), 2.8))


def door(kit: Kit) -> None:
    """A door in its frame; the floor before it stays empty."""
    p, w, h, kit.clear = kit.palette, 0.42, 2.02, 0.7
    leaf, frame = p.body(), p.paint((0, 0.1), (0.7, 0.95))
    kit.box((-w, w), (0, 0.015), (0, h), leaf, casts=False)
    kit.box((-w - 0.07, w + 0.07), (0, 0.04), (h, h + 0.07), frame)
    for side in (-1, 1):
        kit.box((side * w, side * (w + 0.07)), (0, 0.04), (0, h + 0.07), frame)
    kit.ball(w - 0.06, 0.06, 1.03, (0.03, 0.03, 0.03), frame)


def window(kit: Kit) -> None:
    """A window with frame, sill and perhaps curtains; daylight comes through it."""
    p, w, low, high = kit.palette, kit.uniform(0.4, 0.9), kit.uniform(0.75, 1.0), kit.uniform(1.85, 2.15)
    kit.clear = 0.25
    frame, view = p.paint((0, 0.1), (0.8, 0.95)), p.make("outdoors", *SKY, scale=high - low, glow=1.3)
    kit.box((-w, w), (0, 0.01), (low, high), view, casts=False)
    for x in (-w, 0, w):
        kit.box((x - 0.03, x + 0.03), (0, 0.05), (low, high), frame)
    for z in (low, high):
        kit.box((-w - 0.03, w + 0.03), (0, 0.09), (z - 0.03, z + 0.03), frame)
    if kit.chance(0.45):
        cloth, hem = p.cloth(), 0.05 if kit.chance(0.5) else low - 0.2
        for x, side in itertools.product(np.arange(4) * 0.09 - w - 0.2, (-1, 1)):
            kit.column(side * x, 0.1, (hem, high + 0.1), 0.055, cloth)
    strength = kit.uniform(0.6, 1.2)
    kit.lights.append(((0, 0.3, (low + high) / 2), (0.75 * strength, 0.9 * strength, 1.1 * strength), 2.5))


def picture(kit: Kit) -> None:
    """A framed picture."""
    p, w, h, z = kit.palette, kit.uniform(0.18, 0.55), kit.uniform(0.15, 0.4), kit.uniform(1.45, 1.75)
    art = p.make("painting", *(p.color((0.1, 0.9), (0.1, 0.95)) for _ in range(4)), scale=2 * h)
    kit.box((-w, w), (0, 0.03), (z - h, z + h), p.body())
    kit.box((-w + 0.04, w - 0.04), (0.03, 0.034), (z - h + 0.04, z + h - 0.04), art, casts=False)


Piece = Callable[[Kit], None]

# By kind of room: what must find a place at a wall, what else may stand there, what may stand anywhere.
ROOMS: dict[str, tuple[tuple[Piece, ...], tuple[Piece, ...], tuple[Piece, ...]]] = {
    "bedroom": ((bed,), (wardrobe, sideboard, desk, floor_lamp, plant, bookshelf), (toys,)),
    "living_room": ((sofa, sideboard), (bookshelf, sofa, floor_lamp, plant, desk), (table, toys)),
    "office": ((desk, bookshelf), (desk, sideboard, bookshelf, plant, floor_lamp, wardrobe), (table,)),
    "kitchen": ((counter, counter), (sideboard, bookshelf, plant, wardrobe), (table,)),
    "dining_room": ((sideboard,), (bookshelf, sofa, floor_lamp, plant, wardrobe), (table, table)),
    "playroom": ((bookshelf, bed), (toys, wardrobe, toys, sofa, desk, floor_lamp), (toys, table, toys)),
}


class Plan:
    """What stands where: each piece keeps a box of the room for itself.

    Walls are numbered 0 to 3: y = 0, x = max, y = max, x = 0.
    """

    def __init__(self, size: tuple[float, float, float], palette: Palette):
        self.size, self.palette, self.rng = size, palette, palette.rng
        self.solids: list[Solid] = []
        self.pieces: list[tuple[int, int]] = []
        self.lights: list[Light] = []
        self.taken: list[np.ndarray] = []  # [2, 3], lowest and highest corner

    def put(self, kit: Kit, x: float, y: float, yaw: float, z: float = 0.0, keeps: bool = True) -> bool:
        """Put a piece into the room; False where it would stand in another one or in a wall."""
        c, s = math.cos(yaw), math.sin(yaw)

        def moved(points) -> np.ndarray:
            px, py, pz = np.moveaxis(np.asarray(points, float), -1, 0)
            return np.stack([x + c * px - s * py, y + s * px + c * py, z + pz], -1)

        corners = np.concatenate([solid.corners() for solid in kit.solids])
        low, high = corners.min(0), np.maximum(corners.max(0), [-9, kit.clear, -9])
        ends = moved(list(itertools.product(*zip(low, high, strict=True))))
        box = np.stack([ends.min(0) - 0.03, ends.max(0) + 0.03])
        if (box[0] < -0.05).any() or (box[1] > np.add(self.size, 0.05)).any():
            return False
        if keeps and any((box[0] < other[1]).all() and (other[0] < box[1]).all() for other in self.taken):
            return False
        if keeps:
            self.taken.append(box)
        self.pieces.append((len(self.solids), len(self.solids) + len(kit.solids)))
        for solid in kit.solids:
            place = moved(solid.center).tolist()
            self.solids.append(replace(solid, center=tuple(place), yaw=solid.yaw + yaw))
        for place, color, reach in kit.lights[
            : 2 - len(self.lights)
        ]:  # two lights at most: each costs a shadow ray a sample
            self.lights.append(Light(moved(place), color, reach=reach))
        return True

    def at_wall(self, piece: Piece) -> None:
        """Try to find a place at a wall."""
        kit = Kit(self.palette)
        piece(kit)
        for _ in range(30):
            wall = int(self.rng.integers(4))
            along, (x, y, _) = float(self.rng.uniform(0, self.size[wall % 2])), self.size
            place = ((along, 0.0), (x, along), (x - along, y), (0.0, y - along))[wall]
            if self.put(kit, *place, wall * math.pi / 2):
                return

    def anywhere(self, piece: Piece, z: float = 0.0, keeps: bool = True) -> None:
        """Try to find a place away from the walls, at any angle."""
        kit = Kit(self.palette)
        piece(kit)
        for _ in range(20):
            x, y = (float(self.rng.uniform(0.3, 0.7) * self.size[i]) for i in range(2))
            if self.put(kit, x, y, float(self.rng.uniform(0, 2 * math.pi)), z, keeps):
                return


def furnish(kind: str, rng: np.random.Generator) -> Room:
    """A random room of a kind, a key of `ROOMS`."""
    # The longest diagonal is 9.5 m: depth stays below the 10 m that NYU protocols end at.
    long, wide, high = (float(rng.uniform(*ends)) for ends in ((3.0, 7.2), (2.8, 5.4), (2.35, 3.0)))
    size = (long, wide, high) if rng.random() < 0.5 else (wide, long, high)
    palette = Palette(rng)
    plan = Plan(size, palette)
    needed, usual, free = ROOMS[kind]
    chosen = [usual[i] for i in rng.permutation(len(usual))[: rng.integers(2, len(usual) + 1)]]
    windows, pictures = [window] * rng.integers(1, 4), [picture] * rng.integers(2, 6)
    for piece in (door, *windows, *needed, *chosen, *pictures):
        plan.at_wall(piece)
    for piece in free[: rng.integers(0, len(free) + 1)]:
        plan.anywhere(piece)
    if rng.random() < 0.6:
        plan.anywhere(rug, keeps=False)
    plan.anywhere(ceiling_lamp, high)
    common, accent = palette.wall(), palette.wall()
    walls = [common if rng.random() < 0.8 else accent for _ in range(4)]
    ceiling = palette.paint((0, 0.06), (0.85, 0.97))
    grey = float(rng.uniform(0.22, 0.45))
    return Room(
        size,
        tuple(plan.solids),
        (*walls, palette.floor(), ceiling),
        tuple(plan.lights),
        (grey, grey, grey),
        tuple(plan.pieces),
    )
