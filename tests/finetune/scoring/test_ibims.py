"""Scores of iBims-1: by hand, and beside a plain restatement of what Koch et al. 2018 and their scripts compute."""

import math

import numpy as np
import pytest
from skimage import feature

from finetune.depth_data.sample import Plane
from finetune.scoring.ibims import boundary_errors, depth_edges, directed_errors, planarity_errors

CAMERA = (60.0, 64.0, 32.5, 24.5)
SIZE = (48, 64)


# --- DDE


def test_directed_errors_by_hand() -> None:
    truth = np.array([1.0, 3.0, 3.1, 9.0, 2.0])
    prediction = np.array([2.0, 3.1, 3.0, 4.0, 2.9])  # right, too far, too near, right, right
    assert directed_errors(prediction, truth) == {"dde_0": 3 / 5, "dde_m": 1 / 5, "dde_p": 1 / 5}
    assert directed_errors(prediction, truth, plane=100.0)["dde_0"] == 1
    # a plane nearer: too near, too near, right, right, too near
    assert (
        directed_errors(np.array([1.0, 1, 9, 9, 1]), np.array([2.0, 3, 3, 9, 2]), plane=1.5)["dde_m"] == 3 / 5
    )


# --- DBE


def step(column: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    """A wall at 2 m in front of one at 4 m, up to `column`."""
    return np.where(np.arange(size[1]) < column, 2.0, 4.0) * np.ones(size)


def line(column: int, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    edges = np.zeros(size, bool)
    edges[:, column] = True
    return edges


def test_a_step_is_one_edge_beside_itself() -> None:
    found = depth_edges(step(30))
    assert found.any(0).sum() <= 2
    assert set(np.flatnonzero(found.any(0))) <= {29, 30}
    assert not depth_edges(np.full((40, 60), 3.0)).any()
    assert not depth_edges(np.zeros((40, 60))).any()
    np.testing.assert_array_equal(
        depth_edges(step(30) * 7 + 1), found
    )  # min-max: neither scale nor shift matter


@pytest.mark.parametrize("shift", [0, 3, 9])
def test_boundary_errors_are_distances(shift: int) -> None:
    found = depth_edges(step(30))
    errors = boundary_errors(step(30), np.roll(found, -shift, 1))
    # not exactly, for Canny bends the edge by a pixel at the rim of the image
    assert errors["dbe_acc"] == pytest.approx(shift, abs=0.2)
    assert errors["dbe_com"] == pytest.approx(shift, abs=0.2)


def test_edges_ten_pixels_away_are_others() -> None:
    assert boundary_errors(step(45), line(20)) == {"dbe_acc": 10, "dbe_com": 10}
    assert boundary_errors(np.full((40, 60), 2.0), line(20)) == {"dbe_acc": 10, "dbe_com": 10}
    # An edge that is near sets completeness free: the second true edge is 30 px away, and counts with all of them.
    both = boundary_errors(step(20), line(20) | line(50))
    assert both["dbe_acc"] < 1
    assert 14 < both["dbe_com"] < 17
    nothing = boundary_errors(step(20), np.zeros((40, 60), bool))
    assert all(math.isnan(value) for value in nothing.values())


def test_symmetric_completeness_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """True edges in columns 0 and 30, predicted ones in columns 4 and 45, on one row each."""
    edges, found = np.zeros((2, 60, 60), bool)
    edges[20, 0] = edges[20, 30] = found[20, 4] = found[20, 45] = True
    monkeypatch.setattr("finetune.scoring.ibims.depth_edges", lambda prediction, version: found)
    nothing = np.ones((60, 60))
    # true to predicted: 4, 15; predicted to true: 4, 15, of which only the first is near
    assert boundary_errors(nothing, edges) == {"dbe_acc": 4, "dbe_com": (4 + 15) / 2}
    symmetric = boundary_errors(nothing, edges, "symmetric")
    assert symmetric == {"dbe_acc": 4, "dbe_com_sym": (4 + 10 + 4 + 10) / 4}
    edges[20, 0] = False  # no predicted edge is within 10 px of what is left
    assert boundary_errors(nothing, edges, "symmetric") == {"dbe_acc": 10, "dbe_com_sym": 10}


def test_the_symmetric_version_sees_fewer_edges() -> None:
    """A low step beside a high one, 0.115 of the range: its gradient is between the thresholds of the two."""
    depth = step(20) + np.where(np.arange(60) < 40, 0.0, 0.26)
    low, high = depth_edges(depth)[:, 35:].any(), depth_edges(depth, "symmetric")[:, 35:].any()
    assert (low, high) == (True, False)
    assert depth_edges(depth, "symmetric")[:, 15:25].any()


# --- PE


def wall(normal: tuple[float, float, float], distance: float) -> np.ndarray:
    """Depth of the plane n . X = distance, X = (x right, y ahead, z up), as the camera sees it."""
    fx, fy, cx, cy = CAMERA
    column, row = np.meshgrid(np.arange(1, SIZE[1] + 1), np.arange(1, SIZE[0] + 1))
    ray = normal[0] * (column - cx) / fx + normal[1] - normal[2] * (row - cy) / fy
    return distance / ray


def whole(normal: tuple[float, float, float]) -> Plane:
    return Plane("wall", np.ones(SIZE, bool), np.array(normal))


EVERYWHERE = np.ones(SIZE, bool)
SLANTED = (0.28, 0.96, 0.0)


def test_a_perfect_plane_is_flat_and_upright_at_any_scale() -> None:
    truth = wall(SLANTED, 3.0)
    for normal in (SLANTED, tuple(-n for n in SLANTED)):  # either side
        errors = planarity_errors(0.37 * truth, truth, EVERYWHERE, whole(normal), CAMERA)
        assert errors is not None
        assert errors["pe_fla"] == pytest.approx(0, abs=1e-4)
        assert errors["pe_ori"] == pytest.approx(0, abs=1e-4)


def test_orientation_is_the_angle_between_planes() -> None:
    truth = wall((0, 1, 0), 3.0)
    turned = wall((math.sin(math.radians(20)), math.cos(math.radians(20)), 0), 3.0)
    errors = planarity_errors(turned, truth, EVERYWHERE, whole((0, 1, 0)), CAMERA)
    assert errors is not None
    assert errors["pe_ori"] == pytest.approx(20)
    floor = planarity_errors(turned, truth, EVERYWHERE, whole((0, 0, 1)), CAMERA)
    assert floor is not None
    assert floor["pe_ori"] == pytest.approx(90)


def test_flatness_is_a_deviation_in_centimetres() -> None:
    truth = wall((0, 1, 0), 2.0)
    bumpy = truth + np.where((np.add(*np.indices(SIZE)) % 2).astype(bool), 0.01, -0.01)
    errors = planarity_errors(bumpy, truth, EVERYWHERE, whole((0, 1, 0)), CAMERA)
    assert errors is not None
    assert errors["pe_fla"] == pytest.approx(1.0, rel=0.02)
    assert errors["pe_ori"] < 0.2


def test_small_planes_do_not_count() -> None:
    truth = wall((0, 1, 0), 2.0)
    small = np.zeros(SIZE, bool)
    small[:12, :13] = True  # 156 of 3072 pixels: 5.08 %
    plane = Plane("table", small, np.array([0.0, 1, 0]))
    assert planarity_errors(truth, truth, EVERYWHERE, plane, CAMERA) is not None
    valid = EVERYWHERE.copy()
    valid[0, :10] = False  # 146 of them count: 4.75 %
    assert planarity_errors(truth, truth, valid, plane, CAMERA) is None


# --- beside a plain restatement


def restated(
    prediction: np.ndarray,
    truth: np.ndarray,
    edges: np.ndarray,
    numbers: np.ndarray,
    normals: list[np.ndarray],
) -> dict[str, float]:
    """All of it with loops over pixels, on arrays where 0 is no value, as the scripts of the data set have them."""
    height, width = truth.shape
    sides, seen = {"0": 0, "m": 0, "p": 0}, 0
    for p, g in zip(prediction.ravel(), truth.ravel(), strict=True):
        if p != 0 and g != 0:
            seen += 1
            difference = int(p <= 3) - int(g <= 3)
            sides[{0: "0", 1: "m", -1: "p"}[difference]] += 1
    out = {f"dde_{name}": count / seen for name, count in sides.items()}

    masked = np.where(prediction == 0, np.nan, prediction).astype("f")
    masked = masked - np.nanmin(masked)
    masked = masked / np.nanmax(masked)
    found = np.argwhere(feature.canny(masked, sigma=2**0.5, low_threshold=0.1, high_threshold=0.2))
    true = np.argwhere(edges)
    near = [distance for y, x in found if (distance := min(math.hypot(y - v, x - u) for v, u in true)) < 10]
    out["dbe_acc"] = sum(near) / len(near)
    out["dbe_com"] = sum(min(math.hypot(y - v, x - u) for y, x in found) for v, u in true) / len(true)

    flat, angles = [], []
    for number, normal in enumerate(normals, start=1):
        places = [
            (r, c)
            for r in range(height)
            for c in range(width)
            if numbers[r, c] == number and prediction[r, c] != 0 and truth[r, c] != 0
        ]
        if len(places) / (height * width) < 0.05:
            continue
        factor = np.median([truth[place] for place in places]) / np.median(
            [prediction[place] for place in places]
        )
        fx, fy, cx, cy = CAMERA
        cloud = np.array(
            [
                (
                    (c + 1 - cx) * prediction[r, c] * factor / fx,
                    prediction[r, c] * factor,
                    -(r + 1 - cy) * prediction[r, c] * factor / fy,
                )
                for r, c in places
            ]
        )
        centred = cloud - cloud.mean(0)
        fitted = np.linalg.svd(centred, full_matrices=False)[2][2]
        flat.append(np.std(centred @ fitted) * 100)
        angles.append(math.degrees(math.acos(min(1, abs(fitted @ normal)))))
    return {**out, "pe_fla": float(np.mean(flat)), "pe_ori": float(np.mean(angles))}


def test_beside_the_restatement() -> None:
    rng = np.random.default_rng(0)
    normals = [np.array(SLANTED), np.array([0.0, 0.6, 0.8]), np.array([0.0, 0.0, 1.0])]
    numbers = np.zeros(SIZE, int)
    numbers[:24, :32], numbers[:24, 32:], numbers[40:, 20:30] = 1, 2, 3  # the third is too small
    truth = np.where(numbers == 1, wall(SLANTED, 2.5), np.where(numbers == 2, 4.0, 3.0))
    truth[5:9, 10:14] = 0
    edges = np.zeros(SIZE, bool)
    edges[:24, 32], edges[24, 3:60] = True, True
    prediction = truth * 0.9 + 0.2 + rng.normal(0, 0.02, SIZE)
    prediction[30:, 40:] += 1.5
    prediction[40:44, :6] = 0  # no prediction

    valid = (truth != 0) & (prediction != 0)
    planes = [Plane("wall", numbers == number, normal) for number, normal in enumerate(normals, start=1)]
    each = [planarity_errors(prediction, truth, valid, plane, CAMERA) for plane in planes]
    kept = [errors for errors in each if errors is not None]
    assert len(kept) == 2
    ours = {
        **directed_errors(prediction[valid], truth[valid]),
        **boundary_errors(prediction, edges),
        **{name: float(np.mean([errors[name] for errors in kept])) for name in ("pe_fla", "pe_ori")},
    }
    expected = restated(prediction, truth, edges, numbers, normals)
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert min(ours["dde_m"], ours["dde_p"], ours["dbe_acc"], ours["pe_fla"], ours["pe_ori"]) > 0
