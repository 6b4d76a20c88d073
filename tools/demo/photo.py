"""A photo of a room: procedural surfaces, light and shadow, and what a sensor makes of it."""

import math

import numpy as np

from tools.demo.scene import Camera, Light, Material, Room, cast

SAMPLES = 2  # rays a pixel, along each axis


class Noise:
    """Smooth random fields over the plane, read from one table of random numbers."""

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


def mix(m: Material, weight, first: int = 0, second: int = 1) -> np.ndarray:
    """Blend two colours of a material by `weight` `[N]` (0 = first): `[3, N]`."""
    a, b = (np.array(m.colors[i % len(m.colors)], np.float32)[:, None] for i in (first, second))
    return a + (b - a) * weight


def grooves(x, period: float, width: float) -> np.ndarray:
    """1 in grooves of the given width [m] that repeat every `period` [m], 0 between them."""
    return (np.abs((x / period + 0.5) % 1 - 0.5) * period < width / 2).astype(np.float32)


def plaster(m: Material, u, v, noise: Noise) -> np.ndarray:
    """One colour with stains and fine grain: walls, paint, plastic."""
    stains = 0.14 * noise.smooth(u * 2, v * 2, m.seed) + 0.05 * noise.smooth(u * 40, v * 40, 5)
    return mix(m, 0, 0, 0) * (0.9 + stains)


