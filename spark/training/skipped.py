"""Images that could not be read: counted, listed, and too many of them refused."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spark.errors import UserError
from spark.files import write_whole


class UnreadableImages:
    """The files that could not be read so far, counted once each against a share of the data set; shards likewise.

    A process sees only its own failures: gather them from all processes before `add`, so that all stop together.

    Args:
        num_files: size of the data set.
        max_share: share of the files that may be unreadable, 0 to 1. Above 0 it allows one file at least.
        num_shards: shards of the data set, of which at most this share may break off.
    """

    def __init__(self, num_files: int, max_share: float, num_shards: int = 0):
        self.num_files = num_files
        self.max_share = max_share
        self.num_shards = num_shards
        self.reasons: dict[str, str] = {}
        self.shards: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of files."""
        return len(self.reasons)

    def add(self, failed: Sequence[str]) -> list[str]:
        """Count failures as `describe_failure` writes them; returns the new ones.

        Raises:
            UserError: more than `max_share` of all files have failed by now.
        """
        return self._count(failed, self.reasons, self.num_files, "images could not be read")

    def add_shards(self, failed: Sequence[str]) -> list[str]:
        """Count shards that broke off or could not be had, as `add` counts files."""
        return self._count(failed, self.shards, self.num_shards, "shards could not be read to their end")

    def _count(self, failed: Sequence[str], known: dict[str, str], total: int, what: str) -> list[str]:
        new = []
        for failure in failed:
            path, _, reason = failure.rpartition(": ")
            if path not in known:
                known[path] = reason
                new.append(failure)
        if new and len(known) > allowed_failures(self.max_share, total):
            raise UserError(
                f"{len(known)} of {total} {what}, more than the accepted share of {self.max_share:g}: repair or remove "
                f"them, or raise data.max_unreadable. First {'; '.join(_lines(known)[:3])}"
            )
        return new

    def report(self, path: str | Path) -> None:
        """Write `skipped_images.txt`: a line "path: reason" for each shard and file, sorted; nothing if none failed."""
        if self.reasons or self.shards:
            text = "".join(f"{line}\n" for line in _lines(self.shards) + _lines(self.reasons))
            write_whole(path, text.encode(errors="surrogateescape"))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on counting."""
        return {"reasons": dict(self.reasons), "shards": dict(self.shards)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.reasons = dict(state["reasons"])
        self.shards = dict(state.get("shards", {}))


def allowed_failures(max_share: float, total: int) -> float:
    """How many of so many files or shards may fail: their share, and one at least unless the share is 0."""
    return max(max_share * total, 1 if max_share > 0 else 0)


def _lines(reasons: dict[str, str]) -> list[str]:
    return [f"{path}: {reason}" for path, reason in sorted(reasons.items())]
