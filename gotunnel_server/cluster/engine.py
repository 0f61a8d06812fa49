"""The connection to Redis: commands, scripts and messages, by the package ``redis``.

A command is sent once. If it fails, its caller hears of it (Away) and decides: a command that was
given up may still arrive there, so nothing is ever repeated here. Waits are short and bounded: a
member without the board has to act within its lease. So are answers (bounded.py).

No password gets into an error: the URL is never shown, and what a server quotes is taken out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from gotunnel_agent.common.one_line import on_one_line

from .board import Away
from .bounded import bound
from .settings import NODES, SENTINEL, SOCKET, Address, Settings

log = logging.getLogger("gotunnel.engine")

# Seconds for a connection, and for an answer. A renewal that takes longer is of no use.
CONNECT_TIMEOUT, ANSWER_TIMEOUT = 1.0, 1.0
SENTINEL_TIMEOUT = 0.5  # seconds for an answer of one Sentinel; there are several
MOST_CONNECTIONS = 32  # of all threads together: the issuer's, the order threads', those here
LEAST_REDIS = 5  # whose scripts may ask for the time and then write
NO_EVICTION = "noeviction"
MOST_ERROR = 300  # characters
# Seconds between two pings on the connection for messages, and without any answer until it counts
# as cut: nothing else would be sent there.
PING, SILENCE = 2.0, 5.0
BACKOFF, MOST_BACKOFF = 0.25, 2.0  # seconds until that connection is tried again
# What the package raises by an answer that is none of Redis's.
STUMBLES = (TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, AssertionError)


class Engine:
    """Any thread. Connects when it is first used, and again whenever it has to."""

    def __init__(self, settings: Settings):
        self._address = settings.redis
        self._ca_file = settings.ca_file
        self._lock = threading.Lock()  # guards _client
        self._client: Any = None
        self._closed = False

    def __str__(self) -> str:
        return str(self._address)

    def call(self, *command: str | bytes | int | float) -> Any:
        """Send one command; returns its result, texts as bytes. Raises Away."""
        with self._translated():
            return self._connected().execute_command(*command)

    def run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | bytes | int]
    ) -> Any:
        """Run a script. Raises Away."""
        with self._translated():
            client = self._connected()
            try:
                return client.execute_command(
                    "EVALSHA", script.digest, len(keys), *keys, *arguments
                )
            except NoScriptError:  # nothing was done
                return client.execute_command("EVAL", script.text, len(keys), *keys, *arguments)

    def hear(
        self,
        channels: Sequence[str],
        on_message: Callable[[bytes], object],
        over: threading.Event,
        on_connected: Callable[[], object] = lambda: None,
    ) -> None:
        """Call ``on_message(data)`` with each message of these channels, until ``over`` is set.
        Never raises; messages get lost while there is no connection."""
        delay, told = BACKOFF, ""
        while not over.is_set():
            try:
                with self._translated():
                    for data in self._messages(channels, over):
                        if data is None:
                            delay = BACKOFF
                            on_connected()
                        else:
                            on_message(data)
            except Away as error:
                if over.is_set():
                    return
                # That Redis is away says members.py, once for all.
                is_news = isinstance(error, Refuses) and told != str(error)
                told = str(error) if is_news else told
                log.log(logging.WARNING if is_news else logging.DEBUG, "messages of other gateways "
                        "are not heard: %s; tried again in %g s", error, delay)  # fmt: skip
            over.wait(delay)
            delay = min(2 * delay, MOST_BACKOFF)

    def _messages(self, channels: Sequence[str], over: threading.Event) -> Iterator[bytes | None]:
        """The messages; None once the channels are heard. Ends when ``over`` is set."""
        with contextlib.closing(self._connected().pubsub()) as line:
            line.subscribe(*channels)
            heard_at = pinged_at = monotonic()
            while not over.is_set():
                message = line.get_message(timeout=0.5)
                now = monotonic()
                if now - pinged_at > PING:
                    pinged_at = now
                    line.ping()
                if message is None:
                    if now - heard_at > SILENCE:
                        raise Away("the connection for messages is silent")
                    continue
                heard_at = now
                if message["type"] == "subscribe" and message["data"] == len(channels):
                    yield None
                elif message["type"] == "message" and isinstance(message["data"], bytes):
                    yield message["data"]

    # For `check`

    def time(self) -> float:
        """Seconds for an answer, once connected. Raises Away."""
        self.call("PING")
        began = monotonic()
        self.call("PING")
        return monotonic() - began

    def version(self) -> str:
        """What the server calls itself. Raises Away."""
        found = self._facts("server")
        name = "Valkey" if "valkey_version" in found else "Redis"
        return f"{name} {found.get('valkey_version') or found.get('redis_version', '')}"

    def flaws(self) -> Iterator[str]:
        """What is wrong with the server's settings, as sentences. Raises Away."""
        version = re.match(r"[0-9]+", self._facts("server").get("redis_version", ""))
        if version is not None and int(version[0]) < LEAST_REDIS:
            yield f"this version is too old, expected {LEAST_REDIS} or newer"
        policy = self._facts("memory").get("maxmemory_policy", NO_EVICTION)
        if policy != NO_EVICTION:
            yield (
                f"maxmemory-policy is {policy}, expected {NO_EVICTION}: a hostname whose key is "
                "evicted could get two owners"
            )
        if self._facts("replication").get("role", "master") != "master":
            yield "this server is a replica, which cannot be written to: name the master"

    def try_out(self, name: str) -> None:
        """Do once what a gateway does: run a script that writes, for a second, and send and hear a
        message. Raises Away."""
        self.run(TRIAL, [f"{{{name}}}:check"], [])
        self.call("PUBLISH", f"{{{name}}}:check", "{}")
        with self._translated(), contextlib.closing(self._connected().pubsub()) as line:
            line.subscribe(f"{{{name}}}:check")
            line.get_message(timeout=ANSWER_TIMEOUT)

    def _facts(self, section: str) -> dict[str, str]:
        """What INFO says. Raises Away."""
        found = self.call("INFO", section)
        if isinstance(found, bytes):
            lines = found.decode(errors="replace").splitlines()
            return dict(line.split(":", 1) for line in lines if ":" in line)
        if not isinstance(found, dict):
            return {}
        if found and all(isinstance(value, dict) for value in found.values()):  # of all nodes
            found = next(iter(found.values()))
        return {str(key): str(value) for key, value in found.items()}

    def own_address(self) -> str | None:
        """The IP address by which this machine reaches Redis; None if it is a Unix socket, or if
        that cannot be told."""
        if not self._address.hosts:
            return None
        host, port = self._address.hosts[0]
        with contextlib.suppress(OSError):
            for family, kind, protocol, _, where in socket.getaddrinfo(
                host, port, type=socket.SOCK_DGRAM
            ):
                with socket.socket(family, kind, protocol) as sock:
                    sock.connect(where)  # no packet is sent
                    found: str = sock.getsockname()[0]
                    return found
        return None

    def close(self) -> None:
        """Close all connections; calls raise Away from now on."""
        with self._lock:
            self._closed = True
            client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(RedisError, OSError):
                client.close()

    # Connecting

    def _connected(self) -> Any:
        """The client, which connects by itself. For a Redis Cluster this asks a node for all."""
        with self._lock:
            if self._closed:
                raise Away("the gateway stops")
            if self._client is None:
                self._client = self._make()
            return self._client

    def _make(self) -> Any:
        address = self._address
        common: dict[str, Any] = {
            "username": address.user,
            "password": address.password,
            "socket_timeout": ANSWER_TIMEOUT,
            "socket_connect_timeout": CONNECT_TIMEOUT,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "client_name": f"gotunnel-{os.getpid()}",
            "redis_connect_func": bound,
        }
        if address.kind == SOCKET:
            del common["socket_connect_timeout"]
            return redis.Redis(
                unix_socket_path=address.path, db=address.db, max_connections=MOST_CONNECTIONS,
                **common,
            )  # fmt: skip
        common["socket_keepalive"] = True
        if address.tls:
            common |= {"ssl": True, "ssl_ca_certs": self._ca_file, "ssl_check_hostname": True}
        if address.kind == NODES:
            nodes = [ClusterNode(host, port) for host, port in address.hosts]
            return RedisCluster(
                startup_nodes=nodes, require_full_coverage=False, cluster_error_retry_attempts=0,
                max_connections=MOST_CONNECTIONS, **common,
            )  # fmt: skip
        if address.kind == SENTINEL:
            return self._by_sentinel(address, common | {"db": address.db})
        host, port = address.hosts[0]
        return redis.Redis(host, port, address.db, max_connections=MOST_CONNECTIONS, **common)

    def _by_sentinel(self, address: Address, common: dict[str, Any]) -> Any:
        """Sentinels without a password are usual; one with a password most likely has Redis's."""
        plain = common | {"socket_timeout": SENTINEL_TIMEOUT, "db": 0}
        plain["socket_connect_timeout"] = SENTINEL_TIMEOUT
        open_ones = plain | {"username": None, "password": None}
        for settings in (open_ones, plain) if address.password is not None else (open_ones,):
            sentinel = Sentinel(address.hosts, sentinel_kwargs=settings, **common)
            try:
                sentinel.discover_master(address.master)
            except AuthenticationError:
                continue
            break
        return sentinel.master_for(address.master, max_connections=MOST_CONNECTIONS)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the package are raised as Away."""
        try:
            yield
        except Away:
            raise
        except (RedisError, RedisClusterException, OSError, ValueError) as error:
            raise self._away(_words(error), refuses=isinstance(error, ResponseError)) from None
        except STUMBLES as error:
            words = f"an answer that is none of Redis's ({on_one_line(str(error), MOST_ERROR)})"
            raise self._away(words) from None

    def _away(self, words: str, refuses: bool = False) -> Away:
        if self._address.password:  # a server may quote what it got
            words = words.replace(self._address.password, "...")
        return (Refuses if refuses else Away)(f"Redis at {self._address}: {words}")


class Refuses(Away):
    """Redis answers, and does not do it: a command or a right is missing, for example."""


# Here begins the part of an error that an operator does not get to see: redis-py's own objects
# behind "No master found for 'NAME'"; the digest and the line of a script behind Redis's answer to
# it; the arguments of an unknown command, which are a password if that is AUTH.
_ITS_OWN = re.compile(r" : <redis\.|\.? script: [0-9a-f]{40}|, with args beginning with")


def _words(error: Exception) -> str:
    """What an error says, without the place, which redis-py repeats."""
    if isinstance(error, redis.exceptions.TimeoutError):
        return f"no answer in {ANSWER_TIMEOUT:g} s"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = _ITS_OWN.split(str(error), maxsplit=1)[0]
    if isinstance(cause, ssl.SSLCertVerificationError):
        text = f"its certificate is not to be trusted: {cause.verify_message}"
    elif isinstance(cause, OSError) and cause.strerror:
        text = cause.strerror[:1].lower() + cause.strerror[1:]
    return on_one_line(text.rstrip(".") or type(error).__name__, MOST_ERROR)


class Script:
    """A Lua script, which Redis keeps by its digest."""

    def __init__(self, text: str):
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


# KEYS: one that nothing else uses.
TRIAL = Script("""
redis.call('TIME')
return redis.call('SET', KEYS[1], '', 'PX', 1000)
""")
