"""The agent's life: dial, register, serve until dropped, back off, again.

Threads, besides the session's demultiplexer (see gotunnel.py):

    thread     how many              does                                   ends when
    agent      1                     the life above                         stop()
    control    1 a session           answers pings                          the session ends
    accept     1 a session           hands each new data stream a worker    the session ends
    stream_N   at most MAX_STREAMS   one data stream: target.serve()        the stream ends
    ... answer 1 a visit, http mode  copies the target's answer             the stream ends
    ... back   1 a visit, tcp mode   copies what the target sends           both directions are done

and two of the process: main, which waits for signals (cli.py), and standard error, which writes the
log until the process ends (common/standard_error.py).
All are daemons: none keeps a process alive that has stopped.

There is one session, unless the gateway asks for another one (GO_AWAY, or End with MOVE): then the
agent dials anew. The old session serves on until the new one does, and ends with its visits.
"""

import contextlib
import logging
import math
import random
import secrets
import ssl
import threading
import warnings
from time import monotonic, time

import jwt

from gotunnel import (
    CERTIFICATES,
    HALF_CLOSE,
    LATER_PORTS,
    MAX_STREAMS,
    MOVE,
    PORTS,
    REASONS,
    REFUSALS,
    REPLACED,
    SPEAKS_HTTP,
    START_WINDOW,
    UPGRADES,
    Ack,
    Certificate,
    Deadline,
    End,
    MessageReader,
    Ping,
    Pong,
    Port,
    ProtocolError,
    Register,
    Session,
    SessionClosed,
    Waker,
    encode_message,
    spawn,
)

from .common.duplex import Duplex, Observer
from .common.hostnames import normal_hostname
from .common.one_line import on_one_line, words_and_link
from .common.process import Stopped, Workers
from .common.tls import AEAD
from .connect import GivenUp, addresses_of, connect
from .target import Route, Targets, serve
from .trust import NO_TLS, client_context

log = logging.getLogger("gotunnel.agent")

DIAL_TIMEOUT = 10  # seconds, for the connection and again for the TLS handshake
ACK_TIMEOUT = 30  # seconds; a gateway may have to make certificates before it says yes
SILENCE_TIMEOUT = 40  # seconds without a ping, which comes every 15: the line is dead
# Seconds that running visits have when the agent is told to stop, and that threads have afterwards.
# Together with standard_error.LAST_LINES less than the ten that Docker and others grant: a process
# that they kill has not said how its visits ended.
DRAIN_TIMEOUT = 5
LAST_WORDS = 3

FIRST_DELAY = 0.5  # seconds before the first retry; doubled with each one that fails
MAX_DELAY = 30  # seconds; a gateway that is back must not wait long for its agents
RESTART_DELAY = 3  # ... if the gateway's machine refused the connection: it is there, and restarts
REFUSED_DELAY = 15  # ... at least, if the gateway said no: an operator must change something first
# OpenSSL's numbers (x509_vfy.h) for a certificate whose CA is not known here: self-signed, itself
# or in its chain; issuer not found, of the last one or of the first.
UNKNOWN_CA = (18, 19, 20, 21)
RIGHT_PORT = "tunnel_addr has to name the gateway's TUNNEL_PORT (9443)"
TAKEN = "host already registered"  # begins the text of such a refusal, Go's gateway's too
MOST_KIND = 50  # characters of an unknown message's type that the log shows
# Seconds after a GO_AWAY in which the session ends, if that was what it meant: Session.close() and
# Go's gateway say it first, too.
GO_AWAY_LOOK = 1
OLD_LOOK = 1  # seconds between looks whether an old session has no visit any more
OLD_SESSION = 24 * 3600  # seconds that it may last: a visit may last for ever, a line costs little
OLD_SESSIONS = 4  # at a time; of more, the oldest ends with its visits
HELD = 10  # seconds after which a session counts as one that worked


# A short secret is the gateway's choice, and it says so at its start.
warnings.filterwarnings("ignore", message="The HMAC key is")


class Refused(Exception):
    """The gateway said no to a registration, in the words of the exception."""


