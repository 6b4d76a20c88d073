"""Augmentation: image and depth stay one scene, metres stay metres, and chance is a function of the position."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from finetune.depth_data import (
    DepthFileError,
    DepthSample,
    DepthTrainingSet,
    EvalTransform,
    NYUSync,
    TrainTransform,
    collate_depth,
)

PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
STILL: dict[str, Any] = {"zoom": (1.0, 1.0), "flip": 0.0, "colour": 0.0, **PLAIN}


def coded_sample(height: int = 240, width: int = 320, name: str = "scene") -> DepthSample:
    """A scene whose colours say how deep it is: red is depth / 5 m; green and blue are the row and the column."""
    rows, columns = np.mgrid[:height, :width]
    depth = 1.0 + 2.5 * (rows / height) + 1.3 * (columns / width)  # 1 to 4.8 m, a slanted plane
    image = np.stack([depth / 5.0, rows / height, columns / width], -1)
    return DepthSample((image * 255).round().astype(np.uint8), depth.astype(np.float32), name)


def run(transform, sample, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(sample)


class Pairs(Dataset):
    """`count` pairs; those in `broken` cannot be read."""

    def __init__(self, count: int = 6, broken: tuple[int, ...] = ()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def __getitem__(self, index: int) -> DepthSample:
        if index in self.broken:
            raise DepthFileError(f"pair{index}.png: cannot be read")
        return coded_sample(96, 128, f"pair{index}")


# --- geometry
# --------------------------------------------------------------------------------------------------


def test_shapes_and_types():
    out = run(TrainTransform(), coded_sample())
    assert out["image"].shape == (3, 128, 160)
    assert out["depth"].shape == out["valid"].shape == (1, 128, 160)
    assert (out["image"].dtype, out["depth"].dtype, out["valid"].dtype) == (
        torch.float32,
        torch.float32,
        torch.bool,
    )
    assert all(tensor.is_contiguous() for tensor in out.values())


@pytest.mark.parametrize("rotation", [0.0, 2.5])
@pytest.mark.parametrize("border", [None, (45, 472, 43, 608)])
@pytest.mark.parametrize("size", [(480, 640), (240, 320), (61, 83)])
def test_image_and_depth_stay_one_scene(size, border, rotation):
    """Depth is written in the red channel: after any crop, zoom, flip and rotation, both must still say the same."""
    transform = TrainTransform(
        image_size=(72, 96),
        crop_size=(56, 72),
        border=border,
        rotation=rotation,
        zoom=(1.0, 1.5),
        colour=0.0,
        flip=0.5,
        **PLAIN,
    )
    for seed in range(12):
        out = run(transform, coded_sample(*size), seed)
        red, depth, valid = out["image"][0] * 5, out["depth"][0], out["valid"][0]
        inside = valid.clone()  # a turned frame has black corners; the pixels that touch them are mixed
        inside[1:-1, 1:-1] &= valid[2:, 1:-1] & valid[:-2, 1:-1] & valid[1:-1, 2:] & valid[1:-1, :-2]
        ratio = (red / depth)[inside]  # is the zoom, one number for the whole crop
        assert 0.97 < ratio.median() < 1.53
        # 2.5 m over 480 rows: nearest and averaged depth differ by up to a few source pixels, not by a shift
        spread = 0.012 if min(size) > 100 else 0.06
        assert (ratio / ratio.median() - 1).abs().quantile(0.98) < spread
        # no systematic shift between the two, such as half a pixel
        bias = (red / ratio.median() - depth)[inside].mean().abs()
        assert bias < 0.01


def test_a_shift_of_one_pixel_would_be_seen():
    """The agreement above is sharp enough: moved by one pixel of the crop, it is gone."""
    out = run(TrainTransform(image_size=(72, 96), crop_size=(56, 72), **STILL), coded_sample(480, 640))
    red, depth = out["image"][0] * 5, out["depth"][0]
    matched = (red - depth).mean().abs()
    shifted = (red[1:] - depth[:-1]).mean().abs()
    assert matched < 0.01 < 0.03 < shifted


def test_without_augmentation_training_sees_what_evaluation_sees():
    sample = coded_sample()
    everything = TrainTransform(image_size=(72, 96), crop_size=(72, 96), border=None, **STILL)
    evaluation = EvalTransform((72, 96), **PLAIN)
    assert torch.equal(run(everything, sample)["image"], evaluation(sample)["image"])
    assert torch.equal(evaluation.prepare(sample.image), evaluation(sample)["image"])


def test_crop_has_the_scale_of_the_whole_frame():
    """480x640 at 144x192 is a factor of 0.3: a crop of 128x160 covers 426.7x533.3 source pixels, inside the border."""
    for seed in range(20):
        image = run(TrainTransform(**STILL), coded_sample(480, 640), seed)["image"]
        rows, columns = image[1].mean(1) * 480, image[2].mean(0) * 640
        assert (rows[-1] - rows[0]) / 127 == pytest.approx(1 / 0.3, rel=0.01)
        assert (columns[-1] - columns[0]) / 159 == pytest.approx(1 / 0.3, rel=0.01)
        assert rows[0] >= 45
        assert rows[-1] <= 472
        assert columns[0] >= 43
        assert columns[-1] <= 608


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_white_border_is_cut_at_any_frame_size(scale):
    """None of the 7 white pixels around the frame gets in, whatever the crop, the zoom and the rotation."""
    height, width, edge = 480 // scale, 640 // scale, 7 // scale + 1
    image = np.full((height, width, 3), 255, np.uint8)
    image[edge:-edge, edge:-edge] = 100
    sample = DepthSample(image, np.full((height, width), 2.0, np.float32), "white")
    for seed in range(20):
        out = run(TrainTransform(rotation=2.5, colour=0.0, **PLAIN), sample, seed)
        assert out["image"].max() * 255 < 100.5
        still = run(TrainTransform(colour=0.0, **PLAIN), sample, seed)
        assert (still["image"] * 255 - 100).abs().max() < 0.5
        assert still["valid"].all()
    uncut = run(TrainTransform(image_size=(144, 192), crop_size=(144, 192), border=None, **STILL), sample)
    assert uncut["image"].max() > 0.9


def test_zoom_divides_depth_and_magnifies():
    sample = coded_sample(480, 640)
    for zoom in (0.95, 1.0, 1.25, 2.0):
        transform = TrainTransform(crop_size=(96, 128), **{**STILL, "zoom": (zoom, zoom)})
        out = run(transform, sample, 3)
        assert (out["image"][0] * 5 / out["depth"][0]).median() == pytest.approx(zoom, rel=0.01)
        rows = out["image"][1].mean(1) * 480
        assert (rows[-1] - rows[0]) / 95 == pytest.approx(1 / 0.3 / zoom, rel=0.02)


def test_zoom_range_is_used():
    sample = coded_sample()
    zooms = [
        (out["image"][0] * 5 / out["depth"][0]).median().item()
        for out in (run(TrainTransform(**{**STILL, "zoom": (1.0, 1.5)}), sample, seed) for seed in range(30))
    ]
    assert 0.98 < min(zooms) < 1.1
    assert 1.4 < max(zooms) < 1.53


def test_flip_mirrors_both():
    sample = coded_sample()
    unflipped, flipped = (
        run(TrainTransform(**{**STILL, "flip": probability}), sample) for probability in (0.0, 1.0)
    )
    for key in ("image", "depth", "valid"):
        assert torch.equal(flipped[key], unflipped[key].flip(-1))
    assert not torch.equal(flipped["depth"], unflipped["depth"])


def test_rotation_turns_both_and_marks_what_comes_from_outside():
    sample = DepthSample(np.full((240, 320, 3), 200, np.uint8), np.full((240, 320), 3.0, np.float32), "wall")
    transform = TrainTransform(
        image_size=(120, 160), crop_size=(120, 160), border=None, rotation=10.0, **STILL
    )
    shares = []
    for seed in range(5):
        out = run(transform, sample, seed)
        outside = ~out["valid"][0]
        shares.append(outside.float().mean().item())
        assert (out["depth"][0][outside] == 0).all()
        assert (out["depth"][0][~outside] == 3).all()
        assert (out["image"][0][outside] < 0.79).float().mean() > 0.8  # black, but for the pixels on the edge
    assert max(shares) > 0.02


# --- readings
# --------------------------------------------------------------------------------------------------


def test_depth_is_never_mixed():
    """Holes and a depth edge: every value that comes out went in (divided by the zoom)."""
    depth = np.full((240, 320), 2.0, np.float32)
    depth[:, 160:] = 7.0
    depth[np.random.default_rng(0).random(depth.shape) < 0.3] = 0.0
    sample = DepthSample(np.zeros((240, 320, 3), np.uint8), depth, "edge")
    for seed in range(5):
        transform = TrainTransform(zoom=(1.2, 1.2), rotation=2.5)
        out = run(transform, sample, seed)
        values = (out["depth"] * 1.2).unique()
        assert all(min(abs(value - known) for known in (0.0, 2.0, 7.0)) < 1e-5 for value in values.tolist())
        assert torch.equal(out["valid"], out["depth"] > 0)
        assert (~out["valid"]).float().mean() == pytest.approx(0.3, abs=0.03)


def test_validity_is_strict_and_after_the_zoom():
    depth = np.zeros((4, 6), np.float32)
    depth[0] = [0.0, 0.001, 0.0011, 9.9999, 10.0, 12.0]
    sample = DepthSample(np.zeros((4, 6, 3), np.uint8), depth, "limits")
    transform = TrainTransform(image_size=(4, 6), crop_size=(4, 6), border=None, **STILL)
    assert run(transform, sample)["valid"][0, 0].tolist() == [False, False, True, True, False, False]
    kitti = TrainTransform(image_size=(4, 6), crop_size=(4, 6), border=None, max_depth=80.0, **STILL)
    assert run(kitti, sample)["valid"][0, 0].tolist() == [False, False, True, True, True, True]
    near = TrainTransform(image_size=(8, 12), crop_size=(8, 12), border=None, **{**STILL, "zoom": (1.5, 1.5)})
    wall = DepthSample(np.zeros((8, 12, 3), np.uint8), np.full((8, 12), 12.0, np.float32), "far")
    assert run(near, wall)["valid"].all()  # 12 m, brought to 8 m


# --- disparity, points and classes go the same way
# ---------------------------------------------------------------------------


def annotated_sample(seed: int, size: tuple[int, int] = (240, 320)) -> DepthSample:
    """Four points, two pairs; each point is the middle of a square of 9 pixels of its own class and disparity."""
    generator = np.random.default_rng(seed)
    labels = np.full(size, 9, np.uint8)
    points = []
    while len(points) < 4:
        row, column = (int(generator.integers(10, side - 10)) for side in size)
        if all(abs(row - r) + abs(column - c) > 30 for r, c in points):
            labels[row - 4 : row + 5, column - 4 : column + 5] = len(points)
            points.append((row, column))
    disparity = labels.astype(np.float32) / 10
    disparity[labels == 9] = np.nan
    pairs, relation = np.array(points, float).reshape(2, 4), np.array([1, -1])
    return DepthSample(
        np.zeros((*size, 3), np.uint8), None, "points", disparity, pairs, relation, labels=labels
    )


@pytest.mark.parametrize("size", [(240, 320), (123, 200)])
def test_points_classes_and_disparity_stay_on_the_picture(size):
    """After any crop, zoom, flip and rotation, a point's pixel still shows the class painted there."""
    transform = TrainTransform(
        image_size=(144, 192), crop_size=(128, 160), border=None, rotation=20.0, zoom=(1.0, 1.5), flip=0.5
    )
    valid = 0
    for seed in range(30):
        out = run(transform, annotated_sample(seed, size), seed)
        assert "depth" not in out
        assert out["pairs"].dtype == out["relation"].dtype == out["labels"].dtype == torch.int64
        assert out["relation"].tolist() == [1, -1]
        for number, (pair, is_valid) in enumerate(zip(out["pairs"], out["pairs_valid"], strict=True)):
            if not is_valid:
                assert pair.tolist() == [0, 0, 0, 0]
                continue
            valid += 1
            for point, (row, column) in enumerate(pair.reshape(2, 2).tolist()):
                assert out["labels"][row, column] == 2 * number + point
                known = out["affine_valid"][0, row, column]
                assert known
                assert out["affine"][0, row, column] == pytest.approx((2 * number + point) / 10)
        assert torch.equal(out["affine_valid"][0], out["labels"] < 9)  # the rest is class 9 or void: unknown
        assert (out["affine"][~out["affine_valid"]] == 0).all()
    assert 20 < valid < 60


