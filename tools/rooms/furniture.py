"""Pieces of furniture, each a function that puts solids into a kit, and which of them a room may hold."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from rooms.solids import Solid
from rooms.textures import Material, Palette, Range


class Kit:
    """Collects the solids of one piece in its own frame.

    The frame: x along the wall, y away from the wall, z up; its origin is where the middle of the back of the
    piece meets the floor.

    Args:
        palette: where materials and random numbers come from.
    """

    def __init__(self, palette: Palette):
        self.palette, self.rng = palette, palette.rng
        self.solids: list[Solid] = []

    def uniform(self, low: float, high: float) -> float:
        """A random length [m]."""
        return float(self.rng.uniform(low, high))

    def count(self, low: int, high: int) -> int:
        """A random number from `low` to `high`, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return bool(self.rng.random() < probability)

    def box(self, x: Range, y: Range, z: Range, material: Material, **options) -> None:
        """A box between the given bounds."""
        self.add("box", x, y, z, material, **options)

    def ball(
        self, x: float, y: float, z: float, radii: tuple[float, float, float], material: Material
    ) -> None:
        """An ellipsoid about a point."""
        rx, ry, rz = radii
        self.add("ellipsoid", (x - rx, x + rx), (y - ry, y + ry), (z - rz, z + rz), material)

    def column(self, x: float, y: float, z: Range, radius: float, material: Material, **options) -> None:
        """A cylinder, or with `taper` a frustum, about a vertical axis."""
        self.add("frustum", (x - radius, x + radius), (y - radius, y + radius), z, material, **options)

    def add(self, shape: str, x: Range, y: Range, z: Range, material: Material, **options) -> None:
        """A solid that fills the given bounds; knobs and the like throw no shadow unless told to."""
        cx, cy, cz = ((a + b) / 2 for a, b in (x, y, z))
        hx, hy, hz = (max(abs(b - a) / 2, 1e-3) for a, b in (x, y, z))
        options.setdefault("casts", max(hx, hy, hz) > 0.07)
        self.solids.append(Solid(shape, (cx, cy, cz), (hx, hy, hz), material, **options))

    def legs(self, x: Range, y: Range, z: Range, material: Material, thickness: float = 0.05) -> None:
        """Four legs under a rectangle."""
        for cx in (x[0] + thickness, x[1] - thickness):
            for cy in (y[0] + thickness, y[1] - thickness):
                self.column(cx, cy, z, thickness / 2, material)

    def clutter(self, x: Range, y: Range, z: float, count: int) -> None:
        """Small things on a surface at height `z`: boxes, books, bottles, bowls, balls, plants."""
        for _ in range(count):
            cx, cy = self.uniform(x[0] + 0.1, x[1] - 0.1), self.uniform(y[0] + 0.1, y[1] - 0.1)
            SMALL_THINGS[self.count(0, len(SMALL_THINGS) - 1)](self, cx, cy, z)


def small_box(kit: Kit, x: float, y: float, z: float) -> None:
    """A packet."""
    w, d, h = kit.uniform(0.05, 0.14), kit.uniform(0.05, 0.14), kit.uniform(0.08, 0.28)
    kit.box((x - w, x + w), (y - d, y + d), (z, z + h), kit.palette.paint(), yaw=kit.uniform(-1, 1))


def stack_of_books(kit: Kit, x: float, y: float, z: float) -> None:
    """Books that lie on each other."""
    for level in range(kit.count(1, 5)):
        w, low = kit.uniform(0.08, 0.13), z + 0.035 * level
        kit.box(
            (x - w, x + w),
            (y - 0.1, y + 0.1),
            (low, low + 0.033),
            kit.palette.paint(),
            yaw=kit.uniform(-0.3, 0.3),
        )


def bottle(kit: Kit, x: float, y: float, z: float) -> None:
    """A bottle or a vase."""
    h, glass = kit.uniform(0.14, 0.26), kit.palette.paint(gloss=0.7)
    kit.column(x, y, (z, z + h), 0.045, glass)
    kit.column(x, y, (z + h, z + h + 0.09), 0.02, glass)


