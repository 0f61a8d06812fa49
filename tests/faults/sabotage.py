"""A gateway that is broken on purpose, to see that the bench finds it.

sabotage.py NAME     starts the gateway with one of its rules broken

keeps      an answer was cut, or its visitor left: its stream is kept for the next visit
completes  a cut answer is ended as if it were whole
waits      a session, or a target, that says nothing more is waited for without end
repeats    a POST whose stream broke is sent again
mixes      a visit goes to another hostname of its agent
mangles    an answer loses a byte in its middle, and its length says so
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import gotunnel
from gotunnel_server import cli
from gotunnel_server.agents import heartbeat, stream_pool, tunnel
from gotunnel_server.visitors import exchange, http1_server


def keeps():
    def run(self):
        try:
            self._ask()
            self._answer()
        except BaseException:
            if self._holds_stream:
                self._route.tunnel.keep(self._route, self._stream)
            if self._head_sent:
                self._request.abort()
            raise

    def put(self, hostname, stream):
        if not self._put(hostname, stream):
            stream.close()

    exchange.Exchange._run = run
    stream_pool.KeptStreams.put = put
    tunnel.Tunnel.take_kept = lambda self, route: self._kept.pop(route.hostname)


def completes():
    def abort(self):
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")

    http1_server.Http1Request.abort = abort


def waits():
    gotunnel.KEEP_ALIVE = heartbeat.PONG_TIMEOUT = 10**6
    wait = exchange.Exchange._wait
    exchange.Exchange._wait = lambda self, timeout=None: wait(self, timeout and 10**6)


def repeats():
    open_stream = tunnel.Tunnel.open

    def open_twice(self, route, ends, first=b"", relayed=False):
        if first.startswith(b"POST "):
            open_stream(self, route, ends, first, relayed)
        return open_stream(self, route, ends, first, relayed)

    tunnel.Tunnel.open = open_twice


def mixes():
    pop = stream_pool.KeptStreams.pop

    def pop_another(self, hostname):
        with self._lock:
            others = [name for name, kept in self._by_hostname.items() if kept]
        return pop(self, others[0] if others else hostname)

    stream_pool.KeptStreams.pop = pop_another


def mangles():
    finish = http1_server.Http1Request.finish

    def shorter(self, pieces, trailers=()):
        pieces = list(pieces)
        if self._chunked and pieces and len(pieces[-1]) > 1000:
            pieces[-1] = pieces[-1][:-1]
        finish(self, pieces, trailers)

    http1_server.Http1Request.finish = shorter


if __name__ == "__main__":
    {each.__name__: each for each in (keeps, completes, waits, repeats, mixes, mangles)}[
        sys.argv[1]
    ]()
    del sys.argv[1]
    sys.exit(cli.main())
