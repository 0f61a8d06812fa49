"""Redis for tests: servers of the test's own, a Sentinel set, and a line to them that breaks.

``redis_process()`` is one redis-server on a free port of 127.0.0.1 and on a Unix socket. It writes
no file by itself and has ended when its ``with`` has. The test can kill, pause and restart it, with
its data or without. ``sentinel_set()`` is a master with replicas, watched by Sentinels, which fail
over in about a second. ``Proxy`` is a TCP proxy in front of any of them: a test gives each member
of a cluster a proxy of its own, and so cuts one of them off.

conftest.py has the fixtures ``redis_server``, ``redis_sentinels`` and ``proxy_to``.
"""

import contextlib
import signal
import socket
import struct
import tempfile
import threading
from pathlib import Path
from time import monotonic

from support import TIMEOUT, Program, need, reserved_port, wait_until

LOOPBACK = "127.0.0.1"
MASTER_NAME = "gotunnel"  # of a Sentinel set
DOWN_AFTER = 400  # milliseconds without an answer after which a Sentinel takes a server for dead
SENTINELS, QUORUM = 3, 2


class RedisError(Exception):
    """Redis has answered with an error, whose text this is."""


class RedisServer:
    """One redis-server, or one Sentinel. Use redis_process() or sentinel_set()."""

    def __init__(self, folder, port, settings=(), password=None, sentinel=False):
        """``settings`` are lines of redis.conf. ``port`` is kept for it by reserved_port()."""
        self.folder, self.port = Path(folder), port
        self.unix_path = str(self.folder / "redis.sock")
        self.password = password
        self._sentinel = sentinel
        self._program = None
        self._paused = False
        lines = [
            f"bind {LOOPBACK}", f"port {port}", f"unixsocket {self.unix_path}", "protected-mode no",
            f"dir {self.folder}", "loglevel notice", *settings,
        ]  # fmt: skip
        if not sentinel:
            lines += ['save ""', "appendonly no", "repl-diskless-sync-delay 0"]
        if password is not None:
            lines += [f"requirepass {password}", f"masterauth {password}"]
        self._config = self.folder / "redis.conf"
        self._config.write_text("\n".join([*lines, ""]))

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        """As CLUSTER takes it, without a password."""
        return f"redis://{self.address}/0"

    @property
    def is_running(self) -> bool:
        return self._program is not None

    def start(self, keep=False):
        """Start it again after kill(), with what save() has saved last, or without any data."""
        if not keep:
            (self.folder / "dump.rdb").unlink(missing_ok=True)
        mode = ["--sentinel"] if self._sentinel else []
        self._program = Program([need("redis-server"), str(self._config), *mode], self.folder, {})
        self._program.wait_for("eady to accept connections|Sentinel ID is")

    def kill(self):
        """SIGKILL. Its connections end, and new ones are refused."""
        if self._program is not None:
            self._program.signal(signal.SIGKILL)
            self._end()

    def restart(self, keep=True):
        """Kill it and start it again. Without ``keep`` all its data are lost."""
        if keep:
            self.save()
        self.kill()
        self.start(keep)

    def pause(self):
        """SIGSTOP: connections are accepted by the system, and nothing is answered."""
        self._program.signal(signal.SIGSTOP)
        self._paused = True

    def resume(self):
        self._program.signal(signal.SIGCONT)
        self._paused = False

    def save(self):
        """Note all data as they are now, for start(keep=True). What is written later is lost by a
        kill: so a failover loses what a replica has not got yet."""
        self.call("SAVE")

    def end(self):
        if self._program is not None:
            if self._paused:
                self.resume()
            self._end()

    def _end(self):
        program, self._program, self._paused = self._program, None, False
        program.end()

    def call(self, *command):
        """The answer to one command: str, int, None or a list of them. Raises RedisError."""
        with socket.create_connection((LOOPBACK, self.port), TIMEOUT) as sock:
            sock.settimeout(TIMEOUT)
            with sock.makefile("rb") as replies:
                if self.password is not None:
                    _ask(sock, replies, "AUTH", self.password)
                return _ask(sock, replies, *command)

    def counts(self) -> dict:
        """How often each command was called since reset_counts(), scripts' own calls too."""
        lines = self.call("INFO", "commandstats").splitlines()
        pairs = (line.removeprefix("cmdstat_").split(":calls=") for line in lines if ":" in line)
        return {name: int(rest.partition(",")[0]) for name, rest in pairs}

    def reset_counts(self):
        self.call("CONFIG", "RESETSTAT")


