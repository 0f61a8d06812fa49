"""The example configurations of the folder conf, for --print-example.

conf is their only place in the source. A build puts copies into the packages (setup.py,
tools/pyz.py), so that an installed program has them as well.
"""

import argparse
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .process import print_answer

FOLDER = "examples"  # in a package that was built
CHECKOUT = Path(__file__).parents[2] / "conf"


def example(package: str, name: str) -> str:
    """The text of an example. Raises OSError if this copy of the program has none."""
    try:
        content = pkgutil.get_data(package, f"{FOLDER}/{name}")
    except OSError:
        content = None
    if content is None:
        content = (CHECKOUT / name).read_bytes()
    return content.decode()


class PrintExample(argparse.Action):
    """An option that prints an example and ends the program, as --version does."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, *, package: str, name: str, **others: Any
    ):  # fmt: skip
        super().__init__(option_strings, dest, nargs=0, **others)
        self._place = package, name

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
        values: str | Sequence[Any] | None, option_string: str | None = None,
    ) -> None:  # fmt: skip
        try:
            text = example(*self._place)
        except OSError as error:
            parser.exit(1, f"{parser.prog}: {error}: this copy of the program has no examples\n")
        parser.exit(print_answer(parser.prog, lambda: _print(text)))


def add_print_example(parser: argparse.ArgumentParser, package: str, name: str, what: str) -> None:
    """Add --print-example, for the example ``name`` of ``package``; ``what`` it is, for the
    help."""
    parser.add_argument(
        "--print-example", action=PrintExample, package=package, name=name,
        default=argparse.SUPPRESS, help=f"print {what}, with an explanation of each line",
    )  # fmt: skip


def _print(text: str) -> int:
    print(text, end="")
    return 0
