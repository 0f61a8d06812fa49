"""One of several gateways on the same ports: the process that the supervisor has started.

The channel's thread "supervisor" reads the supervisor's messages. Orders that the main thread must
carry out wait in a list, and child_life.py is woken for them. What other children ask is answered
by the thread "siblings", so that a slow answer holds no order up.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any

from gotunnel import Deadline, call_logged, process_memory, spawn
from gotunnel_agent.common.json_lines import JsonLines
from gotunnel_agent.common.one_line import on_one_line
from gotunnel_agent.common.process import stay_on_one_cpu
from gotunnel_agent.common.standard_error import share_standard_error

from ..cluster.board import Board
from ..handover import Failed
from ..net.inherited import Given, Inherited
from ..several import VARIABLE
from .board import ChildBoard
from .channel import PROTOCOL, ChildEnd, Message
from .together import Together

log = logging.getLogger("gotunnel.child")

CALL_TIMEOUT = 2.0  # seconds for the supervisor's answer, which takes less than a millisecond
ASK_TIMEOUT = 2.0  # seconds for the answers of other children to an operator's question


class OtherVersion(Failed):
    """The supervisor runs other code than this process, and the two do not understand each
    other."""


class Gone(OSError):
    """The supervisor has ended, or does not answer."""


class Child:
    """This process among its siblings. Any thread."""

    def __init__(self, descriptor: int) -> None:
        """``descriptor``: this end of the channel. Raises EOFError, OSError."""
        sock = socket.socket(fileno=descriptor)
        sock.set_inheritable(False)
        self._end = ChildEnd(sock)
        hello: Mapping[str, Any] = self._end.receive().get("hello", {})
        if hello.get("protocol") != PROTOCOL:
            self._end.close()
            raise OtherVersion(
                f"the supervisor speaks version {hello.get('protocol')} of its messages, and this "
                f"process {PROTOCOL}: restart the gateway, supervisor included"
            )
        self.number: int = hello["number"]  # from 1
        self.count: int = hello["count"]
        self.supervisor: int = hello["supervisor"]  # process id
        # Whether it logs what is open and where: one does for all.
        self.tells_facts: bool = hello["tells_facts"]
        self.began: float = hello["began"]  # monotonic, of the supervisor
        self.secret: bytes = bytes.fromhex(hello["secret"])  # that all children have
        self.sockets = [_given(*entry) for entry in hello["sockets"]]
        self._others = {
            int(number): [_given(*entry) for entry in entries]
            for number, entries in hello["others"].items()
        }
        status = hello["status"]
        self.status: socket.socket | None = None  # where `status` asks
        if status is not None:
            self.status = socket.socket(fileno=status)
            self.status.set_inheritable(False)
        self.processes: list[Message] = []  # all of them, as the supervisor knows them
        self.all_ready = False  # all have served, and none is to stop
        self.together = Together(self)
        self._answers: dict[str, Callable[[Any], Any]] = {}  # to what siblings ask, by topic
        self._hear: Callable[[Any], object] = lambda told: None  # messages of other members
        self._on_order: Callable[[Message], object] = lambda order: None
        self._lock = threading.Lock()  # guards the three below
        self._last_id = 0
        self._waiting: dict[int, queue.SimpleQueue[Message]] = {}  # calls and questions, by id
        self._gone = False
        # What siblings ask; None ends the thread.
        self._asked: queue.SimpleQueue[tuple[int, Message] | None] = queue.SimpleQueue()

    def start(self, on_order: Callable[[Message], object]) -> None:
        """Begin to read. ``on_order(order)`` is called for each order; for the end of the
        supervisor with {"order": "orphaned"}. Raises NoThread."""
        self._on_order = on_order
        spawn("siblings", self._answer_all)
        spawn("supervisor", self._run)

    def stop(self) -> None:
        """End the threads, and close the channel. For tests: a child ends with its process."""
        self._asked.put(None)
        self._end.close()

    def set_up(self) -> None:
        """Have the log's lines carry the number; take a CPU of a small machine, and a part of the
        memory that one gateway would use for payload."""
        process_memory().limit //= self.count
        number_lines(self.number)
        share_standard_error()
        stay_on_one_cpu(choose_cpu(self.number))

    def inherited(self) -> Inherited:
        return Inherited(self.sockets, shares_ports=True)

    def sockets_of(self, number: int) -> list[Given]:
        """The sockets that are another child's alone."""
        return self._others.get(number, [])

    # To the supervisor

    def tell(self, **message: Any) -> None:
        """Send a message. Raises OSError if the supervisor has ended."""
        self._end.send(message)

    def say(self, **message: Any) -> None:
        """As tell(); but if the supervisor has ended, the order "orphaned" is enough."""
        with contextlib.suppress(OSError):
            self.tell(**message)

    def call(self, name: str, *arguments: Any) -> Any:
        """Ask the supervisor. Raises Gone; ValueError for a call that it does not understand."""
        reply = self._exchange(
            lambda id: {"call": id, "name": name, "with": arguments}, 1, CALL_TIMEOUT
        )
        if not reply:
            raise Gone("the supervisor does not answer")
        if "error" in reply[0]:
            raise ValueError(reply[0]["error"])
        return reply[0]["result"]

    def board(self) -> Board:
        """The board that the children share, for a cluster without Redis."""
        return ChildBoard(self)

    def on_board(self, hear: Callable[[Any], object]) -> None:
        """Have ``hear(message)`` called for each message by the board."""
        self._hear = hear

    # To the siblings

    def answer(self, topic: str, function: Callable[[Any], Any]) -> None:
        """Have ``function(question)`` answer what siblings ask() about a topic. Both are JSON."""
        self._answers[topic] = function

    def ask(self, topic: str, question: Any = None) -> dict[int, Any]:
        """The answers of all other children that serve, by number, within ASK_TIMEOUT. Those that
        do not answer are missing. Raises nothing."""
        others = {each["process"] for each in self.processes if each["state"] == "serving"}
        others -= {self.number}
        if not others:
            return {}
        try:
            replies = self._exchange(
                lambda id: {"to": 0, "body": {"ask": id, "topic": topic, "question": question}},
                len(others), ASK_TIMEOUT,
            )  # fmt: skip
        except Gone:
            return {}
        return {reply["from"]: reply["answer"] for reply in replies if "answer" in reply}

    def _exchange(
        self, message: Callable[[int], Message], count: int, timeout: float
    ) -> list[Message]:
        """Send a message, and wait for ``count`` replies. Raises Gone."""
        replies: queue.SimpleQueue[Message] = queue.SimpleQueue()
        with self._lock:
            if self._gone:
                raise Gone("the supervisor has ended")
            self._last_id += 1
            id = self._last_id
            self._waiting[id] = replies
        found: list[Message] = []
        deadline = Deadline(timeout)
        try:
            self._end.send(message(id))
            while len(found) < count:
                reply = replies.get(timeout=deadline.left())
                if reply.get("gone"):
                    raise Gone("the supervisor has ended")
                found.append(reply)
        except queue.Empty:
            pass
        except Gone:
            raise
        except ConnectionError:
            raise Gone("the supervisor has ended") from None
        except OSError as error:
            raise Gone(f"the supervisor does not answer: {error.strerror or error}") from None
        finally:
            with self._lock:
                self._waiting.pop(id, None)
        return found

    # The threads

    def _run(self) -> None:
        try:
            while True:
                call_logged(self._on_message, self._end.receive())
        except (EOFError, OSError) as error:
            log.debug("the supervisor has ended: %s", error)
        with self._lock:
            self._gone = True
            waiting = list(self._waiting.values())
        for each in waiting:
            each.put({"gone": True})
        self._on_order({"order": "orphaned"})

    def _on_message(self, message: Message) -> None:
        if "order" in message:
            self._on_order(message)
        elif "reply" in message:
            self._give(message["reply"], message)
        elif "processes" in message:
            self.processes, self.all_ready = message["processes"], message["ready"]
        elif "board" in message:
            self._hear(message["board"])
        elif "from" in message:
            body = message["body"]
            if "answer" in body:
                self._give(body["id"], {"from": message["from"], "answer": body["answer"]})
            elif "unknown" in body:
                self._give(body["id"], {"from": message["from"]})
            else:
                self._asked.put((message["from"], body))

    def _give(self, id: int, reply: Message) -> None:
        with self._lock:
            waiting = self._waiting.get(id)
        if waiting is not None:
            waiting.put(reply)

    def _answer_all(self) -> None:
        while (asked := self._asked.get()) is not None:
            call_logged(self._answer_one, *asked)

    def _answer_one(self, number: int, body: Message) -> None:
        function = self._answers.get(body["topic"])
        told: Message = {"id": body["ask"], "unknown": True}
        try:
            if function is not None:
                told = {"id": body["ask"], "answer": function(body["question"])}
        finally:
            self.tell(to=number, body=told)


