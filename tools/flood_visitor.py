"""The honest visitor of flood.py: asks for a small page again and again, and says how long it took.

    flood_visitor.py PORT HOSTNAME ADDRESS     until standard input ends

One thread makes a new TLS connection for each request, the other one keeps its connection. Prints a
line for each request: "new" or "kept", when it began (monotonic), the seconds, "ok" or an error.
"""

import contextlib
import http.client
import socket
import ssl
import sys
import threading
import time

EVERY = 0.05  # seconds from one request to the next
TIMEOUT = 10  # seconds: then a request has failed
SLOW_START = 0.2  # seconds after a failure
LOOPBACK = "127.0.0.1"


class Visitor:
    def __init__(self, port, hostname, address):
        self._port, self._hostname, self._address = int(port), hostname, address
        self._trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self._trust.check_hostname, self._trust.verify_mode = False, ssl.CERT_NONE

    def connect(self):
        plain = socket.create_connection((LOOPBACK, self._port), TIMEOUT, (self._address, 0))
        visitor = http.client.HTTPConnection(self._hostname)
        try:
            visitor.sock = self._trust.wrap_socket(plain, server_hostname=self._hostname)
        except BaseException:
            plain.close()
            raise
        return visitor

    def ask(self, visitor):
        visitor.request("GET", "/small")
        got = visitor.getresponse()
        got.read()
        if got.status != 200:
            raise http.client.HTTPException(f"status {got.status}")

    def ask_again(self, kept):
        """Ask on a kept connection. None if there is none, or if the gateway has closed it since
        its last answer: a browser then asks on a new one (RFC 9112 section 9.3.1)."""
        if kept is None or kept.sock is None:
            return None
        try:
            self.ask(kept)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            kept.close()
            return None
        return kept

    def run(self, how):
        """Ask for ever."""
        kept = None
        while True:
            began, problem = time.monotonic(), "ok"
            visitor = None
            try:
                visitor = self.ask_again(kept) or self.connect()
                if visitor is not kept:
                    self.ask(visitor)
            except (OSError, http.client.HTTPException) as error:
                problem = repr(error)
            took = time.monotonic() - began
            if how == "kept" and problem == "ok":
                kept = visitor
            else:
                for over in filter(None, (visitor, kept)):
                    with contextlib.suppress(OSError):
                        over.close()
                kept = None
            print(how, f"{began:.6f} {took:.6f}", problem, flush=True)
            time.sleep(max(0, EVERY - took) if problem == "ok" else SLOW_START)


def main(*arguments):
    visitor = Visitor(*arguments)
    for how in ("new", "kept"):
        threading.Thread(target=visitor.run, args=(how,), daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
