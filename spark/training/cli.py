"""A command line and a YAML file become a dataclass of options, and back."""

import dataclasses
import difflib
import json
import math
import os
import re
import sys
import typing
from argparse import Action, ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import (
    ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
    ArgumentParser,
    DefaultHelpFormatter,
)

from spark.errors import FileError, UserError
from spark.files import write_whole

T = TypeVar("T")


def require(holds: bool, path: str, value: Any, rule: str) -> None:
    """Raise ``ValueError("<path> must be <rule>, got <value>")`` unless `holds`."""
    if not holds:
        raise UserError(f"{path} must be {rule}, got {value}")


def parse_config(cls: type[T], argv: Sequence[str] | None, description: str) -> T:
    """Read a dataclass of options from a command line.

    ``--config FILE`` reads a YAML file, dotted options such as ``--optim.base_lr 1e-3`` override it (the last one
    counts), ``--losses.l1 0.5`` adds to an option that is a dict (``--losses '{l1: 0.5}'`` replaces it), ``--help``
    lists every option, and ``--print_config`` prints the result as YAML and exits.

    Args:
        cls: a dataclass, its fields typed, possibly dataclasses themselves, with an ``Attributes:`` docstring section.
        argv: the arguments, None for those of the process.
        description: what ``--help`` says first.

    Returns:
        An instance of `cls`.

    Raises:
        SystemExit: code 2, after one line on stderr, for an unknown option (the nearest one is named), a wrong type, a
            missing required option, a value that the dataclass refuses with ValueError, or an unreadable file; code 0
            after ``--help`` and ``--print_config``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(
        description=description, exit_on_error=False, formatter_class=_help_formatter(cls)
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the options below")
    parser.add_class_arguments(cls)
    try:
        _check_names(cls, argv)
        values = parser.instantiate(parser.parse_args(argv))
        config = cls(**{name: values[name] for name in typing.get_type_hints(cls)})
        _require_finite(config)
        return config
    except (ArgumentError, ValueError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {_explain(cls, str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


def _require_finite(value: Any, path: str = "") -> None:
    """Raise ValueError for the first number that is infinite or no number, which YAML knows as .inf and .nan."""
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            _require_finite(getattr(value, item.name), f"{path}.{item.name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for entry in value:
            _require_finite(entry, path)
    elif isinstance(value, float):
        require(math.isfinite(value), path, value, "a finite number")


def save_config(config: Any, path: str | Path) -> None:
    """Write a dataclass of options as the YAML file that ``--config`` reads back.

    Args:
        config: an instance of a dataclass.
        path: the file to write.
    """
    write_whole(path, yaml.safe_dump(config_dict(config), sort_keys=False).encode())


def config_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass of options into nested dicts of plain values (lists for tuples), as in its YAML file."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_dict(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def config_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Options that differ between the config of a checkpoint and that of the run which continues from it."""
    lines = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_changes(old, new, f"{prefix}{name}.")
        elif old != new and prefix + name != "resume":
            lines.append(f"{prefix}{name} was {_as_written(old)}, is {_as_written(new)}")
    return lines


def _as_written(value: Any) -> str:
    """A plain value as it is given on the command line: null, true, [0.9, 0.95]."""
    return value if isinstance(value, str) else json.dumps(value)