def test_points_by_hand():
    """A frame of 4x6 with A in row 1, column 2 and B in row 3, column 5."""
    sample = DepthSample(
        np.zeros((4, 6, 3), np.uint8), None, "x", pairs=np.array([[1.0, 2, 3, 5]]), relation=np.array([0])
    )

    def pairs(size: tuple[int, int], crop: tuple[int, int], **options: Any):
        transform = TrainTransform(image_size=size, crop_size=crop, border=None, **{**STILL, **options})
        out = run(transform, sample)
        return out["pairs"].tolist(), out["pairs_valid"].tolist()

    assert pairs((4, 6), (4, 6)) == ([[1, 2, 3, 5]], [True])
    assert pairs((4, 6), (4, 6), flip=1.0) == ([[1, 3, 3, 0]], [True])
    # twice as large: the middle of pixel 1 is at 1.5, which comes to 3.0, the upper edge of pixel 3
    assert pairs((8, 12), (8, 12)) == ([[3, 5, 7, 11]], [True])
    # half: 1.5 -> 0.75, 2.5 -> 1.25, 3.5 -> 1.75, 5.5 -> 2.75
    assert pairs((2, 3), (2, 3)) == ([[0, 1, 1, 2]], [True])
    # a crop of 3x4 holds both only where it begins in row 1 and column 2
    assert pairs((4, 6), (3, 4)) == ([[0, 0, 2, 3]], [True])
    # magnified by 2, 2x3 pixels are left: not both fit
    assert pairs((4, 6), (4, 6), zoom=(2.0, 2.0)) == ([[0, 0, 0, 0]], [False])


