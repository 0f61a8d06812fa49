"""How many threads the pools have, and how many connections each port takes: limited by the
operator, and by the port's part of the file descriptors that the process may have. The rest of them
is for files and listening sockets."""

import logging
import os
import threading

from gotunnel import spawn

from .net.listener import descriptor_limit
from .net.shares import Places
from .visitors.forwarded import Proxies

log = logging.getLogger("gotunnel.capacity")

# For TLS handshakes and request heads: short work that waits for no peer. One a CPU, at least two:
# with more threads the listeners hardly run while addresses flood a port with ClientHellos. Beside
# five such addresses, on two CPUs, a visit took 14 ms with 2 threads, and 12 s with 32 (median).
STEP_THREADS = min(max(os.cpu_count() or 1, 2), 32)
# For granted registrations: reading CERT_DIR and the store, making local certificates. A pool of
# its own, because a disk that hangs must not stop visitors' handshakes. A few threads keep a disk
# busy. AGENT_CONNECTIONS bounds the queue.
REGISTRATION_THREADS = 8
# Answered at a time, each on DASHBOARD_PORT and METRICS_PORT. All that use the dashboard by ssh -L
# have one address, whose share is 6 of them.
PAGE_REQUESTS = 16
HTTP_REQUESTS = 64  # on the port for plain HTTP, unless there are TRUSTED_PROXIES
PAGE_CONNECTIONS = 100  # at a time: those pages are for a few people and programs
# On the port for plain HTTP. With TRUSTED_PROXIES its visitors count towards MAX_CONNECTIONS.
HTTP_CONNECTIONS = 1000
OTHER_THREADS = 32  # of a gateway, beside one for each agent: its own, and some for first visits
AGENT_CONNECTIONS = 4096  # at a time, strangers included; registered ones take a thread each
# Parts of the file descriptors. A visitor takes one descriptor, an agent four.
VISITORS_SHARE, AGENTS_SHARE = 1 / 2, 1 / 3
PORTS_SHARE = 1 / 16  # for the agents' public ports (TCP_PORTS), without their visitors
PORT_DESCRIPTORS = 5  # of one such port: two sockets, a selector, and a waker's two
PLAIN_SHARE = 1 / 24  # each for HTTP_PORT's connections, the dashboard's and the metrics'


def visitors(wanted: int, proxies: Proxies) -> Places:
    """For the visitors of all ports; ``wanted`` is MAX_CONNECTIONS."""
    limit = min(wanted, int(descriptor_limit() * VISITORS_SHARE))
    if limit < wanted:
        log.warning("MAX_CONNECTIONS is %d, but of the %d descriptors of the process only %d are "
                    "for visitors; raise the limit (ulimit -n)",
                    wanted, descriptor_limit(), limit)  # fmt: skip
    return Places(limit, proxies)


def agents(proxies: Proxies) -> Places:
    """For agents. An address has no share of its own: many agents may be behind one NAT, and their
    credentials have limits."""
    limit = min(AGENT_CONNECTIONS, int(descriptor_limit() * AGENTS_SHARE / 4))
    return Places(limit, proxies, parts=0)


def plain(wanted: int, proxies: Proxies) -> Places:
    """For a port without TLS that serves no tunnels."""
    return Places(min(wanted, int(descriptor_limit() * PLAIN_SHARE)), proxies)


def try_threads(sessions: int) -> None:
    """Have the system give the threads of so many agents' sessions, and the other ones, for a
    moment. A successor without them would take over the ports, and serve nothing. Raises
    NoThread."""
    over = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(min(sessions, AGENT_CONNECTIONS) + OTHER_THREADS):
            threads.append(spawn("trial", over.wait))
    finally:
        over.set()
        for thread in threads:
            thread.join()


def ports() -> int:
    """How many public ports agents may have open at a time."""
    return int(descriptor_limit() * PORTS_SHARE / PORT_DESCRIPTORS)
