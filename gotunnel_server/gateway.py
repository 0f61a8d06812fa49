"""The gateway: builds its parts, starts and stops them in order. The only file that knows all.

    thread                  how many                     ends when
    main                    1 (cli.py)                   a signal comes; it stops the gateway
    standard error          1 (standard_error.py)        the process ends; it writes the log
    listener PORT           1 a port, also of agents     stop(), by a wake-up byte
    step                    at most STEP_THREADS         the step is done; addresses take turns
    registration            at most REGISTRATION_THREADS the agent has its ack
    exchange                at most WORKERS, and 68 [1]  the request is answered
    upload                  at most 1 an exchange        the request's body has come, or is given up
    relay, relay back       2 a tcp visit or WebSocket   both ends are done
    demux ADDRESS           1 a registered agent         the session ends
    keeper, credentials     1 each                       stop(); they look at what changes
    issuer, order, window,
    timer of a request      see issuer.py                stop()

    [1] HTTP_REQUESTS (none with TRUSTED_PROXIES) and DASHBOARD_REQUESTS

A connection is accepted by its port's listener, and is either watched by it or in the hands of one
thread (steps.py, newcomer.py). A registered agent has a demultiplexer, which reads for all of
its streams (gotunnel.py).
"""

import functools
import ipaddress
import logging
import os
from time import monotonic

from gotunnel import __version__
from gotunnel_agent.common import addresses
from gotunnel_agent.common.process import Workers

from .agents.attempts import Attempts
from .agents.credentials import Credentials
from .agents.newcomer import REGISTER_TIMEOUT, Newcomers
from .agents.ports import Ports
from .agents.tunnel import Tunnels
from .certs import ordering
from .certs.challenges import HTTP_01, TLS_ALPN_01, Challenges
from .certs.contexts import Certificates
from .certs.keeper import Keeper
from .certs.local_ca import FOLDER as LOCAL_FOLDER
from .certs.local_ca import Authority
from .certs.turns import UNLIMITED
from .listeners import Listeners
from .net.client_hello import ALWAYS_TAKEN
from .net.dns import is_always_here
from .net.listener import descriptor_limit
from .net.round_robin import FairWorkers
from .net.shares import Places
from .routes import Registry
from .visitors import dashboard, policy
from .visitors.forwarded import Proxies
from .visitors.port import Port, PublicPort, Room, TcpPort, Timeouts
from .visitors.sites import choose_redirect, choose_site
from .watcher import Watcher

log = logging.getLogger("gotunnel.gateway")

# For handshakes and heads: short work, of which nothing waits for a peer while others wait. No more
# than there are CPUs: further ones keep the listeners from running when an address floods a port
# with ClientHellos. On two CPUs, beside five such addresses, a visit took 14 ms with 2 threads,
# 100 ms and more with 4, and 12 s with 32 (median).
STEP_THREADS = min(max(os.cpu_count() or 1, 2), 32)
# For agents whose registration is granted: looking at CERT_DIR and the store, making local
# certificates. A pool of its own, since a disk that hangs must not stop visitors' handshakes. A few
# threads are enough to keep a disk busy; the queue is bounded by AGENT_CONNECTIONS.
REGISTRATION_THREADS = 8
DASHBOARD_REQUESTS = 4  # answered at a time
DASHBOARD_CONNECTIONS = 100  # at a time: it is a page for a few people
# On the port for plain HTTP, unless there are TRUSTED_PROXIES, whose visitors count as all do.
HTTP_REQUESTS, HTTP_CONNECTIONS = 64, 1000
AGENT_CONNECTIONS = 4096  # at a time, strangers included; registered ones take a thread each
# Parts of the descriptors that the process may have. A visitor takes one, an agent four; what is
# left is for files, the gateway's own ports and the connections that they take themselves.
VISITORS_SHARE, AGENTS_SHARE = 1 / 2, 1 / 3
PORTS_SHARE = 1 / 16  # for the ports of agents (TCP_PORTS), whose visitors count as all visitors do
PORT_DESCRIPTORS = 5  # of one such port: two sockets, a selector, and a waker's two
PLAIN_SHARE = 1 / 24  # each for HTTP_PORT's connections and the dashboard's
# Seconds between looks at CERT_DIR and AGENTS_FILE. A change counts after two of them: within 5 s.
RELOAD = 2
LAST_JOBS = 2  # seconds for jobs in the pools when the gateway stops: connections are closed
LAST_LOOK = 2  # seconds for the look that is under way when we stop: a disk may hang


