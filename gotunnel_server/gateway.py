"""Composes the gateway: builds all parts, starts and stops them in order, decides nothing.

A port's listener accepts a connection. Then either the listener watches it, or one thread has it
(steps.py, newcomer.py). An agent's demultiplexer reads for all of its streams (gotunnel.py).
docs/architecture.md has a table of all threads.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from gotunnel import __version__
from gotunnel_agent.common.free_memory import FreeMemory
from gotunnel_agent.common.process import Workers, free_buffers

from . import capacity, membership, metrics
from .agents.attempts import Attempts
from .agents.credentials import Credentials
from .agents.newcomer import REGISTER_TIMEOUT, Newcomers
from .agents.ports import Ports
from .agents.tunnel import Tunnels
from .certification import build_certification
from .certs.challenges import HTTP_01, TLS_ALPN_01, Challenges
from .config import Config
from .facts import facts
from .handover import Estate
from .listeners import Listeners
from .net.inherited import NOTHING, Inherited
from .net.round_robin import FairWorkers
from .recording import Recording
from .routes import Registry
from .served import ServedFile
from .several import opener, tells_facts, together_of
from .showing import Showing
from .visitors import sites
from .visitors.forwarded import Proxies
from .visitors.port import HealthPort, Port, PublicPort, TcpPort, change_ports, drain
from .visitors.room import Room, Timeouts
from .visitors.visits import Subscriber
from .visitors.waiting import WaitingRoom
from .watcher import Watcher, Watchers

log = logging.getLogger("gotunnel.gateway")

# Seconds between checks of files. A changed one may be half written: it is read at the next check.
RELOAD = 2
LAST_JOBS = 2  # seconds for which stop() waits for a pool's jobs, or a watcher's check


class Gateway:
    """A gateway: start(), then stop(). If __init__ raises, it leaves no socket or file open."""

    shown_port: int  # that visitors type

    def __init__(
        self, config: Config, subscribers: Sequence[Subscriber] = (),
        inherited: Inherited = NOTHING, child: Any = None,
    ):  # fmt: skip
        """``subscribers`` get records of visits, ``inherited`` are listening sockets; ``child``:
        see several.py. Raises CertificateError, AgentsFileError, PortError, LogFileError."""
        self.drain_timeout = config.drain_timeout
        self._timeouts = Timeouts(*config.timeouts)
        self.own_names = tuple(dict.fromkeys((config.gateway_host, config.tunnel_host)))
        self._registry = Registry(reserved=self.own_names)
        self.cluster = membership.join(config, self._registry, child)
        self._served = ServedFile(config.acme_cache, self._registry)
        self._challenges = Challenges(
            (HTTP_01, TLS_ALPN_01) if config.http_port is not None else (TLS_ALPN_01,),
            config.acme_cache,
        )
        self._credentials = Credentials(*config.credentials)
        self._certificates, self.keeper, ca_file = build_certification(
            config, self.own_names, self._registry, self._challenges, self.cluster.certificates
        )
        self._proxies, self._templates = Proxies(config.trusted_proxies), config.templates
        self._waiting = WaitingRoom(self._registry, self._proxies, config.agent_timeout)
        self._ports = Ports(
            config.tcp_ports, opener(child, self._open_port), capacity.ports(),
            self._credentials.named_ports)  # fmt: skip
        self._steps = FairWorkers(capacity.STEP_THREADS, "step")
        self._registrations = Workers(capacity.REGISTRATION_THREADS, "registration")
        self._visitor_ports: list[Port] = []
        self._ready = threading.Event()  # the ports are open, and no drain has begun
        self.listeners = Listeners(config.bind, self._steps, inherited)
        self._showing = Showing(config, self, self._proxies, together_of(child))
        readers = (*subscribers, *self._showing.subscribers)
        self.recording = Recording(config, self._proxies, self._registry.lookup, readers)
        try:
            self._build_tunnels(config)
            self._build_visitors(config)
            self._build_http(config)
            self._showing.guard(self._visitor_ports)
            self._build_pages(config)
        except BaseException:
            for part in (self.listeners, self.recording, self.cluster):
                part.stop()
            raise
        self._watchers = Watchers(
            Watcher("keeper", lambda asked: self.keeper.look(), RELOAD),
            Watcher("credentials", self._look_at_credentials, RELOAD),
            Watcher("memory", FreeMemory(self.listeners.taken, free_buffers).look, RELOAD),
        )
        self._facts = tuple(facts(config, self, ca_file)) if tells_facts(child) else ()

    # Agents

    def _build_tunnels(self, config):
        self.tunnels = Tunnels(
            credentials=self._credentials,
            registry=self._registry,
            claims=self.cluster.claims,
            ports=self._ports,
            ensure_certificates=self.keeper.want,
            certificate_state=self.keeper.state,
            submit=self._registrations.submit,
        )
        self._newcomers = Newcomers(
            self.tunnels,
            # Agents send GATEWAY_HOST or TUNNEL_HOST as SNI, or no SNI.
            context=self._certificates.fronts(
                config.tunnel_host, self.own_names.__contains__
            ).context,
            challenges=self._challenges,
            attempts=Attempts(),
            proxies=self._proxies,
            terms=config.terms,
            submit=self._registrations.submit,
            stall_timeout=config.stall_timeout,
        )
        self.tunnel_port = self.listeners.add(
            "TUNNEL_PORT", config.tunnel_port, self._newcomers,
            capacity.agents(self._proxies), REGISTER_TIMEOUT,
        )  # fmt: skip

    def _look_at_credentials(self, asked):
        self._credentials.reload(force=asked)
        self.tunnels.end_revoked()
        self._served.write()

    # Visitors

    def _build_visitors(self, config):
        self._site = sites.choose_site(
            self._registry.lookup, config.gateway_host, lambda: self.shown_port, self._proxies,
            self._showing.at_gateway,
        )  # fmt: skip
        redirect = sites.choose_redirect(
            self._registry.lookup, config.gateway_host, proxies=self._proxies, secured=self._site
        )
        self._visitors = self._build_port(
            PublicPort,
            Room(config.workers, self._proxies, http2=config.http2),
            context=self._certificates.fronts(config.gateway_host).context,
            site=self._site,
            waiting=self._waiting,
            redirect=redirect,
            registry=self._registry,
            raw_host=config.raw_tcp_host,
            challenges=self._challenges,
            awaits_certificate=self.keeper.pending,
        )
        # Visitors of TCP_PORTS, and those that a proxy brings to HTTP_PORT, take these places, too.
        self._visitor_places = capacity.visitors(config.max_connections, self._proxies)
        self.public_port = self.listeners.add(
            "GATEWAY_PORT", config.gateway_port, self._visitors, self._visitor_places,
            self._visitors.first_timeout,
        )  # fmt: skip
        self.shown_port = self.tunnels.visitors_port = config.public_port or self.public_port

    def _build_pages(self, config):
        self.dashboard_port = self._add_page(
            "DASHBOARD_PORT", config.dashboard_port, config.dashboard_bind, self._showing.at_port
        )
        self.metrics_port = None
        if config.metrics_port is None:
            return
        parts = metrics.Parts(
            self.recording, self.tunnels, self.own_names, self.keeper.state, self.listeners,
            self._steps, self._visitors, self._newcomers, self._ready.is_set, self.cluster,
        )  # fmt: skip
        site = metrics.build_site(parts, config.metrics_bind, self._showing.together)
        self.metrics_port = self._add_page(
            metrics.SETTING, config.metrics_port, config.metrics_bind, site, HealthPort
        )

    def _add_page(self, setting, number, addresses, site, kind=Port):
        if number is None:
            return None
        port = self._build_port(kind, Room(capacity.PAGE_REQUESTS, self._proxies), site=site)
        places = capacity.plain(capacity.PAGE_CONNECTIONS, self._proxies)
        return self.listeners.add(setting, number, port, places, port.first_timeout, addresses)

    def _build_http(self, config):
        """The port for plain HTTP: answers HTTP-01 validations, redirects visitors to https."""
        self.http_port = None
        if config.http_port is None:
            return
        site = sites.choose_redirect(
            self._registry.lookup, config.gateway_host, lambda: self.shown_port, self._challenges,
            proxies=self._proxies, secured=self._site,
        )  # fmt: skip
        if config.trusted_proxies:  # a proxy that terminates TLS may bring all visitors here
            room, places = self._visitors.room, self._visitor_places
        else:
            room = Room(capacity.HTTP_REQUESTS, self._proxies)
            places = capacity.plain(capacity.HTTP_CONNECTIONS, self._proxies)
        port = self._build_port(Port, room, site=site, waiting=self._waiting)
        self.http_port = self.listeners.add(
            "HTTP_PORT", config.http_port, port, places, port.first_timeout
        )

    def _build_port(self, kind, room, **rest):
        """A Port or PublicPort."""
        shared = {"proxies": self._proxies, "timeouts": self._timeouts,
                  "visits": self.recording.visits, "templates": self._templates}  # fmt: skip
        self._visitor_ports.append(kind(room=room, **shared | rest))
        return self._visitor_ports[-1]

    def _open_port(self, port, route):
        """Open a public port for an agent's tunnel. Raises PortError."""
        tcp_port = TcpPort(self._visitors, route)
        self.listeners.open("TCP_PORTS", port, tcp_port, self._visitor_places, 0).start()
        return tcp_port

    # Life

    def start(self, before_orders: Callable[[], object] = lambda: None) -> None:
        """Serve; call ``before_orders()`` before certificates are ordered. Raises PortError,
        NoThread, and whatever ``before_orders()`` raises."""
        self.recording.start()
        for port in self._visitor_ports:
            port.exchanges.prepare()
        self._steps.prepare()
        self._registrations.prepare()
        self.cluster.start(self.tunnel_port, self._newcomers, self.listeners, self._showing.blocks)
        self._watchers.prepare()
        self.keeper.prepare()  # all threads that it needs are there before it says that it serves
        self.listeners.start()
        before_orders()
        self._watchers.start()
        self.keeper.start()
        self._ready.set()
        for fact in (*self._facts, f"gotunnel {__version__} is ready"):
            log.info("%s", fact)

    def reload(self) -> None:
        """Read now what may have changed. Any thread; waits for nothing."""
        self._watchers.ask()
        self.recording.reopen()

    def change(self, config: Config) -> None:
        """Take over what can change: see reloading.py. Any thread."""
        self.drain_timeout = config.drain_timeout
        change_ports(self._visitor_ports, *config.timeouts[1:], config.templates)
        self._newcomers.terms = config.terms
        self._showing.change(config)
        self._credentials.change_shared(config.jwt_secret, config.jwt_secret_old, config.jwt_issuer)

    def estate(self) -> Estate:
        """The state that a successor gets in a hand-over, beside the sockets. Any thread."""
        modes, ports = self._registry.modes(), self._ports.hostnames()
        return Estate(modes, ports, self._challenges.published(), len(self.tunnels.shown()))

    def inherit(self, estate: Estate) -> None:
        """Before start(): take over a predecessor's state. Raises NoThread."""
        capacity.try_threads(estate.sessions)
        self._registry.expect(estate.modes)
        self._ports.remember(estate.ports)
        self._challenges.adopt(estate.proofs)

    def stop_accepting(self, but: str = "") -> None:
        """Take no new connections, except at the port ``but``; those that are here go on."""
        self._ready.clear()
        self.cluster.drain()
        self._showing.drain()
        for port in self._visitor_ports:
            port.start_draining()
        self._ports.close()
        self._newcomers.listener.stop()  # an agent that is not registered yet dials again
        self.listeners.stop_accepting(but)

    def stop(self) -> None:
        """Take no new work, let visits end within DRAIN_TIMEOUT, then close everything."""
        self._served.write()  # while the agents are here
        self.stop_accepting(but=metrics.SETTING)  # there, /readyz answers 503 until the end
        self.tunnels.move()
        self._watchers.stop()
        self.keeper.stop()
        drain((*self._visitor_ports, *self.cluster.ports), self.drain_timeout, self.listeners.stop)
        self._newcomers.close()  # before the tunnels, as newcomers may become tunnels meanwhile
        self.tunnels.close()
        self.cluster.stop()
        self._steps.shutdown(LAST_JOBS)
        self._registrations.shutdown(LAST_JOBS)  # after the steps, which submit jobs to it
        for port in self._visitor_ports:
            port.stop(LAST_JOBS)
        self._watchers.join(LAST_JOBS)
        self.recording.stop()
        log.info("stopped")
