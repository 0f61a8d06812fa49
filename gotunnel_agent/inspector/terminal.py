"""`gotunnel inspect`: shows, repeats and saves the visits that an agent's inspector has kept.

It asks the inspector that runs on this machine by its JSON API (docs/inspector.md), and finds it by
the file that the agent has written (place.py).

Exit status: 0 if all went well; 1 if a replay was not answered as it should be (no answer or a
status of 500 and more, or not what --until names), or if the answers of two visits differ; 2 if an
argument is wrong, no inspector runs, or it has refused.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import signal
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import sleep
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .. import home
from ..arguments import Parser
from ..called import program
from ..common import atomic_file, small_file
from ..common.cells import safe
from ..common.process import print_answer
from .ask import CannotAsk, Inspector, Refused
from .lines import Paper, comparison_lines, replay_lines, row, table, text_lines, visit_lines
from .mask import COPY_MASK, MASK
from .place import Place, places
from .search import FILTERS

COMMANDS = (
    "list", "show", "replay", "curl", "python", "body", "compare", "har", "import", "follow",
    "clear", "open",
)  # fmt: skip
DESCRIPTION = """\
Show the visits that an agent with an inspector has kept, send them again, and
save them:

    {0} inspect                          the latest visits
    {0} inspect list status:5xx /hook    those that fit a query
    {0} inspect show 12                  heads, bodies and messages of visit 12
    {0} inspect replay 12 --until 2xx    send it again until it passes
    {0} inspect follow                   visits as they come

An agent has an inspector with `inspect:` in its configuration, and with
`{0} http 8000 --inspect`."""
EPILOG = """\
Exit status: 0 all is well; 1 a replay failed, or two answers differ; 2 an
argument is wrong, no inspector runs here, or it has refused."""
HELPS = {
    "list": "the latest visits, or those that fit a query",
    "show": "a visit with its heads, bodies and messages",
    "replay": "send a request to its target again, as it was or edited",
    "curl": "a visit's request as a curl command",
    "python": "a visit's request as a Python program",
    "body": "the bytes of a body",
    "compare": "how two visits and their answers differ",
    "har": "all visits, or those that fit a query, as a HAR file",
    "import": "add the visits of a HAR file",
    "follow": "visits as they come, until Ctrl-C",
    "clear": "forget all visits",
    "open": "open the inspector's page in a browser",
}
LISTED = 30  # visits, unless --limit says otherwise
MOST_FILE = 64 * 1024 * 1024  # bytes of a HAR file or a body that is read
MOST_TOLD = 5000  # visits that follow() remembers to have told: they may change once more
AGAIN = 1.0  # seconds between two looks whether an inspector that has ended runs again
LOOK = 0.2  # seconds between two looks at how a replay goes
FAILED = 500  # a status from which on a target has failed
RUNNING, PASSED = "running", "passed"


class BadArgument(Exception):
    """An argument cannot be used; one line for the user."""


def main(arguments: list[str] | None = None) -> int:
    """Run `gotunnel inspect`; return the exit status."""
    _, *words = sys.argv[1:] if arguments is None else arguments
    parser = make_parser()
    options = parse(parser, words)
    prog = f"{program()} inspect"
    try:
        return print_answer(prog, lambda: run(options))
    except (BadArgument, CannotAsk, Refused) as error:
        print(f"{prog}: {safe(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run(options: argparse.Namespace) -> int:
    if options.url and options.command is None:
        for place in chosen(options.at, several=True):
            print(place.url)
        return 0
    (place,) = chosen(options.at)
    return ACTIONS[options.command or "list"](Inspector(place), options)


# The inspectors that run ------------------------------------------------------------------------


def chosen(at: str | None, *, several: bool = False) -> list[Place]:
    """The inspector that --at names, or the only one that runs. ``several``: all of them. Raises
    CannotAsk, BadArgument."""
    found = places(*home.state_folders())
    if at is not None:
        return [named(at, found)]
    tunnels = {place: asked for place in found if (asked := tunnels_of(place)) is not None}
    if not tunnels:
        raise CannotAsk(
            f"no inspector runs here: start one with `{program()} http 8000 --inspect`, or with "
            "inspect: in the agent's configuration; that of another user, such as a service, needs "
            "sudo"
        )
    if len(tunnels) > 1 and not several:
        which = "; ".join(f"{place.port} ({names})" for place, names in tunnels.items())
        raise BadArgument(f"{len(tunnels)} inspectors run here, expected --at PORT of one: {which}")
    return list(tunnels)


def named(at: str, found: Sequence[Place]) -> Place:
    """The place that a port, an address or a URL with a token stands for."""
    if at.startswith("http://"):
        parts = urlsplit(at)
        token = parse_qs(parts.query).get("token", [""])[0]
        try:
            host, port = parts.hostname or "", parts.port or 80
        except ValueError:
            raise BadArgument("--at: a URL with a wrong port came") from None
        for place in found:
            if (place.host, place.port) == (host, port) and not token:
                return place
        if not (host and token):
            raise BadArgument("--at: a URL without ?token= came, expected the one that was printed")
        return Place(host, port, token)
    for place in found:
        if at in (str(place.port), place.address, f"localhost:{place.port}"):
            return place
    known = ", ".join(str(place.port) for place in found) or "none"
    raise BadArgument(
        f"--at: {at!a} came, expected the port of an inspector that runs here ({known}), or the "
        "address that was printed at its start"
    )


def tunnels_of(place: Place) -> str | None:
    """The hostnames of an inspector's agent, in words; None if it does not run."""
    try:
        tunnels = Inspector(place).get("info").get("tunnels") or []
    except (CannotAsk, Refused):
        return None
    names = [str(tunnel.get("hostname")) for tunnel in tunnels]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "no tunnel") + more