class Gateway:
    """start(), then stop(). A gateway that could not start has left nothing open."""

    def __init__(self, config):
        """``config``: the frozen Config of config.load(); its values are handed on, and it is not
        kept. Raises CertificateError, AgentsFileError, PortError."""
        self._drain_timeout = config.drain_timeout
        self._timeouts = Timeouts(
            config.header_timeout, config.idle_timeout, config.response_timeout,
            config.stall_timeout,
        )
        self._own_names = tuple(dict.fromkeys((config.gateway_host, config.tunnel_host)))
        self._registry = Registry(reserved=self._own_names)
        self._challenges = Challenges(
            (HTTP_01, TLS_ALPN_01) if config.http_port is not None else (TLS_ALPN_01,),
            config.acme_cache,
        )
        self._credentials = Credentials(config.jwt_secret, config.jwt_issuer, config.agents_file)
        self._build_keeper(config)
        self._proxies = Proxies(config.trusted_proxies)
        most = int(descriptor_limit() * PORTS_SHARE / PORT_DESCRIPTORS)
        self._ports = Ports(
            config.tcp_ports, self._open_port, most, self._credentials.named_ports
        )
        self._steps = FairWorkers(STEP_THREADS, "step")
        self._registrations = Workers(REGISTRATION_THREADS, "registration")
        self._visitor_ports = []
        self._listeners = Listeners(config.bind, self._steps)
        try:
            self._build_tunnels(config)
            self._build_visitors(config)
            self._build_dashboard(config)
            self._build_http(config)
        except BaseException:
            self._listeners.stop()
            raise
        self._watchers = (
            Watcher("keeper", lambda asked: self._keeper.look(), RELOAD),
            Watcher("credentials", self._look_at_credentials, RELOAD),
        )
        self._facts = tuple(self._tell_facts(config))

    # Certificates

    def _build_keeper(self, config):
        authority = Authority(config.acme_cache / LOCAL_FOLDER) if config.local_ca else None
        self._ca_file = authority and authority.ca_file
        self._certificates = Certificates(config.cert_dir, authority, alpn=ALWAYS_TAKEN)
        self._keeper = Keeper(
            self._certificates,
            own_names=self._own_names,
            served=self._registry.routes,
            owner=self._owner,
            on_change=self._tell_certificate,
            earlier=authority.hostnames() if authority else (),
            ordering=config.acme
            and ordering.set_up(config.acme, config.acme_cache, self._challenges),
        )

    def _owner(self, hostname):
        """Whose orders those for a hostname are: its agent's, and that one's limits."""
        route = self._registry.lookup(hostname)
        if route is None:
            return None, UNLIMITED
        return route.tunnel.agent.blame, route.tunnel.identity.limits

    def _tell_certificate(self, hostname):
        """Let the agent that serves a hostname know how its certificate stands now. Any thread."""
        route = self._registry.lookup(hostname)
        if route is not None:
            route.tunnel.tell_certificate(hostname)

    # Agents

    def _build_tunnels(self, config):
        self.tunnels = Tunnels(
            credentials=self._credentials,
            registry=self._registry,
            ports=self._ports,
            ensure_certificates=self._keeper.want,
            certificate_state=self._keeper.state,
            submit=self._registrations.submit,
        )
        self._newcomers = Newcomers(
            self.tunnels,
            # Agents dial either name, or none.
            context=self._certificates.fronts(
                config.tunnel_host, self._own_names.__contains__
            ).context,
            challenges=self._challenges,
            attempts=Attempts(),
            proxies=self._proxies,
            read_policy=functools.partial(policy.read, defaults=config.policy_defaults),
            max_hosts=config.max_hosts_per_agent,
            submit=self._registrations.submit,
            stall_timeout=config.stall_timeout,
        )
        limit = min(AGENT_CONNECTIONS, int(descriptor_limit() * AGENTS_SHARE / 4))
        self.tunnel_port = self._listeners.add(
            "TUNNEL_PORT", config.tunnel_port, self._newcomers,
            # Many agents may have one address, and a registered one is bound by its credential.
            Places(limit, self._proxies, parts=0),
            REGISTER_TIMEOUT,
        )  # fmt: skip

    def _look_at_credentials(self, asked):
        self._credentials.reload(force=asked)
        self.tunnels.end_revoked()

    # Visitors

    def _build_visitors(self, config):
        self._site = choose_site(
            self._registry.lookup, config.gateway_host, lambda: self.public_port, self._proxies
        )
        self._visitors = self._build_port(
            PublicPort,
            Room(config.workers, self._proxies),
            context=self._certificates.fronts(config.gateway_host).context,
            site=self._site,
            redirect=choose_redirect(
                self._registry.lookup, config.gateway_host,
                proxies=self._proxies, secured=self._site,
            ),
            registry=self._registry,
            raw_host=config.raw_tcp_host,
            challenges=self._challenges,
            awaits_certificate=self._keeper.pending,
        )
        limit = min(config.max_connections, int(descriptor_limit() * VISITORS_SHARE))
        if limit < config.max_connections:
            log.warning("MAX_CONNECTIONS is %d, but of %d descriptors only %d are for visitors: "
                        "raise the limit (ulimit -n)",
                        config.max_connections, descriptor_limit(), limit)  # fmt: skip
        # Those of TCP_PORTS take from it, too, and those that a proxy brings to HTTP_PORT.
        self._visitor_places = Places(limit, self._proxies)
        self.public_port = self._listeners.add(
            "GATEWAY_PORT", config.gateway_port, self._visitors, self._visitor_places,
            self._visitors.first_timeout,
        )  # fmt: skip

    def _build_dashboard(self, config):
        self.dashboard_port = None
        if config.dashboard_port is None:
            return
        site = dashboard.build_site(
            self.tunnels.registered, config.gateway_host, self.public_port, __version__,
            self._keeper.state, self._proxies, config.dashboard_password,
        )  # fmt: skip
        port = self._build_port(Port, Room(DASHBOARD_REQUESTS, self._proxies), site=site)
        self.dashboard_port = self._listeners.add(
            "DASHBOARD_PORT", config.dashboard_port, port,
            self._plain_places(DASHBOARD_CONNECTIONS), port.first_timeout,
            config.dashboard_bind,
        )  # fmt: skip

    def _build_http(self, config):
        """The port for plain HTTP, where a CA asks for proof and visitors are sent on."""
        self.http_port = None
        if config.http_port is None:
            return
        site = choose_redirect(
            self._registry.lookup, config.gateway_host, lambda: self.public_port, self._challenges,
            proxies=self._proxies, secured=self._site,
        )  # fmt: skip
        if config.trusted_proxies:  # one that has ended TLS may bring all visitors here
            room, places = self._visitors.room, self._visitor_places
        else:
            room = Room(HTTP_REQUESTS, self._proxies)
            places = self._plain_places(HTTP_CONNECTIONS)
        port = self._build_port(Port, room, site=site)
        self.http_port = self._listeners.add(
            "HTTP_PORT", config.http_port, port, places, port.first_timeout
        )

    def _plain_places(self, most):
        return Places(min(most, int(descriptor_limit() * PLAIN_SHARE)), self._proxies)

    def _build_port(self, kind, room, **rest):
        """A Port or PublicPort, with what all of them share."""
        port = kind(room=room, proxies=self._proxies, timeouts=self._timeouts, **rest)
        self._visitor_ports.append(port)
        return port

    def _open_port(self, port, route):
        """A public port for an agent's tunnel: a TcpPort that is open. Raises PortError."""
        tcp_port = TcpPort(self._visitors, route)
        self._listeners.open("TCP_PORTS", port, tcp_port, self._visitor_places, 0).start()
        return tcp_port

    # Life

    def start(self):
        if self._ca_file:
            log.info("certificates from a local CA, for trials; clients must trust %s",
                     self._ca_file.resolve())  # fmt: skip
        self._listeners.start()
        for watcher in self._watchers:
            watcher.start()
        self._keeper.start()
        for fact in self._facts:
            log.info("%s", fact)
        log.info("gotunnel %s is ready", __version__)

    def _tell_facts(self, config):
        """Lines for the log at start."""
        if config.acme:
            yield f"certificates from {config.acme.directory}"
        yield f"visitors: https://{config.gateway_host}:{self.public_port}/"
        yield f"agents: tunnel_addr {config.tunnel_host}:{self.tunnel_port}"
        if self.dashboard_port is not None:
            yield f"dashboard: {self._dashboard_urls(config)}"
        if self.http_port is not None:
            yield f"plain HTTP: port {self.http_port}"

    def _dashboard_urls(self, config):
        """Where the dashboard can be opened."""
        hosts = [addresses.as_host(address) for address in config.dashboard_bind]
        urls = [f"http://{host}:{self.dashboard_port}/" for host in hosts]
        by_name = f"http://{config.gateway_host}:{self.dashboard_port}/"
        found = map(ipaddress.ip_address, config.dashboard_bind)
        if not urls or any(address.is_unspecified for address in found):
            return by_name
        if config.dashboard_bind != config.bind:  # the name may lead elsewhere
            return " ".join(urls)
        # The name leads there, unless a proxy in front is what it names.
        return by_name if is_always_here(config.gateway_host) else " ".join((by_name, *urls))

    def reload(self):
        """Look now at what may have changed. Any thread; waits for nothing."""
        for watcher in self._watchers:
            watcher.ask()

    def stop(self):
        """No new work; what runs may finish, DRAIN_TIMEOUT at most; then close."""
        for watcher in self._watchers:
            watcher.stop()
        self._keeper.stop()
        for port in self._visitor_ports:
            port.start_draining()
        self._ports.close()
        self._listeners.stop()
        until = monotonic() + self._drain_timeout
        left = sum(port.drain(max(0, until - monotonic())) for port in self._visitor_ports)
        if left:
            log.warning("%d visits did not end in %g s and were cut", left, self._drain_timeout)
        self._newcomers.close()  # before the tunnels: one may become the other meanwhile
        self.tunnels.close()
        self._steps.shutdown(LAST_JOBS)
        self._registrations.shutdown(LAST_JOBS)  # after the steps, which give it work
        for port in self._visitor_ports:
            port.stop(LAST_JOBS)
        for watcher in self._watchers:
            watcher.join(LAST_LOOK)
        log.info("stopped")