class CannotTrust(Exception):
    """The CA file is of no use; one line for the operator."""


class Ended(Exception):
    """The gateway has ended the session, in the words of the exception; ``code`` is End's."""

    def __init__(self, end):
        super().__init__(end.reason)
        self.code = end.code


class Service:
    """One session, and what becomes of it. The agent's lock guards ``outcome`` and ``asked``."""

    def __init__(self, session):
        self.session = session
        self.control = None  # its control stream
        self.asked = False  # the gateway wants another session
        self.outcome = None  # the exception that says why it is over; None: it is not
        self.since = math.inf  # monotonic, of its ack
        self.ends_at = math.inf  # monotonic, once another one has taken its place

    def has_visits(self) -> bool:
        return any(stream is not self.control for stream in self.session.streams_in_use())


class Agent:
    """Keeps one gateway served until stop() is called. run() is the agent's thread."""

    def __init__(self, config):
        """``config`` is the frozen Config of config.load(). Raises CannotTrust."""
        self._config = config
        self._context = tls_context(config.ca_file, config.skip_tls_verify)
        self._context.set_ciphers(AEAD)
        # Tunnels that trust the same share a context: the system's authorities fill megabytes.
        contexts = {
            trust: trust and tls_context(*trust, "target_ca_file")
            for trust in {_trust(tunnel.target) for tunnel in config.tunnels}
        }
        # Hostname to Route. Replaced as a whole, never changed: workers read it meanwhile.
        self._routes = {
            normal_hostname(tunnel.hostname): Route(tunnel, contexts[_trust(tunnel.target)])
            for tunnel in config.tunnels
        }
        self._stopping = threading.Event()
        self._waker = Waker()  # woken once, by stop(): ends a dial
        self._instance = new_instance()
        self._lock = threading.Condition()  # guards what follows; notified when any of it changes
        self._service = None  # the latest
        self._old = []  # earlier ones that are not over yet
        self._stranger = None  # the connection to a gateway that has not said yes yet
        self._running = 0  # data streams that have a worker
        self._targets = Targets()
        self.observer: Observer | None = None  # of each session; tools set it before run()

    def run(self):
        """Serve until stop() is called. Raises nothing that the gateway or the line can cause."""
        workers = Workers(MAX_STREAMS, "stream")
        try:
            self._serve_sessions(workers)
        finally:
            workers.shutdown(LAST_WORDS)  # one may hang in getaddrinfo(), which nothing can end
            self._waker.close()

    def stop(self):
        """End the session when its visits are done. Any thread; waits, DRAIN_TIMEOUT at most for
        the visits and LAST_WORDS for the session's last frames. Before the gateway has said yes
        there is nothing to wait for."""
        self._stopping.set()
        self._waker.wake()
        with self._lock:
            self._lock.notify_all()
            services, stranger = [*self._old, self._service], self._stranger
        if stranger is not None:
            stranger.reset()
        sessions = [service.session for service in services if service is not None]
        for session in sessions:
            session.leave()
        with self._lock:
            drained = self._lock.wait_for(
                lambda: not self._running or all(session.ended for session in sessions),
                DRAIN_TIMEOUT,
            )
            left = self._running
        if not drained:
            log.warning("%d visits did not end in %g s and were cut", left, DRAIN_TIMEOUT)
        for session in sessions:
            session.close("the agent stops")
        self._targets.reset()
        deadline = monotonic() + LAST_WORDS
        for session in sessions:
            session.join(max(0, deadline - monotonic()))

    @property
    def _address(self):
        return f"{self._config.tunnel_host}:{self._config.tunnel_port}"

    # Sessions, one after the other

    def _serve_sessions(self, workers):
        failures = 0
        while not self._stopping.is_set():
            least, most = 0, MAX_DELAY
            service = None
            try:
                service = self._begin(workers)
                self._serve(service)
                problem = "the gateway asks for a new session, and ends this one with its visits"
            except Refused as error:
                if str(error).startswith(TAKEN) and self._await_old():
                    continue
                problem = f"the gateway refused: {on_one_line(str(error))}"
                least = REFUSED_DELAY
                if str(error).startswith(TAKEN):
                    problem += "; another agent serves it and answers, this one waits for it"
            except Ended as error:
                problem = f"the gateway says: {on_one_line(str(error))}"
                if error.code == REPLACED:
                    # Under the old id the two agents would replace each other for ever. With a
                    # new one, this agent gets the hostnames when the other one is gone.
                    self._instance, least = new_instance(), REFUSED_DELAY
            except ConnectionRefusedError:
                problem, most = "nobody listens there", RESTART_DELAY
            except ssl.SSLCertVerificationError as error:
                problem = f"its certificate is not to be trusted: {error.verify_message}"
                if error.verify_code in UNKNOWN_CA:
                    problem += "; if it has a CA of its own, ca_file has to name that"
            except OSError as error:
                problem = _problem(error)
            except ProtocolError as error:
                problem = f"it does not speak our protocol: {error}"
            if self._stopping.is_set():
                break
            held = service is not None and monotonic() - service.since >= HELD
            if held and service.outcome is None:
                log.info("%s: %s", self._address, problem)
                failures = 0
                continue
            failures = 1 if held else failures + 1
            delay = retry_delay(failures, least, most)
            log.warning("%s: %s; next try in %.1f s", self._address, problem, delay)
            self._stopping.wait(delay)

    # One session

    def _begin(self, workers) -> Service:
        """Dial and register; the new session is in the place of the one before."""
        service = Service(self._dial())
        session = service.session
        session.on_leave = lambda: self._ask(service)
        with self._lock:
            before, self._service = self._service, service
            if before is not None and before.outcome is None:
                self._old.append(before)
        try:
            if self._stopping.is_set():  # and stop() may have looked for the session too early
                raise SessionClosed("the agent stops")
            session.start()
            service.control = session.open(encode_message(self._registration()))
            messages = _messages(service.control)
            self._take_answer(_expect_ack(next(messages)))
            with self._lock:
                self._stranger = None
            service.since = monotonic()
            served = [name for name, route in self._routes.items() if not route.problem]
            log.info("%s: serving %s", self._address, ", ".join(served) or "nothing")
            spawn("accept", self._accept, session, workers)
            spawn("control", self._hear, service, messages)
        except BaseException as error:
            self._end(service, error)
            raise
        self._retire_old()
        return service

    def _serve(self, service):
        """Wait until a session is over, and raise why; or return, as the gateway wants another."""
        with self._lock:
            self._lock.wait_for(
                lambda: service.asked or service.outcome is not None or self._stopping.is_set()
            )
            if service.asked:
                self._lock.wait_for(lambda: service.outcome is not None, GO_AWAY_LOOK)
        if self._stopping.is_set():  # stop() ends it when its visits are done
            with self._lock:
                self._lock.wait_for(lambda: service.outcome is not None)
        if service.outcome is not None:
            service.session.join(LAST_WORDS)
            raise service.outcome

    def _ask(self, service):
        """The gateway wants another session. Any thread; waits for nothing."""
        with self._lock:
            service.asked = True
            self._lock.notify_all()

    def _hear(self, service, messages):
        """Answer pings until the session is over."""
        outcome = SessionClosed("the gateway ended the session")
        try:
            certificates = {}
            for message in messages:
                if isinstance(message, Certificate):
                    self._log_certificate(message, certificates)
                elif isinstance(message, Port):
                    self._take_port(message)
                elif isinstance(message, End) and message.code == MOVE:
                    self._ask(service)
                elif isinstance(message, End):
                    raise Ended(message)
                elif isinstance(message, Ping):
                    with contextlib.suppress(ConnectionError):  # what has come may still say why
                        pong = encode_message(Pong(int(time() * 1000)))
                        service.control.write(pong, timeout=SILENCE_TIMEOUT)
                else:
                    raise ProtocolError(f"a {type(message).__name__.lower()} after the ack")
        except (OSError, ProtocolError, Ended) as error:
            outcome = error
        finally:
            self._end(service, outcome)

    def _end(self, service, outcome):
        """End a session, and say why it is over."""
        with self._lock:
            service.outcome = outcome
            self._lock.notify_all()
        service.session.close("the agent ends the session")
        service.session.join(LAST_WORDS)
        with self._lock:
            if service in self._old:
                self._old.remove(service)
                log.debug("%s: an old session is over: %s", self._address, outcome)
            self._lock.notify_all()

    # Sessions whose place another one takes

    def _retire_old(self):
        """End the earlier sessions when their visits are done."""
        now = monotonic()
        with self._lock:
            old = list(self._old)
        for service in old[:-OLD_SESSIONS]:
            service.session.close("there are too many old sessions")
        for service in old:
            if service.ends_at == math.inf:
                service.ends_at = now + OLD_SESSION
                service.session.call_later(OLD_LOOK, lambda service=service: self._look(service))

    def _look(self, service):
        """Demultiplexer of an old session: waits for nothing."""
        if service.has_visits() and monotonic() < service.ends_at:
            service.session.call_later(OLD_LOOK, lambda: self._look(service))
        else:
            service.session.close("another session has taken its place")

    def _await_old(self) -> bool:
        """The gateway has refused what an old session of ours still serves: wait for its end. False
        if there is none."""
        with self._lock:
            if not self._old:
                return False
            log.info("%s: the old session is served until it ends", self._address)
            self._lock.wait_for(lambda: not self._old or self._stopping.is_set())
        return True

    def _dial(self):
        host, port = self._config.tunnel_host, self._config.tunnel_port
        duplex = Duplex(connect(addresses_of(host, port), Deadline(DIAL_TIMEOUT), stop=self._waker))
        duplex.stall_timeout = self._config.stall_timeout
        try:
            with self._lock:
                self._stranger = duplex
            if self._stopping.is_set():  # and stop() may have looked for it too early
                raise GivenUp("the agent stops")
            duplex.start_tls(self._context, server_side=False, server_hostname=host)
            duplex.handshake_within(DIAL_TIMEOUT)
        except BaseException:
            duplex.close()
            raise
        return Session(
            duplex, client=True, name=self._address, window=START_WINDOW, observer=self.observer
        )

    def _registration(self):
        config = self._config
        needs = {feature for tunnel in config.tunnels for feature in tunnel.needs}
        later = (LATER_PORTS,) if PORTS in needs else ()
        return Register(
            token=config.token
            or make_token(config.jwt_secret, config.jwt_issuer, config.jwt_expire_sec),
            routes=config.routes(),
            modes=config.modes(),
            features=(
                CERTIFICATES,
                HALF_CLOSE,
                REASONS,
                UPGRADES,
                REFUSALS,
                *later,
                *sorted(needs),
            ),  # fmt: skip
            host_headers=config.host_headers(),
            ports=config.ports(),
            addressed=config.addressed(),
            policies=config.policies(),
            instance=self._instance,
        )

    def _take_answer(self, ack):
        """Turn away the visits of tunnels that the gateway cannot serve as they are written: what
        it would serve is not what the operator wants."""
        routes = {}
        for hostname, route in self._routes.items():
            tunnel, problem = route.tunnel, ack.refused.get(hostname, "")
            missing = [name for name in tunnel.needs if name not in ack.features]
            if missing:
                names = ", ".join(missing)
                problem = f"this gateway does not know {names}; update it, or do without"
            elif tunnel.port and not problem and hostname not in ack.ports:
                problem = "the gateway has opened no port for it"
            if problem:
                log.error("%s: not served: %s", hostname, on_one_line(problem))
            elif tunnel.port:
                port = on_one_line(ack.ports[hostname], 5)
                log.info("%s: on port %s of the gateway", hostname, port)
            awaits_port = bool(problem) and not missing and LATER_PORTS in ack.features
            routes[hostname] = route._replace(
                problem=problem,
                awaits_port=awaits_port,
                refusals=REFUSALS in ack.features,
            )
        with self._lock:
            self._routes = routes

    def _take_port(self, message):
        """Serve a tunnel whose port was refused for the time being."""
        with self._lock:
            route = self._routes.get(message.hostname)
            if route is None or not route.awaits_port:
                return
            served = route._replace(problem="", awaits_port=False)
            self._routes = {**self._routes, message.hostname: served}
        port = on_one_line(message.port, 5)
        log.info("%s: on port %s of the gateway", message.hostname, port)

    def _log_certificate(self, message, told):
        """Say how the certificate of a hostname stands, which its operator would else look for
        here. ``told``: what was said of each."""
        route = self._routes.get(message.hostname)
        if route is None or route.problem or told.get(message.hostname) == message.state:
            return
        told[message.hostname] = message.state
        level = logging.INFO if message.state in ("ready", "waiting") else logging.WARNING
        log.log(level, "%s: certificate: %s", message.hostname, words_and_link(message.state))

    def _accept(self, session, workers):
        while True:
            try:
                stream = session.accept()
            except SessionClosed:
                return
            with self._lock:
                self._running += 1
            try:
                workers.submit(self._serve_stream, stream)
            except Stopped:  # the agent has stopped, and the session has ended with all streams
                with self._lock:
                    self._running -= 1
                return

    def _serve_stream(self, stream):
        try:
            serve(stream, self._routes.get, self._targets)
        except Exception:
            log.exception("stream %d: reset by an unexpected error (bug, traceback follows)",
                          stream.id)  # fmt: skip
            stream.reset()
        finally:
            with self._lock:
                self._running -= 1
                self._lock.notify_all()