def test_a_crop_keeps_its_points_where_they_fit():
    transform = TrainTransform(image_size=(240, 320), crop_size=(60, 80), border=None, **STILL)
    starts = set()
    for seed in range(20):
        sample = DepthSample(
            np.zeros((240, 320, 3), np.uint8),
            None,
            "x",
            pairs=np.array([[100.0, 200, 130, 170]]),
            relation=np.array([1]),
        )
        out = run(transform, sample, seed)
        assert out["pairs_valid"].all()
        row, column = out["pairs"][0, :2].tolist()
        assert out["pairs"][0].tolist() == [row, column, row + 30, column - 30]
        starts.add((row, column))
    assert len(starts) > 10  # still drawn


def test_void_and_unknown_come_from_outside_a_turned_frame():
    sample = DepthSample(
        np.full((40, 60, 3), 255, np.uint8),
        np.full((40, 60), 2.0, np.float32),
        "wall",
        labels=np.zeros((40, 60), np.uint8),
    )
    transform = TrainTransform(image_size=(40, 60), crop_size=(40, 60), border=None, rotation=45.0, **STILL)
    out = run(transform, sample, 1)
    outside = out["labels"] == 255
    assert 0.05 < outside.float().mean() < 0.5
    assert torch.equal(out["labels"] == 0, ~outside)
    assert torch.equal(outside, ~out["valid"][0])


