"""Procedural surfaces: noise, patterns, and the palette that gives a room its taste."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Color = tuple[float, float, float]  # linear RGB in [0, 1]
Range = tuple[float, float]


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

    def mix(self, weight, first: int = 0, second: int = 1) -> np.ndarray:
        """Blend two of the colours by `weight` `[N]` (0 = first): `[3, N]`."""
        a, b = (np.array(self.colors[i % len(self.colors)], np.float32)[:, None] for i in (first, second))
        return a + (b - a) * weight


class Noise:
    """Smooth random fields over the plane, read from one table of random numbers.

    Args:
        rng: fills the table.
    """

    def __init__(self, rng: np.random.Generator):
        self.table = rng.random((256, 256), dtype=np.float32)

    def cell(self, i, j, seed: int = 0) -> np.ndarray:
        """A number in [0, 1) for each pair of integers; it repeats every 256."""
        i, j = np.asarray(i).astype(np.int32), np.asarray(j).astype(np.int32)
        return self.table[(i + 37 * seed) & 255, (j + 101 * seed) & 255]

    def smooth(self, u, v, seed: int = 0) -> np.ndarray:
        """Value noise in [0, 1) with lattice step 1."""
        i, j = np.floor(u), np.floor(v)
        fu, fv = u - i, v - j
        fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
        near = self.cell(i, j, seed) * (1 - fv) + self.cell(i, j + 1, seed) * fv
        far = self.cell(i + 1, j, seed) * (1 - fv) + self.cell(i + 1, j + 1, seed) * fv
        return near * (1 - fu) + far * fu

    def cloud(self, u, v, seed: int = 0) -> np.ndarray:
        """Three octaves of `smooth`, in [0, 1)."""
        octaves = [self.smooth(u * 2**k, v * 2**k, seed + k) * 0.5**k for k in range(3)]
        return (octaves[0] + octaves[1] + octaves[2]) / 1.75


def grooves(x, period: float, width: float) -> np.ndarray:
    """1 in grooves of the given width [m] that repeat every `period` [m], 0 between them."""
    return (np.abs((x / period + 0.5) % 1 - 0.5) * period < width / 2).astype(np.float32)


def plain(m: Material, u, v, noise: Noise) -> np.ndarray:
    """One colour with faint large stains."""
    return m.mix(0, 0, 0) * (0.93 + 0.14 * noise.smooth(u * 2, v * 2, m.seed))


def plaster(m: Material, u, v, noise: Noise) -> np.ndarray:
    """A painted wall: stains and fine grain."""
    stains = 0.16 * noise.cloud(u * 1.5, v * 1.5, m.seed)
    return m.mix(0, 0, 0) * (0.88 + stains + 0.06 * noise.smooth(u * 40, v * 40, 5))


def carpet(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Speckle of two colours."""
    speckle = 0.65 * noise.smooth(u * 55, v * 55, m.seed) + 0.35 * noise.smooth(u * 5, v * 5, m.seed + 1)
    return m.mix(np.clip(2.2 * speckle - 0.6, 0, 1))


