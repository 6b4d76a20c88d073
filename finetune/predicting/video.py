"""Videos: frames read and counted, a colour range that does not flicker, and videos of depth that appear whole.

Written with opencv's own encoders: MPEG-4 in .mp4, or Motion JPEG in .avi where that one is missing. Sound is not kept.
"""

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from finetune.report.figures import colourise
from spark.errors import FileError, UserError

EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
CODECS = ((".mp4", "mp4v"), (".avi", "MJPG"))
COUNTED = (".mp4", ".m4v", ".mov", ".avi")
"""Files that hold how many frames they have."""
USUAL_RATE = 25.0
FASTEST = 240.0
"""Frames per second beyond which a rate is an error of the file."""
TOLERANCE_SECONDS = 0.1
"""Differences of time below this are nothing to tell: sound is longer than the picture by some hundredths."""
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
        announced: how many frames the file says it has, or those that the first pass could decode (`most` at most);
            None of a camera.
        seconds: how long the file says it is; None if it does not say, as cameras.
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
        said = isinstance(source, Path) and 0 < count < 1e9
        self.announced = int(count) if said else None
        self.seconds = count / rate if said and math.isfinite(rate) and rate > 0 else None
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
        """What lacks at the end, after all frames were read; "" if nothing does.

        A number of frames alone tells little (edit lists drop some): the time of the last one must be too early too.
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
        """What even frames make of the timing of those read; "" where they are even."""
        if self.timing_off <= max(TOLERANCE_SECONDS, 1.5 / self.rate):
            return ""
        return (
            f"its frames come unevenly, those of the depth evenly, {self.rate:g} a second: the worst is"
            f" {self.timing_off:.1f} s from its time"
        )

    def close(self) -> None:
        """Let go of the file or camera."""
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


def part_path(stem: Path, extension: str) -> Path:
    """The hidden name under which a video is written."""
    return stem.with_name(f".{stem.name}.part{extension}")


def forget_killed(stem: Path) -> None:
    """Remove what a killed program left of a video of this path without extension."""
    for extension, _ in CODECS:
        part_path(stem, extension).unlink(missing_ok=True)


class VideoWriter:
    """A video of RGB frames that takes its name when it is closed: whole, or cut short by Ctrl-C and still playable.

    Used as a context: an error inside leaves nothing.

    Args:
        stem: path of the file without extension; the first of `CODECS` that opens decides that.
        rate: frames per second.
        codecs: (extension, four letters) in the order in which they are tried.

    Attributes:
        path: of the file; None until it was closed with a frame in it.
        frames: how many were written.
    """

    def __init__(self, stem: Path, rate: float, codecs: Sequence[tuple[str, str]] = CODECS) -> None:
        self.path: Path | None = None
        self.frames = 0
        self._stem, self._rate, self._codecs = stem, rate, codecs
        self._writer: cv2.VideoWriter | None = None
        self._part = stem

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, frame: np.ndarray) -> None:
        """Append a frame uint8 [H, W, 3]; an odd side gets a pixel more, which the codecs want."""
        frame = np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")
        if self._writer is None:
            self._writer = self._opened((frame.shape[1], frame.shape[0]))
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        self.frames += 1

    def _opened(self, size: tuple[int, int]) -> cv2.VideoWriter:
        self._stem.parent.mkdir(parents=True, exist_ok=True)
        for extension, letters in self._codecs:
            self._part = part_path(self._stem, extension)
            code = cv2.VideoWriter.fourcc(*letters)
            writer = cv2.VideoWriter(str(self._part), code, self._rate, size)
            if writer.isOpened():
                return writer
            self._part.unlink(missing_ok=True)
        raise FileError(
            f"no video of {size[0]}x{size[1]} can be written to {self._stem.parent}: the folder is not writable, or"
            f" opencv has none of {', '.join(letters for _, letters in self._codecs)}; write frames with formats npy"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is None:
            return
        self._writer.release()
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            with suppress(OSError):
                self._part.unlink(missing_ok=True)
            return
        # opencv says nothing of a full disk: count what arrived.
        check = cv2.VideoCapture(str(self._part))
        arrived = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
        check.release()
        if arrived < self.frames:
            self._part.unlink(missing_ok=True)
            raise FileError(
                f"only {arrived} of {self.frames} frames arrived in {self._stem.name}, nothing was left of it: is the"
                " disk full? Free some space and try again"
            )
        final = self._stem.with_name(self._stem.name + self._part.suffix)
        os.replace(self._part, final)
        self.path = final
