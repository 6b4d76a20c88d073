"""Videos: frames read and counted, a colour range that does not flicker, and videos of depth that appear whole.

Videos are written as MPEG-4 in .mp4 by opencv's own encoder. Sound is not kept.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from finetune.report.figures import colourise
from spark.errors import FileError, UserError

EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
COUNTED = (".mp4", ".m4v", ".mov", ".avi")
"""Kinds of file that hold their number of frames."""
USUAL_RATE = 25.0
FASTEST = 240.0
"""Frames per second beyond which a rate is an error of the file."""
TOLERANCE_SECONDS = 0.1
"""Smaller differences of time do not count: sound is longer than the picture by some hundredths."""
SMOOTHING_SECONDS = 1.0
PERCENTILES = (2, 98)


class VideoError(UserError):
    """A video that cannot be read; the message is the reason."""


class VideoFrames:
    """The frames of a video file, or of a camera by its index, upright, uint8 [H, W, 3] RGB.

    Files that do not hold their number of frames (all but `COUNTED`) are decoded once before, up to `most` frames: of
    them opencv multiplies the length with a guess of the rate, which for uneven frames is no number of frames at all.

    Args:
        source: the file, or the index of a camera.
        most: how many frames are wanted; None: all.

    Attributes:
        announced: number of frames by the header of the file, or those that the first pass could decode (`most` at
        most);
            None of a camera.
        seconds: length by the header of the file; None without one, as of cameras.
        rate: frames per second, on average where they are uneven.
        shape: (H, W, 3) of a frame.
        frames: how many were read so far.
        timing_off: how far [s] the worst frame so far is from where it would be if all came evenly at `rate`.

    Raises:
        VideoError: no such file or camera, or nothing in it that can be decoded.
    """

    def __init__(self, source: Path | int, most: int | None = None) -> None:
        if isinstance(source, Path) and not source.is_file():
            raise VideoError("there is no such file")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        found, frame = self._capture.read() if self._capture.isOpened() else (False, None)
        if not found or frame is None:
            self._capture.release()
            if isinstance(source, int):
                raise VideoError(f"there is no camera {source}, or another program uses it")
            raise VideoError(
                "it cannot be decoded as a video: it is damaged, or of a codec that this opencv lacks; convert it, for"
                " example with ffmpeg -i IN -c:v libx264 OUT.mp4"
            )
        self._first, self.shape, self._live = frame, frame.shape, isinstance(source, int)
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        known = isinstance(source, Path) and 0 < count < 1e9
        self.announced = int(count) if known else None
        self.seconds = count / rate if known and math.isfinite(rate) and rate > 0 else None
        self._counted = isinstance(source, int) or source.suffix.lower() in COUNTED
        if isinstance(source, Path) and not (self._counted and self.announced and 0 < rate <= FASTEST):
            self.announced, before, last = _first_pass(source, most)
            self._counted = False
            if last > 0 and not (rate > 0 and abs(before / rate - last) < 0.002):  # times are milliseconds
                rate = before / last
        self.rate = round(rate, 3) if math.isfinite(rate) and 0 < rate <= FASTEST else USUAL_RATE
        self.frames, self.timing_off = 0, 0.0
        self._began, self._last = time.monotonic(), 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames, once, until the end or the first that cannot be decoded."""
        frame = self._first
        while frame is not None:
            at = self._now()
            if at > 0:  # 0 is the first, or one without a time
                self._last = max(self._last, at)
                self.timing_off = max(self.timing_off, abs(at - self.frames / self.rate))
            self.frames += 1
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            found, frame = self._capture.read()
            frame = frame if found else None

    def _now(self) -> float:
        """Time of the frame that was read last [s]: of a camera since it was opened."""
        if self._live:
            return time.monotonic() - self._began if self.frames else 0.0
        return self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    def missing(self) -> str:
        """What is missing at the end, after all frames were read; "" if nothing is.

        Fewer frames than announced are no proof (edit lists drop some): the last one must be too early, too.
        """
        if self.announced is None or self.seconds is None:
            return ""
        if self._counted:
            if self.frames >= self.announced or self._last >= (self.announced - 1.5) / self.rate:
                return ""
            return (
                f"{self.frames} of {self.announced} frames could be decoded, the rest is damaged or missing"
            )
        if self._last >= self.seconds - 1.5 / self.rate - TOLERANCE_SECONDS:
            return ""
        return (
            f"the last frame that could be decoded, number {self.frames}, is at {self._last:.1f} s of"
            f" {self.seconds:.1f} s, the rest is damaged or missing, or has only sound"
        )

    def uneven(self) -> str:
        """How far even frames are from the times of those read; "" where these are even."""
        if self.timing_off <= max(TOLERANCE_SECONDS, 1.5 / self.rate):
            return ""
        return (
            f"its frames come unevenly, those of the depth evenly, {self.rate:g} a second: the worst is"
            f" {self.timing_off:.1f} s from its time"
        )

    def close(self) -> None:
        """Release the file or camera."""
        self._capture.release()