def speckle(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Speckle of two colours: carpet, cloth, leaves."""
    field = 0.65 * noise.smooth(u * 55, v * 55, m.seed) + 0.35 * noise.smooth(u * 5, v * 5, m.seed + 1)
    return mix(m, np.clip(2.2 * field - 0.6, 0, 1))


def stripes(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Bands of two colours."""
    return mix(m, (u / m.scale) % 1 < 0.5) * (0.92 + 0.16 * noise.smooth(u * 9, v * 9, m.seed))


def tiles(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Tiles with grout, of one colour or as a chessboard of two."""
    i, j = np.floor(u / m.scale), np.floor(v / m.scale)
    joint = np.maximum(grooves(u, m.scale, 0.02), grooves(v, m.scale, 0.02))
    return mix(m, (i + j) % 2) * (0.85 + 0.25 * noise.cell(i, j, m.seed)) * (1 - 0.4 * joint)


def wood(m: Material, u, v, noise: Noise) -> np.ndarray:
    """Grain along u, in boards as wide as `scale`, each of its own shade."""
    board = np.floor(v / m.scale + 0.5)
    grain = noise.smooth(u * 1.5 + 7 * noise.cell(board, 0, m.seed), v * 25, m.seed)
    joint = np.maximum(grooves(v + m.scale / 2, m.scale, 0.008), 0)
    return mix(m, grain) * (0.8 + 0.35 * noise.cell(board, 1, m.seed)) * (1 - 0.5 * joint)


def books(m: Material, u, v, noise: Noise) -> np.ndarray:
    """A row of book spines on a shelf of height `scale`; dark above them and in the gaps."""
    i = np.floor(u / 0.037 + 0.8 * noise.smooth(u * 6, 0 * u, m.seed))
    pick = (noise.cell(i, 0, m.seed) * 97).astype(int) % len(m.colors)
    spine = np.array(m.colors, np.float32)[pick].T * (0.65 + 0.5 * noise.cell(i, 1, m.seed))
    gap = (v > (0.1 + 0.4 * noise.cell(i, 3, m.seed)) * m.scale) | (noise.cell(i, 4, m.seed) < 0.06)
    return np.where(gap, np.float32(0.02), spine)


def painting(m: Material, u, v, noise: Noise) -> np.ndarray:
    """An abstract picture of four colours."""
    shapes = noise.smooth(u / m.scale * 4, v / m.scale * 4, m.seed)
    ground = noise.smooth(u / m.scale * 2, v / m.scale * 6, m.seed + 9) > 0.52
    weight = np.clip(5 * shapes - 2, 0, 1)
    return np.where(ground, mix(m, weight, 2, 3), mix(m, weight))


def outdoors(m: Material, u, v, noise: Noise) -> np.ndarray:
    """What a window shows: sky, and trees below it."""
    height = v / m.scale
    trees = height < -0.35 + 0.4 * noise.smooth(u * 4, 0 * u, m.seed)
    return np.where(
        trees, mix(m, noise.smooth(u * 9, v * 9, m.seed), 2, 3), mix(m, np.clip(height + 0.5, 0, 1))
    )


PATTERNS = {p.__name__: p for p in (plaster, speckle, stripes, tiles, wood, books, painting, outdoors)}


def render_photo(room: Room, camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A photo of the room, uint8 `[H, W, 3]`; exposure, tint and sensor noise are drawn from `rng`."""
    noise = Noise(np.random.default_rng(20))
    rays = camera.rays(size, SAMPLES, np.float32).reshape(3, -1)
    depth, hit = (a.ravel() for a in cast(room, camera, size, SAMPLES, np.float32))
    points = rays * depth + camera.position.astype(np.float32)[:, None]
    albedo, normals, glow = np.empty_like(points), np.zeros_like(points), np.zeros_like(depth)
    order = np.argsort(hit, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(hit[order])) + 1):
        number, where = int(hit[part[0]]), points[:, part]
        if number < 6:
            axis, material = number // 2, room.surfaces[number]
            normals[axis, part] = -1 if number % 2 else 1
            uv = where[[0, 1]] if axis == 2 else where[[1 - axis, 2]]  # patterns on walls stand upright
        else:
            material = room.solids[number - 6].material
            normals[:, part], uv = room.solids[number - 6].surface(where)
        albedo[:, part] = PATTERNS[material.pattern](material, uv[0], uv[1], noise)
        glow[part] = material.glow
    radiance = albedo * (ambient_light(room, points, normals) + glow)
    # Each ray of a pixel sees a lamp at another place of it: their mean has a soft shadow.
    rows, columns = np.indices((size[0] * SAMPLES, size[1] * SAMPLES))
    corner = ((rows % SAMPLES) * SAMPLES + columns % SAMPLES).ravel()
    offsets = np.array([[1, 0, 0.4], [0, 1, -0.4], [0, -1, 0.4], [-1, 0, -0.4]], np.float32).T[:, corner]
    for light in room.lights:
        origin = points + np.float32(2e-3) * normals
        toward = light.position.astype(np.float32)[:, None] + np.float32(light.radius) * offsets - origin
        lit = np.flatnonzero((toward * normals).sum(0) > 0)
        lit = lit[~shadowed(room, light, origin[:, lit], toward[:, lit])]
        distance = np.sqrt((toward[:, lit] ** 2).sum(0))
        strength = (toward[:, lit] * normals[:, lit]).sum(0) / distance / (1 + (distance / light.reach) ** 2)
        radiance[:, lit] += np.array(light.color, np.float32)[:, None] * albedo[:, lit] * strength
    return develop(radiance.reshape(3, size[0], SAMPLES, size[1], SAMPLES).mean((2, 4)), rng)


def ambient_light(room: Room, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light from everywhere, `[3, N]`; it fades in the corners of the room."""
    light = 0.85 + 0.15 * normals[2]
    for axis in range(3):
        facing = 0.32 * (1 - np.abs(normals[axis]))
        for distance in (points[axis], room.size[axis] - points[axis]):
            light *= 1 - facing * np.exp(np.minimum(distance, 2) / -0.25)
    return light * np.array(room.ambient, np.float32)[:, None]


def shadowed(room: Room, light: Light, origin: np.ndarray, toward: np.ndarray) -> np.ndarray:
    """Whether a solid stands between points `[3, N]` and the light, which is at `origin + toward`."""
    dark = np.zeros(origin.shape[1], bool)
    distance = np.sqrt((toward**2).sum(0))
    direction = toward / -distance  # from the light to the point
    for first, end in room.pieces or ((0, len(room.solids)),):
        casting = [index for index in range(first, end) if room.solids[index].casts]
        if not casting:
            continue
        points = np.flatnonzero(
            behind(room.corners[casting].reshape(-1, 3), light, direction, distance) & ~dark
        )
        here = [a[..., points] for a in (origin, toward, direction, distance)]
        for index in casting:
            near = np.flatnonzero(behind(room.corners[index], light, *here[2:]) & ~dark[points])
            hidden = room.solids[index].hit(here[0][:, near], here[1][:, near]) < 0.999
            dark[points[near[hidden]]] = True
    return dark


def behind(corners: np.ndarray, light: Light, direction: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Which points the bounding sphere of some corners `[K, 3]` may hide from a light: a quick look before `hit`.

    Args:
        corners: what may stand in the way [m].
        light: where light comes from.
        direction: unit vectors `[3, N]` from the light to the points.
        distance: between light and points `[N]` [m].
    """
    center = (corners.min(0) + corners.max(0)) / 2
    radius = float(np.sqrt(((corners - center) ** 2).sum(1).max())) + light.radius
    x, y, z = (center - light.position).tolist()
    away = math.sqrt(x * x + y * y + z * z)
    possible = distance > away - radius
    if away > radius:  # inside the cone that the sphere cuts out of the light
        cosine = math.sqrt(away * away - radius * radius)
        possible &= x * direction[0] + y * direction[1] + z * direction[2] > cosine
    return possible


def develop(radiance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a camera makes of radiance `[3, H, W]`: exposure, tint, vignette, tone curve, noise. uint8 `[H, W, 3]`."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in radiance.shape[1:]), indexing="ij")
    brightness = radiance.mean(0)
    key = math.exp(float(np.log(brightness + 0.02).mean()))  # log-average, which windows do not dominate
    exposure = min(rng.uniform(0.22, 0.4) / key, 1.6 / float(np.quantile(brightness, 0.9)))
    tint = np.clip(rng.normal(1, 0.05, (3, 1, 1)), 0.85, 1.15)
    vignette = 1 - rng.uniform(0.0, 0.2) * (x * x + y * y) / 2
    image = (1 - np.exp(-1.2 * exposure * radiance * tint * vignette)) ** (1 / 2.2)
    image += rng.normal(0, 1, image.shape) * rng.uniform(0.004, 0.018) * (1.3 - 0.6 * image)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))
