"""The gateway: builds its parts, starts and stops them in order. The only file that knows all.

    thread                  how many                     ends when
    main                    1 (cli.py)                   a signal comes; it stops the gateway
    listener PORT           1 a port, also of agents     stop(), by a wake-up byte
    step                    at most STEP_THREADS         the step is done; it waits for nobody
    registration            at most REGISTRATION_THREADS the agent has its ack
    exchange                at most WORKERS              the request is answered
    upload                  at most 1 an exchange        the request's body has come, or is given up
    relay, relay back       2 a tcp visit or WebSocket   both ends are done
    demux ADDRESS           1 a registered agent         the session ends
    keeper                  1                            stop()
    issuer, order, window,
    timer of a request      see issuer.py                stop()

A connection is accepted by its port's listener, and is either watched by it or in the hands of one
thread (steps.py, newcomer.py). A registered agent has a demultiplexer, which reads for all of
its streams (gotunnel.py).
"""

import contextlib
import functools
import importlib
import logging
import threading
from time import monotonic

from gotunnel import __version__, spawn
from gotunnel_agent.common.hostnames import WILDCARD, valid_hostname
from gotunnel_agent.common.process import Workers

from .agents.attempts import Attempts
from .agents.credentials import Credentials
from .agents.newcomer import REGISTER_TIMEOUT, Newcomers
from .agents.ports import Ports
from .agents.tunnel import Tunnels
from .certs.acme_errors import HOST, LATER, CaError
from .certs.challenges import HTTP_01, TLS_ALPN_01, Challenges
from .certs.contexts import Certificates
from .certs.folder import open_store
from .certs.issuer import Issuer
from .certs.local_ca import Authority, CertificateError
from .certs.pem_file import pem_file
from .certs.state import FAILED
from .certs.store import StoreError
from .net.dns import NoAnswer, is_always_here, is_own, own_addresses, resolve
from .net.listener import Listener, PortError, bind, descriptor_limit
from .routes import Registry
from .visitors import dashboard, policy
from .visitors.forwarded import Proxies
from .visitors.port import Port, PublicPort, TcpPort, Timeouts
from .visitors.relays import MAX_RELAYS
from .visitors.sites import choose_redirect, choose_site

log = logging.getLogger("gotunnel.gateway")

# A visitor that names protocols of its own may want one of them back: HTTP's, and PostgreSQL's
# clients, which else refuse direct TLS.
ALPN = ("http/1.1", "postgresql")
STEP_THREADS = 32  # for handshakes and heads: short work, of which little waits
# For agents whose registration is granted: looking at CERT_DIR and the store, making local
# certificates. A pool of its own, since a disk that hangs must not stop visitors' handshakes. A few
# threads are enough to keep a disk busy; the queue is bounded by AGENT_CONNECTIONS.
REGISTRATION_THREADS = 8
DASHBOARD_REQUESTS = 4  # answered at a time
DASHBOARD_CONNECTIONS = 100  # at a time: it is a page for a few people
HTTP_REQUESTS, HTTP_CONNECTIONS = 64, 1000  # on the port for plain HTTP, which only sends on
AGENT_CONNECTIONS = 4096  # at a time, strangers included; registered ones take a thread each
# Parts of the descriptors that the process may have. A visitor takes one, an agent four; what is
# left is for files, listening sockets and the dashboard.
VISITORS_SHARE, AGENTS_SHARE = 1 / 2, 1 / 3
# Seconds between looks at CERT_DIR and AGENTS_FILE. A change counts after two of them: within 5 s.
RELOAD = 2
RESOLVE_AGAIN = 300  # seconds after a hostname's resolver, or ours, gave no answer
LAST_LOOK = 2  # seconds for the look that is under way when we stop: a disk may hang
KEEP = 3600  # seconds between looks whose certificates are wanted: who is not served at two is not
READY = "ready"


