"""The rendered rooms: depth against geometry, files against what NYU readers expect, and repeatability."""

import json
import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from finetune.depth_data import open_depth_data
from tools.demo import rooms as render_rooms
from tools.demo.furniture import ROOMS, furnish
from tools.demo.photo import PATTERNS, Noise, render_photo, shadowed
from tools.demo.scene import (
    Camera,
    Light,
    Material,
    Room,
    Solid,
    cast,
    intrinsics,
    random_view,
    render_depth,
)

ROOT = Path(__file__).resolve().parents[2]

SIZE = (48, 64)
EMPTY = Room((6.0, 4.0, 2.5))
SMALL = render_rooms.Settings(scenes=8, views=2, unlabeled=3, size=(24, 32), seed=5)


def camera_at(
    x: float, y: float, z: float, yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0
) -> Camera:
    return Camera.looking((x, y, z), yaw, pitch, roll)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "rooms"
    render_rooms.render(folder, SMALL, workers=1)
    return folder


def test_intrinsics_are_nyu_at_its_own_size_and_scale_with_the_image():
    assert intrinsics((480, 640)) == pytest.approx((518.858, 519.470, 325.582, 253.736))
    fx, fy, cx, cy = intrinsics((120, 160))
    assert (fx, fy) == pytest.approx((518.858 / 4, 519.470 / 4))
    # The same point of the image plane: pixel edges, which lie half a pixel outside the centres, scale exactly.
    assert ((cx + 0.5) * 4 - 0.5, (cy + 0.5) * 4 - 0.5) == pytest.approx((325.582, 253.736))


