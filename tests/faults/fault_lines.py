"""A TCP proxy on loopback that breaks its connections by a script.

Each connection draws a Script from a seeded deck: which fault, in which direction, after how many
bytes. The same seed gives the same scripts in the same order, whatever the connections carry.

    cut       both sides get a RST
    end       both sides get a FIN, in the middle of whatever they were saying
    delay     bytes are held for some seconds, then go on
    split     bytes go on three at a time for a while
    halve     the second half of a piece is lost, the rest goes on
    corrupt   one bit is flipped
    swallow   from there on bytes vanish; the connection stays open, and its end still passes
"""

import contextlib
import math
import random
import selectors
import socket
import struct
import threading
from collections import Counter
from time import monotonic
from typing import NamedTuple

CUT, END, DELAY, SPLIT, HALVE, CORRUPT, SWALLOW = KINDS = (
    "cut", "end", "delay", "split", "halve", "corrupt", "swallow",
)  # fmt: skip
ALTERING = {HALVE, CORRUPT}  # the bytes behind it are not what was sent
SHORTENING = {END, SWALLOW}  # its end may come too early, and looks like any other
OUT, BACK = "out", "back"  # from the side that has dialled, and towards it

READ_SIZE = 16 * 1024
MOST_HELD = 64 * 1024  # bytes that a direction holds before the proxy stops reading
SPLIT_BYTES, SPLIT_SIZE = 1500, 3  # bytes that "split" sends in pieces, and their size
LONGEST_DELAY = 3.0  # seconds; far below what any of the programs takes for a dead line
MEMORY = 120  # seconds that an altered connection is remembered after its end


class Script(NamedTuple):
    """What happens to one connection. ``kind`` "" is nothing; ``way`` is OUT or BACK; ``after``
    counts bytes in that direction; ``amount``, from 0 to 1, is how long or which bit."""

    kind: str = ""
    way: str = OUT
    after: int = 0
    amount: float = 0.0


class Deck:
    """Scripts in a seeded order, in which each kind comes as often as the others. One thread."""

    def __init__(self, seed, name, *, share, most, kinds=KINDS):
        """``share``: of the connections, how many get a fault. ``most``: bytes before it."""
        self._random = random.Random(f"{seed} {name}")
        self._share, self._most, self._kinds = share, most, kinds
        self._left = []

    def draw(self) -> Script:
        chance = self._random
        # All numbers are drawn always, so that the next script does not depend on this one.
        faulty, depth, amount = chance.random() < self._share, chance.random(), chance.random()
        if not faulty or not self._kinds:
            return Script()
        if not self._left:
            self._left = [(kind, way) for kind in self._kinds for way in (OUT, BACK)]
            chance.shuffle(self._left)
        kind, way = self._left.pop()
        # Spread over all orders of magnitude, the larger ones more often: a handshake is short.
        return Script(kind, way, int(self._most ** math.sqrt(depth)), amount)


class Connection:
    """One connection through the proxy, and what has happened to it. ``fired`` is written by the
    line's thread before the first byte that the fault concerns leaves."""

    def __init__(self, script):
        self.script = script
        self.fired = ""  # the kind of the fault that has happened
        self.since, self.until = monotonic(), None
        self.ways = {}
        self.sockets = ()

    @property
    def altered(self) -> bool:
        return self.fired in ALTERING

    @property
    def shortened(self) -> bool:
        return self.fired in SHORTENING or self.altered


class Way:
    """One direction of a connection."""

    def __init__(self, connection, name, source, sink):
        self.connection, self.name = connection, name
        self.source, self.sink = source, sink
        self.held = bytearray()
        self.seen = 0  # bytes read so far
        self.source_ended = False
        self.ended = False  # the source has ended, or the script lets it seem so
        self.finished = False  # that was passed on
        self.swallows = False
        self.held_until = 0.0
        self.split_left = 0

    @property
    def wants_to_read(self) -> bool:
        return not self.source_ended and (self.swallows or len(self.held) < MOST_HELD)

    def wants_to_write(self, now) -> bool:
        return now >= self.held_until and (bool(self.held) or self.ended and not self.finished)


