"""Entries of samples: a data set brings what no other has, and it follows crop, zoom, mirroring, rotation, batches."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from finetune.depth_data import DepthFileError, DepthSample, DepthTrainingSet, TrainTransform, collate_depth
from finetune.depth_data.entries import Depth, Frame, Intrinsics, Pairs, Value
from tests.finetune.depth_data.test_depth_transforms import STILL, coded_sample, run

K = np.array([[60.0, 0, 31.5], [0, 58.0, 23.5], [0, 0, 1]])


def video_sample(name: str = "clip", matrix: np.ndarray = K, pairs: int = 2) -> DepthSample:
    """A frame of 48x64 and the next one, whose colours are the inverted ones, with camera, speed and pairs."""
    first = coded_sample(48, 64, name)
    other = np.tile([[10.0, 20.0, 30.0, 40.0]], (pairs, 1))
    return DepthSample(
        first.image,
        first.depth,
        name,
        entries={
            "next": Frame(255 - first.image),
            "next_depth": Depth(first.metres),
            "intrinsics": Intrinsics(matrix),
            "speed": Value(1.5),
            "more": Pairs(other, np.ones(pairs, np.int64)),
        },
    )


def seen(transform: TrainTransform, sample: DepthSample, seed: int = 0) -> dict[str, torch.Tensor]:
    return run(transform, sample, seed)


def test_intrinsics_by_hand() -> None:
    """Half the frame's size, the crop of 12x16 in the middle of the right edge, magnified by 2, then mirrored."""
    whole: dict[str, Any] = {"image_size": (24, 32), "crop_size": (24, 32), "border": None, **STILL}
    # At half the size: pixel x covers 2x and 2x + 1, whose middle is 2x + 0.5.
    half = seen(TrainTransform(**whole), video_sample())["intrinsics"]
    torch.testing.assert_close(half, torch.tensor([[30.0, 0, 15.5], [0, 29.0, 11.5], [0, 0, 1]]))
    mirrored = seen(TrainTransform(**{**whole, "flip": 1.0}), video_sample())["intrinsics"]
    off = K.copy()
    off[0, 1:] = 6.0, 20.0  # skew, and a middle that is off
    skewed = seen(TrainTransform(**{**whole, "flip": 1.0}), video_sample(matrix=off))["intrinsics"]
    torch.testing.assert_close(mirrored, half)  # its middle is that of the image
    # x' = 31 - (x - 0.5) / 2 of a scene whose x is mirrored: f stays, s changes sign, cx = 31 - (20 - 0.5) / 2
    torch.testing.assert_close(skewed, torch.tensor([[30.0, -3.0, 21.25], [0, 29.0, 11.5], [0, 0, 1]]))


def test_intrinsics_of_a_crop_that_is_magnified_and_mirrored_by_hand() -> None:
    """Presented at 24x32 and magnified by 2, a frame of 48x64 keeps its pixels: the crop is 12x16 of them."""
    transform = TrainTransform(
        image_size=(24, 32), crop_size=(12, 16), border=None, **{**STILL, "zoom": (2.0, 2.0), "flip": 1.0}
    )
    for seed in range(5):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draw = torch.rand(12, dtype=torch.float64).tolist()
        top, left = draw[2] * (48 - 12), draw[3] * (64 - 16)
        out = seen(transform, video_sample(), seed)
        expected = torch.tensor([[60.0, 0, 15 - (31.5 - left)], [0, 58.0, 23.5 - top], [0, 0, 1]])
        torch.testing.assert_close(out["intrinsics"], expected)


