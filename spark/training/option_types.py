"""Types of options that say which values are allowed, and the check of a dataclass of options against them.

    width: PositiveInt = 768                       # a whole number above 0
    clip_grad: PositiveFloat | None = 5.0          # a number above 0 or null
    train: PathText                                # a text, a leading ~ is the home folder

The same words are in error messages and in ``--help``.
"""

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal, Union

from spark.errors import UserError

LARGEST = 10**12
"""No option means a number beyond this: what is larger was mistyped, and overflows or never ends somewhere later."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Restricts a type, as in ``Annotated[float, Rule("above 0", lambda value: value > 0)]``.

    Attributes:
        words: what follows the name of the type, such as "above 0".
        holds: whether a value of the type is allowed.
        names: the words stand in place of the name of the type.
        most: no number may be larger; said only of one that is.
    """

    words: str
    holds: Callable[[Any], bool]
    names: bool = False
    most: int = LARGEST


def between(low: float, high: float) -> Rule:
    """The rule of a number from `low` to `high`, both included."""
    return Rule(f"from {low} to {high}", lambda value: low <= value <= high)


class HomeFolder:
    """Marks a text that names a file or folder: a leading ~ becomes the home folder, also in a YAML file."""


def at_most(most: int) -> Rule:
    """The rule of a number that has an upper end far from what anybody means."""
    return Rule("", lambda value: True, most=most)


PathText = Annotated[str, HomeFolder()]
PositiveInt = Annotated[int, Rule("above 0", lambda value: value > 0)]
NonNegativeInt = Annotated[int, Rule("of at least 0", lambda value: value >= 0)]
PositiveFloat = Annotated[float, Rule("above 0", lambda value: value > 0)]
NonNegativeFloat = Annotated[float, Rule("of at least 0", lambda value: value >= 0)]
Share = Annotated[float, between(0, 1)]
PositiveShare = Annotated[float, Rule("above 0 and at most 1", lambda value: 0 < value <= 1)]
ShareBelow1 = Annotated[float, Rule("of at least 0 and below 1", lambda value: 0 <= value < 1)]
InnerShare = Annotated[float, Rule("between 0 and 1", lambda value: 0 < value < 1)]
Workers = Annotated[NonNegativeInt, at_most(256)]
BatchSize = Annotated[PositiveInt, at_most(1_000_000)]
Side = Annotated[PositiveInt, at_most(65_536)]
Channels = Annotated[PositiveInt, at_most(1024)]
Rate = Annotated[PositiveFloat, at_most(1000)]
LOW_FIRST = Rule("with the lower one first", lambda value: value[0] <= value[1])
NOT_EMPTY = Rule("", lambda value: len(value) > 0)


def require(holds: bool, path: str, value: Any, rule: str) -> None:
    """Raise ``UserError("<path> must be <rule>, got <value>")`` unless `holds`."""
    if not holds:
        raise UserError(f"{path} must be {rule}, got {value}")


class Options:
    """Base of a command's options, a dataclass: when one is made, all values in it are checked.

    A dataclass in it may have a method ``check`` for rules between its fields; it runs after those of the types.

    Attributes:
        ESSENTIALS: options that ``--help`` shows, in order, under those that are required; empty shows all.
        POSITIONAL: the option that takes values without a name before them, such as files to compare.
        CARDS: folder of configs/ whose run cards ``--config NAME`` finds.
        RETIRED: options that there were once; files may still hold them, and they do nothing.
    """

    ESSENTIALS: typing.ClassVar[tuple[str, ...]] = ()
    POSITIONAL: typing.ClassVar[str | None] = None
    CARDS: typing.ClassVar[str | None] = None
    RETIRED: typing.ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_options(self)


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Type of every field of a dataclass, with its rules, those of base classes first."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


