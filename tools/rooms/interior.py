"""A room: its walls, what stands in it, and its lights; and how to furnish one at random."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from rooms.furniture import LAMP_GLOW, ROOMS, Kit, Piece
from rooms.solids import Solid
from rooms.textures import Color, Material, Palette

Rectangle = tuple[float, float, float, float]  # from and to along one axis, from and to along another [m]


@dataclass(frozen=True)
class Light:
    """A lamp, the sky in a window, or the sun behind it.

    Args:
        position: `[3]` [m].
        color: linear RGB.
        radius: how far the lamp reaches around its position [m]; makes the edges of shadows soft.
        reach: distance at which the light has fallen to a half [m]; inf for the sun.
        opening: for the sun, the hole in a wall that it comes through: the axis of the wall's normal, the wall's
            coordinate, and the hole's bounds along the other horizontal axis and in height.
    """

    position: np.ndarray
    color: Color
    radius: float = 0.1
    reach: float = 2.5
    opening: tuple[int, float, Rectangle] | None = None


@dataclass(frozen=True)
class Room:
    """A furnished room with its lights.

    Args:
        size: extents along x, y and z [m]; the room fills [0, size].
        solids: what stands in it.
        surfaces: materials of the walls x = 0, x = max, y = 0, y = max, of the floor and of the ceiling.
        lights: lamps and suns.
        ambient: light from everywhere, linear RGB.
        footprints: rectangles that furniture covers on the floor, along x and y.
        pieces: which runs of `solids` belong together, as (first, end).
    """

    size: tuple[float, float, float]
    solids: tuple[Solid, ...] = ()
    surfaces: tuple[Material, ...] = (Material(),) * 6
    lights: tuple[Light, ...] = ()
    ambient: Color = (0.5, 0.5, 0.5)
    footprints: tuple[Rectangle, ...] = ()
    pieces: tuple[tuple[int, int], ...] = ()

    @cached_property
    def corners(self) -> np.ndarray:
        """Corners of the bounding boxes of the solids, `[S, 8, 3]` [m]."""
        return np.array([solid.corners() for solid in self.solids]).reshape(-1, 8, 3)


class Builder:
    """Furnishes a room so that things do not stand in each other, in the door or before the windows.

    Walls are numbered 0 to 3: y = 0, x = max, y = max, x = 0. Each has a frame whose x runs along the wall and whose
    y points into the room.

    Args:
        kind: a key of `ROOMS`.
        rng: where all choices come from.
    """

    def __init__(self, kind: str, rng: np.random.Generator):
        self.kind, self.rng, self.palette = kind, rng, Palette(rng)
        # The longest diagonal is 9.5 m: depth stays below the 10 m that NYU protocols end at.
        long, wide, high = (
            float(rng.uniform(3.0, 7.2)),
            float(rng.uniform(2.8, 5.4)),
            float(rng.uniform(2.35, 3.0)),
        )
        self.size = (long, wide, high) if rng.random() < 0.5 else (wide, long, high)
        self.solids: list[Solid] = []
        self.pieces: list[tuple[int, int]] = []
        self.lights: list[Light] = []
        self.footprints: list[Rectangle] = []
        self.on_walls: list[tuple[int, Rectangle]] = []  # wall; along it and in height

    def build(self) -> Room:
        """The furnished room."""
        rng, palette = self.rng, self.palette
        usual, accent = palette.wall(), palette.wall()
        walls = [usual if rng.random() < 0.8 else accent for _ in range(4)]
        ceiling, floor = palette.make("plaster", (palette.color((0, 0.06), (0.85, 0.97)),)), palette.floor()
        self.skirting()
        self.door(int(rng.integers(4)))
        for _ in range(int(rng.integers(1, 4))):
            self.window(int(rng.integers(4)))
        needed, usual_pieces, free = ROOMS[self.kind]
        for piece in needed:
            self.against_wall(piece)
        for i in rng.permutation(len(usual_pieces))[: int(rng.integers(2, len(usual_pieces) + 1))]:
            self.against_wall(usual_pieces[i])
        for piece in free[: int(rng.integers(0, len(free) + 1))]:
            self.in_the_middle(piece)
        self.rug()
        for _ in range(int(rng.integers(2, 7))):
            self.decoration(int(rng.integers(4)))
        self.lamps()
        tint = np.clip(1 + rng.normal(0, 0.05, 3), 0.8, 1.2) * rng.uniform(0.22, 0.45)
        return Room(
            self.size,
            tuple(self.solids),
            (walls[3], walls[1], walls[0], walls[2], floor, ceiling),
            tuple(self.lights),
            (float(tint[0]), float(tint[1]), float(tint[2])),
            tuple(self.footprints),
            tuple(self.pieces),
        )

    def length(self, wall: int) -> float:
        """Length of a wall [m]."""
        return self.size[wall % 2]

    def at_wall(self, wall: int, along: float) -> tuple[float, float, float]:
        """Place `(x, y, yaw)` of a frame whose origin is `along` metres along a wall."""
        x, y, _ = self.size
        origin = ((along, 0.0), (x, along), (x - along, y), (0.0, y - along))[wall]
        return *origin, wall * math.pi / 2

    def add(self, kit: Kit, x: float, y: float, yaw: float) -> None:
        """Put the solids of a piece into the room."""
        c, s = math.cos(yaw), math.sin(yaw)
        self.pieces.append((len(self.solids), len(self.solids) + len(kit.solids)))
        for solid in kit.solids:
            lx, ly, lz = solid.center
            center = (x + c * lx - s * ly, y + s * lx + c * ly, lz)
            self.solids.append(replace(solid, center=center, yaw=solid.yaw + yaw))

    def wall_is_free(self, wall: int, box: Rectangle, gap: float = 0.08) -> bool:
        """Whether a rectangle of a wall is still empty."""
        if box[0] < 0.05 or box[1] > self.length(wall) - 0.05:
            return False
        return not any(wall == other and overlap(box, taken, gap) for other, taken in self.on_walls)

    def floor_is_free(self, box: Rectangle, gap: float = 0.05) -> bool:
        """Whether a rectangle lies on the floor of the room and nothing stands on it."""
        if min(box[0], box[2]) < -0.01 or box[1] > self.size[0] + 0.01 or box[3] > self.size[1] + 0.01:
            return False
        return not any(overlap(box, taken, gap) for taken in self.footprints)

    def skirting(self) -> None:
        """Boards along the foot of the walls."""
        if self.rng.random() < 0.25:
            return
        board = self.palette.timber() if self.rng.random() < 0.4 else self.palette.white()
        height = float(self.rng.uniform(0.06, 0.14))
        for wall in range(4):
            kit, half = Kit(self.palette), self.length(wall) / 2
            kit.box((-half, half), (0, 0.012), (0, height), board, casts=False)
            self.add(kit, *self.at_wall(wall, half))

    def door(self, wall: int) -> None:
        """A door in its frame; the floor before it stays empty."""
        kit, w, h = Kit(self.palette), 0.42, 2.02
        leaf = self.palette.body()
        frame = leaf if kit.chance(0.4) else self.palette.white()
        panels = kit.chance(0.6)
        along = kit.uniform(0.6, self.length(wall) - 0.6)
        kit.box((-w, w), (0, 0.015), (0, h), leaf, casts=False)
        kit.box((-w - 0.07, w + 0.07), (0, 0.04), (h, h + 0.07), frame)
        for side in (-1, 1):
            kit.box((side * w, side * (w + 0.07)), (0, 0.04), (0, h + 0.07), frame)
            if panels:
                for low, high in ((0.2, 0.95), (1.1, h - 0.15)):
                    kit.box((side * 0.06, side * (w - 0.08)), (0.015, 0.024), (low, high), leaf, casts=False)
        kit.ball(w - 0.06, 0.06, 1.03, (0.03, 0.03, 0.03), self.palette.metal())
        place = self.at_wall(wall, along)
        self.add(kit, *place)
        self.on_walls.append((wall, (along - 0.5, along + 0.5, 0, 2.1)))
        self.footprints.append(turned((-0.45, 0.45, 0.0, 0.7), *place))

    def window(self, wall: int) -> None:
        """A window with frame, sill and perhaps curtains, if the wall has room for it; daylight comes through it."""
        kit, p = Kit(self.palette), self.palette
        w, low, high = kit.uniform(0.4, 0.9), kit.uniform(0.75, 1.0), kit.uniform(1.85, 2.15)
        along = kit.uniform(w + 0.3, max(self.length(wall) - w - 0.3, w + 0.31))
        if not self.wall_is_free(wall, (along - w - 0.25, along + w + 0.25, low, high + 0.1)):
            return
        day = kit.chance(0.8)
        sky = ((0.75, 0.85, 1.0), (0.25, 0.5, 1.0), (0.05, 0.13, 0.03), (0.2, 0.3, 0.08))
        night = ((0.02, 0.025, 0.06), (0.005, 0.005, 0.02), (0.003, 0.004, 0.004), (0.01, 0.012, 0.01))
        view = p.make("outdoors", sky if day else night, high - low, 0.2, 1.3 if day else 0.4)
        frame = p.white() if kit.chance(0.7) else p.timber()
        kit.box((-w, w), (0, 0.01), (low, high), view, casts=False)
        for x in np.linspace(-w, w, kit.count(2, 3)):
            kit.box((x - 0.03, x + 0.03), (0, 0.05), (low, high), frame)
        for z in (low, high, low + 0.65 * (high - low))[: kit.count(2, 3)]:
            kit.box((-w - 0.03, w + 0.03), (0, 0.05), (z - 0.03, z + 0.03), frame)
        kit.box((-w - 0.08, w + 0.08), (0, 0.16), (low - 0.05, low - 0.02), frame)
        if kit.chance(0.45):
            cloth, hem = p.fabric(), 0.05 if kit.chance(0.5) else low - 0.2
            kit.box((-w - 0.3, w + 0.3), (0.085, 0.115), (high + 0.12, high + 0.15), p.metal())
            for x in np.arange(4) * 0.09 - w - 0.2:
                for side in (-1, 1):
                    kit.column(side * x, 0.1, (hem, high + 0.12), 0.055, cloth)
        self.add(kit, *self.at_wall(wall, along))
        self.on_walls.append((wall, (along - w - 0.1, along + w + 0.1, low - 0.1, high + 0.1)))
        if day and len(self.lights) < 2:
            self.daylight(wall, along, (w, low, high))

    def daylight(self, wall: int, along: float, hole: tuple[float, float, float]) -> None:
        """Light of the sky, and perhaps a sun that draws its patch on the floor. The hole: half width, from, to."""
        x, y, yaw = self.at_wall(wall, along)
        w, low, high = hole
        center = np.array([x, y, (low + high) / 2])
        if self.rng.random() < 0.5:
            turn, drop = yaw + math.pi / 2 + self.rng.uniform(-0.8, 0.8), self.rng.uniform(0.45, 1.0)
            beam = np.array(
                [math.cos(turn) * math.cos(drop), math.sin(turn) * math.cos(drop), -math.sin(drop)]
            )
            axis = 1 - wall % 2
            middle = float(center[1 - axis])
            opening = (axis, float(center[axis]), (middle - w, middle + w, low, high))
            self.lights.append(Light(center - 40 * beam, (2.2, 1.95, 1.5), 0.35, math.inf, opening))
        strength = float(self.rng.uniform(0.6, 1.2))
        inside = center + 0.25 * np.array([-math.sin(yaw), math.cos(yaw), 0.0])
        self.lights.append(Light(inside, (0.75 * strength, 0.9 * strength, 1.1 * strength), 0.3))

    def against_wall(self, piece: Piece) -> None:
        """Try to find a place at a wall for a piece of furniture."""
        kit = Kit(self.palette)
        piece(kit)
        x0, x1, _, y1, height = extent(kit.solids)
        for _ in range(30):
            wall = int(self.rng.integers(4))
            spare = self.length(wall) - (x1 - x0)
            if spare < 0.12 or height > self.size[2] - 0.05:
                continue
            along = float(self.rng.uniform(0.06, spare - 0.05)) - x0
            place = self.at_wall(wall, along)
            box, area = turned((x0, x1, 0.0, y1), *place), (along + x0, along + x1, 0.0, height)
            if self.floor_is_free(box) and self.wall_is_free(wall, area, 0.0):
                self.add(kit, *place)
                self.footprints.append(box)
                self.on_walls.append((wall, area))
                return

    def in_the_middle(self, piece: Piece) -> None:
        """Try to find a place away from the walls, at any angle."""
        kit = Kit(self.palette)
        piece(kit)
        x0, x1, y0, y1, _ = extent(kit.solids)
        for _ in range(20):
            x, y = (float(self.rng.uniform(0.2, self.size[i] - 0.2)) for i in range(2))
            yaw = float(self.rng.uniform(0, 2 * math.pi))
            box = turned((x0, x1, y0, y1), x, y, yaw)
            if self.floor_is_free(box, 0.1):
                self.add(kit, x, y, yaw)
                self.footprints.append(box)
                return

    def rug(self) -> None:
        """Perhaps a rug on the floor."""
        kit, p = Kit(self.palette), self.palette
        if kit.chance(0.4):
            return
        pattern = str(self.rng.choice(["carpet", "stripes", "checker", "painting"]))
        cloth = p.make(pattern, tuple(p.color() for _ in range(4)), (0.15, 0.5))
        if kit.chance(0.3):
            kit.column(0, 0, (0, 0.012), kit.uniform(0.6, 1.2), cloth, casts=False)
        else:
            w, d = kit.uniform(0.6, 1.3), kit.uniform(0.5, 1.0)
            kit.box((-w, w), (-d, d), (0, 0.012), cloth, casts=False)
        x, y = (kit.uniform(0.35, 0.65) * self.size[i] for i in range(2))
        self.add(kit, x, y, float(self.rng.normal(0, 0.3)))

    def decoration(self, wall: int) -> None:
        """A framed picture or a small shelf, if the chosen part of the wall is empty."""
        kit, p = Kit(self.palette), self.palette
        w, h, z = kit.uniform(0.18, 0.55), kit.uniform(0.15, 0.4), kit.uniform(1.45, 1.75)
        along = kit.uniform(w + 0.1, max(self.length(wall) - w - 0.1, w + 0.11))
        if not self.wall_is_free(wall, (along - w, along + w, z - h, z + h)):
            return
        if kit.chance(0.75):
            art = p.make("painting", tuple(p.color((0.1, 0.9), (0.1, 0.95)) for _ in range(4)), 2 * h, 0.1)
            kit.box((-w, w), (0, 0.03), (z - h, z + h), p.body())
            kit.box((-w + 0.04, w - 0.04), (0.03, 0.034), (z - h + 0.04, z + h - 0.04), art, casts=False)
        else:
            kit.box((-w, w), (0, 0.22), (z - 0.012, z + 0.012), p.body())
            kit.clutter((-w, w), (0.0, 0.22), z + 0.012, 2)
        self.add(kit, *self.at_wall(wall, along))
        self.on_walls.append((wall, (along - w, along + w, z - h, z + h)))

    def lamps(self) -> None:
        """Light in the shade of a floor lamp, and mostly a lamp under the ceiling; three lights at most."""
        kit, rng, top = Kit(self.palette), self.rng, self.size[2]
        warm = np.array([1.15, 1.0, 0.75]) if kit.chance(0.6) else np.array([0.95, 1.0, 1.05])

        def lamp(position, strength: float, radius: float, reach: float) -> Light:
            r, g, b = (warm * strength).tolist()
            return Light(np.asarray(position), (r, g, b), radius, reach)

        shades = [solid for solid in self.solids if solid.material.glow == LAMP_GLOW]
        for shade in shades[: 3 - len(self.lights)][:1]:
            self.lights.append(lamp(shade.center, kit.uniform(0.5, 1.0), 0.08, 1.6))
        if len(self.lights) == 3 or (self.lights and kit.chance(0.25)):
            return
        glow = Material("plain", ((1.0, 0.93, 0.8),), glow=1.3)
        drop = kit.uniform(0.1, 0.5) if top > 2.6 else 0.1
        kit.column(0, 0, (top - drop, top), 0.01, self.palette.metal(), casts=False)
        if kit.chance(0.5):
            kit.ball(0, 0, top - drop - 0.04, (0.13, 0.13, 0.13), glow)
        else:
            kit.column(0, 0, (top - drop - 0.08, top - drop + 0.05), 0.2, glow, taper=-0.25)
        kit.solids = [replace(solid, casts=False) for solid in kit.solids]
        x, y = (kit.uniform(0.35, 0.65) * self.size[i] for i in range(2))
        self.add(kit, x, y, 0.0)
        self.lights.append(lamp((x, y, top - drop - 0.1), float(rng.uniform(0.8, 1.4)), 0.12, 2.8))


def overlap(a: Rectangle, b: Rectangle, gap: float) -> bool:
    """Whether two rectangles come closer than `gap` [m] along both axes."""
    return all(a[i] < b[i + 1] + gap and b[i] < a[i + 1] + gap for i in (0, 2))


def turned(box: Rectangle, x: float, y: float, yaw: float) -> Rectangle:
    """Bounds on the floor of a rectangle that is turned by `yaw` about its frame's origin, which comes to (x, y)."""
    c, s = math.cos(yaw), math.sin(yaw)
    corners = [(a, b) for a in box[:2] for b in box[2:]]
    xs, ys = [x + c * a - s * b for a, b in corners], [y + s * a + c * b for a, b in corners]
    return min(xs), max(xs), min(ys), max(ys)


def extent(solids: list[Solid]) -> tuple[float, float, float, float, float]:
    """Bounds x0, x1, y0, y1 and height of the solids of a piece, in the frame they are given in [m]."""
    corners = np.concatenate([solid.corners() for solid in solids])
    low, high = corners.min(0).tolist(), corners.max(0).tolist()
    return low[0], high[0], low[1], high[1], high[2]