@pytest.mark.parametrize("rotation", [0.0, 10.0])
def test_intrinsics_project_the_scene_where_the_view_shows_it(rotation: float) -> None:
    """A point of the frame with its depth, projected with the new matrix, lies where its own colour is."""
    transform = TrainTransform(
        image_size=(48, 64),
        crop_size=(32, 40),
        border=None,
        zoom=(1.0, 1.5),
        flip=0.5,
        rotation=rotation,
        colour=0.0,
    )
    transform = TrainTransform(**{**vars(transform), "mean": (0.0,) * 3, "std": (1.0,) * 3})
    mirrored = set()
    for seed in range(20):
        out = seen(transform, video_sample(), seed)
        green, blue, depth = out["image"][1], out["image"][2], out["depth"][0]
        flipped = bool((blue[16, 25] < blue[16, 15]) if abs(rotation) < 45 else False)
        mirrored.add(flipped)
        inverse = np.linalg.inv(K)
        for row, column in ((8, 9), (16, 20), (24, 30)):
            # The row and column of the frame that this pixel shows, and its point in the scene of this view.
            y, x = green[row, column].item() * 48, blue[row, column].item() * 64
            point = inverse @ [x, y, 1] * depth[row, column].item()  # metres are divided by the zoom already
            point[0] *= -1 if flipped else 1
            projected = out["intrinsics"].double().numpy() @ point
            shown = projected[:2] / projected[2]
            np.testing.assert_allclose(shown, (column, row), atol=0.9)
    assert mirrored == {False, True}


def test_a_second_frame_is_seen_as_the_first() -> None:
    transform = TrainTransform(
        image_size=(48, 64),
        crop_size=(30, 40),
        border=None,
        rotation=0.0,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
        colour=0.0,
    )
    for seed in range(5):
        out = seen(transform, video_sample(), seed)
        torch.testing.assert_close(out["next"], 1 - out["image"], rtol=0, atol=1.01 / 255)
        assert torch.equal(out["next_depth"], out["depth"])
        assert torch.equal(out["next_depth_valid"], out["valid"])
    coloured = TrainTransform(**{**vars(transform), "colour": 1.0})
    sample = video_sample()
    same = DepthSample(sample.image, None, "x", entries={"next": Frame(sample.image)})
    out = seen(coloured, same)
    assert torch.equal(out["next"], out["image"])
    assert not torch.equal(out["image"], seen(transform, same)["image"])


def test_what_a_set_brings_changes_no_draw() -> None:
    transform = TrainTransform(
        image_size=(48, 64), crop_size=(30, 40), border=None, rotation=2.5, cut_depth=0.5
    )
    plain, more = coded_sample(48, 64), video_sample()
    more.entries.pop("more")  # points do: crops are drawn around them
    for seed in range(5):
        one, other = seen(transform, plain, seed), seen(transform, more, seed)
        assert all(torch.equal(one[name], other[name]) for name in one)


class Clips(Dataset):
    """Three samples with one, two and three pairs."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> DepthSample:
        return video_sample(f"clip{index}", pairs=index + 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_whatever_the_set_brings(workers: int) -> None:
    transform = TrainTransform(image_size=(48, 64), crop_size=(30, 40), border=None)
    data = DepthTrainingSet(Clips(), transform, seed=1)
    places = [(0, 0), (1, 1), (2, 2)]
    (batch,) = DataLoader(data, batch_sampler=[places], collate_fn=collate_depth, num_workers=workers)
    shapes = {name: tuple(value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert shapes == {
        "image": (3, 3, 30, 40),
        "depth": (3, 1, 30, 40),
        "valid": (3, 1, 30, 40),
        "next": (3, 3, 30, 40),
        "next_depth": (3, 1, 30, 40),
        "next_depth_valid": (3, 1, 30, 40),
        "intrinsics": (3, 3, 3),
        "speed": (3,),
        "more": (3, 3, 4),
        "more_relation": (3, 3),
        "more_valid": (3, 3),
        "position": (3,),
        "index": (3,),
    }
    assert batch["name"] == ["clip0", "clip1", "clip2"]
    assert batch["more_relation"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["failed"] == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"next": Frame(np.zeros((4, 5, 3), np.uint8))},
            r"clip: next is uint8 \[4, 5, 3\], not uint8 \[48, 64, 3\]",
        ),
        ({"camera": Intrinsics(np.eye(4))}, r"clip: camera is \[4, 4\], not a matrix \[3, 3\]"),
        ({"next_depth": Depth(np.zeros((4, 5)))}, "the image is 48x64, its depth map 4x5"),
        ({"more": Pairs(np.array([[0.0, 0, 0, 64]]), None)}, "lies outside the image of 48x64"),
    ],
)
def test_entries_that_do_not_fit_the_image_are_refused(entry: dict, message: str) -> None:
    with pytest.raises(DepthFileError, match=message):
        DepthSample(np.zeros((48, 64, 3), np.uint8), None, "clip", entries=entry)
