"""What the experiments' commands share of their argument parsing."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cs336_systems.errors import bad, unknown


def new_parser(prog: str, doc: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser described by a module's first line; the epilog stays as it is written."""
    return argparse.ArgumentParser(
        prog=prog,
        description=doc.partition("\n")[0],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every experiment has."""
    group = parser.add_argument_group("running")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("artifacts"),
        metavar="DIR",
        help="folder for the five files (default: artifacts)",
    )
    group.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )
    group.add_argument("--smoke", action="store_true", help="tiny sizes: seconds, to try it out")


def whole(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` on, with underscores as Python takes them."""

    def parse(word: str) -> int:
        try:
            number = int(word)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {least}, got {word}")
        return number

    return parse


def known(where: str, name: str, rows: Iterable[str], given: Sequence[str]) -> list[str]:
    """Return the given names, each once.

    Raises: UsageError for one that the table does not have, listing those it has.
    """
    rows = tuple(rows)
    for word in given:
        if word not in rows:
            raise unknown(where, name, rows, word)
    return list(dict.fromkeys(given))


def file_path(where: str, name: str, given: Path) -> str:
    """Return a readable file's path as the benchmarks, which run elsewhere, can find it.

    Raises: UsageError when there is no such file.
    """
    if not given.is_file():
        raise bad(where, name, "be a file", str(given))
    return str(given.resolve())