def bowl(kit: Kit, x: float, y: float, z: float) -> None:
    """A bowl, wider at the top."""
    kit.column(x, y, (z, z + 0.08), kit.uniform(0.08, 0.12), kit.palette.paint(gloss=0.4), taper=0.4)


def small_ball(kit: Kit, x: float, y: float, z: float) -> None:
    """A ball or a fruit."""
    r = kit.uniform(0.05, 0.1)
    kit.ball(x, y, z + r, (r, r, r), kit.palette.paint(gloss=0.5))


def plant(kit: Kit, x: float, y: float, z: float, height: float | None = None) -> None:
    """A pot with leaves."""
    height = height or kit.uniform(0.25, 0.45)
    kit.column(x, y, (z, z + 0.3 * height), 0.2 * height, kit.palette.paint(), taper=0.2)
    green = kit.palette.leaves()
    for _ in range(kit.count(3, 6)):
        dx, dy = kit.rng.normal(0, 0.12 * height, 2)
        r, middle = kit.uniform(0.12, 0.22) * height, z + kit.uniform(0.42, 0.82) * height
        kit.ball(x + dx, y + dy, middle, (r, r, 1.4 * r), replace(green, seed=kit.count(0, 99)))


SMALL_THINGS = (small_box, stack_of_books, bottle, bowl, small_ball, plant)


def bed(kit: Kit) -> None:
    """Frame, headboard, mattress, blanket and pillows."""
    p, w, length, h = kit.palette, kit.uniform(0.45, 0.9), kit.uniform(1.9, 2.1), kit.uniform(0.2, 0.35)
    frame, pillow = p.body(), p.fabric() if kit.chance(0.5) else p.white()
    kit.box((-w, w), (0.05, length), (0.08, h), frame)
    kit.box((-w, w), (0.0, 0.06), (0.0, kit.uniform(0.7, 1.1)), frame)
    kit.box((-w + 0.02, w - 0.02), (0.07, length - 0.02), (h, h + 0.2), p.white())
    kit.box((-w, w), (kit.uniform(0.6, 0.9), length), (h - 0.05, h + 0.23), p.fabric())
    for x in (-w / 2, w / 2) if w > 0.65 else (0.0,):
        kit.ball(x, 0.33, h + 0.24, (0.32, 0.22, 0.1), pillow)
    if kit.chance(0.5):
        kit.ball(kit.uniform(-w / 2, w / 2), 0.56, h + 0.33, (0.2, 0.11, 0.17), p.fabric())


def table(kit: Kit) -> None:
    """A table, round or not, with things on it and chairs around it."""
    p, w, d, h = kit.palette, kit.uniform(0.45, 0.9), kit.uniform(0.35, 0.5), kit.uniform(0.68, 0.78)
    top, leg, y = p.body(), p.metal() if kit.chance(0.4) else p.timber(), 0.95
    if kit.chance(0.3):
        w = d = kit.uniform(0.4, 0.6)
        kit.column(0, y, (h - 0.04, h), w, top)
        kit.column(0, y, (0.03, h), 0.05, leg)
        kit.column(0, y, (0, 0.03), 0.28, leg)
    else:
        kit.box((-w, w), (y - d, y + d), (h - 0.04, h), top)
        kit.legs((-w, w), (y - d, y + d), (0, h - 0.04), leg, 0.06)
    kit.clutter((-w * 0.7, w * 0.7), (y - d * 0.7, y + d * 0.7), h, kit.count(1, 4))
    seat = p.fabric() if kit.chance(0.5) else p.body()
    for side in (-1, 1):
        for x in (-w / 2, w / 2) if w > 0.65 else (0.0,):
            if kit.chance(0.75):
                chair(
                    kit, x + kit.uniform(-0.1, 0.1), y + side * (d + kit.uniform(0.0, 0.12)), side, seat, leg
                )