def _ask(sock, replies, *command):
    """One command in RESP, and its answer."""
    words = [str(word).encode() for word in command]
    request = b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)
    sock.sendall(b"*%d\r\n" % len(words) + request)
    return _read(replies)


def _read(replies):
    line = replies.readline()
    assert line.endswith(b"\r\n"), f"an end came from Redis after {line!r}"
    kind, rest = line[:1], line[1:-2].decode()
    if kind == b"-":
        raise RedisError(rest)
    if kind == b"+":
        return rest
    if kind == b":":
        return int(rest)
    if kind == b"*":
        return None if rest == "-1" else [_read(replies) for _ in range(int(rest))]
    assert kind == b"$", line
    if rest == "-1":
        return None
    return replies.read(int(rest) + 2)[:-2].decode("utf-8", "surrogateescape")


@contextlib.contextmanager
def redis_process(*settings, password=None):
    """A RedisServer that runs. ``settings`` are further lines of redis.conf."""
    need("redis-server")
    # Not pytest's folder: the path of a Unix socket has 107 bytes at most.
    with tempfile.TemporaryDirectory(prefix="gt-redis-") as folder, reserved_port() as port:
        server = RedisServer(folder, port, settings, password)
        try:
            server.start()
            yield server
        finally:
            server.end()


class SentinelSet:
    """``servers``: the first one begins as the master. ``sentinels`` watch them."""

    def __init__(self, servers, sentinels):
        self.servers, self.sentinels = servers, sentinels

    @property
    def url(self) -> str:
        """As CLUSTER takes it."""
        places = ",".join(each.address for each in self.sentinels)
        return f"redis+sentinel://{places}/{MASTER_NAME}"

    def master(self) -> RedisServer:
        """The server that the Sentinels which run call the master; fails if they differ."""
        running = [each for each in self.sentinels if each.is_running]
        asked = {
            int(each.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)[1])
            for each in running
        }
        [port] = wait_until(lambda: asked if len(asked) == 1 else None)
        return next(each for each in self.servers if each.port == port)

    def wait_for_replicas(self):
        """Wait until each replica has all that the master has, and the Sentinels know them."""
        master = self.master()
        written = master.call("ROLE")[1]  # bytes of its log of writes
        replicas = [each for each in self.servers if each.is_running and each is not master]
        for each in replicas:
            wait_until(lambda each=each: _has_got(each, written))
        for each in self.sentinels:
            wait_until(lambda each=each: self._knows(each, len(replicas)))

    def _knows(self, sentinel, replicas):
        answer = sentinel.call("SENTINEL", "MASTER", MASTER_NAME)
        about = dict(zip(answer[::2], answer[1::2], strict=True))
        others = len(self.sentinels) - 1
        return int(about["num-slaves"]) >= replicas and int(about["num-other-sentinels"]) >= others

    def wait_for_master_instead_of(self, before) -> RedisServer:
        """The new master, once all Sentinels name it and it says so itself."""

        def other():
            names = {self._named_by(each) for each in self.sentinels if each.is_running}
            if len(names) == 1 and (server := names.pop()) is not before:
                if server.call("ROLE")[0] == "master":
                    return server

        return wait_until(other)

    def _named_by(self, sentinel):
        port = int(sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER_NAME)[1])
        return next(each for each in self.servers if each.port == port)


def _has_got(replica, written) -> bool:
    role, *rest = replica.call("ROLE")
    return role == "slave" and rest[2] == "connected" and rest[3] >= written


@contextlib.contextmanager
def sentinel_set(replicas=1):
    """A SentinelSet: a master, so many replicas, and SENTINELS."""
    need("redis-server")
    with contextlib.ExitStack() as stack:

        def serve(*settings, sentinel=False):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gt-redis-"))
            port = stack.enter_context(reserved_port())
            server = RedisServer(folder, port, settings, sentinel=sentinel)
            stack.callback(server.end)
            server.start()
            return server

        master = serve()
        of_master = f"{LOOPBACK} {master.port}"
        servers = [master, *(serve(f"replicaof {of_master}") for _ in range(replicas))]
        sentinels = [
            serve(
                f"sentinel monitor {MASTER_NAME} {of_master} {QUORUM}",
                f"sentinel down-after-milliseconds {MASTER_NAME} {DOWN_AFTER}",
                f"sentinel failover-timeout {MASTER_NAME} 3000",
                sentinel=True,
            )
            for _ in range(SENTINELS)
        ]
        for each in sentinels:  # milliseconds; the usual ones are seconds
            each.call(
                "SENTINEL", "DEBUG", "info-period", 200, "ping-period", 100, "ask-period", 100,
                "publish-period", 200, "default-down-after", DOWN_AFTER,
            )  # fmt: skip
        yield SentinelSet(servers, sentinels)


