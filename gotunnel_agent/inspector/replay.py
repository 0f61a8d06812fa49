"""Sends recorded requests to their targets again, and records what they answer.

A replay goes to the target as the agent dials it for a visit: the same address, TLS, PROXY header
and Host. It does not go through the gateway, so nothing is asked of a visitor (policies), and the
fields that the gateway has added (X-Forwarded-For) are sent as they were recorded. Each try has a
connection of its own and makes a Record, whose ``replay_of`` names the recorded one.

Threads: each replay has as many as its order's ``concurrency``, named "replay ID", at most
order.MOST_AT_ONCE; they end with the last try, by stop(), or by a deadline: each try has
order.timeout, and dialling target.DIAL_TIMEOUT of its own. There are at most MOST_RUNNING replays
at a time.
"""

from __future__ import annotations

import ipaddress
import math
import selectors
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from time import monotonic, time
from typing import Any

from gotunnel import Deadline, Ends, NoThread, spawn

from ..common.duplex import Duplex
from ..common.hostnames import MAX_HOSTNAME, WILDCARD
from ..common.hostnames import OPEN as OPEN_NAME
from ..common.http1 import Malformed
from ..config import HTTP1, Tunnel
from ..dialogue import CUT_SHORT, NO_ANSWER, SWITCHING_PROTOCOLS
from ..target import Route, Unserved, dial, hostname_of, introduction
from .answer import Answer
from .compare import key_of
from .order import CannotReplay, Edit, Order, Outgoing, read_order, rebuild, with_secrets
from .record import ENDED, OPEN, SHARE, Kept, Message, Record, Ring

MOST_RUNNING = 4  # replays at a time; each has up to eight threads
# Groups of equal answers. A target that answers with the time would have as many as there are
# tries: further ones are grouped by their status.
MOST_GROUPS = 12
MOST_KEPT = 50  # replays that are over and can still be asked for
# Seconds between two changes of a running replay, or of a record whose answer still comes, that
# readers are told.
TELL_PAUSE = 0.25
BODY = 64 * 1024  # bytes of an answer's body that are kept, unless the configuration says otherwise
# Bytes of an answer that are read. A target that answers for ever is cut by the timeout; this
# limit spares the machine a minute of it at full speed.
MOST_ANSWER = 1 << 30
HTTPS_PORT = 443  # the gateway's end in a PROXY header, whose real port is not known here

MOST_PORT = 6  # characters of a port behind a hostname, with its colon

RUNNING, OVER, STOPPED, PASSED = "running", "ended", "stopped", "passed"

# A selector that needs no descriptor of its own, where the system has one.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)


class _Group:
    """Answers that are equal, except for dates and such (compare.USUAL)."""

    def __init__(self, first: Record, mixed: bool):
        self._first, self._mixed = first.id, mixed
        self._status, self._problem = first.status, first.problem
        self._size = first.response_body.size
        self._count = 0
        self._least, self._most = math.inf, 0.0

    def note(self, record: Record) -> None:
        took = record.duration or 0.0
        self._count += 1
        self._least, self._most = min(self._least, took), max(self._most, took)

    def document(self) -> dict[str, Any]:
        return {
            "record": self._first,  # the first of them
            "count": self._count,
            "status": self._status,
            "problem": self._problem,
            "size": self._size,
            "mixed": self._mixed,  # they have the status alone in common
            "least_ms": round(1000 * self._least, 3),
            "most_ms": round(1000 * self._most, 3),
        }