def _messages(control):
    """The gateway's messages, until it ends the session. Raises TimeoutError if it is silent."""
    reader, timeout = MessageReader(_pass_over), ACK_TIMEOUT
    while True:
        try:
            data = control.read(timeout=timeout)
        except TimeoutError:
            raise TimeoutError(f"the gateway was silent for {timeout} s") from None
        if not data:
            raise SessionClosed("the gateway ended the session")
        yield from reader.feed(data)
        timeout = SILENCE_TIMEOUT


def _pass_over(kind):
    kind = on_one_line(kind, MOST_KIND)
    log.debug("messages of the gateway's of type %s are passed over, nobody knows them", kind)


def _expect_ack(message):
    if not isinstance(message, Ack):
        raise ProtocolError(f"a {type(message).__name__.lower()}, expected an ack")
    if not message.ok:
        raise Refused(message.error or "no reason given")
    return message


def _problem(error):
    """An OSError in words, with what to do if the port is most likely another one's."""
    if getattr(error, "reason", None) in NO_TLS:
        return f"what answers there does not speak TLS; {RIGHT_PORT}"
    text = error.strerror or str(error)
    if SPEAKS_HTTP in text:
        return f"what answers there speaks HTTP, perhaps the port for visitors; {RIGHT_PORT}"
    return text


