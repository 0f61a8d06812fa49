"""The gateway: builds its parts, starts and stops them in order. The only file that knows all.

    thread                  how many                     ends when
    main                    1 (cli.py)                   a signal comes; it stops the gateway
    listener PORT           1 a port, also of agents     stop(), by a wake-up byte
    step                    at most STEP_THREADS         the step is done; it waits for nobody
    exchange                at most WORKERS              the request is answered
    upload                  at most 1 an exchange        the request's body has come, or is given up
    relay, relay back       2 a tcp visit or WebSocket   both ends are done
    demux ADDRESS           1 a registered agent         the session ends

A connection is accepted by its port's listener, and is either watched by it or in the hands of one
thread (visitor.py, tunnel.py). A registered agent has a demultiplexer, which reads for all of its
streams (gotunnel.py).
"""

import logging

from gotunnel import Workers, __version__, descriptor_limit

from . import dashboard
from .authority import Authority, CertificateError
from .certificates import Certificates
from .credentials import Credentials
from .forwarding import Proxies
from .listener import Listener, PortError, bind
from .ports import Ports
from .registry import Registry
from .tunnel import REGISTER_TIMEOUT, Tunnels
from .visitor import MAX_RELAYS, SILENCE, Exchanges, PortDoor, Visitors, choose_site

log = logging.getLogger("gotunnel.gateway")

# A visitor that names protocols of its own may want one of them back: HTTP's, and PostgreSQL's
# clients, which else refuse direct TLS.
ALPN = ("http/1.1", "postgresql")
STEP_THREADS = 32  # for handshakes and heads: short work, of which little waits
DASHBOARD_REQUESTS = 4  # answered at a time
DASHBOARD_CONNECTIONS = 100  # at a time: it is a page for a few people
AGENT_CONNECTIONS = 4096  # at a time, strangers included; registered ones take a thread each
# Parts of the descriptors that the process may have. A visitor takes one, an agent four; what is
# left is for files, listening sockets and the dashboard.
VISITORS_SHARE, AGENTS_SHARE = 1 / 2, 1 / 3


