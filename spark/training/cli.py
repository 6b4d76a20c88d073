"""A command line and YAML files become a dataclass of options, and back.

The dataclasses are the only list of options: their types check, their docstrings are the ``--help``. None of it needs
torch.
"""

import dataclasses
import difflib
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

import yaml

from spark.errors import UserError, one_line
from spark.files import write_whole
from spark.training.cards import COMMANDS, card_names, find_card, kind_of
from spark.training.help import help_text
from spark.training.option_types import Options, as_written, field_types, type_name

T = TypeVar("T", bound=Options)


def parse_config(cls: type[T], argv: Sequence[str] | None, description: str) -> T:
    """Read the options of a command from its command line.

    ``--config FILE`` reads a YAML file or a run card. Dotted options such as ``--optim.base_lr 1e-3`` override it, and
    the last one counts. ``--losses.l1 0.5`` adds to an option that is a dict, ``--losses '{l1: 0.5}'`` replaces it. A
    list may be several values (``--model.input_size 96 128``), and a name alone means true. ``--help`` explains the
    options, and ``--print_config`` prints the result as YAML. ``--model resnet50`` sets the first option of the group
    model, its name.

    Args:
        cls: the options.
        argv: the arguments, None for those of the process.
        description: what ``--help`` says first.

    Raises:
        SystemExit: code 2, after one line on stderr, for an unknown option (the nearest one is named), a wrong value,
            a missing required option, or an unreadable file; code 0 after ``--help`` and ``--print_config``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for at, argument in enumerate(argv):
        if argument in ("-h", "--help"):
            wanted = next(iter(argv[at + 1 :]), None)
            print(help_text(cls, description, wanted and wanted.lstrip("-")))
            raise SystemExit(0)
    try:
        return read_options(cls, argv)
    except (UserError, OSError) as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {one_line(error) or error}", file=sys.stderr)
        raise SystemExit(2) from None


def read_options(cls: type[T], argv: Sequence[str]) -> T:
    """As `parse_config`, without what prints; raises UserError."""
    from argparse import ArgumentError

    from jsonargparse import (
        ActionConfigFile,  # pyright: ignore[reportPrivateImportUsage]
        ArgumentParser,
    )

    arguments = list(_arguments(cls, argv))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(cls)
    try:
        values = parser.instantiate(parser.parse_args(arguments))
        return cls(**{name: values[name] for name in field_types(cls)})
    except UserError:
        raise
    except (ArgumentError, ValueError) as error:
        cards = card_names(cls.CARDS) if cls.CARDS and not any(a.startswith("--config") for a in argv) else []
        raise UserError(_explain(cls, str(error), cards)) from error
    except OverflowError as error:  # a whole number that no float can be
        where = next((a.partition("=")[0] for a in arguments if re.search(r"\d{300}", a)), "an option")
        raise UserError(f"{where} has a number of hundreds of digits: correct it") from error


def call_options(cls: type[T], options: Mapping[str, Any]) -> T:
    """Options from the keyword arguments of a call, checked as those of a command line are.

    ``model="resnet50"`` sets the first option of the group model, its name; ``optim={"batch_size": 64}`` and
    ``**{"optim.batch_size": 64}`` set options in a group; ``config="small"`` reads a run card.

    Raises:
        UserError: something is wrong with an option or a file; one sentence.
    """
    _, groups = _names(cls)

    def arguments(entries: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in entries.items():
            name = prefix + key
            if name in groups and isinstance(value, Mapping):
                yield from arguments(value, f"{name}.")
            else:
                yield f"--{name}={_as_yaml(value)}"

    given = dict(options)
    first = [f"--config={given.pop('config')}"] if "config" in given else []
    return read_options(cls, [*first, *arguments(given)])


def _as_yaml(value: Any) -> str:
    if isinstance(value, str | Path):
        return str(value)
    return yaml.safe_dump(_plain(value), default_flow_style=True, width=1 << 30).removesuffix("...\n").strip()


def make_callable(module: str, call: Callable[..., None]) -> None:
    """Let a module be called: ``spark.pretrain(...)``, beside ``spark.pretrain.main([...])``."""

    class CallableModule(types.ModuleType):
        def __call__(self, **options: Any) -> None:
            call(**options)

    sys.modules[module].__class__ = CallableModule


def save_config(config: Any, path: str | Path) -> None:
    """Write a dataclass of options as the YAML file that ``--config`` reads back."""
    write_whole(path, yaml.safe_dump(config_dict(config), sort_keys=False).encode())


def config_dict(config: Any) -> dict[str, Any]:
    """Turn a dataclass of options into nested dicts of plain values (lists for tuples), as in its YAML file."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def flat_config(config: Any) -> dict[str, bool | int | float | str]:
    """The options by dotted name, as trackers show them; what is no single value is a text."""

    def entries(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in options.items():
            if isinstance(value, dict) and value:
                yield from entries(value, f"{prefix}{name}.")
            else:
                yield (
                    prefix + name,
                    value if isinstance(value, bool | int | float | str) else as_written(value),
                )

    return dict(entries(config_dict(config)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_dict(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def with_defaults(cls: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an older run, as `config_dict` has them, as this version would write them.

    What did not exist then has its default, and what no longer exists is left out.
    """
    plain: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        kind = field_types(cls)[item.name]
        if dataclasses.is_dataclass(kind):
            plain[item.name] = with_defaults(typing.cast(type, kind), options.get(item.name) or {})
        elif item.name in options:
            plain[item.name] = options[item.name]
        elif item.default_factory is not dataclasses.MISSING:
            plain[item.name] = _plain(item.default_factory())
        elif item.default is not dataclasses.MISSING:
            plain[item.name] = _plain(item.default)
    return plain


def config_changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """Options that differ between two configs of `config_dict`; `with_defaults` completes an older one before."""
    lines = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += config_changes(old, new, f"{prefix}{name}.")
        elif old != new and prefix + name != "resume":
            lines.append(f"{prefix}{name} was {as_written(old)}, is {as_written(new)}")
    return lines


def _names(cls: type, prefix: str = "") -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Dotted name -> type of every option of a dataclass; dotted name -> names of the members of every group."""
    options, groups = {}, {}
    for name, kind in field_types(cls).items():
        if dataclasses.is_dataclass(kind):
            inner, nested = _names(typing.cast(type, kind), f"{prefix}{name}.")
            options |= inner
            groups |= {prefix + name: list(field_types(typing.cast(type, kind)))} | nested
        else:
            options[prefix + name] = kind
    return options, groups


def _arguments(cls: type[Options], argv: Sequence[str]) -> Iterator[str]:
    """The arguments in the form ``--name=value``: names checked, several values made a list, cards found."""
    options, groups = _names(cls)
    given: list[tuple[str, list[str]]] = [("", [])]  # values before the first name have none
    for argument in argv:
        if re.match(r"--\w", argument):
            name, equals, value = argument[2:].partition("=")
            given.append((name, [value] if equals else []))
        else:
            given[-1][1].append(argument)
    stray = given[0][1]
    for name, values in given[1:]:
        if name in groups and not "".join(values[:1]).startswith("{"):
            name = f"{name}.{groups[name][0]}"
        kind = options.get(name)
        if name in cls.RETIRED:
            raise UserError(f"there is no option --{name} any more: leave it out")
        if name not in {"config", "print_config", *options, *groups} and not _is_entry(name, options):
            raise UserError(f"unknown option --{name}{_suggest(name, options, groups)}")
        if name == "print_config":
            yield "--print_config"
        elif not values:
            if not _takes(kind, bool):
                raise UserError(f"--{name} needs a value" + (f": {type_name(kind)}" if kind else ""))
            yield f"--{name}=true"
        elif _takes(kind, list) or _takes(kind, tuple):
            yield f"--{name}={_listed(kind, values)}"
        else:
            if name == "config":
                values[0] = _as_yaml(_read_file(find_card(values[0], cls.CARDS), cls, options, groups))
            yield f"--{name}={values[0]}"
            stray += values[1:]
    if cls.POSITIONAL is not None and stray:
        kind = options[cls.POSITIONAL]
        yield f"--{cls.POSITIONAL}={_listed(kind, stray) if _takes(kind, list) else stray.pop(0)}"
        stray = [] if _takes(kind, list) else stray
    if stray:
        raise UserError(f"unexpected argument {stray[0]}; options are given as --name VALUE")


def _takes(kind: Any, wanted: type) -> bool:
    """Whether a type is `wanted`, or has it among its alternatives."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _takes(parts[0], wanted)
    if origin in (Union, types.UnionType):
        return any(_takes(part, wanted) for part in parts)
    return (origin or kind) is wanted


def _listed(kind: Any, values: Sequence[str]) -> str:
    """Values of an option that takes a list, as YAML; a single one may be the list itself or another alternative."""
    if len(values) == 1 and (
        re.match(r"\[|null$", values[0]) or any(_takes(kind, other) for other in (int, float, str, bool))
    ):
        return values[0]
    texts = any(_takes(part, str) for part in typing.get_args(kind)) or "str" in repr(kind)
    return _as_yaml(list(values)) if texts else f"[{', '.join(values)}]"


def _is_entry(name: str, options: dict[str, Any]) -> bool:
    """Whether a dotted name is an entry of an option that is a dict, which adds to the dict or replaces in it."""
    return any(
        _takes(kind, dict) and re.match(rf"{re.escape(option)}\.\w", name) for option, kind in options.items()
    )


def _read_file(
    path: Path, cls: type[Options], options: dict[str, Any], groups: dict[str, list[str]]
) -> dict[str, Any]:
    """The options in a YAML file, without those that were retired; unknown ones are refused."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error

    def known(section: Any, prefix: str) -> dict[str, Any]:
        where = f"{prefix} in {path}" if prefix else str(path)
        members = groups.get(prefix) or [name for name in (*options, *groups) if "." not in name]
        if not isinstance(section, dict):
            raise UserError(
                f"{where} must hold options ({', '.join(members)}), one a line as `name: value`, got {section!r}"
            )
        kept = {}
        for key, value in section.items():
            name = f"{prefix}.{key}" if prefix else str(key)
            if name in groups:
                kept[key] = known(value, name)
            elif name in options:
                kept[key] = value
            elif name not in cls.RETIRED:
                kind = kind_of(content)
                if cls.CARDS in COMMANDS and kind in COMMANDS and kind != cls.CARDS:
                    raise UserError(
                        f"{path} is of {COMMANDS[kind]} (it has {name}), and this is {COMMANDS[cls.CARDS]}"
                    )
                raise UserError(f"unknown option {name} in {path}{_suggest(name, options, groups)}")
        return kept

    return known(content, "")


def _suggest(name: str, options: dict[str, Any], groups: dict[str, list[str]]) -> str:
    """Say which option was probably meant, or which there are."""
    group, _, leaf = name.rpartition(".")
    group = difflib.get_close_matches(group, groups, n=1)[:1] if group else []
    names = [*options, *groups]
    siblings = [other for other in names if group and other.rpartition(".")[0] == group[0]]
    # an option of this very name, in no group, or one that is written nearly so
    nearest = [leaf] if group and leaf in names else difflib.get_close_matches(name, names, n=1, cutoff=0.8)
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


def _explain(cls: type, message: str, cards: Sequence[str]) -> str:
    """Put jsonargparse's messages of several lines into one sentence; leave others as they are."""
    key = re.match(r'Parser key "([^"]+)":', message)
    options, _ = _names(cls)
    if key and key[1] in options:
        value = re.search(r"(?:Got value|Given value): (.*)", message)
        return f"{key[1]} must be {type_name(options[key[1]])}, got {value[1] if value else 'something else'}"
    if missing := re.search(r"arguments are required: (.*)", message):
        names = missing[1].split(", ")
        example = " ".join(f"--{name} VALUE" for name in names)
        more = f"; --config NAME reads a run card, one of {', '.join(cards)}" if cards else ""
        return f"{' and '.join(names)} must be set, in the config file or as {example}{more}"
    return " ".join(message.split())