class Replay:
    """One order that is carried out: a request that is sent once or many times."""

    def __init__(self, number: int, source: Record, order: Order, outgoing: Outgoing, route: Route):
        self.id = number
        # Not the record itself: it may leave the ring, and its bodies would stay in memory.
        self.record_id, self.visitor = source.id, source.visitor
        self.hostname = order.hostname or source.hostname
        self.order, self.outgoing, self.route = order, outgoing, route
        self.over = threading.Event()  # its threads have ended
        self._stop = threading.Event()
        self._began, self._began_at = time(), monotonic()
        self._lock = threading.Lock()  # guards all below
        self._state = RUNNING
        self._begun = self._threads = 0
        self._ended_at = 0.0
        self._next_at: float | None = None  # wall-clock time of the next try, while it waits
        self._statuses: Counter[str] = Counter()
        self._problems: Counter[str] = Counter()
        self._records: list[int] = []
        self._groups: dict[object, _Group] = {}  # equal answers, by compare.key_of()
        self._open: set[Duplex] = set()
        self._told_at = 0.0

    @property
    def running(self) -> bool:
        return self._state == RUNNING

    def stop(self) -> None:
        """End it, and the tries that run. Any thread."""
        with self._lock:
            if self._state != RUNNING:
                return
            self._state = STOPPED
            open_ones = list(self._open)
        self._stop.set()
        for duplex in open_ones:
            duplex.reset()

    def document(self) -> dict[str, Any]:
        """Its state, for JSON."""
        order = self.order
        with self._lock:
            ended_at = self._ended_at or monotonic()
            document = {
                "id": self.id,
                "record": self.record_id,
                "state": self._state,
                "hostname": self.hostname,
                "target": str(self.route.tunnel.target),
                "method": self.outgoing.method,
                "times": order.times,
                "concurrency": order.concurrency,
                "every": order.every,
                "until": None if order.until is None else str(order.until),
                "done": sum(self._statuses.values()),
                "statuses": dict(sorted(self._statuses.items())),
                "problems": dict(self._problems.most_common(10)),
                "records": list(self._records),
                "groups": [group.document() for group in self._groups.values()],
                "next_at": self._next_at,
                "began": self._began,
                "duration": ended_at - self._began_at,
                "notes": list(self.outgoing.notes),
            }
        return document | {"text": in_words(document)}

    # Of its threads

    def begin(self) -> bool:
        """Whether there is another try. Waits for its time."""
        with self._lock:
            if self._state != RUNNING or self._begun == self.order.times:
                return False
            done = self._begun
            self._begun += 1
            pause = self.order.pause(done) if done else 0.0
            self._next_at = time() + pause if pause else None
        return not self._stop.wait(pause)

    def hold(self, duplex: Duplex) -> None:
        """stop() resets it from now on."""
        with self._lock:
            self._open.add(duplex)
            late = self._state == STOPPED
        if late:
            duplex.reset()

    def let_go(self, duplex: Duplex) -> None:
        with self._lock:
            self._open.discard(duplex)

    def note_begun(self, record: Record) -> None:
        with self._lock:
            self._records.append(record.id)
            self._next_at = None

    def note_ended(self, record: Record) -> None:
        until = self.order.until
        key: object = key_of(record)
        with self._lock:
            mixed = key not in self._groups and len(self._groups) >= MOST_GROUPS
            if mixed:
                key = record.status  # all others of that status
            self._groups.setdefault(key, _Group(record, mixed)).note(record)
            self._statuses[str(record.status)] += 1  # 0 without an answer
            if record.problem:
                self._problems[record.problem] += 1
            passed = until is not None and not record.problem and until.passes(record.status)
            if passed and self._state == RUNNING:
                self._state = PASSED

    def join_in(self) -> None:
        with self._lock:
            self._threads += 1

    def leave(self) -> bool:
        """A thread ends. Whether it is the last one."""
        with self._lock:
            self._threads -= 1
            if self._threads:
                return False
            if self._state == RUNNING:
                self._state = OVER
            self._ended_at, self._next_at = monotonic(), None
            # Replays that are over are kept, and their bodies are not.
            self.outgoing = self.outgoing._replace(head=b"", content=b"", data=b"")
            self.order = self.order._replace(edit=Edit())
        self.over.set()
        return True

    def may_tell(self) -> bool:
        """Whether it is time to tell the readers how it goes."""
        now = monotonic()
        with self._lock:
            if now - self._told_at < TELL_PAUSE:
                return False
            self._told_at = now
            return True


