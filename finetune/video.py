"""Videos: frames read and counted, a colour range that does not flicker, and videos of depth that appear whole.

Written with opencv's own encoders: MPEG-4 in .mp4, or Motion JPEG in .avi where that one is missing. Sound is not kept.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from finetune.figures import colourise

EXTENSIONS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
CODECS = ((".mp4", "mp4v"), (".avi", "MJPG"))
USUAL_RATE = 25.0
SMOOTHING_SECONDS = 1.0
PERCENTILES = (2, 98)


class VideoError(ValueError):
    """A video that cannot be read; the message is the reason."""


class VideoFrames:
    """The frames of a video file, or of a camera by its index, upright, uint8 [H, W, 3] RGB.

    Args:
        source: the file, or the index of a camera.

    Attributes:
        announced: how many frames the file says it has; None if it does not say, as cameras.
        rate: frames per second.
        shape: (H, W, 3) of a frame.

    Raises:
        VideoError: no such file or camera, or nothing in it that can be decoded.
    """

    def __init__(self, source: Path | int) -> None:
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
        self._first, self.shape = frame, frame.shape
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.announced = int(count) if isinstance(source, Path) and 0 < count < 1e9 else None
        rate = float(self._capture.get(cv2.CAP_PROP_FPS))
        self.rate = rate if math.isfinite(rate) and 0 < rate <= 1000 else USUAL_RATE

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the frames, once, until the end or the first that cannot be decoded."""
        frame = self._first
        while frame is not None:
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            found, frame = self._capture.read()
            frame = frame if found else None

    def close(self) -> None:
        """Let go of the file or camera."""
        self._capture.release()


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
            self._part = self._stem.with_name(f".{self._stem.name}.part{extension}")
            code = cv2.VideoWriter.fourcc(*letters)
            writer = cv2.VideoWriter(str(self._part), code, self._rate, size)
            if writer.isOpened():
                return writer
            self._part.unlink(missing_ok=True)
        raise OSError(
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
            raise OSError(
                f"only {arrived} of {self.frames} frames arrived in {self._stem.name}, nothing was left of it: is the"
                " disk full? Free some space and try again"
            )
        final = self._stem.with_name(self._stem.name + self._part.suffix)
        os.replace(self._part, final)
        self.path = final