class Numbered(logging.Formatter):
    """Puts the process's number into each line of the log."""

    def __init__(self, formatter: logging.Formatter, number: int) -> None:
        super().__init__()
        self._formatter, self._number = formatter, number
        self._is_json = isinstance(formatter, JsonLines)

    def format(self, record: logging.LogRecord) -> str:
        if self._is_json:
            line = self._formatter.format(record)
            return f'{line[:-1]},"process":{self._number}}}'
        copy = logging.makeLogRecord(vars(record))
        copy.msg, copy.args = f"[{self._number}] {record.getMessage()}", None
        return self._formatter.format(copy)


def number_lines(number: int) -> None:
    """Have all lines of the log carry the process's number."""
    for handler in logging.getLogger().handlers:
        handler.setFormatter(Numbered(handler.formatter or logging.Formatter(), number))


def choose_cpu(number: int) -> Callable[[set[int]], int]:
    """For stay_on_one_cpu(): the children take the CPUs in turn."""
    return lambda cpus: sorted(cpus)[(number - 1) % len(cpus)]


def _given(descriptor: int, name: str, by_systemd: bool) -> Given:
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    return Given(sock, name, by_systemd)


def connect(descriptor: str) -> Child | None:
    """The Child whose channel is the descriptor in the environment; None, and a line in the log, if
    it is none."""
    try:
        return Child(int(descriptor))
    except (ValueError, TypeError, KeyError, OSError, EOFError):
        log.warning("%s is %s, which is no channel to a supervisor: it is ignored; unset it",
                    VARIABLE, on_one_line(repr(descriptor), 40))  # fmt: skip
        return None