# Commands ---------------------------------------------------------------------------------------


def list_visits(inspector: Inspector, options: argparse.Namespace) -> int:
    query = " ".join(options.query)
    asked = {"q": query, "limit": options.limit, "unmask": options.unmask and 1}
    document = inspector.get("visits", asked)
    if options.json:
        print_json(document)
        return 0
    visits = document["visits"][::-1]  # the latest last, where the eye is
    write(table(visits, paper()))
    if not visits:
        kept = document["total"]
        tell(f"none of {kept} visits fits {query!a}" if query and kept else "no visits yet")
    elif document["matched"] > len(visits):
        tell(f"the latest {len(visits)} of {document['matched']}; --limit shows more")
    return 0


def show(inspector: Inspector, options: argparse.Namespace) -> int:
    document = inspector.get(f"visits/{options.id}", {"unmask": options.unmask and 1})
    if options.json:
        print_json(document)
    else:
        write(visit_lines(document, paper()))
    return 0


def replay(inspector: Inspector, options: argparse.Namespace) -> int:
    order = order_of(inspector, options)
    document = inspector.post(f"visits/{options.id}/replay", order)
    number = document["id"]
    try:
        while document["state"] == RUNNING and not options.detach:
            sleep(LOOK)
            document = inspector.get(f"replays/{number}")
            progress(document["text"])
    except KeyboardInterrupt:
        document = inspector.post(f"replays/{number}/stop")
    finally:
        progress("")
    if options.json:
        print_json(document)
    else:
        write(replay_lines(document, paper()))
        if document["done"] == 1 and document["records"]:
            show_answer(inspector, options.id, document["records"][-1])
    return 0 if options.detach or succeeded(document) else 1


def show_answer(inspector: Inspector, before: int, number: int) -> None:
    """The visit that a replay has made, and whether its answer is the recorded one."""
    try:
        write(visit_lines(inspector.get(f"visits/{number}"), paper()))
        asked = {"left": before, "right": number}
        if inspector.get("compare", asked)["same"]:
            tell(f"the answer is equal to that of visit {before}")
        else:
            tell(f"the answer differs from that of visit {before}: `{program()} inspect compare "
                 f"{before} {number}` shows how")  # fmt: skip
    except Refused as error:  # one of them has gone meanwhile
        tell(str(error))


def succeeded(document: dict[str, Any]) -> bool:
    """Whether all answers were whole and none told of a fault of the target."""
    if document["until"] is not None:
        return bool(document["state"] == PASSED)
    statuses = [int(status) for status in document["statuses"]]  # 0 without an answer
    whole = bool(statuses) and min(statuses) > 0 and not document["problems"]
    return whole and max(statuses) < FAILED


