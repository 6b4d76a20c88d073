"""What a process of a run of several does; apart, so that it imports nothing but the command it is given."""

from collections.abc import Callable


def call(rank: int, main: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Run a command line as one of several processes."""
    main(arguments)