class Gateway:
    """start(), then stop(). A gateway that could not start has left nothing open."""

    def __init__(self, config):
        """``config``: the frozen Config of config.load(). Raises CertificateError,
        AgentsFileError, PortError."""
        self._config = config
        self._authority = Authority(config.acme_cache / "local") if config.local_ca else None
        self._certificates = Certificates(config.cert_dir, self._authority, alpn=ALPN)
        self._registry = Registry(reserved={config.gateway_host, config.tunnel_host})
        self._challenges = Challenges(
            (HTTP_01, TLS_ALPN_01) if config.http_port is not None else (TLS_ALPN_01,),
            config.acme_cache,
        )
        self._issuer = self._build_issuer() if config.acme else None
        self._credentials = Credentials(config.jwt_secret, config.jwt_issuer, config.agents_file)
        self._stopping = False
        self._look_now = threading.Event()  # for the keeper: something may have changed, or the end
        self._not_taken = set()  # hostnames whose ordered certificate could not be served yet
        self._keeper = None
        self._ensure_own_certificates()
        self._proxies = Proxies(config.trusted_proxies)
        self._ports = Ports(config.tcp_ports, self._open_port)
        self._steps = Workers(STEP_THREADS, "step")
        self._registrations = Workers(REGISTRATION_THREADS, "registration")
        self._visitor_ports = []
        self._listeners = []
        try:
            self._build_tunnels()
            self._build_visitors()
            self._build_dashboard()
            self._build_http()
        except BaseException:
            self._close_listeners()
            raise

    # Certificates

    def _build_issuer(self):
        acme = self._config.acme
        try:
            store = self._store = open_store(self._config.acme_cache, acme.directory)
        except StoreError as error:
            raise CertificateError(str(error)) from None
        # Who orders nothing need not load what ordering takes: 15 MB.
        orders = importlib.import_module(f"{__package__}.certs.acme")
        eab = (acme.eab_kid, acme.eab_hmac) if acme.eab_kid else None
        ca = orders.Ca(
            acme.directory, store, ca_file=acme.ca_file, email=acme.email, eab=eab,
            user_agent=f"gotunnel/{__version__}",
        )  # fmt: skip
        self._serve_stored(store)
        return Issuer(
            ca, store, self._challenges, self._certificate_changed, look_up=self._look_up
        )

    def _look_up(self, hostname):
        """Issuer's thread: whether the CA can find us by a hostname at all."""
        if is_always_here(hostname):
            return
        try:
            found = resolve(hostname)
        except NoAnswer as error:
            raise CaError(
                LATER, "DNS", f"no resolver answers for {hostname} ({error}): see whether this "
                "machine's are up", retry_after=RESOLVE_AGAIN
            ) from None  # fmt: skip
        except OSError as error:
            raise CaError(
                HOST, "DNS", f"{hostname} does not resolve ({error}), expected a record that leads "
                "to this machine"
            ) from None  # fmt: skip
        if not any(map(is_own, found)):  # NAT, or a mistake: the CA will see
            log.warning("%s leads to %s, and this machine is %s: if no router passes that on, the "
                        "CA will find somebody else",
                        hostname, ", ".join(found), ", ".join(own_addresses()))  # fmt: skip

    def _serve_stored(self, store):
        """Serve what was ordered earlier: until its agent is back, a hostname shows a page that
        says so, and no TLS error."""
        for hostname in store.hostnames():
            with contextlib.suppress(CertificateError, StoreError, OSError):  # ordered when wanted
                stored = store.certificate(hostname)
                if stored is not None:
                    with pem_file(store.pem(stored)) as file:
                        self._certificates.take(hostname, file)

    @property
    def _own_names(self):
        return tuple(dict.fromkeys((self._config.gateway_host, self._config.tunnel_host)))

    def _ensure_own_certificates(self):
        config = self._config
        for name in self._own_names:
            if self._issuer and valid_hostname(name):
                self._ensure_certificates([name])
            elif not self._certificates.ensure(name):
                raise CertificateError(
                    f"{name}: no CA certifies an IP address here, expected a hostname in "
                    "TUNNEL_HOST, or its certificate in CERT_DIR"
                    if self._issuer else
                    f"CERT_DIR {config.cert_dir}: no certificate for {name}, expected one in a "
                    "pair x.crt and x.key; add it, or set ACME_ENV=local to try things out"
                )
        # Those that an earlier gateway has left: until its agent is back, a hostname shows a page
        # that says so, and no TLS error.
        if self._authority:
            self._ensure_certificates(self._authority.hostnames())

    def _ensure_certificates(self, hostnames, agent=None):
        """See to it that hostnames have certificates, now or soon."""
        self._certificates.reload()  # once for all: it is a look at each of hundreds of files
        for hostname in hostnames:
            self._ensure_certificate(hostname, agent)

    def _ensure_certificate(self, hostname, agent):
        try:
            there = self._certificates.ensure(hostname)
        except CertificateError as error:
            log.error("%s: %s", hostname, error)
            return
        if self._issuer is None or hostname.startswith(WILDCARD):
            if not there:
                log.warning("%s: visitors are refused, %s", hostname, self._why_none(hostname))
            return
        if self._certificates.is_given(hostname):
            self._issuer.drop(hostname)
            return
        try:
            self._issuer.want(hostname, agent)
            self._take_ordered(hostname)
        except (StoreError, ValueError) as error:
            log.warning("%s: no certificate: %s", hostname, error)

    def _take_ordered(self, hostname):
        """Serve what was ordered for a hostname, if it is there; if that fails, the keeper tries
        again: the process may be short of descriptors."""
        stored = self._issuer.certificate(hostname)
        try:
            if stored is not None:
                with pem_file(self._store.pem(stored)) as file:
                    self._certificates.take(hostname, file)
        except (CertificateError, StoreError, OSError) as error:
            if hostname not in self._not_taken:
                log.error("%s: %s", hostname, error)
            self._not_taken.add(hostname)
        else:
            self._not_taken.discard(hostname)

    def _certificate_state(self, hostname) -> str:
        """How the certificate of a hostname stands, as in gotunnel.Certificate."""
        state = self._issuer and self._issuer.state(hostname)
        if state is not None:
            return str(state)
        if self._certificates.context(hostname):
            return READY
        return f"{FAILED.value}: {self._why_none(hostname)}"

    @staticmethod
    def _why_none(hostname):
        if hostname.startswith(WILDCARD):
            return f"CERT_DIR has no certificate for {hostname}, and wildcards are not ordered"
        return "there is no certificate for it"

    def _certificate_changed(self, hostname):
        """Issuer's thread: an order has come to an end, good or bad."""
        self._take_ordered(hostname)
        route = self._registry.lookup(hostname)
        if route is not None:
            route.tunnel.tell_certificate(hostname)

    def _awaits_certificate(self, hostname) -> bool:
        """Whether a hostname has no certificate yet, and will soon; in between it is ready, and
        not yet served."""
        if self._issuer is None or hostname is None or self._certificates.context(hostname):
            return False
        state = self._issuer.state(hostname)
        return state is not None and state.name != FAILED

    def _keep(self):
        """Thread: now and then, and when asked, look after what changes."""
        served, next_keep = set(), monotonic() + KEEP
        given = self._certificates.given
        while True:
            asked = self._look_now.wait(RELOAD)
            self._look_now.clear()
            if self._stopping:
                return
            try:
                self._credentials.reload(force=asked)
                self.tunnels.end_revoked()
                self._certificates.reload()
                if given != self._certificates.given:
                    given = self._certificates.given
                    self._take_up_given()
                self._renew_asked()
                for hostname in tuple(self._not_taken):
                    self._take_ordered(hostname)
                if monotonic() >= next_keep:
                    next_keep = monotonic() + KEEP
                    served = self._keep_certificates(served)
            except Exception:
                log.exception("what changes is not looked after: a defect")

    def _take_up_given(self):
        """Other names have a valid pair in CERT_DIR now: order what is missing, and tell agents."""
        routes = self._registry.routes()
        self._ensure_certificates({*self._own_names, *routes})
        for hostname, route in routes.items():
            route.tunnel.tell_certificate(hostname)

    def _renew_asked(self):
        """Order what `certificates --renew` asks for."""
        for hostname in self._store.renewals() if self._issuer else ():
            known = self._issuer.retry_now(hostname)
            log.info("%s: a new certificate was asked for%s", hostname,
                     "" if known else ", but nobody serves it now")  # fmt: skip

    def _keep_certificates(self, before):
        """Renew those of hostnames that are served now, and forget those that are not, nor were
        ``before``, at the last time. Returns what is served now."""
        now = {*self._own_names, *self._registry.routes()}
        self._ensure_certificates(now)
        if self._issuer:
            idle = self._issuer.hostnames() - now - before - self._registry.routes().keys()
            for hostname in idle:
                self._issuer.drop(hostname)
            self._ensure_certificates(idle & self._registry.routes().keys())  # it came just then
        return now

    # The ports

    def _listen(self, setting, port, connections, limit, first_timeout):
        listener = self._listener(setting, port, connections, limit, first_timeout)
        self._listeners.append(listener)
        return listener.port

    def _listener(self, setting, port, connections, limit, first_timeout):
        sockets = bind(setting, self._config.bind, port)
        name = setting.removesuffix("_PORT").lower() if setting.endswith("_PORT") else str(port)
        try:
            listener = Listener(
                name,
                sockets,
                connections.welcome,
                self._steps.submit,
                limit,
                first_timeout,
            )
        except OSError as error:  # no descriptor is left
            for sock in sockets:
                sock.close()
            raise PortError(f"{setting} {port}: {error.strerror}") from None
        connections.listener = listener
        return listener

    def _open_port(self, port, route):
        """A public port for an agent's tunnel: a running Listener. Raises PortError."""
        tcp_port = TcpPort(self._visitors, route)
        listener = self._listener("TCP_PORTS", port, tcp_port, MAX_RELAYS, 0)
        listener.start()
        return listener

    def _build_port(self, kind, requests, **rest):
        """A Port or PublicPort, with what all of them share."""
        config = self._config
        timeouts = Timeouts(config.header_timeout, config.idle_timeout, config.response_timeout)
        port = kind(requests=requests, proxies=self._proxies, timeouts=timeouts, **rest)
        self._visitor_ports.append(port)
        return port

    def _build_tunnels(self):
        config = self._config
        own = {config.gateway_host, config.tunnel_host}  # agents dial either name, or none
        self.tunnels = Tunnels(
            credentials=self._credentials,
            registry=self._registry,
            ports=self._ports,
            ensure_certificates=self._ensure_certificates,
            certificate_state=self._certificate_state,
        )
        self._newcomers = Newcomers(
            self.tunnels,
            context=self._certificates.front(config.tunnel_host, own.__contains__),
            challenges=self._challenges,
            attempts=Attempts(),
            read_policy=functools.partial(policy.read, defaults=config.policy_defaults),
            max_hosts=config.max_hosts_per_agent,
            submit=self._registrations.submit,
        )
        limit = min(AGENT_CONNECTIONS, int(descriptor_limit() * AGENTS_SHARE / 4))
        self.tunnel_port = self._listen(
            "TUNNEL_PORT", config.tunnel_port, self._newcomers, limit, REGISTER_TIMEOUT
        )

    def _build_visitors(self):
        config = self._config
        self._visitors = self._build_port(
            PublicPort,
            config.workers,
            context=self._certificates.front(config.gateway_host),
            site=choose_site(
                self._registry.lookup,
                config.gateway_host,
                lambda: self.public_port,
                self._proxies,
            ),
            redirect=choose_redirect(self._registry.lookup, config.gateway_host),
            registry=self._registry,
            raw_host=config.raw_tcp_host,
            challenges=self._challenges,
            awaits_certificate=self._awaits_certificate,
        )
        limit = min(config.max_connections, int(descriptor_limit() * VISITORS_SHARE))
        if limit < config.max_connections:
            log.warning("MAX_CONNECTIONS is %d, but of %d descriptors only %d are for visitors: "
                        "raise the limit (ulimit -n)",
                        config.max_connections, descriptor_limit(), limit)  # fmt: skip
        self.public_port = self._listen(
            "GATEWAY_PORT", config.gateway_port, self._visitors, limit,
            self._visitors.first_timeout,
        )  # fmt: skip

    def _build_dashboard(self):
        config = self._config
        self.dashboard_port = None
        if config.dashboard_port is None:
            return
        site = dashboard.choose_site(
            self.tunnels.registered, config.gateway_host, self.public_port, __version__,
            self._certificate_state,
        )
        port = self._build_port(Port, DASHBOARD_REQUESTS, site=site)
        self.dashboard_port = self._listen(
            "DASHBOARD_PORT", config.dashboard_port, port, DASHBOARD_CONNECTIONS,
            port.first_timeout,
        )  # fmt: skip

    def _build_http(self):
        """The port for plain HTTP, where a CA asks for proof and visitors are sent on."""
        config = self._config
        self.http_port = None
        if config.http_port is None:
            return
        site = choose_redirect(
            self._registry.lookup, config.gateway_host, lambda: self.public_port, self._challenges
        )
        port = self._build_port(Port, HTTP_REQUESTS, site=site)
        self.http_port = self._listen(
            "HTTP_PORT", config.http_port, port, HTTP_CONNECTIONS, port.first_timeout
        )

    # Life

    def start(self):
        config = self._config
        if self._authority:
            log.info("certificates from a local CA, for trials; clients must trust %s",
                     self._authority.ca_file.resolve())  # fmt: skip
        for listener in self._listeners:
            listener.start()
        self._keeper = spawn("keeper", self._keep)
        if self._issuer:
            self._issuer.start()
            log.info("certificates from %s", config.acme.directory)
        log.info("visitors: https://%s:%d/", config.gateway_host, self.public_port)
        log.info("agents: tunnel_addr %s:%d", config.tunnel_host, self.tunnel_port)
        if self.dashboard_port is not None:
            log.info("dashboard: http://%s:%d/", config.gateway_host, self.dashboard_port)
        if self.http_port is not None:
            log.info("plain HTTP: port %d", self.http_port)
        log.info("gotunnel %s is ready", __version__)

    def reload(self):
        """Look now at what may have changed. Any thread; waits for nothing."""
        self._look_now.set()

    def stop(self):
        """No new work; what runs may finish, DRAIN_TIMEOUT at most; then close."""
        self._stopping = True
        self._look_now.set()
        if self._issuer:
            self._issuer.stop()
        self._visitors.start_draining()
        self._ports.close()
        for listener in self._listeners:
            listener.stop()
        left = self._visitors.drain(self._config.drain_timeout)
        if left:
            log.warning("%d visits did not end in %g s and were cut",
                        left, self._config.drain_timeout)  # fmt: skip
        for port in self._visitor_ports:
            port.drain(0)
        self._newcomers.close()  # before the tunnels: one may become the other meanwhile
        self.tunnels.close()
        self._steps.shutdown()
        self._registrations.shutdown()  # after the steps, which give it work
        for port in self._visitor_ports:
            port.stop()
        self._keeper.join(LAST_LOOK)
        log.info("stopped")

    def _close_listeners(self):
        for listener in self._listeners:
            listener.stop()