def order_of(inspector: Inspector, options: argparse.Namespace) -> dict[str, Any]:
    """The order for the API. Fields are edited one by one here, and replaced as a whole there."""
    order: dict[str, Any] = {
        key: value
        for key in (
            "method",
            "path",
            "hostname",
            "times",
            "concurrency",
            "every",
            "timeout",
            "until",
        )
        if (value := getattr(options, key)) is not None
    }
    if options.field or options.drop:
        document = inspector.get(f"visits/{options.id}")
        order["fields"] = edited(document["request"]["fields"], dict(options.field), options.drop)
    if options.body is not None:
        order["body"] = options.body
    elif options.body_file is not None:
        order["body_base64"] = base64.b64encode(
            read_file(options.body_file, "--body-file")
        ).decode()
    return order


def edited(
    fields: Sequence[Sequence[str]], new: dict[str, str], drop: Sequence[str]
) -> list[list[str]]:
    """The fields with the new values in the place of the old ones, and without those to drop."""
    gone = {name.lower() for name in drop}
    values = {name.lower(): [name, value] for name, value in new.items()}
    found = []
    for name, value in fields:
        item = values.pop(name.lower(), None)
        if item is not None:
            found.append(item)
            gone.add(name.lower())  # one new value for all old ones
        elif name.lower() not in gone:
            found.append([name, value])
    return found + list(values.values())


def copy(inspector: Inspector, options: argparse.Namespace) -> int:
    """curl and python."""
    asked = {"unmask": options.unmask and 1}
    text = inspector.fetch(f"visits/{options.id}/{options.command}", asked).decode(errors="replace")
    write(text_lines(text.rstrip("\n")))
    if not options.unmask and COPY_MASK in text:
        tell(f"secrets are written as {COPY_MASK}; --unmask writes them as they are")
    return 0


def tell_of_masks(options: argparse.Namespace, data: bytes) -> None:
    """A file with masks is not what came: a program that reads it, or a replay, would fail."""
    masks = MASK.encode(), json.dumps(MASK)[1:-1].encode()
    if not options.unmask and any(each in data for each in masks):
        tell(f"secrets are written as {MASK}; --unmask writes them as they are")


def body(inspector: Inspector, options: argparse.Namespace) -> int:
    which = "request-body" if options.request else "response-body"
    data = inspector.fetch(f"visits/{options.id}/{which}", {"unmask": options.unmask and 1})
    if options.output is not None:
        save(options.output, data)
        tell_of_masks(options, data)
    elif sys.stdout.isatty():
        raise BadArgument(
            "these bytes could be control sequences of your terminal: name a file with -o, or use "
            f"{program()} inspect show"
        )
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(data)
    return 0


def compare(inspector: Inspector, options: argparse.Namespace) -> int:
    asked = {"left": options.left, "right": options.right, "unmask": options.unmask and 1}
    document = inspector.get("compare", asked)
    if options.json:
        print_json(document)
    else:
        write(comparison_lines(document, paper()))
    return 0 if document["same"] else 1


def har(inspector: Inspector, options: argparse.Namespace) -> int:
    if options.file and is_filter(options.file):
        options.file, options.query = None, [options.file, *options.query]
    asked = {"q": " ".join(options.query), "unmask": options.unmask and 1}
    data = inspector.fetch("har", asked)
    if options.file is None or options.file == "-":
        write(text_lines(data.decode(errors="replace").rstrip("\n")))
    else:
        save(options.file, data)
        tell_of_masks(options, data)
    return 0


def is_filter(text: str) -> bool:
    """`gotunnel inspect har status:5xx` means no file of that name."""
    name, colon, _ = text.removeprefix("-").partition(":")
    return bool(colon) and name.lower() in FILTERS


def import_har(inspector: Inspector, options: argparse.Namespace) -> int:
    document = inspector.send("har", read_file(options.file, "FILE"))
    if options.json:
        print_json(document)
        return 0
    print(f"{document['imported']} visits imported")
    for note in document.get("notes") or ():
        tell(str(note))
    return 0


