"""Run cards: YAML files of options that come with the package, found by name (``--config small``)."""

import difflib
from pathlib import Path
from typing import Any

from spark.errors import FileError

PACKAGE = Path(__file__).resolve().parents[1]


def card_folder(kind: str) -> Path:
    """The cards of a kind ("pretrain", "depth" or "accelerate"): inside the installed package, or in the clone."""
    installed = PACKAGE / "cards" / kind
    return installed if installed.is_dir() else PACKAGE.parent / "configs" / kind


def card_names(kind: str) -> list[str]:
    """Names of the cards of a kind."""
    return sorted(path.stem for path in card_folder(kind).glob("*.yaml"))


COMMANDS = {"pretrain": "spark-pretrain", "depth": "spark-depth"}
"""Kind of cards -> the command that reads them."""


def kind_of(options: Any) -> str | None:
    """The kind of a file of options, by those that no other kind has; None where it has none of them."""
    if not isinstance(options, dict):
        return None
    data, model = (
        set(members) if isinstance(members := options.get(group), dict) else set()
        for group in ("data", "model")
    )
    if {"encoder", "losses", "protocol"} & options.keys() or {"root", "list", "crop_size"} & data:
        return "depth"
    return "pretrain" if "train" in data or {"name", "mask_ratio"} & model else None


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
    for other, command in COMMANDS.items():
        if kind in COMMANDS and other != kind and name.removesuffix(".yaml") in card_names(other):
            raise FileError(
                f"{name} is a card of {command}, not of {COMMANDS[kind]}; the cards are {', '.join(known)}"
            )
    near = difflib.get_close_matches(path.stem, known, n=1)
    cards = (
        f"; of the cards, did you mean {near[0]}?"
        if near
        else f"; the cards are {', '.join(known)}"
        if known
        else ""
    )
    raise FileError(f"there is no config file {name}; check the path given to --config{cards}")
