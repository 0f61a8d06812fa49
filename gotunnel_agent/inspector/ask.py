"""Asks a running inspector by its JSON API, for `gotunnel inspect`.

The connection goes to the inspector itself: a proxy of the environment (http_proxy) is not used, as
it could not reach this machine's loopback address, and would learn the token.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from .place import Place

TIMEOUT = 20  # seconds for an answer; the inspector is on this machine, and answers in a few ms
SILENCE = 60  # seconds between two bytes of events; the inspector sends one every 15
# Bytes of an answer. A visit's bodies have some 512 kB of text; a HAR file has what the memory has.
MOST_ANSWER = 1 << 30
MOST_LINE = 64 * 1024 * 1024  # bytes of a line of events


class CannotAsk(Exception):
    """There is no answer; one line for the user."""


class Refused(Exception):
    """The inspector has refused what was asked for; its words, one line."""


class Event(NamedTuple):
    """A server-sent event."""

    name: str
    value: Any


class Inspector:
    """A running inspector."""

    def __init__(self, place: Place):
        self.place = place

    def get(self, path: str, query: Mapping[str, object] = {}) -> Any:
        """The document at a path of the API. Raises CannotAsk, Refused."""
        return _document(self._ask("GET", path, query))

    def post(self, path: str, document: object = None) -> Any:
        return _document(self._ask("POST", path, {}, json.dumps(document or {}).encode()))

    def send(self, path: str, data: bytes) -> Any:
        """post() with a file."""
        return _document(self._ask("POST", path, {}, data))

    def fetch(self, path: str, query: Mapping[str, object] = {}) -> bytes:
        """What is at a path that is no JSON."""
        return self._ask("GET", path, query)

    def events(self, query: Mapping[str, object] = {}) -> Iterator[Event]:
        """What happens from now on, until the inspector ends. Raises CannotAsk, Refused."""
        with self._answer("GET", "events", query, None, SILENCE) as answer:
            if answer.status != 200:
                raise _refused(answer.status, answer.read(MOST_LINE))
            yield from _events(answer)

    def _ask(
        self, method: str, path: str, query: Mapping[str, object], body: bytes | None = None
    ) -> bytes:
        with self._answer(method, path, query, body, TIMEOUT) as answer:
            try:
                data = answer.read(MOST_ANSWER)
            except (OSError, http.client.HTTPException) as error:
                raise self._no_answer(error) from None
        if answer.status >= 300:
            raise _refused(answer.status, data)
        return data

    @contextlib.contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: bytes | None,
        timeout: float,
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer's head; the body is to be read in the ``with`` block. Raises CannotAsk."""
        connection = http.client.HTTPConnection(self.place.host, self.place.port, timeout=timeout)
        with contextlib.closing(connection):
            try:
                answer = self._begin(connection, method, path, query, body)
            except (OSError, http.client.HTTPException) as error:
                raise self._no_answer(error) from None
            with contextlib.closing(answer):  # which holds the socket, once it is there
                yield answer

    def _begin(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        query: Mapping[str, object],
        body: bytes | None,
    ) -> http.client.HTTPResponse:
        given = {name: value for name, value in query.items() if value not in (None, "", False)}
        target = "/api/v1/" + quote(path) + (f"?{urlencode(given)}" if given else "")
        fields = {"Authorization": f"Bearer {self.place.token}", "Accept": "*/*"}
        if body is not None:
            fields["Content-Type"] = "application/json"
        connection.request(method, target, body, fields)
        return connection.getresponse()

    def _no_answer(self, error: Exception) -> CannotAsk:
        if isinstance(error, socket.timeout):
            why = "it does not answer in time"
        elif isinstance(error, OSError):
            why = error.strerror or str(error)
        else:
            why = "it does not speak HTTP"
        return CannotAsk(f"no inspector answers at {self.place.address} ({why})")


def _events(answer: http.client.HTTPResponse) -> Iterator[Event]:
    name = ""
    # A connection that breaks is an end as well.
    with contextlib.suppress(OSError, http.client.HTTPException):
        while line := answer.readline(MOST_LINE):
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            if text.startswith("event: "):
                name = text[len("event: ") :]
            elif text.startswith("data: "):
                yield Event(name, _document(text[len("data: ") :].encode()))


def _document(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise CannotAsk("the answer is no JSON, expected that of an inspector") from None


def _refused(status: int, data: bytes) -> Exception:
    try:
        text = str(json.loads(data)["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return CannotAsk(f"status {status} came, expected the answer of an inspector")
    return Refused(text)