def follow(inspector: Inspector, options: argparse.Namespace) -> int:
    """A line for each visit that is over, as they come, until Ctrl-C. If the agent ends, wait for
    its next start."""
    query = " ".join(options.query)
    inspector.get("visits", {"q": query, "limit": 1})  # a query that is wrong is refused at once
    while True:
        _follow(inspector, query, options)
        tell("the inspector has ended; waiting for it (Ctrl-C ends this)")
        while tunnels_of(inspector.place) is None:
            sleep(AGAIN)
        tell("the inspector runs again")


def _follow(inspector: Inspector, query: str, options: argparse.Namespace) -> None:
    """Until the inspector ends."""
    page = paper()
    told: set[int] = set()
    for event in inspector.events({"unmask": options.unmask and 1}):
        if missed := event.value.get("missed"):
            tell(f"{missed} changes were missed, as they came too fast")
        if event.name != "visit":
            continue
        over = [visit for visit in event.value["visits"] if visit["state"] != "open"]
        new = [visit for visit in over if visit["id"] not in told]
        told.update(visit["id"] for visit in new)
        if len(told) > 2 * MOST_TOLD:
            told = set(sorted(told)[-MOST_TOLD:])
        if query and new:
            ids = ",".join(str(visit["id"]) for visit in new)
            asked = {"q": query, "ids": ids, "unmask": options.unmask and 1}
            new = inspector.get("visits", asked)["visits"][::-1]
        for visit in new:
            print(json.dumps(visit) if options.json else row(visit, page), flush=True)


def clear(inspector: Inspector, options: argparse.Namespace) -> int:
    document = inspector.post("clear")
    print(json.dumps(document) if options.json else f"{document['cleared']} visits forgotten")
    return 0


def open_page(inspector: Inspector, options: argparse.Namespace) -> int:
    """A browser gets the address as an argument, which other users of the machine can see for a
    moment; the token in it is exchanged for a cookie."""
    if not webbrowser.open(inspector.place.url):
        print(inspector.place.url)
        tell("no browser was found; open this address in one")
    return 0


Action = Callable[[Inspector, argparse.Namespace], int]
ACTIONS: dict[str, Action] = {
    "list": list_visits,
    "show": show,
    "replay": replay,
    "curl": copy,
    "python": copy,
    "body": body,
    "compare": compare,
    "har": har,
    "import": import_har,
    "follow": follow,
    "clear": clear,
    "open": open_page,
}


# Output -----------------------------------------------------------------------------------------


def paper() -> Paper:
    """What standard output takes."""
    if not sys.stdout.isatty():
        return Paper()
    terminal = home.terminal()
    knows = terminal.colours and terminal.kind not in ("", "dumb")
    return Paper(shutil.get_terminal_size().columns, knows)


def write(lines: Iterator[str]) -> None:
    for line in lines:
        print(line)


def print_json(document: object) -> None:
    """For programs: ASCII, so that no terminal acts on it."""
    print(json.dumps(document, indent=2))


def tell(text: str) -> None:
    """Something beside the answer, on standard error."""
    if sys.stderr is not None:
        print(safe(text), file=sys.stderr)


def progress(text: str) -> None:
    """A line on the terminal that the next one replaces."""
    if sys.stderr is not None and sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        print(f"\r\x1b[K{safe(text)[: columns - 1]}", end="", file=sys.stderr, flush=True)


def save(path: str, data: bytes) -> None:
    """Write a file that may hold secrets: only its user can read it. Raises BadArgument."""
    file = Path(path)
    try:
        if file.exists() and not file.is_file():  # a device, a pipe
            file.write_bytes(data)
        else:
            new = file.with_name(f"{file.name}.{os.getpid()}.new")
            atomic_file.write(file, data, new=new)
    except OSError as error:
        raise BadArgument(f"{path}: cannot be written ({error.strerror or error})") from None
    tell(f"{len(data)} bytes written to {path}")


