"""The command `status` of both programs: asks the running program, prints its answer."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gotunnel import __version__

from . import status_page
from .status_socket import SERVING, NoAnswer, answers


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show_status(
    places: Sequence[str],
    program: str,
    *,
    as_json: bool,
    choose: Callable[[Iterator[dict[str, Any]]], dict[str, Any]] = next,
) -> int:
    """Ask ``program`` at one of ``places``, and print what it says. Returns the exit status: 0 if
    it serves, 1 if it runs and does not serve, 2 if there is no answer. ``choose(answers)``: the
    answer to print, if the program may run several times; may raise NoAnswer."""
    return show_answer(lambda: choose(answers(places, program)), program, as_json=as_json)


def show_answer(ask: Callable[[], dict[str, Any]], program: str, *, as_json: bool) -> int:
    """As show_status(), for the answer of ``ask()``, which may raise NoAnswer."""
    try:
        answer = ask()
    except NoAnswer as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(answer, indent=2) if as_json else status_page.render(answer, __version__))
    return 0 if answer.get("state") == SERVING else 1
