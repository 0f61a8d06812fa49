"""A long line of the bench: relays TCP connections, each direction so many milliseconds later.

    bench_line.py TO_PORT ONE_WAY_MS    prints its port

Only the delay is that of a long line: there is no limit of rate and no loss, and connecting takes
no time. A process of its own, so that its threads do not share an interpreter with what is
measured.
"""

import contextlib
import queue
import socket
import sys
import threading
import time

LOOPBACK = "127.0.0.1"
PIECE = 64 * 1024  # bytes of a read, at most
HELD = 4096  # pieces on their way in one direction: up to 256 MiB, 1.2 GB/s at 200 ms


def carry(source, sink, one_way):
    """Move one direction: its bytes and its end, ``one_way`` seconds later."""
    pieces = queue.Queue(HELD)  # (monotonic time when it is due, bytes or b"" at the end)
    threading.Thread(target=load, args=(source, pieces, one_way), daemon=True).start()
    while True:
        due, data = pieces.get()
        time.sleep(max(0, due - time.monotonic()))
        with contextlib.suppress(OSError):  # the other side has gone: what comes is dropped
            sink.sendall(data) if data else sink.shutdown(socket.SHUT_WR)
        if not data:
            return


def load(source, pieces, one_way):
    data = b"?"
    while data:
        try:
            data = source.recv(PIECE)
        except OSError:  # a RST: passed on as an end
            data = b""
        pieces.put((time.monotonic() + one_way, data))


def connect(near, port, one_way):
    with near, socket.create_connection((LOOPBACK, port)) as far:
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=carry, args=(far, near, one_way), daemon=True)
        back.start()
        carry(near, far, one_way)
        back.join()


def main(port, one_way):
    with socket.create_server((LOOPBACK, 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        while True:
            near, _ = listening.accept()
            arguments = (near, int(port), float(one_way) / 1000)
            threading.Thread(target=connect, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