class Gateway:
    """start(), then stop(). A gateway that could not start has left nothing open."""

    def __init__(self, config):
        """``config``: the frozen Config of config.load(). Raises CertificateError, PortError."""
        self._config = config
        self._authority = Authority(config.acme_cache / "local") if config.local_ca else None
        self._certificates = Certificates(config.cert_dir, self._authority, alpn=ALPN)
        self._ensure_own_certificates()
        self._registry = Registry(reserved={config.gateway_host, config.tunnel_host})
        self._proxies = Proxies(config.trusted_proxies)
        self._ports = Ports(config.tcp_ports, self._open_port)
        self._steps = Workers(STEP_THREADS, "step")
        self._pools = []
        self._listeners = []
        try:
            self._build_tunnels()
            self._build_visitors()
            self._build_dashboard()
        except BaseException:
            self._close_listeners()
            raise

    def _ensure_own_certificates(self):
        config = self._config
        for name in dict.fromkeys((config.gateway_host, config.tunnel_host)):
            if not self._certificates.ensure(name):
                raise CertificateError(
                    f"CERT_DIR {config.cert_dir}: no certificate for {name}, expected one in a "
                    "pair x.crt and x.key; add it, or set ACME_ENV=local to try things out"
                )
        # Those that an earlier gateway has left: until its agent is back, a hostname shows a page
        # that says so, and no TLS error.
        for name in self._authority.hostnames() if self._authority else ():
            self._ensure_certificate(name)

    def _ensure_certificate(self, hostname) -> bool:
        try:
            self._certificates.reload()
            return self._certificates.ensure(hostname)
        except CertificateError as error:
            log.error("%s: %s", hostname, error)
            return False

    # The ports

    def _listen(self, setting, port, connections, limit, first_timeout):
        listener = self._listener(setting, port, connections, limit, first_timeout)
        self._listeners.append(listener)
        return listener.port

    def _listener(self, setting, port, connections, limit, first_timeout):
        sockets = bind(setting, self._config.bind, port)
        try:
            listener = Listener(
                setting.removesuffix("_PORT").lower(),
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
        door = PortDoor(self._visitors, route)
        listener = self._listener("TCP_PORTS", port, door, MAX_RELAYS, 0)
        listener.start()
        return listener

    def _exchanges(self, most):
        exchanges = Exchanges(most, self._proxies)
        self._pools.append(exchanges)
        return exchanges

    def _build_tunnels(self):
        config = self._config
        own = {config.gateway_host, config.tunnel_host}  # agents dial either name, or none
        self.tunnels = Tunnels(
            context=self._certificates.front(config.tunnel_host, own.__contains__),
            credentials=Credentials(config.jwt_secret, config.jwt_issuer),
            registry=self._registry,
            ports=self._ports,
            ensure_certificate=self._ensure_certificate,
            max_hosts=config.max_hosts_per_agent,
        )
        limit = min(AGENT_CONNECTIONS, int(descriptor_limit() * AGENTS_SHARE / 4))
        self.tunnel_port = self._listen(
            "TUNNEL_PORT", config.tunnel_port, self.tunnels, limit, REGISTER_TIMEOUT
        )

    def _build_visitors(self):
        config = self._config
        self._visitors = Visitors(
            context=self._certificates.front(config.gateway_host),
            site=choose_site(
                self._registry.lookup, config.gateway_host, lambda: self.public_port
            ),
            registry=self._registry,
            exchanges=self._exchanges(config.workers),
            proxies=self._proxies,
            config=config,
        )
        limit = min(config.max_connections, int(descriptor_limit() * VISITORS_SHARE))
        if limit < config.max_connections:
            log.warning("MAX_CONNECTIONS is %d, but of %d descriptors only %d are for visitors: "
                        "raise the limit (ulimit -n)",
                        config.max_connections, descriptor_limit(), limit)  # fmt: skip
        first_timeout = SILENCE if config.raw_tcp_host else config.header_timeout
        self.public_port = self._listen(
            "GATEWAY_PORT", config.gateway_port, self._visitors, limit, first_timeout
        )

    def _build_dashboard(self):
        config = self._config
        self.dashboard_port = self._readers = None
        if config.dashboard_port is None:
            return
        site = dashboard.choose_site(
            self.tunnels.registered, config.gateway_host, self.public_port, __version__
        )
        self._readers = Visitors(
            context=None,
            site=site,
            registry=self._registry,
            exchanges=self._exchanges(DASHBOARD_REQUESTS),
            proxies=self._proxies,
            config=config,
        )
        self.dashboard_port = self._listen(
            "DASHBOARD_PORT", config.dashboard_port, self._readers,
            DASHBOARD_CONNECTIONS, config.header_timeout,
        )  # fmt: skip

    # Life

    def start(self):
        config = self._config
        if self._authority:
            log.info("certificates from a local CA, for trials; clients must trust %s",
                     self._authority.ca_file.resolve())  # fmt: skip
        for listener in self._listeners:
            listener.start()
        log.info("visitors: https://%s:%d/", config.gateway_host, self.public_port)
        log.info("agents: tunnel_addr %s:%d", config.tunnel_host, self.tunnel_port)
        if self.dashboard_port is not None:
            log.info("dashboard: http://%s:%d/", config.gateway_host, self.dashboard_port)
        log.info("gotunnel %s is ready", __version__)

    def stop(self):
        """No new work; what runs may finish, DRAIN_TIMEOUT at most; then close."""
        self._visitors.draining = True
        self._ports.close()
        for listener in self._listeners:
            listener.stop()
        left = self._visitors.drain(self._config.drain_timeout)
        if left:
            log.warning("%d visits did not end in %g s and were cut",
                        left, self._config.drain_timeout)  # fmt: skip
        if self._readers is not None:
            self._readers.drain(0)
        self.tunnels.close()
        self._steps.shutdown()
        for exchanges in self._pools:
            exchanges.stop()
        log.info("stopped")

    def _close_listeners(self):
        for listener in self._listeners:
            listener.stop()