def _trust(target):
    """What a target's certificate is checked by, as for tls_context(); None without TLS."""
    return (target.ca_file, target.skip_tls_verify) if target.tls else None


def tls_context(ca_file, skip_verify, key="ca_file"):
    """How to check a gateway or a target. Raises CannotTrust if ``ca_file``, which the
    configuration names under ``key``, holds no certificates."""
    try:
        return client_context(ca_file, skip_verify, renegotiates=key == "target_ca_file")
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or error
        raise CannotTrust(f"{key} {ca_file}: {reason}, expected certificates as PEM") from None


def make_token(secret, issuer, lifetime) -> str:
    """A JWT as Go agents send it: HS256, with iss, iat and exp. ``lifetime`` is in seconds."""
    now = int(time())
    return jwt.encode({"iss": issuer, "iat": now, "exp": now + lifetime}, secret, "HS256")


def new_instance() -> str:
    """An id for this process, and for no other."""
    return secrets.token_hex(16)


def retry_delay(failures, least=0, most=MAX_DELAY, random=random.random) -> float:
    """Seconds to wait after ``failures`` in a row, of which there is at least one.

    Doubling, within ``least`` and ``most``, of which chance takes up to a half: agents that a
    gateway lost at one moment must not come back at one moment.
    """
    delay = FIRST_DELAY * 2 ** min(failures - 1, 16)  # 16: long past any limit, short of overflow
    return max(least, min(delay, most)) * (0.5 + random() / 2)