def _options(cls: type, prefix: str = "") -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Dotted name -> type of every option of a dataclass; dotted name -> names of the members of every group."""
    options, groups = {}, {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            inner, nested = _options(typing.cast(type, kind), f"{prefix}{name}.")
            options |= inner
            groups |= {prefix + name: list(typing.get_type_hints(kind))} | nested
        else:
            options[prefix + name] = kind
    return options, groups


def _check_names(cls: type, argv: Sequence[str]) -> None:
    """Raise ValueError for the first option that does not exist, on the command line or in a file given to --config."""
    options, groups = _options(cls)
    for at, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        name, equals, value = argument[2:].partition("=")
        if name == "config":
            if path := value if equals else "".join(argv[at + 1 : at + 2]):
                _check_file(Path(path), options, groups)
        elif name not in {"help", "print_config", *options, *groups} and not _is_entry(name, options):
            raise UserError(f"unknown option --{name}{_suggest(name, options, groups)}")


def _help_formatter(cls: type) -> type[DefaultHelpFormatter]:
    """Writes ``--help`` with types in words, such as "a number or null"."""
    options, _ = _options(cls)

    class Formatter(DefaultHelpFormatter):
        def _get_help_string(self, action: Action) -> str:
            text = super()._get_help_string(action)
            return (
                text.replace("%(type)s", _type_name(options[action.dest])) if action.dest in options else text
            )

    return Formatter


def _is_entry(name: str, options: dict[str, Any]) -> bool:
    """Whether a dotted name is an entry of an option that is a dict, which adds to the dict or replaces in it."""
    return any(
        typing.get_origin(kind) is dict and re.match(rf"{re.escape(option)}\.\w", name)
        for option, kind in options.items()
    )


def _check_file(path: Path, options: dict[str, Any], groups: dict[str, list[str]]) -> None:
    if not path.is_file():
        raise FileError(f"there is no config file {path}; check the path given to --config")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error

    def walk(section: Any, prefix: str) -> None:
        where = f"{prefix} in {path}" if prefix else str(path)
        members = groups.get(prefix) or [name for name in (*options, *groups) if "." not in name]
        if not isinstance(section, dict):
            raise UserError(
                f"{where} must hold options ({', '.join(members)}), one a line as `name: value`, got {section!r}"
            )
        for key, value in section.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if name in groups:
                walk(value, name)
            elif name not in options:
                raise UserError(f"unknown option {name} in {path}{_suggest(name, options, groups)}")

    walk(content, "")


def _suggest(name: str, options: dict[str, Any], groups: dict[str, list[str]]) -> str:
    """Say which option was probably meant, or which there are."""
    group, _, leaf = name.rpartition(".")
    group = difflib.get_close_matches(group, groups, n=1)[:1] if group else []
    names = [*options, *groups]
    siblings = [other for other in names if group and other.rpartition(".")[0] == group[0]]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
    for candidates in (siblings, names):
        by_leaf = {other.rpartition(".")[2]: other for other in reversed(candidates)}
        nearest = (
            nearest
            or [by_leaf[match] for match in difflib.get_close_matches(leaf, by_leaf, n=1)]
            or [by_leaf[other] for other in by_leaf if leaf in other.split("_")]
        )
    if nearest:
        return f"; did you mean {nearest[0]}?"
    return f"; {group[0]} has {', '.join(groups[group[0]])}" if group else "; --help lists all options"


def _explain(cls: type, message: str) -> str:
    """Put jsonargparse's messages of several lines into one sentence; leave others as they are."""
    key = re.match(r'Parser key "([^"]+)":', message)
    options, groups = _options(cls)
    if key and key[1] in options:
        value = re.search(r"(?:Got value|Given value): (.*)", message)
        return (
            f"{key[1]} must be {_type_name(options[key[1]])}, got {value[1] if value else 'something else'}"
        )
    if key and key[1] in groups:
        first = f"{key[1]}.{groups[key[1]][0]}"
        return f"--{key[1]} is the name of a YAML file; single options are set as --{first} VALUE"
    if missing := re.search(r"arguments are required: (.*)", message):
        names = missing[1].split(", ")
        example = " ".join(f"--{name} VALUE" for name in names)
        return f"{' and '.join(names)} must be set, in the config file or as {example}"
    if stray := re.search(r"nrecognized arguments: (.*)", message):
        return f"unexpected argument {stray[1]}; options are given as --name VALUE"
    return " ".join(message.split())


def _type_name(kind: Any) -> str:
    """Name a type as a user would: ``float | None`` is "a number or null"."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(part) for part in parts)
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"a list [...] of {_plural(parts[0])}"
        return f"a list [...] of {len(parts)} {_plural(parts[0])}"
    if origin is list:
        return f"a list [...] of {_plural(parts[0])}"
    if origin is dict:
        return f"{{name: {_type_name(parts[1])}, ...}}"
    if origin is not None:
        return " or ".join(_type_name(part) for part in parts)
    names = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
        Any: "any value",
    }
    return names[kind]


def _plural(kind: type) -> str:
    if dataclasses.is_dataclass(kind):
        return f"{{{': ..., '.join(typing.get_type_hints(kind))}: ...}}"
    names = {int: "whole numbers", float: "numbers", str: "texts"}
    return names.get(kind) or f"entries, each {_type_name(kind)}"