def chair(kit: Kit, x: float, y: float, facing: int, seat: Material, frame: Material) -> None:
    """A chair whose back is on the side `facing` (+1 or -1) of its seat."""
    kit.box((x - 0.21, x + 0.21), (y - 0.2, y + 0.2), (0.42, 0.47), seat)
    kit.legs((x - 0.21, x + 0.21), (y - 0.2, y + 0.2), (0, 0.42), frame, 0.04)
    back = y + facing * 0.2
    kit.box((x - 0.2, x + 0.2), (back - 0.018, back + 0.018), (0.47, 0.92), seat)


def sofa(kit: Kit) -> None:
    """Base, back, arms, seat cushions and pillows; an armchair when it is narrow."""
    p, w, cloth = kit.palette, kit.uniform(0.45, 1.15), kit.palette.fabric()
    cushion = replace(cloth, seed=cloth.seed + 1) if kit.chance(0.6) else p.fabric()
    kit.box((-w, w), (0.05, 0.85), (0.06, 0.28), cloth)
    kit.box((-w, w), (0.02, 0.26), (0.06, kit.uniform(0.7, 0.9)), cloth)
    arm = kit.uniform(0.5, 0.62)
    for side in (-1, 1):
        kit.box((side * w, side * (w - 0.16)), (0.02, 0.88), (0.0, arm), cloth)
    for left, right in itertools.pairwise(
        np.linspace(-w + 0.17, w - 0.17, max(1, round((w - 0.16) / 0.34)) + 1)
    ):
        kit.box((left + 0.01, right - 0.01), (0.26, 0.9), (0.28, 0.42), cushion)
    for _ in range(kit.count(0, 3)):
        kit.ball(kit.uniform(-w + 0.35, w - 0.35), 0.34, 0.58, (0.2, 0.1, 0.18), p.fabric())


def bookshelf(kit: Kit) -> None:
    """Boards with rows of books and other things between them."""
    p, w, d, h = kit.palette, kit.uniform(0.3, 0.65), kit.uniform(0.26, 0.36), kit.uniform(1.0, 2.2)
    body = p.body()
    for side in (-1, 1):
        kit.box((side * w, side * (w - 0.025)), (0, d), (0, h), body)
    kit.box((-w, w), (0, 0.015), (0, h), replace(body, seed=body.seed + 1))
    levels, inner = max(2, round(h / 0.37)), w - 0.03
    gap = (h - 0.05) / levels
    spines = tuple(p.color((0.2, 0.9), (0.15, 0.8), float(kit.rng.random())) for _ in range(7))
    for level in range(levels + 1):
        z = 0.02 + level * gap
        kit.box((-w, w), (0, d), (z, z + 0.025), body)
        fill = kit.uniform(0, 1)
        if level < levels and fill < 0.75:
            right = inner if fill < 0.4 else kit.uniform(-0.2 * inner, 0.9 * inner)
            row = p.make("books", spines, gap - 0.03, 0.05)
            kit.box((-inner, right), (0.02, d - kit.uniform(0.03, 0.1)), (z + 0.025, z + gap - 0.02), row)
        elif level < levels and fill < 0.95:
            kit.clutter((-inner, inner), (0, d), z + 0.025, 2)


def wardrobe(kit: Kit) -> None:
    """A tall cabinet."""
    cabinet(kit, kit.uniform(0.45, 1.1), kit.uniform(0.5, 0.62), kit.uniform(1.8, 2.25))


def sideboard(kit: Kit) -> None:
    """A low cabinet with a television or other things on it."""
    w, d, h = kit.uniform(0.4, 0.9), kit.uniform(0.38, 0.5), kit.uniform(0.55, 0.95)
    cabinet(kit, w, d, h)
    if kit.chance(0.4):
        television(kit, 0.0, d / 2, h, kit.uniform(0.3, min(0.6, w)))
    else:
        kit.clutter((-w, w), (0, d), h, kit.count(1, 4))