# A line that breaks ------------------------------------------------------------------------------

OUT, BACK = "out", "back"  # from the side that has dialled, and towards it
BOTH = (OUT, BACK)


class Proxy:
    """A TCP proxy on a free port of 127.0.0.1: it passes everything on until it is told otherwise.

    ``hold()`` is a network that loses each packet: nothing passes, and nobody is told.
    ``refuse()`` is a host without the program: old and new connections end at once.
    ``cut()`` ends the connections that there are. ``delay()`` is the distance to a far place.
    Any thread. Closes as a ``with``.
    """

    def __init__(self, upstream):
        """``upstream``: a port of 127.0.0.1, or the path of a Unix socket."""
        self.upstream = upstream
        self.accepted = 0  # connections so far
        self.passed = {OUT: 0, BACK: 0}  # bytes
        self._changed = threading.Condition()  # guards all below; notified when they change
        self._held = set()
        self._delays = dict.fromkeys(BOTH, 0.0)
        self._refusing = self._closed = False
        self._cuts = 0  # calls of cut()
        self._pairs = []
        self._threads = []
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port = self._listening.getsockname()[1]
        self._acceptor = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._acceptor.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def url(self) -> str:
        """Of the Redis behind it, as CLUSTER takes it."""
        return f"redis://{self.address}/0"

    def hold(self, *ways):
        """Hold all bytes and ends of these directions, of both without any."""
        self._change(lambda: self._held.update(ways or BOTH))

    def release(self):
        """What was held goes on, in order."""
        self._change(self._held.clear)

    def delay(self, seconds, *ways):
        """All bytes take so long in these directions, in both without any."""
        self._change(lambda: self._delays.update(dict.fromkeys(ways or BOTH, seconds)))

    def cut(self):
        with self._changed:
            pairs, self._pairs = self._pairs, []
            self._cuts += 1  # for those that are not a pair yet
            self._changed.notify_all()
        for pair in pairs:
            _reset(*pair)

    def refuse(self):
        self._change(lambda: setattr(self, "_refusing", True))
        self.cut()

    def admit(self):
        """End what refuse() has begun."""
        self._change(lambda: setattr(self, "_refusing", False))

    def _change(self, change):
        with self._changed:
            change()
            self._changed.notify_all()

    def close(self):
        self._change(lambda: setattr(self, "_closed", True))
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(TIMEOUT)
        self._listening.close()
        self.cut()
        for thread in self._threads:
            thread.join(TIMEOUT)

    def _accept(self):
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            thread = threading.Thread(target=self._carry, args=(near,), name="proxy", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _carry(self, near):
        """Thread of one connection, which does one of its directions."""
        far = None
        with self._changed:
            self.accepted += 1
            cuts, refused = self._cuts, self._refusing or self._closed
        try:
            if refused:
                _reset(near)
                return
            far = self._dial()
            with self._changed:
                self._pairs.append((near, far))
                refused = self._refusing or self._closed or self._cuts != cuts
            if refused:
                _reset(near, far)
            ways = {OUT: (near, far), BACK: (far, near)}
            back = threading.Thread(
                target=self._pump, args=(near, BACK, *ways[BACK]), name="proxy", daemon=True
            )
            back.start()
            self._pump(near, OUT, *ways[OUT])
            back.join()
        except OSError:  # there is no upstream
            _reset(near)
        finally:
            with self._changed:
                self._pairs = [pair for pair in self._pairs if pair[0] is not near]
            for sock in (near, far):
                if sock is not None:
                    sock.close()

    def _dial(self):
        if isinstance(self.upstream, int):
            return socket.create_connection((LOOPBACK, self.upstream), TIMEOUT)
        far = socket.socket(socket.AF_UNIX)
        far.connect(self.upstream)
        return far

    def _pump(self, near, way, source, sink):
        """Pass on one direction of the connection that ``near`` has dialled."""

        def ended():
            return self._closed or not any(pair[0] is near for pair in self._pairs)

        source.settimeout(None)
        sink.settimeout(None)
        try:
            while True:
                data = source.recv(64 * 1024)
                due = monotonic() + self._delays[way]
                with self._changed:
                    self._changed.wait_for(ended, max(0, due - monotonic()))
                    self._changed.wait_for(lambda: ended() or way not in self._held)
                    if ended():
                        break
                    self.passed[way] += len(data)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)
        except OSError:
            pass  # one side is gone: so is the other
        _reset(source, sink)


def _reset(*sockets):
    """End connections with a RST. Their threads close them."""
    for sock in sockets:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.shutdown(socket.SHUT_RDWR)