def stripes(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Bands of two colours."""
    band = ((u / m.scale) % 1 < 0.5).astype(np.float32)
    return m.mix(band) * (0.92 + 0.16 * noise.smooth(u * 9, v * 9, m.seed))


def checker(m: Material, u, v, noise: Noise) -> np.ndarray:
    """A chessboard."""
    square = (np.floor(u / m.scale) + np.floor(v / m.scale)) % 2
    return m.mix(square) * (0.9 + 0.2 * noise.cloud(u * 4, v * 4, m.seed))


def tiles(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Tiles of slightly different shades, with grout."""
    shade = 0.82 + 0.26 * noise.cell(np.floor(u / m.scale), np.floor(v / m.scale), m.seed)
    joint = np.maximum(grooves(u, m.scale, 0.02), grooves(v, m.scale, 0.02))
    return m.mix(0, 0, 0) * (shade + 0.1 * noise.cloud(u * 6, v * 6, m.seed)) * (1 - 0.45 * joint)


def bricks(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Staggered courses of bricks, with mortar in the second colour."""
    course = np.floor(v / 0.08)
    along = u + 0.12 * (course % 2)
    shade = 0.7 + 0.6 * noise.cell(np.floor(along / 0.24), course, m.seed)
    joint = np.maximum(grooves(along, 0.24, 0.014), grooves(v, 0.08, 0.014))
    return m.mix(joint) * (joint + shade * (1 - joint))


def boards(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Wooden boards along u, each of its own shade, with grain and joints."""
    board = np.floor(v / m.scale)
    fibre = noise.cloud(u * 1.3 + 7 * noise.cell(board, 0, m.seed), v * 28, m.seed)
    joint = grooves(v, m.scale, 0.008)
    ends = grooves(u + 9 * noise.cell(board, 3, m.seed), 1.6, 0.008)
    shade = (0.8 + 0.35 * noise.cell(board, 1, m.seed)) * (1 - 0.5 * np.maximum(joint, ends))
    return m.mix(np.clip(1.5 * fibre - 0.2, 0, 1)) * shade


def wood(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Wood without joints, for furniture."""
    return m.mix(np.clip(1.6 * noise.cloud(u * 2, v * 22, m.seed) - 0.3, 0, 1))


def books(m: Material, u, v, noise: Noise) -> np.ndarray:
    """A row of book spines on a shelf of height `scale`; dark above them and in the gaps."""
    i = np.floor(u / 0.037 + 0.8 * noise.smooth(u * 6, 0 * u, m.seed))
    pick = (noise.cell(i, 0, m.seed) * 97).astype(int) % len(m.colors)
    spine = np.array(m.colors, np.float32)[pick].T * (0.65 + 0.5 * noise.cell(i, 1, m.seed))
    label = np.abs(v / m.scale + 0.15 + 0.2 * noise.cell(i, 2, m.seed)) < 0.05
    gap = (v > (0.1 + 0.4 * noise.cell(i, 3, m.seed)) * m.scale) | (noise.cell(i, 4, m.seed) < 0.06)
    return np.where(gap, np.float32(0.02), np.where(label, spine * 2.2 + 0.05, spine))


def painting(m: Material, u, v, noise: Noise) -> np.ndarray:
    """An abstract picture of four colours."""
    shapes = noise.cloud(u / m.scale * 3, v / m.scale * 3, m.seed)
    ground = noise.cloud(u / m.scale * 2, v / m.scale * 5, m.seed + 9) > 0.52
    return np.where(
        ground, m.mix(np.clip(5 * shapes - 2, 0, 1), 2, 3), m.mix(np.clip(6 * shapes - 2.6, 0, 1))
    )


def outdoors(m: Material, u, v, noise: Noise) -> np.ndarray:
    """What a window shows: sky, and trees below it."""
    height = v / m.scale
    trees = height < -0.4 + 0.5 * noise.cloud(u * 3, 0 * u, m.seed)
    sky = m.mix(np.clip(height + 0.5, 0, 1)) * (0.85 + 0.3 * noise.cloud(u * 1.5, v * 3, m.seed + 4))
    return np.where(trees, m.mix(noise.cloud(u * 9, v * 9, m.seed), 2, 3), sky)


def screen(m: Material, u, v, noise: Noise) -> np.ndarray:
    """A monitor with blocks of two colours on it."""
    lit = noise.cell(np.floor(u / m.scale * 4), np.floor(v / m.scale * 5), m.seed) > 0.6
    return m.mix(lit.astype(np.float32))


Pattern = Callable[[Material, np.ndarray, np.ndarray, Noise], np.ndarray]
ALL = (
    plain,
    plaster,
    carpet,
    stripes,
    checker,
    tiles,
    bricks,
    boards,
    wood,
    books,
    painting,
    outdoors,
    screen,
)
PATTERNS: dict[str, Pattern] = {pattern.__name__: pattern for pattern in ALL}


def darker(color: Color, factor: float) -> Color:
    """A colour times a factor."""
    return color[0] * factor, color[1] * factor, color[2] * factor


class Palette:
    """Random materials of a kind; one palette a room, so that a room has a taste of its own.

    Args:
        rng: where the choices come from.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.hue = rng.random()
        self.wood_hue, self.wood_value = rng.uniform(0.04, 0.1), rng.uniform(0.2, 0.75)

    def color(
        self, saturation: Range = (0.2, 0.8), value: Range = (0.25, 0.9), hue: float | None = None
    ) -> Color:
        """A random colour; where the hue is free, half of them stay near the hue of the room."""
        if hue is None:
            hue = self.hue + self.rng.normal(0, 0.06) if self.rng.random() < 0.5 else self.rng.random()
        r, g, b = colorsys.hsv_to_rgb(hue % 1, self.rng.uniform(*saturation), self.rng.uniform(*value))
        return r**2.2, g**2.2, b**2.2

    def make(
        self, pattern: str, colors: tuple[Color, ...], scale: Range | float = 0.3, gloss=0.0, glow=0.0
    ) -> Material:
        """A material with noise of its own, and a scale from a range."""
        size = float(self.rng.uniform(*scale)) if isinstance(scale, tuple) else scale
        return Material(pattern, colors, size, gloss, glow, int(self.rng.integers(1000)))

    def timber(self, width: float | None = None) -> Material:
        """Furniture wood, or boards of the given width [m]."""
        value = float(np.clip(self.wood_value + self.rng.normal(0, 0.06), 0.15, 0.85))
        hue = self.wood_hue + self.rng.normal(0, 0.01)
        colors = tuple(self.color((0.35, 0.65), (value * k, value * k), hue) for k in (0.78, 1.1))
        return self.make("boards" if width else "wood", colors, width or 0.3, self.rng.uniform(0, 0.25))

    def fabric(self) -> Material:
        """Cloth: plain, speckled, striped or checked."""
        pattern = str(self.rng.choice(["plain", "carpet", "carpet", "stripes", "checker"]))
        return self.make(pattern, (self.color(), self.color()), (0.08, 0.3))

    def paint(
        self, saturation: Range = (0.0, 0.7), value: Range = (0.2, 0.95), gloss: float = 0.15
    ) -> Material:
        """Lacquer or plastic."""
        return self.make("plain", (self.color(saturation, value),), gloss=gloss)

    def white(self) -> Material:
        """White paint or linen."""
        return self.paint((0, 0.1), (0.78, 0.96), 0.0)

    def black(self) -> Material:
        """Shiny black plastic."""
        return self.paint((0, 0.1), (0.05, 0.18), 0.6)

    def metal(self) -> Material:
        """Steel, or something darker."""
        return self.paint((0, 0.1), (0.15, 0.7), 0.6)

    def body(self) -> Material:
        """What cabinets are made of."""
        return self.timber() if self.rng.random() < 0.6 else self.paint((0, 0.35), (0.35, 0.95))

    def leaves(self) -> Material:
        """Green of two shades."""
        light, dark = self.color((0.5, 0.8), (0.3, 0.6), 0.3), self.color((0.5, 0.8), (0.15, 0.3), 0.33)
        return self.make("carpet", (light, dark))

    def floor(self) -> Material:
        """Boards, tiles, carpet or a chessboard."""
        kind = self.rng.choice(["boards", "boards", "tiles", "carpet", "checker"])
        if kind == "boards":
            return self.timber(float(self.rng.uniform(0.07, 0.2)))
        if kind == "tiles":
            return self.make("tiles", (self.color((0, 0.35), (0.4, 0.9)),), (0.2, 0.5), 0.35)
        if kind == "carpet":
            pile = self.color((0.05, 0.5), (0.3, 0.75))
            return self.make("carpet", (pile, darker(pile, 0.55)))
        light, dark = self.color((0, 0.2), (0.75, 0.95)), self.color((0, 0.5), (0.2, 0.6))
        return self.make("checker", (light, dark), (0.25, 0.45), 0.3)

    def wall(self) -> Material:
        """Paint mostly; some wallpaper, brick and wood."""
        kind = self.rng.choice(["plaster", "stripes", "bricks", "boards"], p=[0.76, 0.12, 0.06, 0.06])
        hue = self.rng.choice([self.rng.normal(0.1, 0.03), self.rng.uniform(0.2, 0.65), self.rng.random()])
        base = self.color((0.0, 0.3), (0.55, 0.93), float(hue))
        if kind == "boards":
            return self.timber(0.14)
        if kind == "stripes":
            return self.make("stripes", (base, darker(base, 0.72)), (0.12, 0.5))
        if kind == "bricks":
            return self.make("bricks", (self.color((0.3, 0.65), (0.4, 0.75), 0.03), (0.45, 0.43, 0.4)))
        return self.make("plaster", (base,))
