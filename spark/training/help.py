"""What ``--help`` prints: the options of a dataclass from its docstrings, required ones first."""

import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from spark.training.cards import card_names
from spark.training.option_types import Options, as_written, field_types, type_name

COLUMN = 26  # where explanations start


class Option(NamedTuple):
    """One option: title of its group, dotted name, type, explanation, whether it must be given, its default if not."""

    group: str
    name: str
    kind: Any
    text: str
    required: bool
    default: Any


def read_options(cls: type, prefix: str = "") -> Iterator[Option]:
    """Every option of a dataclass, then of those in it, each explained in an ``Attributes:`` section."""
    kinds, texts = field_types(cls), explanations(cls)
    title = (cls.__doc__ or "").partition("\n")[0].rstrip(".")
    for item in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(kinds[item.name]):
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            required = default is dataclasses.MISSING
            yield Option(
                title, prefix + item.name, kinds[item.name], texts.get(item.name, ""), required, default
            )
    for name, kind in kinds.items():
        if dataclasses.is_dataclass(kind):
            yield from read_options(typing.cast(type, kind), f"{prefix}{name}.")


def explanations(cls: type) -> dict[str, str]:
    """Explanation of each field, from the ``Attributes:`` sections of a dataclass and those that it inherits from."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        section = re.search(
            r"^Attributes:\n((?:    .*\n?|\n)*)", inspect.cleandoc(each.__doc__ or ""), re.MULTILINE
        )
        entries = re.findall(
            r"^    (\w+): ((?:.|\n(?!    \w+: ))*)", section[1] if section else "", re.MULTILINE
        )
        found |= {name: " ".join(text.split()) for name, text in entries}
    return found


def help_text(cls: type[Options], description: str, wanted: str | None) -> str:
    """The whole help.

    Args:
        cls: the options of the command.
        description: what it does, and how it is called.
        wanted: None for the required options and the essential ones, "all" for all, or a word: the options whose name
            has it.
    """
    every = list(read_options(cls))
    width = min(max(shutil.get_terminal_size().columns, 50), 110)
    lines = [] if wanted else [*_paragraphs(description, width), ""]
    if wanted is None:
        order = {name: place for place, name in enumerate(cls.ESSENTIALS)}
        essential = {
            option.name: option for option in every if option.name in cls.ESSENTIALS and not option.required
        }
        sections = {
            "Required, here or in the file of --config": sorted(
                (o for o in every if o.required), key=lambda option: order.get(option.name, 99)
            ),
            "Used most": [essential[name] for name in cls.ESSENTIALS if name in essential],
        }
        if not cls.ESSENTIALS:
            sections["Options"] = [option for option in every if not option.required]
    else:
        chosen = [option for option in every if wanted == "all" or wanted in option.name]
        sections = {
            title: [o for o in chosen if o.group == title] for title in dict.fromkeys(o.group for o in chosen)
        }
    shown = 0
    for title, options in sections.items():
        if options:
            lines += textwrap.wrap(f"{title}:", width)
            for option in options:
                shown += 1
                lines += _explained(option, cls, width, brief=wanted is None and len(every) > 20)
            lines.append("")
    if not shown:
        lines += [f"no option is called {wanted}; --help all shows all", ""]
    lines += _closing(cls, len(every), shown, width)
    return "\n".join(lines)


def _explained(option: Option, cls: type[Options], width: int, brief: bool) -> list[str]:
    """The lines of one option: name, explanation, and in brackets what values it takes."""
    text = re.split(r"; |\. ", option.text)[0] if brief else option.text
    text = text if text.endswith("...") else text.removesuffix(".")
    kind = type_name(option.kind)
    if option.default is None:
        kind = kind.removesuffix(" or null")
    default = "" if option.required else f"; default {as_written(_plain(option.default))}"
    name = option.name if option.name == cls.POSITIONAL else f"--{option.name}"
    return _entry(name, f"{text} ({kind}{default})", width)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | list | dict | tuple | None) else str(value)


def _closing(cls: type[Options], count: int, shown: int, width: int) -> list[str]:
    cards = (
        f" or of a run card of the package, which are {', '.join(card_names(cls.CARDS))}" if cls.CARDS else ""
    )
    notes = {"--config FILE": f"options of a YAML file{cards}; options after it override it"}
    notes["--print_config"] = "print all options as a YAML file, and do nothing else"
    if shown < count:
        notes["--help all"] = f"explain all {count} options; --help WORD those with WORD in their name"
    return ["Help and files:", *(line for name, text in notes.items() for line in _entry(name, text, width))]


def _entry(name: str, text: str, width: int) -> list[str]:
    """A name and its explanation, wrapped beside it."""
    body = textwrap.wrap(text, width - COLUMN, break_long_words=False, break_on_hyphens=False)
    indented = [" " * COLUMN + line for line in body]
    if len(name) + 4 > COLUMN:
        return [f"  {name}", *indented]
    return [f"  {name}".ljust(COLUMN) + body[0], *indented[1:]]


def _paragraphs(text: str, width: int) -> list[str]:
    """Text wrapped to the width, each point of a list by itself; what is indented, such as commands, stays as it is."""
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lines += [""] if lines else []
        if paragraph.startswith(" "):
            lines += paragraph.splitlines()
            continue
        for item in re.split(r"\n(?=- )", paragraph):
            indent = "  " if item.startswith("- ") else ""
            text = " ".join(item.split())
            lines += textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
    return lines