def _first_pass(path: Path, most: int | None) -> tuple[int, int, float]:
    """How many frames of a file can be decoded, up to `most`; the latest that has a time, from 0, and that time [s]."""
    capture = cv2.VideoCapture(str(path))
    count, last, before = 0, 0.0, 0
    while (most is None or count < most) and capture.grab():
        at = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if at > last:  # the last frame of MPEG has no time
            last, before = at, count
        count += 1
    capture.release()
    return count, before, last


class ColourRange:
    """Nearest and farthest of the colours, from frame to frame: fixed, or following the frames slowly.

    Each frame's own smallest and largest would make a wall change its colour whenever something passes in front of it.
    Following, the 2nd and 98th percentile of each frame enter an exponential mean over a second.

    Args:
        fixed: (near, far); None follows.
        rate: frames per second.
    """

    def __init__(self, fixed: tuple[float, float] | None, rate: float) -> None:
        self.limits = fixed
        self._follow = fixed is None
        self._share = 1 - math.exp(-1 / (rate * SMOOTHING_SECONDS))

    def next(self, values: np.ndarray) -> tuple[float, float]:
        """The range for the next frame, whose values are [H, W]."""
        if self._follow:
            low, high = (float(value) for value in np.percentile(values[::4, ::4], PERCENTILES))
            if self.limits is not None:
                low, high = (
                    old + self._share * (new - old) for old, new in zip(self.limits, (low, high), strict=True)
                )
            self.limits = low, max(high, low + 1e-6)
        assert self.limits is not None
        return self.limits


def paint(values: np.ndarray, limits: tuple[float, float], inverse: bool) -> np.ndarray:
    """Colours uint8 [H, W, 3] of depth [m], or of inverse depth if `inverse`: near is red either way."""
    low, high = limits
    if inverse:
        return colourise(1 + (high - values).clip(0, high - low) / max(high - low, 1e-12), 1.0, 2.0)
    return colourise(values, low, high)


def legend(height: int, limits: tuple[float, float]) -> np.ndarray:
    """A bar of the colours with its ends and middle in metres, uint8 [height, 72, 3]."""
    strip = np.full((height, 72, 3), 255, np.uint8)
    # From the far end for the middles of pixels, because colourise takes 0 for no reading.
    share = (np.arange(height) + 0.5) / height
    strip[:, 4:20] = colourise(1 + share[:, None], 1.0, 2.0)
    for at in (0.0, 0.5, 1.0):
        text = f"{limits[0] + at * (limits[1] - limits[0]):.1f}{' m' if at == 1 else ''}"
        row = round(min(max(at * height + 4, 13), height - 5))
        cv2.putText(strip, text, (23, row), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (34, 39, 43), 1, cv2.LINE_AA)
    return strip


def hidden_path(path: Path) -> Path:
    """The name of a video while it is written."""
    return path.with_name(f".{path.stem}.part{path.suffix}")


class VideoWriter:
    """A video of RGB frames that takes its name when it is closed: whole, or cut short by Ctrl-C and still playable.

    Used as a context: an error inside leaves nothing.

    Args:
        path: of the file, .mp4.
        rate: frames per second.

    Attributes:
        done: whether the file is there.
        frames: how many were written.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.done, self.frames = path, False, 0
        self._rate, self._hidden = rate, hidden_path(path)
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame uint8 [H, W, 3]; an odd side gets a pixel more, which the codec wants."""
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            code, size = cv2.VideoWriter.fourcc(*"mp4v"), (frame.shape[1], frame.shape[0])
            self._writer = cv2.VideoWriter(str(self._hidden), code, self._rate, size)
            if not self._writer.isOpened():
                self._hidden.unlink(missing_ok=True)
                raise FileError(
                    f"no video of {size[0]}x{size[1]} can be written to {self.path.parent}: the folder is not writable,"
                    " or opencv has no MPEG-4; write frames with formats npy"
                )
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.frames += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            with suppress(OSError):
                self._hidden.unlink(missing_ok=True)
            return
        # opencv does not report a full disk: count what arrived.
        check = cv2.VideoCapture(str(self._hidden))
        arrived = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        check.release()
        if arrived < self.frames:
            self._hidden.unlink(missing_ok=True)
            raise FileError(
                f"only {arrived} of {self.frames} frames arrived in {self.path.name}, which was deleted: is the disk"
                " full? Free some space and try again"
            )
        os.replace(self._hidden, self.path)
        self.done = True