def test_cut_depth_pastes_a_rectangle_of_depth():
    sample = coded_sample(96, 128)
    sizes: dict[str, Any] = {
        "image_size": (96, 128),
        "crop_size": (96, 128),
        "border": None,
        "max_depth": 8.0,
    }
    plain, cut = (TrainTransform(**sizes, **STILL, cut_depth=share) for share in (0.0, 1.0))
    areas = []
    for seed in range(40):
        before, after = run(plain, sample, seed), run(cut, sample, seed)
        assert torch.equal(before["depth"], after["depth"])
        shown = after["depth"].expand(3, -1, -1) / 8.0
        pasted = (after["image"] == shown).all(0)
        assert torch.equal(after["image"][:, ~pasted], before["image"][:, ~pasted])
        rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
        box = pasted[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.all()  # one rectangle
        areas.append(pasted.float().mean().item())
    # the mean of (1 - a) b p over two sides, each half of a half of 3/4
    assert np.mean(areas) == pytest.approx((0.25 * 0.75) ** 2, abs=0.025)
    half = TrainTransform(**sizes, **STILL, cut_depth=0.5)
    changed = [
        not torch.equal(run(half, sample, s)["image"], run(plain, sample, s)["image"]) for s in range(100)
    ]
    assert 30 < sum(changed) < 70


def test_batches_of_points_are_filled_up():
    """Samples with one and with three pairs: the missing two are there, and not valid."""
    transform = TrainTransform(image_size=(8, 8), crop_size=(8, 8), border=None, **STILL)
    samples = []
    for count in (1, 3):
        pairs, relation = np.tile([1.0, 2.0, 3.0, 4.0], (count, 1)), np.full(count, -1)
        sample = DepthSample(np.zeros((8, 8, 3), np.uint8), None, "x", pairs=pairs, relation=relation)
        samples.append({**run(transform, sample), "name": "x", "position": 0, "index": 0, "failed": []})
    batch = collate_depth(samples)
    assert batch["pairs"].shape == (2, 3, 4)
    assert batch["pairs_valid"].tolist() == [[True, False, False], [True, True, True]]
    assert batch["relation"].tolist() == [[-1, 0, 0], [-1, -1, -1]]
    assert "depth" not in batch


# --- colours
# ---------------------------------------------------------------------------------------------------


def test_colour_leaves_depth_and_geometry_alone():
    sample = coded_sample()
    still, coloured = (
        run(TrainTransform(colour=probability, rotation=2.5), sample, 5) for probability in (0.0, 1.0)
    )
    assert torch.equal(still["depth"], coloured["depth"])
    assert torch.equal(still["valid"], coloured["valid"])
    assert not torch.equal(still["image"], coloured["image"])


def one_colour(**ranges: tuple[float, float]) -> np.ndarray:
    """A grey wall of 128 (and a darker half) after a colour change with only `ranges` switched on."""
    image = np.full((16, 16, 3), 128, np.uint8)
    image[8:] = 64
    off: dict[str, Any] = dict.fromkeys(("gamma", "brightness", "channel", "contrast"), (1.0, 1.0))
    transform = TrainTransform(
        image_size=(16, 16), crop_size=(16, 16), border=None, **{**STILL, "colour": 1.0}, **{**off, **ranges}
    )
    return run(transform, DepthSample(image, np.ones((16, 16), np.float32), "wall"))["image"].numpy()


def test_each_colour_change_is_what_its_name_says():
    light, dark = 128 / 255, 64 / 255
    np.testing.assert_allclose(one_colour()[:, 0, 0], light, rtol=1e-6)
    np.testing.assert_allclose(one_colour(gamma=(1.1, 1.1))[:, 0, 0], light**1.1, rtol=1e-5)
    np.testing.assert_allclose(one_colour(brightness=(1.25, 1.25))[:, 0, 0], light * 1.25, rtol=1e-5)
    contrast = one_colour(contrast=(0.5, 0.5))
    np.testing.assert_allclose(contrast[:, 0, 0], 0.75 * light + 0.25 * dark, rtol=1e-5)
    channels = one_colour(channel=(0.9, 1.1))[:, 0, 0] / light
    assert len(set(channels.round(4))) == 3
    assert ((channels > 0.9) & (channels < 1.1)).all()
    assert one_colour(brightness=(9.0, 9.0)).max() == 1.0  # stays within [0, 1]


def test_colour_happens_half_of_the_time():
    sample = coded_sample(48, 64)
    transform = TrainTransform(image_size=(24, 32), crop_size=(20, 26), zoom=(1, 1), flip=0)
    plain = TrainTransform(image_size=(24, 32), crop_size=(20, 26), zoom=(1, 1), flip=0, colour=0)
    changed = [
        not torch.equal(run(transform, sample, s)["image"], run(plain, sample, s)["image"])
        for s in range(200)
    ]
    assert 70 < sum(changed) < 130


def test_normalisation():
    image = np.full((10, 10, 3), (255, 0, 51), np.uint8)
    out = EvalTransform((5, 5), mean=(0.5, 0.4, 0.2), std=(0.5, 0.2, 0.1)).prepare(image)
    torch.testing.assert_close(out[:, 2, 2], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6, rtol=0)


# --- what is refused
# -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_size": (144, 192)}, r"does not fit.*leave \(128, 169\)"),
        ({"zoom": (0.5, 1.0)}, r"does not fit.*leave \(64, 84\)"),
        ({"crop_size": (145, 160), "border": None}, "does not fit"),
        ({"zoom": (0.0, 1.0)}, "zoom must be a range"),
        ({"gamma": (1.1, 0.9)}, "gamma must be a range"),
        ({"flip": 1.5}, "flip is a probability"),
        ({"rotation": -1.0}, "rotation must be"),
        ({"border": (0, 0, 0, 640)}, "border is"),
        ({"min_depth": 10.0}, "min_depth < max_depth"),
        ({"crop_size": (0, 160)}, "crop_size is"),
        ({"image_size": (144.5, 192)}, "image_size is"),
        ({"cut_depth": 1.1}, "cut_depth is a probability"),
        ({"mean": (0.5,)}, "three numbers"),
        ({"std": (0.0, 1.0, 1.0)}, "std above 0"),
    ],
)
def test_settings_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TrainTransform(**fields)


