"""A long line of the bench: relays TCP connections, each direction so many milliseconds later.

    bench_line.py TO_PORT ONE_WAY_MS    prints its port

Only the delay is that of a long line: there is no limit of rate and no loss, and connecting takes
no time. A process of its own, so that its threads do not share an interpreter with what is
measured. It must cost little CPU time, which gateway and agent need: buffers are used again, since
new ones would cost page faults.
"""

import contextlib
import queue
import socket
import sys
import threading
import time

LOOPBACK = "127.0.0.1"
BUFFER = 1024 * 1024  # bytes; filled by several reads, and given back when all have been delivered
LEAST = 64 * 1024  # bytes that a read must be able to bring: large reads are cheap ones
HELD = 256  # buffers on their way in one direction: 1.3 GB/s at 200 ms


class Direction:
    """Moves the bytes of one direction and their end, ``one_way`` seconds later."""

    def __init__(self, source, sink, one_way):
        self._source, self._sink, self._one_way = source, sink, one_way
        # (monotonic time when it is due, bytes or b"" at the end, the buffer that is then free)
        self._pieces = queue.SimpleQueue()
        # Buffers that are free; None is one that was not made yet. Last in, first out: one that was
        # used a moment ago is still in the CPU's cache.
        self._spare = queue.LifoQueue()
        for _ in range(HELD):
            self._spare.put(None)

    def carry(self):
        """Deliver until the end has been delivered."""
        threading.Thread(target=self._load, daemon=True).start()
        while True:
            due, data, free = self._pieces.get()
            time.sleep(max(0, due - time.monotonic()))
            with contextlib.suppress(OSError):  # the other side has gone: what comes is dropped
                self._sink.sendall(data) if data else self._sink.shutdown(socket.SHUT_WR)
            if not data:
                return
            if free is not None:
                self._spare.put(free)

    def _load(self):
        data = b"?"
        buffer, used = self._new_buffer(), 0
        while data:
            try:
                count = self._source.recv_into(buffer[used:])
            except OSError:  # a RST: passed on as an end
                count = 0
            due = time.monotonic() + self._one_way
            data, used = buffer[used : used + count], used + count
            full = BUFFER - used < LEAST
            self._pieces.put((due, data, buffer if full else None))
            if full:
                buffer, used = self._new_buffer(), 0

    def _new_buffer(self):
        """A buffer that is free. Waits for one if all are on their way."""
        spare = self._spare.get()
        return memoryview(bytearray(BUFFER)) if spare is None else spare


def connect(near, port, one_way):
    with near, socket.create_connection((LOOPBACK, port)) as far:
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=Direction(far, near, one_way).carry, daemon=True)
        back.start()
        Direction(near, far, one_way).carry()
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
