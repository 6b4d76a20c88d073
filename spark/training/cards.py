"""Run cards: YAML files of options that come with the package, found by name (``--config small``)."""

import difflib
from pathlib import Path

from spark.errors import FileError

PACKAGE = Path(__file__).resolve().parents[1]


def card_folder(kind: str) -> Path:
    """The cards of a kind ("pretrain", "depth" or "accelerate"): inside the installed package, or in the clone."""
    installed = PACKAGE / "cards" / kind
    return installed if installed.is_dir() else PACKAGE.parent / "configs" / kind


def card_names(kind: str) -> list[str]:
    """Names of the cards of a kind."""
    return sorted(path.stem for path in card_folder(kind).glob("*.yaml"))


def find_card(name: str, kind: str | None = None) -> Path:
    """The file that ``--config`` names: a path of a YAML file, or a card of this kind by its name.

    Raises:
        FileError: there is neither.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    known = [] if kind is None else card_names(kind)
    if kind is not None and name.removesuffix(".yaml") in known:
        return card_folder(kind) / f"{name.removesuffix('.yaml')}.yaml"
    near = difflib.get_close_matches(path.stem, known, n=1)
    cards = (
        f"; of the cards, did you mean {near[0]}?"
        if near
        else f"; the cards are {', '.join(known)}"
        if known
        else ""
    )
    raise FileError(f"there is no config file {name}; check the path given to --config{cards}")