def cabinet(kit: Kit, w: float, d: float, h: float) -> None:
    """A box with doors or drawers (thin boxes with gaps between them) and handles."""
    p, body = kit.palette, kit.palette.body()
    front, handle = body if kit.chance(0.5) else p.body(), p.metal()
    kit.box((-w, w), (0, d), (0.05, h), body)
    kit.box((-w + 0.03, w - 0.03), (0, d - 0.04), (0, 0.05), p.black())
    rows = 1 if h > 1.2 else kit.count(1, 3)
    columns = np.linspace(-w, w, max(1, round(w / 0.24)) + 1)
    for i, (left, right) in enumerate(itertools.pairwise(columns)):
        for low, high in itertools.pairwise(np.linspace(0.06, h - 0.03, rows + 1)):
            panel = replace(front, seed=front.seed + i)
            kit.box(
                (left + 0.008, right - 0.008), (d, d + 0.018), (low + 0.008, high - 0.008), panel, casts=False
            )
            x, z = right - 0.07 if i % 2 == 0 else left + 0.07, min((low + high) / 2, 1.1)
            kit.box((x - 0.009, x + 0.009), (d + 0.018, d + 0.04), (z - 0.06, z + 0.06), handle)


def television(kit: Kit, x: float, y: float, z: float, half: float) -> None:
    """A flat screen on a foot, switched on or off."""
    p, height = kit.palette, half * 1.15
    black = p.black()
    picture = p.make("screen", (p.color(), p.color()), half, 0.3, 0.6) if kit.chance(0.5) else p.black()
    kit.box((x - 0.3 * half, x + 0.3 * half), (y - 0.08, y + 0.08), (z, z + 0.02), black, casts=False)
    kit.box((x - 0.04, x + 0.04), (y - 0.02, y + 0.02), (z, z + 0.1), black)
    kit.box((x - half, x + half), (y - 0.02, y + 0.02), (z + 0.07, z + 0.07 + height), black)
    kit.box(
        (x - half + 0.02, x + half - 0.02),
        (y + 0.02, y + 0.024),
        (z + 0.09, z + 0.05 + height),
        picture,
        casts=False,
    )


def desk(kit: Kit) -> None:
    """A writing table with a monitor, a keyboard and a chair."""
    p, w, d, h = kit.palette, kit.uniform(0.5, 0.8), kit.uniform(0.55, 0.75), kit.uniform(0.7, 0.78)
    leg = p.metal()
    kit.box((-w, w), (0.02, d), (h - 0.035, h), p.body())
    kit.legs((-w, w), (0.02, d), (0, h - 0.035), leg)
    television(kit, kit.uniform(-0.2, 0.2), 0.25, h, kit.uniform(0.2, 0.32))
    kit.box((-0.2, 0.2), (d - 0.28, d - 0.14), (h, h + 0.02), p.paint((0, 0.1), (0.1, 0.8)), casts=False)
    if kit.chance(0.7):
        kit.box((w - 0.4, w - 0.02), (0.08, d - 0.08), (0.08, h - 0.05), p.body())
    kit.clutter((-w, -w * 0.4), (0.05, d), h, kit.count(0, 2))
    chair(kit, kit.uniform(-0.3, 0.2), d + kit.uniform(0.05, 0.35), 1, p.fabric(), leg)


def counter(kit: Kit) -> None:
    """Kitchen cabinets with a worktop, tiles behind it, and cabinets on the wall."""
    p, w = kit.palette, kit.uniform(0.6, 1.4)
    cabinet(kit, w, 0.58, 0.86)
    kit.box((-w - 0.01, w + 0.01), (0, 0.63), (0.86, 0.9), p.paint((0, 0.3), (0.2, 0.9), 0.4))
    backsplash = p.make("tiles", (p.color((0, 0.5), (0.5, 0.95)),), 0.12, 0.4)
    kit.box((-w, w), (0, 0.012), (0.9, 1.4), backsplash, casts=False)
    kit.clutter((-w, w), (0.1, 0.55), 0.9, kit.count(2, 5))
    if kit.chance(0.8):
        top, body = kit.uniform(1.95, 2.2), p.body()
        kit.box((-w, w), (0, 0.33), (1.4, top), body)
        for left, right in itertools.pairwise(np.linspace(-w, w, round(w / 0.24) + 1)):
            kit.box((left + 0.006, right - 0.006), (0.33, 0.348), (1.41, top - 0.01), body, casts=False)