def test_crop_that_fits_in_a_frame_fits_in_all():
    """The check at construction holds for frames of any size and shape."""
    for size in [(480, 640), (120, 160), (61, 83), (97, 31)]:
        for seed in range(10):
            assert run(TrainTransform(rotation=2.5), coded_sample(*size), seed)["image"].shape == (
                3,
                128,
                160,
            )


# --- the stream
# ------------------------------------------------------------------------------------------------


def test_sample_is_a_function_of_seed_and_position():
    transform = TrainTransform(image_size=(48, 64), crop_size=(40, 52))
    data = DepthTrainingSet(Pairs(), transform, seed=1)
    torch.manual_seed(123)
    first = data[(7, 2)]
    before = torch.random.get_rng_state()
    again = data[(7, 2)]
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's generator is left alone
    assert torch.equal(first["image"], again["image"])
    assert torch.equal(first["depth"], again["depth"])
    assert (first["name"], first["position"], first["index"]) == ("pair2", 7, 2)
    assert not torch.equal(first["image"], data[(8, 2)]["image"])
    assert not torch.equal(first["image"], DepthTrainingSet(Pairs(), transform, seed=2)[(7, 2)]["image"])


def test_batches_do_not_depend_on_workers():
    data = DepthTrainingSet(Pairs(), TrainTransform(image_size=(48, 64), crop_size=(40, 52)), seed=1)
    batches = [[(0, 3), (1, 1)], [(2, 5), (3, 0)]]
    serial, parallel = (
        list(DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate_depth))
        for workers in (0, 2)
    )
    for here, there in zip(serial, parallel, strict=True):
        assert torch.equal(here["image"], there["image"])
        assert torch.equal(here["depth"], there["depth"])
        assert here["name"] == there["name"]
    assert serial[0]["image"].shape == (2, 3, 40, 52)
    assert serial[0]["depth"].shape == serial[0]["valid"].shape == (2, 1, 40, 52)
    assert serial[1]["position"].tolist() == [2, 3]
    assert serial[1]["index"].tolist() == [5, 0]
    assert serial[0]["failed"] == []


