"""Hand-overs: the line that tells of one, and sockets that are held as systemd holds them."""

import socket
import sys

from support import ROOT, TIMEOUT, Gateway, Program, ca_of, gateway_environment

SERVES = r"the successor, process (\d+), serves"

# Gives descriptors to a program as systemd does: argv[1] are their numbers.
LISTEN = (
    "import os, sys\n"
    "given = [os.dup(int(number) + 0) for number in sys.argv[1].split(',')]\n"
    "given = [os.dup2(number, 500 + place) for place, number in enumerate(given)]\n"
    "for place, number in enumerate(given):\n"
    "    os.dup2(number, 3 + place)\n"
    "    os.close(number)\n"
    "os.environ.update(LISTEN_FDS=str(len(given)), LISTEN_PID=str(os.getpid()))\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Held:
    """The gateway's sockets, held as systemd holds them, and a socket to notify."""

    def __init__(self, cache, stack):
        self._cache = cache
        self.public, self.tunnel = (
            stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
            for _ in range(2)
        )
        self._notified = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self._notified.bind(str(cache / "notify"))
        self._notified.settimeout(TIMEOUT)

    def start(self, **changes):
        named = {
            "LISTEN_FDNAMES": "gateway_port:tunnel_port",
            "NOTIFY_SOCKET": str(self._cache / "notify"),
        }
        environment = gateway_environment(self._cache, **(named | changes))
        sockets = (self.public, self.tunnel)
        numbers = ",".join(str(sock.fileno()) for sock in sockets)
        command = (sys.executable, "-c", LISTEN, numbers, sys.executable, ROOT / "gotunnel_server")
        return Program(list(map(str, command)), self._cache, environment, sockets)

    def hear(self):
        return self._notified.recv(4096).decode()

    def hear_all_but(self, other):
        while (heard := self.hear()) == other:
            pass
        return heard

    def gateway(self, program):
        program.wait_for(" is ready$")
        return Gateway(
            self.public.getsockname()[1], self.tunnel.getsockname()[1], ca_of(self._cache),
            lambda *hostnames: [program.wait_for(f" registered .*{name}") for name in hostnames],
            program=program,
        )  # fmt: skip