def check_options(options: Any, prefix: str = "") -> None:
    """Expand ~ in paths, and check every value of a dataclass against its type.

    Raises:
        UserError: the first value that is not allowed, by its dotted name.
    """
    for name, kind in field_types(type(options)).items():
        value = getattr(options, name)
        for entry in value if isinstance(value, list) else (value,):
            if dataclasses.is_dataclass(entry):
                check_options(entry, f"{prefix}{name}.")
        if isinstance(value, str) and value.startswith("~") and _names_path(kind):
            value = os.path.expanduser(value)
            setattr(options, name, value)
        numbers = _numbers(value)
        infinite = next((v for v in numbers if isinstance(v, float) and not math.isfinite(v)), None)
        most = min(_limits(kind), default=LARGEST)
        huge = next((v for v in numbers if abs(v) > most), None)
        if infinite is not None or huge is not None or not _allows(kind, value):
            wanted, got = type_name(kind), value
            if infinite is not None:
                wanted, got = "a finite number", str(infinite)
            elif huge is not None and _allows(kind, value):
                wanted, got = f"at most {most}", huge
            empty = {"": "an empty text", "[]": "an empty list"}
            got = re.sub(r"\.0\b", "", as_written(got))
            got = empty.get(got, got)
            require(False, prefix + name, got, wanted)
    if hasattr(options, "check"):
        options.check()


def as_written(value: Any) -> str:
    """A plain value as it is given on the command line: null, true, [0.9, 0.95]."""
    return value if isinstance(value, str) else json.dumps(value)


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for entry in value for number in _numbers(entry)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def _names_path(kind: Any) -> bool:
    return any(isinstance(part, HomeFolder) or _names_path(part) for part in typing.get_args(kind))


def _limits(kind: Any) -> list[int]:
    parts = typing.get_args(kind)
    own = [part.most for part in parts if isinstance(part, Rule)]
    return own + [most for part in parts for most in _limits(part)]


def _allows(kind: Any, value: Any) -> bool:
    """Whether a value is of a type and keeps to its rules."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        rules = (rule for rule in parts[1:] if isinstance(rule, Rule))
        return _allows(parts[0], value) and all(rule.holds(value) for rule in rules)
    if origin in (Union, types.UnionType):
        return any(_allows(part, value) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        if not isinstance(value, tuple | list):
            return False
        each = parts if origin is tuple and parts[-1] is not Ellipsis else (parts[0],) * len(value)
        return len(value) == len(each) and all(map(_allows, each, value))
    if origin is dict:
        return isinstance(value, dict) and all(_allows(parts[1], entry) for entry in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def type_name(kind: Any) -> str:
    """Name a type as a user would: ``PositiveFloat | None`` is "a number above 0 or null"."""
    origin, parts = typing.get_origin(kind), list(typing.get_args(kind))
    if origin is Annotated:
        rules = [rule for rule in parts[1:] if isinstance(rule, Rule)]
        name = "a path" if _names_path(kind) else type_name(parts[0])
        words = [rule.words for rule in rules if rule.words]
        return " ".join(words if any(rule.names for rule in rules) else [name, *words])
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts)) if len(parts) > 1 else str(parts[0])
    if origin is tuple and parts and parts[-1] is not Ellipsis:
        return f"a list [...] of {len(parts)} {_plural(parts[0])}"
    if origin in (tuple, list):
        return f"a list [...] of {_plural(parts[0])}"
    if origin is dict:
        return f"{{name: {type_name(parts[1])}, ...}}"
    if origin is not None:
        return " or ".join(type_name(part) for part in parts)
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(kind, "any value")


def _plural(kind: Any) -> str:
    """Name of several of a type: "numbers above 0"."""
    if typing.get_origin(kind) is Annotated:
        base, *rules = typing.get_args(kind)
        return " ".join(
            [_plural(base), *(rule.words for rule in rules if isinstance(rule, Rule) and rule.words)]
        )
    if dataclasses.is_dataclass(kind):
        return f"{{{': ..., '.join(field_types(typing.cast(type, kind)))}: ...}}"
    names = {int: "whole numbers", float: "numbers", str: "texts"}
    return names.get(kind) or f"entries, each {type_name(kind)}"


def values_of(options: Any, cls: type) -> dict[str, Any]:
    """Values of those options that the dataclass `cls` lists, to be passed on as keyword arguments."""
    return {item.name: getattr(options, item.name) for item in dataclasses.fields(cls)}