def read_file(path: str, what: str) -> bytes:
    """Raises BadArgument."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read(MOST_FILE + 1)
        else:
            data = small_file.read(path, MOST_FILE)
    except OSError as error:
        raise BadArgument(f"{what} {path}: cannot be read ({error.strerror or error})") from None
    if len(data) > MOST_FILE:
        raise BadArgument(f"{what} {path}: more than {MOST_FILE} bytes came")
    return data


# Arguments --------------------------------------------------------------------------------------


def make_parser() -> Parser:
    name = program()
    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS,
                        help="print JSON")  # fmt: skip
    common.add_argument(
        "--at", metavar="PORT", default=argparse.SUPPRESS,
        help="the inspector, if several run: its port, or the address that it has printed",
    )  # fmt: skip
    parser = Parser(
        f"{name} inspect",
        description=DESCRIPTION.format(name),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[common],
    )
    parser.add_argument(
        "--url", action="store_true", help="print the address of the page, with its token"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    made = {
        each: commands.add_parser(
            each, help=HELPS[each], description=HELPS[each].capitalize() + ".",
            parents=[common], allow_abbrev=False,
        )
        for each in COMMANDS
    }  # fmt: skip
    for each in ("list", "har", "follow"):
        query = "filters such as status:5xx, method:POST, host:app, and text to look for"
        if each == "har":
            made[each].add_argument(
                "file", metavar="FILE", nargs="?", help="default: standard output"
            )
        made[each].add_argument("query", metavar="QUERY", nargs="*", help=query)
    made["list"].add_argument(
        "--limit", metavar="N", type=a_number(0, 1000), default=LISTED, help="default: %(default)s"
    )
    for each in ("show", "replay", "curl", "python", "body"):
        made[each].add_argument("id", metavar="ID", type=an_id, help="of a visit")
    for each in ("left", "right"):
        made["compare"].add_argument(each, metavar=each.upper(), type=an_id, help="ID of a visit")
    made["import"].add_argument("file", metavar="FILE", help="a HAR file; - for standard input")
    for each in ("list", "show", "curl", "python", "body", "compare", "har", "follow"):
        made[each].add_argument("--unmask", action="store_true", help="show secrets")
    made["body"].add_argument("--request", action="store_true", help="of the request")
    made["body"].add_argument("-o", "--output", metavar="FILE", help="write them to a file")
    _add_replay_options(made["replay"])
    return parser


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-X", "--method", metavar="METHOD", help="another method")
    add("--path", metavar="PATH", help="another path, with its query")
    add("-H", "--field", metavar="'NAME: VALUE'", action="append", default=[], type=a_field,
        help="another value for a field of the head; may come several times")  # fmt: skip
    add("--drop", metavar="NAME", action="append", default=[], help="leave a field out")
    bodies = parser.add_mutually_exclusive_group()
    bodies.add_argument("--body", metavar="TEXT", help="another body")
    bodies.add_argument("--body-file", metavar="FILE", help="the same from a file; - for stdin")
    add("--times", metavar="N", type=a_number(1, 1000), help="how often")
    add("--concurrency", metavar="N", type=a_number(1, 8), help="how many at once")
    add("--every", metavar="SECONDS", type=float, help="pause between two tries")
    add("--until", metavar="STATUS",
        help="try again until the answer has this status, such as 200 or 2xx; the pauses grow up "
        "to a minute, unless --every is given")  # fmt: skip
    add("--timeout", metavar="SECONDS", type=float, help="for one try (default: 60)")
    add("--hostname", metavar="NAME", help="the tunnel to whose target it goes")
    add("--detach", action="store_true", help="do not wait for the answers")


def parse(parser: Parser, words: list[str]) -> argparse.Namespace:
    """`gotunnel inspect 12` shows visit 12."""
    if words and words[0].isascii() and words[0].isdigit():
        words = ["show", *words]
    options = parser.parse_args(words)
    for name, value in (("json", False), ("at", None), ("query", []), ("limit", LISTED),
                        ("unmask", False)):  # fmt: skip
        if not hasattr(options, name):
            setattr(options, name, value)
    return options


def an_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!a} is no number of a visit")
    return int(text)


def a_number(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if text.isascii() and text.isdigit() and len(text) < 10 and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!a} is no number from {least} to {most}")

    return read


def a_field(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text[:40]!a} is no field such as 'X-Try: 2'")
    return name.strip(), value.strip()
