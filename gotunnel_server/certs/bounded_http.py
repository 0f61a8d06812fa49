"""The requests library with bounds, for a server that we do not trust.

    time        REQUEST_TIMEOUT for the whole answer, however slowly it comes; less after a Stop
    size        MOST_BYTES of a body, counted after decompression
    address     https; plain http only to the host and port of the first URL. So no link or redirect
                makes us send plain requests to ports of this machine, or read its files (SSRF)

The library's own timeout only bounds the silence between two bytes. So a timer, and the Stop, shut
down the sockets, which wakes a thread that reads from them.
"""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import urllib.parse
import weakref
from collections.abc import Callable
from typing import Any

import requests
import urllib3
from requests.adapters import HTTPAdapter

from .cancel import Stop

# Seconds for a request with its redirects. A CA's slowest answers take a third of it.
REQUEST_TIMEOUT = 60.0
# A certificate with its chain is some 10 KiB, and nothing else that a CA sends is longer.
MOST_BYTES = 1024 * 1024
CHUNK = 16 * 1024
# The library would follow 30; a CA has no reason for more than one.
MOST_REDIRECTS = 3


class Session(requests.Session):
    """The HTTP session of the requests library, with bounds. Not gotunnel.Session, which is an
    agent's connection.

    Requests of one thread. ``stop`` and ``timeout`` (seconds) may be changed between two.

    An answer that breaks a bound is raised as a requests.RequestException.
    """

    def __init__(self, first_url: str, stop: Stop) -> None:
        super().__init__()
        self.stop = stop
        self.timeout = REQUEST_TIMEOUT
        self.max_redirects = MOST_REDIRECTS
        self.trust_env = False  # no ~/.netrc, no proxy variables: settings come from config.py
        self.hooks["response"].append(_read_whole)
        self._guard = threading.Lock()  # guards what follows
        self._socks: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._cut = False  # the request that runs must end
        adapter = _Adapter(self._watch)
        self.adapters.clear()
        self.mount("https://", adapter)
        first = urllib.parse.urlsplit(first_url)
        if first.scheme == "http":
            self.mount(f"http://{first.netloc}/", adapter)

    def request(self, *arguments: Any, **keywords: Any) -> requests.Response:
        with self._guard:
            self._cut = False
        timer = threading.Timer(self.timeout, self._cut_off)
        timer.name, timer.daemon = "timer of a request", True
        try:
            timer.start()
        except RuntimeError as error:  # the system has no more threads, or Python is about to end
            raise requests.RequestException(str(error)) from error
        try:
            with self.stop.waking(self._cut_off):
                answer = super().request(*arguments, **keywords)
        except Exception:  # a socket that was shut down causes many kinds of errors
            if not self._cut:
                raise
        else:
            if not self._cut:  # else the body may have ended because we cut it
                return answer
        finally:
            timer.cancel()
            timer.join()
        raise requests.Timeout(f"no whole answer within {self.timeout:g} s")

    def _watch(self, sock: socket.socket) -> None:
        with self._guard:
            self._socks.add(sock)
            if self._cut:  # while it was connected
                _shut_down(sock)

    def _cut_off(self) -> None:
        with self._guard:
            self._cut = True
            for sock in self._socks:
                _shut_down(sock)


class _Adapter(HTTPAdapter):
    """Calls ``watch`` with each new socket."""

    def __init__(self, watch: Callable[[socket.socket], None]) -> None:
        self._watch = watch
        super().__init__()

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(*arguments, **keywords)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _watched(urllib3.HTTPConnectionPool, self._watch),
            "https": _watched(urllib3.HTTPSConnectionPool, self._watch),
        }


def _watched(pool: type, watch: Callable[[socket.socket], None]) -> type:
    """``pool``, a class of urllib3, whose connections call ``watch`` with their sockets."""

    # mypy does not accept a base class that is only known at run time.
    class Connection(pool.ConnectionCls):  # type: ignore[name-defined,misc]
        def connect(self) -> None:
            super().connect()
            watch(self.sock)

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed already, which was the goal
        # Not SSLSocket.shutdown(), which drops the TLS state while another thread reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _read_whole(answer: requests.Response, **_: object) -> None:
    """Read a body before the library does, which would read it without a bound."""
    body = bytearray()
    try:
        for chunk in answer.raw.stream(CHUNK, decode_content=True):
            body += chunk
            if len(body) > MOST_BYTES:
                answer.close()
                raise requests.RequestException(f"an answer of more than {MOST_BYTES} bytes")
    except urllib3.exceptions.HTTPError as error:
        raise requests.ConnectionError(error) from error
    answer.raw = io.BytesIO(body)
    answer.encoding = "utf-8"  # or the library guesses, which takes seconds a megabyte
