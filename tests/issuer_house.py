"""An issuer for tests, with a fake clock and a CA that does what the test wants: House."""

import queue
import threading

from fake_ca import DAY, NOW, Clock, Mint, Proofs
from support import TIMEOUT

from gotunnel_server.certs.acme_errors import HOST, CaError
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.issuer import Issuer
from gotunnel_server.certs.rate_limits import Bounds, Quota
from gotunnel_server.certs.schedule import HOUR
from gotunnel_server.certs.store import ca_id

APP, OTHER = "app.example.com", "other.example.com"
URL = "https://ca.example/dir"


class ScriptedCa:
    """A CA in place of acme.Ca. Each order takes a step of ``script``: an error, or a function that
    waits; without one it issues a certificate."""

    def __init__(self, clock):
        self.clock = clock
        self.mint = Mint()
        self.lifetime = 90 * DAY
        self.script = []
        self.orders = queue.Queue()  # (hostname, challenge, replaces) of each
        self.window = None
        self.asks = []
        self.on_ask = lambda: None
        self.lock = threading.Lock()

    def order(self, hostname, challenge, challenges, stop, *, replaces=None):
        self.orders.put((hostname, challenge, replaces))
        with self.lock:
            step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        if step is not None:
            step(stop)
        return self.mint.pair(hostname, self.clock(), self.lifetime)

    def renewal_info(self, leaf, stop):
        self.asks.append(leaf)
        self.on_ask()
        return self.window, 6 * HOUR

    def ordered(self):
        """The orders since the last call."""
        found = []
        while not self.orders.empty():
            found.append(self.orders.get_nowait())
        return found


class House:
    """An issuer with a fake clock and without its thread: it looks when the test calls look()."""

    def __init__(self, folder, proofs=None, **more):
        self.clock = more.pop("clock", None) or Clock()
        self.ca = more.pop("ca", None) or ScriptedCa(self.clock)
        self.open_store = more.pop("open_store", lambda: open_store(folder / "cache", URL))
        self.proofs = proofs or Proofs()
        self.folder = folder
        self.changed = queue.Queue()
        per_hour, per_agent = more.pop("orders_per_hour", None), more.pop("orders_per_agent", None)
        bounds = more.pop("bounds", Bounds())
        if per_hour:
            bounds = bounds._replace(all=Quota(per_hour, HOUR))
        if per_agent:
            bounds = bounds._replace(hour=Quota(per_agent, HOUR))
        self.more = {**more, "bounds": bounds}
        self.issuer = None
        self.restart()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.issuer.stop()

    def restart(self):
        if self.issuer:
            self.issuer.stop()
        self.store = self.open_store()
        self.issuer = Issuer(
            self.ca, self.store, self.proofs, self.changed.put, clock=self.clock, **self.more
        )

    def at(self, seconds):
        """Set the clock to NOW + ``seconds``, and look()."""
        self.clock.now = NOW + seconds
        return self.look()

    def look(self):
        """Run all jobs that are due; returns the orders."""
        self.issuer.look()
        while finish_jobs():
            self.issuer.look()
        return self.ca.ordered()

    def state(self, hostname=APP):
        return self.issuer.queue.state(hostname)

    def file(self, hostname=APP):
        """Where its certificate is kept."""
        return self.folder / "cache" / ca_id(URL) / "certs" / f"{hostname}.pem"


def jobs():
    return [t for t in threading.enumerate() if t.name.startswith(("order ", "window "))]


def finish_jobs() -> bool:
    """Wait for the jobs that run; returns whether there were any."""
    running = jobs()
    for job in running:
        job.join(TIMEOUT)
    return bool(running)


def refused(kind=HOST, **more):
    return CaError(kind, "https://ca.example/x", "the CA's words", code="code", **more)