def floor_lamp(kit: Kit) -> None:
    """A pole with a shade that glows."""
    h, metal, p = kit.uniform(1.3, 1.7), kit.palette.metal(), kit.palette
    kit.column(0, 0.25, (0, 0.03), 0.15, metal)
    kit.column(0, 0.25, (0.03, h), 0.015, metal)
    shade = p.make("plain", (p.color((0.1, 0.45), (0.85, 1.0), 0.1),), 0.3, 0, LAMP_GLOW)
    kit.column(0, 0.25, (h - 0.05, h + 0.25), 0.19, shade, taper=-0.3, casts=False)


LAMP_GLOW = 1.2  # by which the room finds the shades that need a light in them


def big_plant(kit: Kit) -> None:
    """A plant that stands on the floor."""
    plant(kit, 0.0, 0.36, 0.0, kit.uniform(0.8, 1.4))


def toys(kit: Kit) -> None:
    """Boxes and balls on the floor."""
    for _ in range(kit.count(1, 3)):
        x, y, r = kit.uniform(-0.3, 0.3), kit.uniform(0.25, 0.6), kit.uniform(0.12, 0.24)
        if kit.chance(0.6):
            card = kit.palette.paint((0.2, 0.6), (0.4, 0.8), 0)
            kit.box(
                (x - r, x + r), (y - r, y + r), (0, kit.uniform(1.0, 2.2) * r), card, yaw=kit.uniform(-1, 1)
            )
        else:
            kit.ball(x, y, r, (r, r, r), kit.palette.fabric())


def coffee_table(kit: Kit) -> None:
    """A low table."""
    p, w, d, h = kit.palette, kit.uniform(0.35, 0.6), kit.uniform(0.25, 0.35), kit.uniform(0.35, 0.48)
    top = p.body()
    kit.box((-w, w), (0.4 - d, 0.4 + d), (h - 0.04, h), top)
    kit.legs((-w, w), (0.4 - d, 0.4 + d), (0, h - 0.04), p.metal() if kit.chance(0.5) else top)
    kit.clutter((-w * 0.8, w * 0.8), (0.4 - d * 0.8, 0.4 + d * 0.8), h, kit.count(0, 3))


Piece = Callable[[Kit], None]

# By kind of room: what must find a place at a wall, what else may stand there, what may stand anywhere.
ROOMS: dict[str, tuple[tuple[Piece, ...], tuple[Piece, ...], tuple[Piece, ...]]] = {
    "bedroom": ((bed,), (wardrobe, sideboard, desk, floor_lamp, big_plant, bookshelf, sideboard), (toys,)),
    "living_room": (
        (sofa, sideboard),
        (bookshelf, sofa, floor_lamp, big_plant, desk, bookshelf),
        (coffee_table, table, toys),
    ),
    "office": (
        (desk, bookshelf),
        (desk, sideboard, bookshelf, big_plant, floor_lamp, wardrobe),
        (table, toys),
    ),
    "kitchen": ((counter, counter), (sideboard, bookshelf, big_plant, sideboard, wardrobe), (table, toys)),
    "dining_room": ((sideboard,), (bookshelf, sofa, floor_lamp, big_plant, wardrobe), (table, table)),
    "playroom": (
        (bookshelf, bed),
        (toys, wardrobe, toys, sofa, desk, floor_lamp),
        (toys, coffee_table, toys),
    ),
}