class Line:
    """The proxy: one port, one upstream port, one thread. Use it in a ``with``."""

    def __init__(self, name, deck, upstream=None):
        """``upstream``: a port of this machine; None, also later, resets each connection."""
        self.name = name
        self.upstream = upstream
        self.faults = Counter()  # kinds that have happened
        self._deck = deck
        self.active = False  # faults begin only while it is true; what has begun goes on
        self._stopping = False
        self._connections = set()
        # The newest Connection of a port: of the side that dialled, and ours towards the upstream.
        self._by_port = {OUT: {}, BACK: {}}
        self._altered = []  # connections with an altering fault, also closed ones for MEMORY
        self._lock = threading.Lock()  # guards the two before, and ``faults``
        self._selector = selectors.DefaultSelector()
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listening.setblocking(False)
        self.port = self._listening.getsockname()[1]
        self._waker, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name=f"line {name}", daemon=True)

    def __enter__(self):
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stopping = True
        self._waker.send(b"x")
        self._thread.join(10)
        for connection in list(self._connections):
            self._reset(connection)
        for sock in (self._listening, self._waker, self._woken):
            sock.close()
        self._selector.close()

    def connection_from(self, port) -> Connection:
        """The connection that was dialled from this port. Known once its upstream has answered."""
        with self._lock:
            return self._by_port[OUT][port]

    def connection_to(self, port) -> Connection:
        """The connection that reaches its upstream from this port."""
        with self._lock:
            return self._by_port[BACK][port]

    def altered_since(self, since) -> bool:
        """Whether any connection that lived after ``since`` (monotonic) carried altered bytes."""
        with self._lock:
            return any(each.until is None or each.until >= since for each in self._altered)

    def count_faults(self) -> Counter:
        with self._lock:
            return self.faults.copy()

    # The line's thread

    def _run(self):
        while not self._stopping:
            for key, _ in self._selector.select(self._timeout()):
                if key.fileobj is self._listening:
                    self._accept()
                elif key.fileobj is not self._woken:
                    self._serve(key.data)
            now = monotonic()
            for connection in list(self._connections):
                if any(0 < way.held_until <= now for way in connection.ways.values()):
                    self._serve(connection)

    def _timeout(self):
        due = [way.held_until for each in self._connections for way in each.ways.values()]
        due = [at for at in due if at]
        return max(0, min(due) - monotonic()) if due else None

    def _accept(self):
        try:
            near, address = self._listening.accept()
        except OSError:
            return
        connection = Connection(self._deck.draw())
        far = socket.socket()
        try:
            if self.upstream is None:
                raise ConnectionRefusedError
            far.bind(("127.0.0.1", 0))  # the port is known before its upstream accepts
            port = far.getsockname()[1]
            with self._lock:
                self._by_port[OUT][address[1]] = self._by_port[BACK][port] = connection
            far.settimeout(5)
            far.connect(("127.0.0.1", self.upstream))
        except OSError:
            _reset(near)
            far.close()
            return
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sockets = (near, far)
        connection.ways = {
            OUT: Way(connection, OUT, near, far), BACK: Way(connection, BACK, far, near)
        }  # fmt: skip
        self._connections.add(connection)
        self._watch(connection)

    def _serve(self, connection):
        """Move what can be moved now."""
        if connection not in self._connections:
            return  # it was closed a moment ago, by the event before
        now = monotonic()
        try:
            for way in connection.ways.values():
                if way.held_until and now >= way.held_until:
                    way.held_until = 0.0
                if way.wants_to_read:
                    self._read(way)
                if way.wants_to_write(now):
                    self._write(way)
        except OSError:  # a RST, from either side: the other one gets it too
            self._reset(connection)
            return
        if all(way.finished and way.source_ended for way in connection.ways.values()):
            self._close(connection)
        else:
            self._watch(connection)

    def _read(self, way):
        try:
            data = way.source.recv(READ_SIZE)
        except BlockingIOError:
            return
        if not data:
            way.source_ended = way.ended = True
            return
        script, connection = way.connection.script, way.connection
        before, way.seen = way.seen, way.seen + len(data)
        if way.swallows:
            return
        due = way.name == script.way and script.kind and not connection.fired
        if not due or way.seen <= script.after or not self.active:
            way.held += data
            return
        cut = max(0, script.after - before)
        way.held += data[:cut]
        self._note(connection)
        self._break(way, script, data[cut:])

    def _note(self, connection):
        kind = connection.script.kind
        with self._lock:
            self.faults[kind] += 1
            connection.fired = kind
            if kind in ALTERING:
                oldest = monotonic() - MEMORY
                self._altered = [each for each in self._altered if (each.until or oldest) >= oldest]
                self._altered.append(connection)

    def _break(self, way, script, rest):
        """``rest``: the bytes at which the fault happens; there is at least one."""
        if script.kind == CUT:
            with contextlib.suppress(BlockingIOError):
                way.sink.send(way.held)
            raise ConnectionResetError
        if script.kind == END:
            for each in way.connection.ways.values():
                each.ended = each.swallows = True
        elif script.kind == HALVE:
            way.held += rest[: len(rest) // 2]
        elif script.kind == CORRUPT:
            way.held += bytes([rest[0] ^ 1 << int(script.amount * 8)]) + rest[1:]
        elif script.kind == SWALLOW:
            way.swallows = True
        else:
            way.held += rest
            if script.kind == DELAY:
                way.held_until = monotonic() + script.amount * LONGEST_DELAY
            else:
                way.split_left = SPLIT_BYTES

    def _write(self, way):
        if way.held:
            piece = way.held[:SPLIT_SIZE] if way.split_left > 0 else way.held
            try:
                sent = way.sink.send(piece)
            except BlockingIOError:
                return
            del way.held[:sent]
            way.split_left -= sent
        if way.ended and not way.held and not way.finished:
            way.finished = True
            with contextlib.suppress(OSError):  # it is dead; the other direction finds out
                way.sink.shutdown(socket.SHUT_WR)

    def _watch(self, connection):
        now = monotonic()
        out, back = connection.ways[OUT], connection.ways[BACK]
        for sock, reads, writes in (
            (connection.sockets[0], out, back),
            (connection.sockets[1], back, out),
        ):
            mask = selectors.EVENT_READ if reads.wants_to_read else 0
            mask |= selectors.EVENT_WRITE if writes.wants_to_write(now) else 0
            self._select(sock, mask, connection)

    def _select(self, sock, mask, connection):
        known = sock in self._selector.get_map()
        if not mask:
            if known:
                self._selector.unregister(sock)
        elif not known:
            self._selector.register(sock, mask, connection)
        elif self._selector.get_key(sock).events != mask:
            self._selector.modify(sock, mask, connection)

    def _reset(self, connection):
        self._close(connection, _reset)

    def _close(self, connection, how=socket.socket.close):
        self._connections.discard(connection)
        with self._lock:
            connection.until = monotonic()
        for sock in connection.sockets:
            self._select(sock, 0, connection)
            how(sock)
        connection.ways, connection.sockets = {}, ()  # it is remembered longer than they are needed


def _reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()
