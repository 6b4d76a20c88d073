"""Videos through finetune/predict.py, tiles of large images, and colours that do not flicker."""

import json
import re
import struct
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.progress import Progress

from finetune import DepthModel
from finetune.model import prediction
from finetune.predict import main
from finetune.predicting.video import ColourRange, VideoFrames, VideoWriter, legend, paint
from finetune.report.figures import colourise


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    depth_model = DepthModel("test_resnet", head="linear", image_size=(32, 48))
    return depth_model.save(tmp_path_factory.mktemp("run") / "model")


def clip(path: Path, frames: int = 7, size: tuple[int, int] = (36, 54), rate: float = 12.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), rate, size[::-1])
    rng = np.random.default_rng(0)
    for _ in range(frames):
        writer.write(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    writer.release()
    return path


def run(model: Path, source: Path | str, output: Path, *more: str) -> int:
    return main([f"--model={model}", f"--input={source}", f"--output={output}", "--device=cpu", *more])


def report(output: Path) -> dict:
    return json.loads((output / "predictions.json").read_text())


def test_a_video_keeps_its_frames_and_their_rate(model: Path, tmp_path: Path) -> None:
    clip(tmp_path / "clips" / "a.avi")
    formats = "--formats=[colour,side,npy]"
    assert run(model, f"{tmp_path}/clips/*.avi", tmp_path / "out", formats, "--batch_size=3") == 0
    (entry,) = report(tmp_path / "out")["videos"]
    assert entry["frames"] == entry["frames_announced"] == 7
    assert entry["files"] == ["a_colour.mp4", "a_side.mp4", "a_frames"]
    assert "ends_early" not in entry
    for name, width in (("a_colour.mp4", 54), ("a_side.mp4", 54 * 2 + 72)):
        video = VideoFrames(tmp_path / "out" / name)
        shapes = [frame.shape for frame in video]
        assert shapes == [(36, width, 3)] * 7
        assert video.rate == pytest.approx(12.5)
    assert len(list((tmp_path / "out" / "a_frames").glob("*.npy"))) == 7
    first = np.load(tmp_path / "out" / "a_frames" / "000000.npy")
    painted = paint(first, (0.0, 10.0), False).astype(int)
    shown = next(iter(VideoFrames(tmp_path / "out" / "a_colour.mp4"))).astype(int)
    assert np.abs(painted - shown).mean() < 12  # the codec's loss
    assert not list((tmp_path / "out").glob(".*"))


def test_frames_limits_and_folders_with_both(model: Path, tmp_path: Path) -> None:
    clip(tmp_path / "in" / "a.avi")
    cv2.imwrite(str(tmp_path / "in" / "b.png"), np.zeros((20, 30, 3), np.uint8))
    assert run(model, tmp_path / "in", tmp_path / "out", "--frames=2", "--video_range=smooth") == 0
    found = report(tmp_path / "out")
    assert [entry["output"] for entry in found["predicted"]] == ["b"]
    assert found["videos"][0]["frames"] == 2
    assert found["videos"][0]["colour_range"] == "smooth"


def test_a_video_that_is_cut_short_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = clip(tmp_path / "a.avi", 20)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    code = run(model, path, tmp_path / "out")
    printed = " ".join(capsys.readouterr().out.split())
    if code == 0:
        assert 0 < report(tmp_path / "out")["videos"][0]["frames"] < 20
    else:  # a container whose index lies at its end
        assert "cannot be decoded as a video" in printed
    path.write_bytes(b"no video")
    assert run(model, path, tmp_path / "out2") == 1
    assert "a.avi: it cannot be decoded as a video" in " ".join(capsys.readouterr().out.split())


def test_frames_that_are_missing_are_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = VideoFrames.__init__

    def announce_more(self, source, most) -> None:
        original(self, source, most)
        self.announced = 9

    monkeypatch.setattr(VideoFrames, "__init__", announce_more)
    assert run(model, clip(tmp_path / "a.avi"), tmp_path / "out") == 0
    assert "ends early: 7 of 9 frames" in " ".join(capsys.readouterr().out.split())


def uneven(path: Path, milliseconds: list[int], length: float) -> Path:
    """A whole Matroska video of frames at these times, by rewriting those that opencv gave them."""
    content = clip(path, len(milliseconds), rate=25.0).read_bytes()
    times = iter(milliseconds)
    # A block's time counts from that of its cluster, an integer of one or two bytes.
    cluster = re.compile(rb"(\x1f\x43\xb6\x75..\xbf\x84....\xe7)(\x81.|\x82..)(?=\xa3)", re.DOTALL)
    content = cluster.sub(lambda found: found[1] + found[2][:1] + bytes(len(found[2]) - 1), content)
    block = re.compile(rb"\x81..(\x80\xff\xd8)", re.DOTALL)
    content, count = block.subn(lambda found: b"\x81" + struct.pack(">h", next(times)) + found[1], content)
    assert count == len(milliseconds)
    duration = re.compile(rb"(\x44\x89\x88).{8}", re.DOTALL)
    path.write_bytes(duration.sub(lambda found: found[1] + struct.pack(">d", length), content))
    return path


def test_a_video_of_uneven_frames_is_whole_and_keeps_its_length(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = [0, 33, 66, 100, 600, 633, 666, 1500, 1533, 2000]
    source = uneven(tmp_path / "a.mkv", times, 2040.0)
    assert cv2.VideoCapture(str(source)).get(cv2.CAP_PROP_FRAME_COUNT) == 51  # opencv's guess
    assert run(model, source, tmp_path / "out") == 0
    (entry,) = report(tmp_path / "out")["videos"]
    assert "ends_early" not in entry
    assert entry["frames"] == entry["frames_announced"] == 10
    assert entry["frames_per_second"] == pytest.approx(9 / 2.0)
    worst = max(abs(time - 2000 * number / 9) for number, time in enumerate(times)) / 1000
    assert f"the worst is {worst:.1f} s from its time" in entry["uneven"]
    assert VideoFrames(tmp_path / "out" / "a_colour.mp4").rate == pytest.approx(4.5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "ends early" not in printed
    assert "a.mkv: its frames come unevenly, those of the depth evenly, 4.5 a second" in printed

    uneven(source, times, 5000.0)  # a whole header, and no frames behind 2 s
    assert run(model, source, tmp_path / "cut") == 0
    (entry,) = report(tmp_path / "cut")["videos"]
    assert entry["ends_early"].startswith(
        "the last frame that could be decoded, number 10, is at 2.0 s of 5.0 s"
    )
    assert run(model, source, tmp_path / "few", "--frames=4") == 0
    (entry,) = report(tmp_path / "few")["videos"]
    assert "ends_early" not in entry  # nobody asked for the rest
    assert entry["frames_per_second"] == pytest.approx(30)


def test_rates_that_no_camera_has_are_not_believed(tmp_path: Path) -> None:
    even = VideoFrames(clip(tmp_path / "a.mkv", 9, rate=30.0))
    assert len(list(even)) == even.announced == 9
    assert even.rate == 30.0
    assert (even.missing(), even.uneven()) == ("", "")
    assert VideoFrames(clip(tmp_path / "b.avi", rate=500.0)).rate == 25.0


def test_control_c_while_the_progress_bar_moves_leaves_a_whole_video(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, done = Progress.update, []

    def stopped(self, task, **fields) -> None:
        done.append(fields.get("advance"))
        if len(done) == 2:
            raise KeyboardInterrupt
        original(self, task, **fields)

    monkeypatch.setattr(Progress, "update", stopped)
    assert run(model, clip(tmp_path / "a.avi"), tmp_path / "out", "--batch_size=2") == 130
    found = report(tmp_path / "out")
    assert (found["interrupted"], found["videos"][0]["files"]) == (True, ["a_colour.mp4"])
    assert len(list(VideoFrames(tmp_path / "out" / "a_colour.mp4"))) == found["videos"][0]["frames"] == 4
    assert not list((tmp_path / "out").glob(".*"))


def test_what_a_killed_run_left_of_the_same_video_goes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in (".a_colour.part.mp4", ".a_side.part.mp4", ".b_colour.part.mp4"):
        (tmp_path / "out" / name).write_bytes(b"half")
    formats = "--formats=[png]"
    assert run(model, clip(tmp_path / "a.avi"), tmp_path / "out", formats, "--png_scale=1e-6") == 0
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".b_colour.part.mp4"]
    entry = report(tmp_path / "out")["videos"][0]
    assert entry["saturated_pixels"] == 7 * 36 * 54  # 65 mm are the farthest
    assert entry["files"] == ["a_frames"]


def test_control_c_leaves_a_whole_video(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = prediction.predict_images, []

    def stopped(*arguments):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr("finetune.predicting.predictor.predict_images", stopped)
    assert run(model, clip(tmp_path / "a.avi"), tmp_path / "out", "--batch_size=2") == 130
    assert len(list(VideoFrames(tmp_path / "out" / "a_colour.mp4"))) == 4
    found = report(tmp_path / "out")
    assert found["interrupted"]
    assert found["videos"][0]["frames"] == 4
    assert found["videos"][0]["files"] == ["a_colour.mp4"]
    assert "interrupted: what was written is whole" in " ".join(capsys.readouterr().out.split())


def test_an_error_leaves_no_half_video(tmp_path: Path) -> None:
    def fail() -> None:
        with VideoWriter(tmp_path / "a.mp4", 10) as writer:
            writer.write(np.zeros((20, 30, 3), np.uint8))
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with VideoWriter(tmp_path / "b.mp4", 10) as writer:
        writer.write(np.zeros((21, 31, 3), np.uint8))  # odd sides
    assert writer.done
    assert next(iter(VideoFrames(writer.path))).shape == (22, 32, 3)


def test_no_such_camera_is_a_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, "77", tmp_path / "out") == 1
    assert "there is no camera 77" in " ".join(capsys.readouterr().out.split())


def test_a_range_that_follows_does_so_slowly() -> None:
    still, changed = np.random.default_rng(0).uniform(1, 2, (400, 400)), np.full((400, 400), 9.0)
    colours = ColourRange(None, rate=10.0)
    near, far = colours.next(still)
    assert (near, far) == pytest.approx((1.02, 1.98), abs=0.01)
    for step in range(1, 31):
        assert colours.next(changed)[1] == pytest.approx(9 - (9 - far) * np.exp(-step / 10))
    fixed = ColourRange((0.0, 5.0), rate=10.0)
    assert fixed.next(np.full((8, 8), 99.0)) == (0.0, 5.0)


def test_colours_have_one_meaning() -> None:
    depth = np.array([[1.0, 2.0, 4.0]])
    np.testing.assert_array_equal(paint(depth, (1.0, 4.0), False), colourise(depth, 1.0, 4.0))
    nearest, farthest = paint(1 / depth, (0.25, 1.0), True)[0, [0, 2]]
    np.testing.assert_array_equal(nearest, paint(depth, (1.0, 4.0), False)[0, 0])
    np.testing.assert_array_equal(farthest, paint(depth, (1.0, 4.0), False)[0, 2])
    bar = legend(100, (0.0, 10.0))
    assert np.abs(bar[0, 5].astype(int) - nearest).max() < 30
    assert np.abs(bar[-1, 5].astype(int) - farthest).max() < 30


# --- tiles


def test_tiles_cover_the_side_and_overlap() -> None:
    for length, tiles in ((100, 2), (640, 3), (7, 4), (1, 2)):
        side = prediction.tile_side(length, tiles)
        starts = prediction.tile_starts(length, side)
        assert len(starts) <= tiles
        assert starts[0] == 0
        assert starts[-1] + side == length
        assert all(b - a <= side for a, b in pairwise(starts))


@pytest.mark.parametrize("relative", [False, True])
def test_tiles_of_other_scales_leave_no_seams(monkeypatch: pytest.MonkeyPatch, relative: bool) -> None:
    """Each tile says the truth in a unit and with a contrast of its own: put together they must be the truth."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)
    image[..., 1] = np.linspace(0, 255, 120)

    def predict(model, images, *options):
        (part,) = images
        truth = 1 + part[..., 1].astype(np.float32) / 50 + part[..., 0] / 100
        if part.shape == image.shape:
            return [truth]
        a, b = rng.uniform(0.6, 1.9), rng.uniform(-1, 1)
        return [(a * truth + b) if relative else np.exp(b) * truth**a]

    class Model:
        outputs = ("disparity_affine",) if relative else ("depth",)

    monkeypatch.setattr(prediction, "predict_images", predict)
    truth = predict(None, [image])[0]
    put_together = prediction.predict_image(Model(), image, tiles=3)  # type: ignore[arg-type]
    np.testing.assert_allclose(put_together, truth, rtol=2e-4)
