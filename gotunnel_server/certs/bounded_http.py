"""The requests library with bounds, for a server that is to be trusted with nothing.

    how long    REQUEST_TIMEOUT for all of an answer, however it trickles in; less if we are stopped
    how much    MOST_BYTES of a body, counted when it is unpacked
    where to    https, or the very address that we were told to begin with: whatever links come,
                nobody is led to ports of this machine or to its files

The library's own timeout is the silence between two bytes. So a timer, and the Stop, shut down the
sockets: that wakes a thread that reads from them.
"""

from __future__ import annotations

import contextlib
import io
import socket
import threading
import urllib.parse
import weakref

import requests
import urllib3
from requests.adapters import HTTPAdapter

from .cancel import Stop

# Seconds for a request and its redirects. A CA's slowest answers take a third of it.
REQUEST_TIMEOUT = 60.0
# A certificate with its chain is some 10 KiB, and nothing else that a CA sends is longer.
MOST_BYTES = 1024 * 1024
CHUNK = 16 * 1024
# The library would follow 30; a CA has no reason for more than one.
MOST_REDIRECTS = 3


class Session(requests.Session):
    """Requests of one thread. ``stop`` and ``timeout`` (seconds) may be set anew between two.

    What breaks a bound is raised as a requests.RequestException.
    """

    def __init__(self, first_url: str, stop: Stop):
        super().__init__()
        self.stop = stop
        self.timeout = REQUEST_TIMEOUT
        self.max_redirects = MOST_REDIRECTS
        self.trust_env = False  # our settings are config.py's, and ~/.netrc is none of them
        self.hooks["response"].append(_read_whole)
        self._guard = threading.Lock()  # guards what follows
        self._socks: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._cut = False  # the request that runs is to end
        adapter = _Adapter(self._watch)
        self.adapters.clear()
        self.mount("https://", adapter)
        first = urllib.parse.urlsplit(first_url)
        if first.scheme == "http":
            self.mount(f"http://{first.netloc}/", adapter)

    def request(self, *arguments, **keywords) -> requests.Response:
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
        except Exception:  # whatever a socket that was shut down leads to
            if not self._cut:
                raise
        else:
            if not self._cut:  # or its end may be ours, and not the server's
                return answer
        finally:
            timer.cancel()
            timer.join()
        raise requests.Timeout(f"no whole answer within {self.timeout:g} s")

    def _watch(self, sock):
        with self._guard:
            self._socks.add(sock)
            if self._cut:  # while it was connected
                _shut_down(sock)

    def _cut_off(self):
        with self._guard:
            self._cut = True
            for sock in self._socks:
                _shut_down(sock)


class _Adapter(HTTPAdapter):
    """Shows each new socket to ``watch``."""

    def __init__(self, watch):
        self._watch = watch
        super().__init__()

    def init_poolmanager(self, *arguments, **keywords):
        super().init_poolmanager(*arguments, **keywords)
        self.poolmanager.pool_classes_by_scheme = {
            "http": _shown(urllib3.HTTPConnectionPool, self._watch),
            "https": _shown(urllib3.HTTPSConnectionPool, self._watch),
        }


def _shown(pool, watch):
    """``pool``, a class of urllib3, whose connections show their sockets to ``watch``."""

    class Connection(pool.ConnectionCls):
        def connect(self):
            super().connect()
            watch(self.sock)

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def _shut_down(sock):
    with contextlib.suppress(OSError):  # closed already, which was the goal
        # Not that of an SSLSocket, which takes TLS away from under the thread that reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _read_whole(answer, **_):
    """Read a body before the library does, which has no bound."""
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
    answer.encoding = "utf-8"  # to guess it costs seconds a megabyte