def test_rotation_is_a_rotation_and_looks_where_asked():
    camera = camera_at(1, 1, 1, yaw=0.7, pitch=-0.3, roll=0.2)
    right, down, forward = camera.rotation.T
    np.testing.assert_allclose(camera.rotation.T @ camera.rotation, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(np.cross(right, down), forward, atol=1e-12)
    assert math.atan2(forward[1], forward[0]) == pytest.approx(0.7)
    assert math.asin(forward[2]) == pytest.approx(-0.3)
    assert camera_at(1, 1, 1).rotation[2, 1] == -1  # level camera: image down is world down


def test_a_wall_straight_ahead_has_one_depth():
    depth, hit = cast(EMPTY, camera_at(3.0, 2.0, 1.25), SIZE)
    assert depth[hit == 1] == pytest.approx(3.0, abs=1e-12)  # z-depth, not distance: the same in the corners
    assert (hit == 1).mean() > 0.5


def test_a_slanted_wall_follows_its_plane():
    camera, (fx, _, cx, _) = camera_at(1.0, 2.0, 1.25, yaw=0.3), intrinsics(SIZE)
    depth, hit = cast(EMPTY, camera, SIZE)
    row = SIZE[0] // 2
    columns = np.flatnonzero(hit[row] == 1)
    # n . (position + t * direction) = 6 with n = +x
    expected = 5.0 / (math.cos(0.3) + (columns - cx) / fx * math.sin(0.3))
    np.testing.assert_allclose(depth[row, columns], expected, rtol=1e-12)


@pytest.mark.parametrize("roll", [0.0, 0.25])
def test_floor_and_ceiling_follow_the_plane_formula(roll):
    height, pitch, (fx, fy, cx, cy) = 1.4, -0.2, intrinsics(SIZE)
    depth, hit = cast(EMPTY, camera_at(0.5, 2.0, height, pitch=pitch, roll=roll), SIZE)
    v, u = np.indices(SIZE)
    x, y = (u - cx) / fx, (v - cy) / fy
    upright = math.cos(roll) * y + math.sin(roll) * x  # pixels along the direction in which the image sinks
    sinking = -math.sin(pitch) + upright * math.cos(pitch)
    np.testing.assert_allclose(depth[hit == 4], (height / sinking)[hit == 4], rtol=1e-9)
    np.testing.assert_allclose(depth[hit == 5], ((2.5 - height) / -sinking)[hit == 5], rtol=1e-9)
    assert (hit == 4).any()


def test_a_sphere_is_nearest_at_its_nearest_point():
    size, (fx, fy, cx, cy) = (480, 640), intrinsics((480, 640))
    camera = camera_at(1.0, 2.0, 1.25)
    # The centre of pixel (326, 254) looks a hair aside of the axis: put the sphere on that ray.
    ray = camera.rays(size)[:, 254, 326]
    center = np.array([1.0, 2.0, 1.25]) + 2.0 * ray
    room = Room(EMPTY.size, (Solid("ellipsoid", tuple(center), (0.5, 0.5, 0.5)),))
    depth, hit = cast(room, camera, size)
    distance = 2.0 * math.sqrt(ray @ ray) - 0.5
    assert depth[254, 326] == pytest.approx(distance / math.sqrt(ray @ ray), abs=1e-12)
    assert depth[hit == 6].min() == pytest.approx(1.5, abs=1e-4)
    area = math.pi * (0.5 / math.sqrt(4 - 0.25)) ** 2 * fx * fy  # of the silhouette, a circle about the axis
    assert (hit == 6).sum() == pytest.approx(area, rel=0.01)
    assert abs(np.argwhere(hit == 6).mean(0) - (cy, cx)).max() < 1


@pytest.mark.parametrize("yaw", [0.0, 0.6])
def test_box_cylinder_and_frustum_fronts(yaw):
    camera, row, column = camera_at(1.0, 2.0, 1.25), *(round(c) for c in intrinsics(SIZE)[:1:-1])
    ray = camera.rays(SIZE)[:, row, column]

    def front(shape: str, half: tuple[float, float, float], **options) -> float:
        solid = Solid(shape, (3.0, 2.0, 1.25), half, yaw=yaw, **options)
        return float(render_depth(Room(EMPTY.size, (solid,)), camera, SIZE)[row, column])

    # A turned square: the ray meets the side x' = -0.4, that is cos * x + sin * y = cos * 2 - 0.4 about the camera.
    assert front("box", (0.4, 0.4, 0.4)) == pytest.approx(
        (2 * math.cos(yaw) - 0.4) / (math.cos(yaw) * ray[0] + math.sin(yaw) * ray[1]), rel=1e-12
    )
    a, b = ray[0] ** 2 + ray[1] ** 2, 2 * ray[0]
    cylinder = (b - math.sqrt(b * b - a * (4 - 0.3**2))) / a
    assert front("frustum", (0.3, 0.3, 0.4)) == pytest.approx(cylinder, rel=1e-12)
    # A cone about the same axis: where the ray meets it, its radius has changed with the height there.
    t = front("frustum", (0.3, 0.3, 0.4), taper=0.5)
    x, y, z = t * ray - (2.0, 0.0, 0.0)
    assert math.hypot(x, y) == pytest.approx(0.3 * (1 + 0.5 * z / 0.4), rel=1e-9)


def test_caps_of_a_frustum_seen_from_above():
    camera = camera_at(3.0, 2.0, 2.4, pitch=-math.pi / 2)
    room = Room(EMPTY.size, (Solid("frustum", (3.0, 2.0, 0.5), (0.8, 0.8, 0.5), taper=-0.4),))
    depth, hit = cast(room, camera, SIZE)
    top = depth[(hit == 6) & (depth < 1.4 + 1e-9)]
    assert top == pytest.approx(1.4)
    radius = 0.8 * 0.6 / 1.4 * intrinsics(SIZE)[0]
    assert top.size == pytest.approx(math.pi * radius**2, rel=0.05)


def test_nearer_things_hide_farther_ones_and_samples_agree_with_pixel_centres():
    near, far = (
        Solid("box", (2.0, 2.0, 1.25), (0.1, 0.3, 0.3)),
        Solid("box", (3.0, 2.0, 1.25), (0.1, 0.9, 0.9)),
    )
    camera = camera_at(0.5, 2.0, 1.25, yaw=0.05)
    for solids in ((near, far), (far, near)):
        depth, hit = cast(Room(EMPTY.size, solids), camera, SIZE)
        assert len(np.unique(hit)) >= 4
    fine, _ = cast(Room(EMPTY.size, (near, far)), camera, SIZE, samples=3)
    np.testing.assert_allclose(
        fine[1::3, 1::3], depth, rtol=1e-12
    )  # the middle one of three is the pixel centre


def test_bounds_in_the_image_never_cut_a_solid_off():
    rng = np.random.default_rng(0)
    for trial in range(40):
        shape = ("box", "ellipsoid", "frustum")[trial % 3]
        half, center = tuple(rng.uniform(0.05, 0.6, 3)), tuple(rng.uniform((0.6, 0.6, 0.6), (5.4, 3.4, 1.9)))
        solid = Solid(shape, center, half, yaw=rng.uniform(0, 6), taper=rng.uniform(-0.5, 0.5))
        camera = camera_at(
            *rng.uniform((0.1, 0.1, 0.1), (5.9, 3.9, 2.4)), *rng.uniform(-3, 3, 1), rng.normal(0, 0.5)
        )
        if solid.contains(camera.position, 0.0):
            continue
        expected = np.minimum(
            render_depth(EMPTY, camera, SIZE), solid.hit(camera.position, camera.rays(SIZE))
        )  # every ray against the solid, without bounds
        np.testing.assert_array_equal(render_depth(Room(EMPTY.size, (solid,)), camera, SIZE), expected)


def test_normals_point_out_of_the_surface():
    rng = np.random.default_rng(1)
    for shape in ("box", "ellipsoid", "frustum"):
        solid = Solid(shape, (3.0, 2.0, 1.2), (0.7, 0.4, 0.5), yaw=0.8, taper=0.3)
        camera = camera_at(0.5, 2.0, 2.2, pitch=-0.3)
        depth, hit = cast(Room(EMPTY.size, (solid,)), camera, SIZE)
        rays = camera.rays(SIZE)[:, hit == 6]
        points = camera.position[:, None] + rays * depth[hit == 6]
        normals, uv = solid.surface(points)
        assert np.isfinite(uv).all()
        np.testing.assert_allclose((normals**2).sum(0), 1)
        assert ((normals * rays).sum(0) < 1e-9).all()  # what is seen faces the camera
        # A step along the normal leaves the body: a ray back along it hits the body a step away.
        chosen = rng.choice(points.shape[1], 50)
        start = points[:, chosen] + 0.01 * normals[:, chosen]
        np.testing.assert_allclose(solid.hit(start, -normals[:, chosen]), 0.01, rtol=1e-6)


@pytest.mark.parametrize("kind", list(ROOMS))
def test_random_rooms_are_within_the_range_of_nyu(kind):
    for seed in range(4):
        room = furnish(kind, np.random.default_rng(seed))
        assert math.dist((0, 0, 0), room.size) < 10
        assert 1 <= len(room.lights) <= 2
        camera = random_view(room, np.random.default_rng(seed))
        assert all(0 < p < s for p, s in zip(camera.position, room.size, strict=True))
        assert not any(solid.contains(camera.position, 0.0) for solid in room.solids)
        depth = render_depth(room, camera, SIZE)
        assert depth.min() > 0.1
        assert depth.max() < 10


def test_photos_are_lit_and_the_sensor_is_drawn_from_the_generator():
    room = furnish("kitchen", np.random.default_rng(3))
    camera = random_view(room, np.random.default_rng(3))
    photos = [render_photo(room, camera, SIZE, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert photos[0].dtype == np.uint8
    assert photos[0].shape == (*SIZE, 3)
    assert 50 < photos[0].mean() < 210
    assert photos[0].std() > 15
    np.testing.assert_array_equal(photos[0], photos[1])
    assert (photos[0] != photos[2]).any()


def test_every_pattern_colours_every_point():
    rng, noise = np.random.default_rng(0), Noise(np.random.default_rng(1))
    u, v = rng.uniform(-4, 4, (2, 500)).astype(np.float32)
    colors = tuple(tuple(rng.random(3)) for _ in range(4))
    for pattern in PATTERNS:
        albedo = PATTERNS[pattern](Material(pattern, colors), u, v, noise)  # type: ignore[arg-type]
        assert np.broadcast_shapes(albedo.shape, (3, 500)) == (3, 500)
        assert albedo.min() >= 0
        assert albedo.max() < 2.5
        assert albedo.std() > 0


def test_a_thing_before_the_lamp_throws_a_shadow():
    room, lamp = EMPTY, Light(np.array([3.0, 2.0, 2.3]), (1.0, 1.0, 1.0))
    below = np.array([lamp.position[0], lamp.position[1], 0.001], np.float32)[:, None]
    above = lamp.position.astype(np.float32)[:, None] - below
    tray = Solid("box", (*lamp.position[:2].tolist(), 0.5), (0.5, 0.5, 0.01))
    assert shadowed(Room(room.size, (tray,), lights=(lamp,)), lamp, below, above).all()
    assert not shadowed(Room(room.size, (), lights=(lamp,)), lamp, below, above).any()
    aside = Solid("box", (float(lamp.position[0]) + 0.8, float(lamp.position[1]), 0.5), (0.2, 0.2, 0.2))
    assert not shadowed(Room(room.size, (aside,), lights=(lamp,)), lamp, below, above).any()


def test_files_are_what_readers_of_nyu_expect(world):
    data = open_depth_data(world, "train.txt")
    assert len(data) == 6 * 2
    sample = data[3]
    assert sample.image.shape == (24, 32, 3)
    assert sample.depth.min() > 0.3
    assert sample.depth.max() < 10
    line = (world / "train.txt").read_text().splitlines()[0].split()
    assert line[0].startswith("/")
    assert line[1].startswith("/")
    assert float(line[2]) == pytest.approx(518.858 * 32 / 640, abs=1e-4)
    stored = cv2.imread(str(world / line[1][1:]), cv2.IMREAD_UNCHANGED)
    assert stored.dtype == np.uint16
    # Millimetres, of exactly the camera that took the photo: render that view again.
    index = int(line[0].split("/")[1].rsplit("_", 1)[1])
    room, views = render_rooms.scene(SMALL, True, index)
    np.testing.assert_allclose(stored / 1000, render_depth(room, views[0][0], (24, 32)), atol=0.5001e-3)
    unlabeled = sorted((world / "unlabeled").iterdir())
    assert [path.name for path in unlabeled] == ["room_00000.jpg", "room_00001.jpg", "room_00002.jpg"]
    with Image.open(unlabeled[0]) as image:
        assert (image.size, image.mode) == ((32, 24), "RGB")


def test_no_scene_is_in_both_lists_and_every_kind_is_in_each():
    split = render_rooms.Settings(scenes=48).split()
    assert len(split["test"]) == 12
    assert not set(split["train"]) & set(split["test"])
    assert len(set(split["train"]) | set(split["test"])) == 48
    for scenes in split.values():
        assert {name.rsplit("_", 1)[0] for name in scenes} == set(ROOMS)
    for scenes, share in ((2, 0.9), (2, 0.01), (9, 0.5), (100, 0.25)):
        split = render_rooms.Settings(scenes=scenes, test_share=share).split()
        assert len(split["train"]) > 0
        assert len(split["test"]) > 0


def test_lists_name_exactly_the_files_there_are(world):
    lines = [
        line.split()
        for name in ("train", "test")
        for line in (world / f"{name}.txt").read_text().splitlines()
    ]
    named = {path[1:] for line in lines for path in line[:2]}
    there = {str(path.relative_to(world)) for path in world.glob("*_*/*.*")}
    assert named == there
    card = json.loads((world / "rooms.json").read_text())
    assert {line[0].split("/")[1] for line in lines} == {*card["scenes"]["train"], *card["scenes"]["test"]}


def test_the_same_settings_give_the_same_bytes_with_other_workers(world, tmp_path):
    render_rooms.render(tmp_path / "again", SMALL, workers=2)
    for path in world.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(world)).read_bytes(), path.name


def test_another_seed_gives_another_world(world, tmp_path):
    other = render_rooms.Settings(scenes=2, views=1, unlabeled=1, size=(24, 32), seed=6)
    render_rooms.render(tmp_path / "other", other, workers=1)
    name = "bedroom_0000/sync_depth_0000.png"
    assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_a_whole_folder_is_kept_and_an_interrupted_one_is_completed(world, tmp_path, capsys):
    times = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    render_rooms.main(arguments(world))
    assert "nothing to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    settings = render_rooms.Settings(scenes=2, views=1, unlabeled=0, size=(24, 32))
    render_rooms.render(tmp_path / "cut", settings, workers=1)
    photo = tmp_path / "cut" / "bedroom_0000" / "rgb_0000.jpg"
    whole = photo.read_bytes()
    photo.write_bytes(whole[:50])
    (tmp_path / "cut" / "test.txt").unlink()  # the lists are what is written last
    render_rooms.render(tmp_path / "cut", settings, workers=1)
    assert photo.read_bytes() == whole


def arguments(folder: Path, **changes) -> list[str]:
    options = {"scenes": 8, "views": 2, "unlabeled": 3, "seed": 5, **changes}
    return [
        "--output", str(folder), "--size", "24", "32", "--workers", "1",
        *(text for name, value in options.items() for text in (f"--{name}", str(value))),
    ]  # fmt: skip


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="not made by this tool"):
        render_rooms.main(arguments(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(SystemExit, match="is a file"):
        render_rooms.main(arguments(tmp_path / "thesis.tex"))


def test_rooms_of_other_settings_are_refused(world):
    with pytest.raises(SystemExit, match="other settings"):
        render_rooms.main(arguments(world, seed=9))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scenes": 1}, "2 to 9999 scenes"),
        ({"views": 0}, "2 to 9999 scenes"),
        ({"scenes": 20000}, "2 to 9999 scenes"),
        ({"test_share": 1.5}, "between 0 and 1"),
        ({"seed": -1}, "negative"),
    ],
)
def test_settings_that_make_no_sense_are_named(tmp_path, changes, words):
    with pytest.raises(SystemExit, match=words):
        render_rooms.main(arguments(tmp_path / "new", **changes))
    assert not (tmp_path / "new").exists()


def test_a_walk_has_exact_poses(world):
    """Points of one view lie where another view of the same room sees them."""
    room, views = render_rooms.scene(SMALL, True, 0)
    camera, size = views[0][0], (24, 32)
    moved = Camera(camera.position + 0.02 * camera.rotation[:, 2], camera.rotation)
    fx, fy, cx, cy = intrinsics(size)
    points = camera.position[:, None, None] + camera.rays(size) * render_depth(room, camera, size)
    x, y, z = np.einsum("ij,ihw->jhw", moved.rotation, points - moved.position[:, None, None])
    rays = np.stack([x / z, y / z, np.ones_like(z)])
    again = [solid.hit(moved.position, np.tensordot(moved.rotation, rays, 1)) for solid in room.solids]
    seen = np.minimum.reduce([*again, np.full(z.shape, np.inf)])
    assert (seen < z + 1e-9).mean() > 0.2  # on solids; of the others the walls are behind
    hits = cast(room, camera, size)[1] > 5
    assert np.isclose(seen[hits], z[hits], rtol=1e-9).mean() > 0.9  # but for what the step has hidden
    assert np.abs(fx * x / z + cx - np.arange(32)).max() < 2
    assert np.abs(fy * y / z + cy - np.arange(24)[:, None]).max() < 2


def test_the_command_runs_as_documented(tmp_path):
    command = [sys.executable, "-m", "tools.demo.rooms", *arguments(tmp_path / "out", scenes=2, views=1)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "1 training and 1 test scenes" in done.stdout
