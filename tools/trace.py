"""Shows the protocol at work: one visit through gateway and agent, drawn as a ladder.

    python3 tools/trace.py                    a GET of a page, in http mode
    python3 tools/trace.py --tcp              lines both ways through a hostname of mode tcp
    python3 tools/trace.py --websocket        an upgrade, and a WebSocket message each way
    python3 tools/trace.py --upload 1M        a POST of so many bytes: flow control at work
    python3 tools/trace.py --html visit.html  the same as a picture, one file that stands alone

Gateway, agent and target run in one process, on free ports of this machine. Needs nothing but
Python, and the network once to install a few packages into .venv.

How to read a ladder
--------------------

Time runs down the page. Each of the four lines is one party:

    visitor     opens https://app.example.com/, or connects to the tcp hostname
    gateway     has the public address; ends the visitor's TLS
    agent       is beside the target; has dialled the gateway before, over TLS too
    target      what is to be reached, an ordinary server

An arrow goes from its sender to its receiver. The number on its left is the time, in milliseconds
since the agent dialled. It is the time of sending for frames and for what visitor and target send.
What gateway and agent send to them has the time at which it came.

Between visitor and gateway, and between agent and target, an arrow is bytes, as they are inside
TLS. Between gateway and agent each arrow is one frame of yamux, the multiplexer, as it is inside
TLS. Under its meaning stand its bytes in hex. The first 12 are the header:

    00 01 0001 00000001 000c0000
    |  |  |    |        |
    |  |  |    |        length: of the payload (DATA), or credit in bytes (WINDOW_UPDATE)
    |  |  |    stream id: odd ones are opened by the agent, even ones by the gateway
    |  |  flags: 1 SYN (opens), 2 ACK (accepts), 4 FIN (half-close), 8 RST (reset)
    |  type: 0 DATA, 1 WINDOW_UPDATE, 2 PING, 3 GO_AWAY
    version

The first bytes of its payload follow, and what they say: a control message (JSON, on stream 1), the
data header (the first bytes of each other stream), the head of an HTTP request or answer.

"may send" tells a stream's two windows after the frame: how many bytes each side may still send
before it must wait for credit. Each begins with 262144 bytes (256 KiB). DATA takes from its
sender's window; a WINDOW_UPDATE adds to the window of its receiver.

Many DATA frames in a row are one line, with their number and their bytes.
"""

import argparse
import os
import re
import subprocess

import bootstrap

MOST_UPLOAD = 64 * 1024 * 1024
UNITS = {"": 1, "K": 1024, "M": 1024 * 1024}
VISIT = os.path.join(bootstrap.ROOT, "tools", "trace_visit.py")


def main(arguments):
    options = read(arguments)
    python = bootstrap.prepare("server")
    command = [python, VISIT, options.kind, str(options.upload), options.html]
    child = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": bootstrap.ROOT},
        start_new_session=True,  # Ctrl-C is for us: we stop it, also while it still imports
    )
    try:
        status = child.wait()
    finally:  # after Ctrl-C or a signal, it ends what it has started
        child.terminate()
        child.wait()
    return status if status >= 0 else 128 - status  # negative: a signal's number


def read(arguments):
    """The options; ends the program with status 2 if they are wrong."""
    how_to_read = __doc__.partition("How to read a ladder")
    parser = argparse.ArgumentParser(
        prog="trace.py",
        description=__doc__.partition("\n\n")[0],
        epilog="".join(how_to_read[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_mutually_exclusive_group()
    for kind, words in (
        ("http", "GET a page (the default)"),
        ("tcp", "exchange lines in mode tcp, with a half-close"),
        ("websocket", "upgrade to WebSocket, and exchange a message"),
    ):
        kinds.add_argument(f"--{kind}", dest="kind", action="store_const", const=kind, help=words)
    kinds.add_argument(
        "--upload", metavar="SIZE", type=size_of, default=0,
        help="POST so many bytes, such as 1M or 300K, 64M at most",
    )  # fmt: skip
    parser.add_argument(
        "--html", metavar="FILE", default="", help="write a picture there, and print no ladder"
    )
    parser.set_defaults(kind="http")
    options = parser.parse_args(arguments)
    if options.upload:
        options.kind = "upload"
    return options


def size_of(text):
    """Bytes of a size such as 300K or 1M."""
    match = re.fullmatch(r"([0-9]{1,9})([KM]?)", text.upper())
    size = int(match[1]) * UNITS[match[2]] if match else 0
    if not 1 <= size <= MOST_UPLOAD:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size, expected a number of bytes from 1 to 64M, such as 300K or 1M"
        )
    return size


if __name__ == "__main__":
    bootstrap.tool(main)