def test_unreadable_pairs_are_replaced_and_reported():
    transform = TrainTransform(image_size=(48, 64), crop_size=(40, 52))
    data = DepthTrainingSet(Pairs(6, broken=(5, 0)), transform, seed=1)
    sample = data[(0, 5)]
    assert (sample["index"], sample["name"]) == (1, "pair1")
    assert sample["failed"] == ["pair5.png: cannot be read", "pair0.png: cannot be read"]
    assert collate_depth([sample, data[(1, 2)]])["failed"] == sample["failed"]
    with pytest.raises(ValueError, match="none of the 2 pairs can be read"):
        DepthTrainingSet(Pairs(2, broken=(0, 1)), transform, seed=1)[(0, 0)]


def test_errors_cross_from_a_worker():
    """torch rebuilds a worker's error from its message alone, and turns it into a RuntimeError if that fails."""
    with pytest.raises(DepthFileError) as caught:
        Pairs(2, broken=(1,))[1]
    with pytest.raises(DepthFileError, match=r"pair1\.png"):
        raise type(caught.value)(str(caught.value))


@pytest.mark.real_data
def test_real_nyu_batch(real_data):
    data = DepthTrainingSet(NYUSync(real_data / "nyu", "nyu_train.txt"), TrainTransform(rotation=2.5), seed=0)
    batch = collate_depth([data[(position, 40 * position)] for position in range(8)])
    assert torch.isfinite(batch["image"]).all()
    assert batch["valid"].float().mean() > 0.9
    assert 0.5 < batch["depth"][batch["valid"]].min() < batch["depth"][batch["valid"]].max() < 10
    # normalised colours are near 0, and no white border is left over
    assert batch["image"].mean().abs() < 1.0
    edges = torch.cat([batch["image"][..., :3, :].flatten(), batch["image"][..., -3:, :].flatten()])
    assert (edges > 2.1).float().mean() < 0.2


def test_pillow_resamples_nothing_outside_the_frame():
    """A window one rounding error beyond the frame is not an error."""
    image = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
    transform = TrainTransform(image_size=(31, 43), crop_size=(31, 43), border=None, **STILL)
    sample = DepthSample(image, np.ones((33, 47), np.float32), "odd")
    expected = np.asarray(Image.fromarray(image).resize((43, 31), Image.Resampling.BILINEAR))
    assert np.array_equal((run(transform, sample)["image"] * 255).round().permute(1, 2, 0).numpy(), expected)
