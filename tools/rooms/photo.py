"""From a room and a camera to exact depth and a photo: visibility, light and shadow, and what a sensor makes of it."""

import math

import numpy as np
from numpy.typing import DTypeLike

from rooms.camera import Camera
from rooms.interior import Light, Room
from rooms.textures import PATTERNS, Noise

SAMPLES = 2  # rays a pixel of a photo, along each axis


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


def render_photo(room: Room, camera: Camera, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A photo of the room, uint8 `[H, W, 3]`; exposure, tint and sensor noise are drawn from `rng`."""
    noise = Noise(np.random.default_rng(20))
    rays = camera.rays(size, SAMPLES, np.float32).reshape(3, -1)
    depth, hit = (a.ravel() for a in cast(room, camera, size, SAMPLES, np.float32))
    points = rays * depth + camera.position.astype(np.float32)[:, None]
    albedo, normals = np.empty_like(points), np.zeros_like(points)
    gloss, glow = np.zeros_like(depth), np.zeros_like(depth)
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
        gloss[part], glow[part] = material.gloss, material.glow
    radiance = albedo * (ambient_light(room, points, normals) + glow)
    # Each ray of a pixel sees a lamp at another place of it: their mean has a soft shadow.
    rows, columns = np.indices((size[0] * SAMPLES, size[1] * SAMPLES))
    corner = ((rows % SAMPLES) * SAMPLES + columns % SAMPLES).ravel()
    offsets = np.array([[1, 0, 0.4], [0, 1, -0.4], [0, -1, 0.4], [-1, 0, -0.4]], np.float32).T[:, corner]
    for light in room.lights:
        add_light(radiance, room, light, offsets, points, normals, albedo, gloss, rays)
    return develop(radiance.reshape(3, size[0], SAMPLES, size[1], SAMPLES).mean((2, 4)), rng)


def ambient_light(room: Room, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Light from everywhere, `[3, N]`; it fades in the corners of the room and around the feet of furniture."""
    light = 0.85 + 0.15 * normals[2]
    for axis in range(3):
        facing = 0.32 * (1 - np.abs(normals[axis]))
        for distance in (points[axis], room.size[axis] - points[axis]):
            light *= 1 - facing * np.exp(np.minimum(distance, 2) / -0.25)
    floor = np.flatnonzero((points[2] < 0.02) & (normals[2] > 0.9))
    x, y = points[0, floor], points[1, floor]
    for x0, x1, y0, y1 in room.footprints:
        away = np.hypot(np.maximum(np.maximum(x0 - x, x - x1), 0), np.maximum(np.maximum(y0 - y, y - y1), 0))
        light[floor] *= 1 - 0.3 * np.exp(away / -0.15)
    return light * np.array(room.ambient, np.float32)[:, None]


def add_light(radiance, room: Room, light: Light, offsets, points, normals, albedo, gloss, rays) -> None:
    """Add what one light contributes, with shadows and highlights, to `radiance` `[3, N]`."""
    origin = points + np.float32(2e-3) * normals
    toward = light.position.astype(np.float32)[:, None] + np.float32(light.radius) * offsets - origin
    lit = dot(toward, normals) > 0
    if light.opening is not None:
        axis, wall, (left, right, low, high) = light.opening
        t = (wall - origin[axis]) / toward[axis]
        side, height = origin[1 - axis] + t * toward[1 - axis], origin[2] + t * toward[2]
        lit &= (t > 0) & (side > left) & (side < right) & (height > low) & (height < high)
    index = np.flatnonzero(lit)
    index = index[~shadowed(room, light, origin[:, index], toward[:, index])]
    toward, normals = toward[:, index], normals[:, index]
    distance = np.sqrt(dot(toward, toward))
    toward /= distance
    strength = dot(toward, normals)
    if not math.isinf(light.reach):
        strength /= 1 + (distance / light.reach) ** 2
    color = np.array(light.color, np.float32)[:, None]
    radiance[:, index] += color * albedo[:, index] * strength
    shiny = np.flatnonzero(gloss[index] > 0)
    look = rays[:, index[shiny]]
    half = toward[:, shiny] - look / np.sqrt(dot(look, look))
    shine = np.maximum(dot(half, normals[:, shiny]) / np.sqrt(dot(half, half)), 0) ** 32
    radiance[:, index[shiny]] += color * (0.6 * gloss[index[shiny]] * shine)


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products `[N]` of vectors `[3, N]`."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def shadowed(room: Room, light: Light, origin: np.ndarray, toward: np.ndarray) -> np.ndarray:
    """Whether a solid stands between points `[3, N]` and the light, which is at `origin + toward`."""
    dark = np.zeros(origin.shape[1], bool)
    distance = np.sqrt(dot(toward, toward))
    direction = toward / -distance  # from the light to the point
    for first, end in room.pieces or ((0, len(room.solids)),):
        casting = [index for index in range(first, end) if room.solids[index].casts]
        if not casting:
            continue
        points = np.flatnonzero(
            behind(room.corners[casting].reshape(-1, 3), light, direction, distance) & ~dark
        )
        if not points.size:
            continue
        # Points, and for them four short-cuts to their rows, that this piece may shade.
        here = [a[..., points] for a in (origin, toward, direction, distance)]
        hidden = np.zeros(points.size, bool)
        for index in casting:
            near = np.flatnonzero(behind(room.corners[index], light, here[2], here[3]) & ~hidden)
            if near.size:
                t = room.solids[index].hit(here[0][:, near], here[1][:, near])
                hidden[near[t < 0.999]] = True
        dark[points[hidden]] = True
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
    exposure = rng.uniform(0.22, 0.4) / key
    exposure = min(exposure, 1.6 / float(np.quantile(brightness, 0.9)))
    tint = np.clip(rng.normal(1, 0.05, (3, 1, 1)), 0.85, 1.15)
    vignette = 1 - rng.uniform(0.0, 0.2) * (x * x + y * y) / 2
    image = (1 - np.exp(-1.2 * exposure * radiance * tint * vignette)) ** (1 / 2.2)
    image += rng.normal(0, 1, image.shape) * rng.uniform(0.004, 0.018) * (1.3 - 0.6 * image)
    return np.ascontiguousarray((np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0))


def place_camera(room: Room, rng: np.random.Generator) -> Camera:
    """A hand-held view at eye height that nothing blocks: the first good one of some random ones, or the best."""
    best, best_score = None, -math.inf
    for _ in range(40):
        position = np.array(
            [*(rng.uniform(0.25, room.size[i] - 0.25) for i in range(2)), rng.uniform(1.3, 1.65)]
        )
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
    if best is None:  # a crammed room: look down from its middle, under the ceiling
        position = np.array([room.size[0] / 2, room.size[1] / 2, room.size[2] - 0.2])
        return Camera.looking(position, rng.uniform(0, 2 * math.pi), -0.5)
    return best