def in_words(document: Mapping[str, Any]) -> str:
    """How a replay stands, in one line."""
    done, times, until = document["done"], document["times"], document["until"]
    found = ", ".join(
        f"{count} x {'no answer' if status == '0' else status}"
        for status, count in document["statuses"].items()
    )
    if document["state"] == PASSED:
        return f"passed at try {done}: {found}"
    if times == done == 1:
        problem = next(iter(document["problems"]), "")
        parts = [] if problem and "0" in document["statuses"] else [found.removeprefix("1 x ")]
        return ", ".join([*parts, problem] if problem else parts)
    words = {RUNNING: "so far", STOPPED: "stopped", OVER: "ended"}[document["state"]]
    line = f"{words}, {done} of {times} {'try' if times == 1 else 'tries'}"
    if found:
        line += f": {found}"
    if until is not None and document["state"] != RUNNING:
        line += f"; no answer was {until}"
    return line


class Replayer:
    """Carries out orders. Any thread may call any method."""

    def __init__(
        self,
        ring: Ring,
        routes: Callable[[], Mapping[str, Route]],
        *,
        body: int = BODY,
    ):
        """``routes()``: the agent's routes by hostname, as it serves them now. ``body``: bytes of
        an answer's body that are kept."""
        self._ring, self._routes, self._body = ring, routes, body
        self._lock = threading.Lock()  # guards all below
        self._replays: dict[int, Replay] = {}  # the latest last
        self._last = 0
        self._over = False  # close() was called

    def start(self, record_id: int, document: object) -> Replay:
        """Begin to replay a record, as an order in JSON says. Raises CannotReplay."""
        order = read_order(document)
        source = self._ring.get(record_id)
        if source is None:
            raise CannotReplay(f"there is no visit {record_id} any more", "not-found")
        return self.carry_out(source, order)

    def carry_out(self, source: Record, order: Order) -> Replay:
        """Begin to replay a record. Raises CannotReplay."""
        route = route_for(source, order.hostname, self._routes())
        head, kept = source.request_head, source.request_body
        edit = with_secrets(order.edit, head, kept)
        outgoing = rebuild(
            head,
            kept,
            edit,
            trailers=source.request_trailers,
            host_header=route.tunnel.host_header,
            switched=source.status == SWITCHING_PROTOCOLS,
            complete=source.state == ENDED or source.status > 0,
        )
        with self._lock:
            running = [replay for replay in self._replays.values() if not replay.over.is_set()]
            if self._over:
                raise CannotReplay("the agent stops", "busy")
            if len(running) >= MOST_RUNNING:
                raise CannotReplay(
                    f"{len(running)} replays run, expected at most {MOST_RUNNING}: stop one, or "
                    "wait", "busy",
                )  # fmt: skip
            self._last += 1
            replay = Replay(self._last, source, order, outgoing, route)
            self._replays[replay.id] = replay
            self._forget()
        self._spawn(replay)
        return replay

    def get(self, number: int) -> Replay | None:
        with self._lock:
            return self._replays.get(number)

    def all(self) -> list[Replay]:
        """The oldest first."""
        with self._lock:
            return list(self._replays.values())

    def stop(self, number: int) -> Replay | None:
        """End a replay; None if there is none of that number."""
        replay = self.get(number)
        if replay is not None:
            replay.stop()
        return replay

    def close(self) -> None:
        """End all. Their threads end soon; none may be started any more."""
        with self._lock:
            self._over = True
            replays = list(self._replays.values())
        for replay in replays:
            replay.stop()

    def _forget(self) -> None:
        """Caller holds the lock."""
        over = [number for number, replay in self._replays.items() if replay.over.is_set()]
        for number in over[: max(0, len(over) - MOST_KEPT)]:
            del self._replays[number]

    def _spawn(self, replay: Replay) -> None:
        count = min(replay.order.concurrency, replay.order.times)
        replay.join_in()  # so that it is not over while threads are still started
        try:
            for _ in range(count):
                replay.join_in()
                try:
                    spawn(f"replay {replay.id}", self._work, replay)
                except NoThread:
                    replay.leave()
                    raise
        except NoThread as error:
            replay.stop()
            raise CannotReplay(str(error), "busy") from None
        finally:
            self._leave(replay)

    def _leave(self, replay: Replay) -> None:
        if replay.leave():
            self._ring.tell("replay", replay.document())

    # A thread of a replay

    def _work(self, replay: Replay) -> None:
        try:
            while replay.begin():
                replay.note_ended(self._try(replay))
                if replay.may_tell():
                    self._ring.tell("replay", replay.document())
        finally:
            self._leave(replay)

    def _try(self, replay: Replay) -> Record:
        """Send the request once. Returns the record of it, which is over."""
        began, outgoing = monotonic(), replay.outgoing
        tunnel = replay.route.tunnel
        record = Record(
            hostname=replay.hostname,
            target=str(tunnel.target),
            visitor=replay.visitor,
            began=time(),
            method=outgoing.method,
            path=outgoing.target,
            request_head=outgoing.head,
            request_body=Kept(outgoing.content[: self._body], len(outgoing.content)),
            replay_of=replay.record_id,
            state=OPEN,
        )
        self._ring.add(record)
        replay.note_begun(record)
        answer = Answer(outgoing.method, self._body)
        try:
            record.problem = self._ask(replay, answer, record, began)
        finally:
            self._note_events(record, answer)
            self._note_answer(record, answer)
            record.duration = monotonic() - began
            record.state = ENDED
            self._ring.update(record)
        return record

    def _ask(self, replay: Replay, answer: Answer, record: Record, began: float) -> str:
        """Dial, send, and read the answer. Returns why it is not whole; "" if it is."""
        deadline = Deadline(replay.order.timeout)
        tunnel, context = replay.route.tunnel, replay.route.context
        try:
            first = introduction(tunnel.proxy_protocol, _ends(record.visitor))
            duplex = dial(tunnel.target, context, first, tunnel.protocol)
        except Unserved as error:
            return STOPPED if not replay.running else f"the target was not reached: {error}"
        replay.hold(duplex)
        try:
            return self._converse(duplex, replay.outgoing, answer, record, began, deadline)
        except TimeoutError:
            late = f"in {replay.order.timeout:g} s"
            return f"{CUT_SHORT}: not whole {late}" if answer.status else f"{NO_ANSWER} {late}"
        except Malformed as error:
            return f"the answer cannot be read: {error}"
        except OSError as error:
            if not replay.running:
                return STOPPED
            why = error.strerror or str(error)
            return f"{CUT_SHORT if answer.status else NO_ANSWER}: {why}"
        finally:
            replay.let_go(duplex)
            duplex.close()

    def _converse(
        self,
        duplex: Duplex,
        outgoing: Outgoing,
        answer: Answer,
        record: Record,
        began: float,
        deadline: Deadline,
    ) -> str:
        """Send the request and read the answer at the same time: a target may answer before it has
        read all. Raises OSError, Malformed."""
        sent = _sends(lambda: duplex.send(outgoing.head + outgoing.data))
        told_at, read = 0.0, 0
        while not answer.over:
            left = deadline.left()
            data = duplex.receive()
            if data is None:
                if not duplex.pending:
                    _wait(duplex, left, writable=not sent)
                sent = sent or _sends(duplex.flush)
                continue
            if not data:
                if not answer.status:
                    return NO_ANSWER
                try:
                    answer.eof()
                except Malformed:
                    return CUT_SHORT
                break
            answer.feed(data)
            self._note_events(record, answer)
            read += len(data)
            if read > MOST_ANSWER:
                return f"{CUT_SHORT}: over {MOST_ANSWER} bytes"
            now = monotonic()
            if answer.status and now - told_at > TELL_PAUSE:
                told_at = now
                if record.first_byte is None:
                    record.first_byte = now - began
                self._note_answer(record, answer)
                self._ring.update(record)
        return ""

    def _note_events(self, record: Record, answer: Answer) -> None:
        events, answer.events = answer.events, []
        for event in events:
            record.add_message(Message(time(), False, "event", *event), self._ring.budget // SHARE)

    @staticmethod
    def _note_answer(record: Record, answer: Answer) -> None:
        record.status, record.response_head = answer.status, answer.head
        record.interim, record.response_trailers = answer.interim, answer.trailers
        record.response_body = Kept(answer.kept, answer.size)


def route_for(record: Record, hostname: str, routes: Mapping[str, Route]) -> Route:
    """The route that a record's replay takes. ``hostname``: the one that the user has named, or "".
    Raises CannotReplay."""
    if record.mode != "http":
        raise CannotReplay("a visit in tcp mode cannot be replayed: its bytes are not read", "tcp")
    wanted = hostname or record.hostname
    # A longer one is none, and the look for its wildcard would take seconds.
    may_be_one = len(wanted) <= MAX_HOSTNAME + MOST_PORT
    route = find_route(hostname_of(wanted), routes) if may_be_one else None
    if route is None:
        others = [name for name, route in routes.items() if route.tunnel.mode == "http"]
        if record.imported and not hostname and len(others) == 1:
            route = routes[others[0]]  # a HAR of another program: there is one place to send it to
        else:
            known = ", ".join(sorted(others)[:10]) or "there is none"
            raise CannotReplay(
                f"no tunnel of this agent serves {ascii(wanted[:MAX_HOSTNAME])[1:-1]}; name one by "
                f"hostname: {known}", "no-tunnel",
            )  # fmt: skip
    _check(route.tunnel)
    return route


def _check(tunnel: Tunnel) -> None:
    if tunnel.mode != "http":
        raise CannotReplay(
            f"{tunnel.hostname} is in tcp mode, expected a tunnel in http mode", "tcp"
        )
    if tunnel.protocol and tunnel.protocol != HTTP1:
        raise CannotReplay(
            f"the target of {tunnel.hostname} speaks HTTP/2 (protocol: {tunnel.protocol}), which "
            "cannot be replayed", "http2",
        )  # fmt: skip


def find_route(hostname: str, routes: Mapping[str, Route]) -> Route | None:
    """The route of a hostname, of the wildcard that it belongs to, or of the open name that it was
    made of: without a session the agent knows no other name of that tunnel."""
    if hostname in routes:
        return routes[hostname]
    label, _, rest = hostname.partition(".")
    opened = routes.get(label + OPEN_NAME)
    while rest:
        if route := routes.get(WILDCARD + rest):
            return route
        rest = rest.partition(".")[2]
    return opened


def _ends(visitor: str) -> Ends | None:
    """What a PROXY header says: the recorded visitor, whose port was not recorded."""
    try:
        ipaddress.ip_address(visitor)
    except ValueError:  # none, or an imported record's
        return None
    return Ends((visitor, 0), ("::" if ":" in visitor else "0.0.0.0", HTTPS_PORT))


def _sends(send: Callable[[], bool]) -> bool:
    """Whether no more has to be sent. A target that does not read all may still answer."""
    try:
        return send()
    except OSError:
        return True


def _wait(duplex: Duplex, timeout: float | None, *, writable: bool) -> None:
    """Wait until the socket can be read, or also written."""
    with _Selector() as selector:
        write = selectors.EVENT_WRITE if writable else 0
        selector.register(duplex, selectors.EVENT_READ | write)
        selector.select(timeout)
