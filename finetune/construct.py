"""From a name and options in a configuration to an object of a family (heads, losses)."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, TypeVar

from spark.errors import UserError

T = TypeVar("T")


class Registry(Mapping[str, type[T]]):
    """Name in a configuration -> class, which is imported when it is asked for.

    Args:
        places: Name -> "package.module:Class".
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = dict(places)

    def __getitem__(self, name: str) -> type[T]:
        module, _, attribute = self._places[name].partition(":")
        return getattr(import_module(module), attribute)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def construct(
    kind: str,
    registry: Mapping[str, Callable[..., T]],
    name: str,
    options: Mapping[str, Any],
    *args: Any,
    **given: Any,
) -> T:
    """Return `registry[name](*args, **given, **options)`.

    Args:
        kind: What the registry holds, for messages ("head", "loss").
        registry: Name -> class or function.
        name: The entry wanted.
        options: The user's keyword arguments for it; must be parameters of the entry that are not in `args` or
            `given`.
        args: Positional arguments that the caller, not the user, supplies.
        given: Keyword arguments likewise.

    Raises:
        UserError: Unknown name or option, with what there is and the nearest match; or values of the wrong type.
    """
    if name not in registry:
        raise UserError(
            f"there is no {kind} named {name!r}{_nearest(name, list(registry))}: there is {_listed(registry)}."
        )
    parameters = list(inspect.signature(registry[name]).parameters)[len(args) :]
    accepted = [parameter for parameter in parameters if parameter not in given]
    for option in options:
        if option not in accepted:
            raise UserError(
                f"{kind} {name!r} has no option {option!r}{_nearest(option, accepted)}: it has {_listed(accepted)}."
            )
    try:
        return registry[name](*args, **given, **options)
    except TypeError as error:
        if not options:
            raise
        raise UserError(f"{kind} {name!r} cannot take the options {dict(options)}: {error}") from error


def _listed(names: Any) -> str:
    return ", ".join(names) or "none"


def _nearest(name: str, candidates: list[str]) -> str:
    matches = difflib.get_close_matches(name, candidates, n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
