"""Listening sockets that the process was given at its start (socket activation, hand-over), until a
port takes them.

They come from one of three sources:

    systemd          LISTEN_FDS, LISTEN_PID, LISTEN_FDNAMES (sd_listen_fds(3)): the operator's unit
                     says which ports there are, so a socket serves the setting that it is named
                     after, whatever number the setting has
    a predecessor    a gateway that hands over to this one (handover.py): its sockets serve where
                     the configuration, which may have changed, asks for the same address
    the supervisor   of several gateways on the same ports (processes/): as from a predecessor

A port without a socket here is opened as usual. The backlog belongs to the socket: a connection
that no process has accepted yet waits until the next process accepts it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import sleep
from typing import NamedTuple

from gotunnel_agent.common.hostnames import MAX_PORT
from gotunnel_agent.common.one_line import on_one_line, some

log = logging.getLogger("gotunnel.inherited")

FIRST = 3  # the first descriptor behind LISTEN_FDS (SD_LISTEN_FDS_START)
# Most sockets that may be given: a port of each setting on a few addresses, and public ports of
# agents. A larger LISTEN_FDS is a typing error; without the limit each descriptor would be tried.
MOST_SOCKETS = 4096
MOST_NAME = 64  # characters of a name that the log shows
LISTEN = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")  # variables of systemd's protocol
TCP_PORTS = "TCP_PORTS"


class Contradiction(Exception):
    """The units of systemd leave open which port serves a setting, or which setting a port serves.
    The text is one line for the operator."""


class Given(NamedTuple):
    """A given socket. ``name``: a setting such as GATEWAY_PORT, or TCP_PORTS; "" if the port number
    decides for which setting it is. ``by_systemd``: opened by systemd, not by a predecessor."""

    sock: socket.socket
    name: str
    by_systemd: bool

    @property
    def port(self) -> int:
        return int(self.sock.getsockname()[1])

    def __str__(self) -> str:
        """For the log."""
        host, port = self.sock.getsockname()[:2]
        return f"socket {self.name or 'without a name of ours'} ({host} port {port})"


class Inherited:
    """The sockets that no port has taken yet. Any thread."""

    def __init__(self, given: Iterable[Given] = (), shares_ports: bool = False) -> None:
        """``shares_ports``: other processes listen on the same ports (SO_REUSEPORT), so that a port
        without a socket here is opened beside theirs."""
        self.shares_ports = shares_ports
        self._left = list(given)
        # The settings that systemd's sockets are for, by port.
        self._named = {entry.port: entry.name for entry in self._left if entry.by_systemd}
        # Those of systemd that were taken: a successor must treat them as systemd's, too.
        self._by_systemd: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._lock = threading.Lock()  # guards both

    def is_by_systemd(self, sock: socket.socket) -> bool:
        with self._lock:
            return sock in self._by_systemd

    def take(self, setting: str, port: int) -> list[socket.socket]:
        """systemd's sockets for a setting, whose port is ``port`` (0: any). Raises
        Contradiction."""
        with self._lock:
            found = [given for given in self._left if given.by_systemd and (
                given.name == setting and (setting != TCP_PORTS or given.port == port)
                or not given.name and given.port == port
            )]  # fmt: skip
            ports = {given.port for given in found}
            if len(ports) > 1:
                raise Contradiction(
                    f"{setting} has sockets of systemd at the ports {some(sorted(ports))}, "
                    "expected one port: remove a ListenStream=, or name it for another setting by "
                    "FileDescriptorName="
                )
            if setting == TCP_PORTS:
                # The agent may leave and come back, and systemd goes on listening.
                socks = [given.sock.dup() for given in found]
            else:
                socks = [given.sock for given in found]
                self._left = [given for given in self._left if given not in found]
            self._by_systemd.update(socks)
        for given in found:
            if port not in (0, given.port):
                log.warning("%s is used for %s=%d: systemd's unit decides; set %s=%d",
                            given, setting, port, setting, given.port)  # fmt: skip
        return socks

    def named_at(self, port: int) -> str:
        """The setting that systemd's socket at a port is for; "" if there is no such socket, or
        its name says nothing."""
        return self._named.get(port, "")

    def take_at(self, setting: str, address: str, port: int) -> socket.socket | None:
        """A predecessor's socket at an IP address ("" for all) and ``port``; with 0, the one that
        served ``setting`` there. None if there is none."""
        with self._lock:
            for given in self._left:
                fits = given.port == port if port else given.name == setting
                if not given.by_systemd and fits and _is_at(given.sock, address):
                    self._left.remove(given)
                    return given.sock
        return None

    def close_unfit(self, tcp_ports: Sequence[range]) -> None:
        """Call it when all settings have their ports. Close the sockets that no setting has taken,
        except for those that an agent may still take, and log each. A socket of systemd stays
        open there, and its visitors would wait for an answer in vain: hence a warning."""
        for given in self._pop(lambda given: not _may_come(given, tcp_ports)):
            shown = str(given)
            given.sock.close()
            if given.by_systemd:
                log.warning("%s fits no port of the configuration: the gateway closes it, systemd "
                            "goes on listening; set its FileDescriptorName= to a setting's name, "
                            "such as gateway_port",
                            shown)  # fmt: skip
            else:
                log.info("%s is no longer wanted: closed", shown)

    def close_unclaimed_after(self, seconds: float) -> None:
        """Give agents so many seconds to come for the ports that they had at a predecessor, then
        close those that are left."""
        sleep(seconds)
        for given in self._pop(lambda given: not given.by_systemd):
            log.info("%s: its agent has not come back: closed", given)
            given.sock.close()

    def close(self) -> None:
        """Close all that is left."""
        for given in self._pop(lambda given: True):
            given.sock.close()

    def left(self) -> list[Given]:
        """Those that no port has taken."""
        with self._lock:
            return list(self._left)

    def _pop(self, wanted: Callable[[Given], bool]) -> list[Given]:
        with self._lock:
            popped = [given for given in self._left if wanted(given)]
            self._left = [given for given in self._left if given not in popped]
        return popped


NOTHING = Inherited()


def _may_come(given: Given, tcp_ports: Sequence[range]) -> bool:
    return given.name in ("", TCP_PORTS) and any(given.port in ports for ports in tcp_ports)


def _is_at(sock: socket.socket, address: str) -> bool:
    bound = ipaddress.ip_address(sock.getsockname()[0])
    if address:
        return bound == ipaddress.ip_address(address)
    if not bound.is_unspecified:
        return False
    # For all addresses: IPv6 that takes IPv4 as well, or a machine without IPv6.
    if sock.family == socket.AF_INET6:
        return not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    return not socket.has_dualstack_ipv6()


def of_systemd(environment: Mapping[str, str], settings: Iterable[str]) -> list[Given]:
    """What systemd has given to this process. ``settings``: the variables that name a port. What
    does not fit is a warning in the log, one line each. Raises Contradiction if two sockets have
    one address, or are one: a visitor would reach either setting at random."""
    found: list[Given] = []
    if not any(environment.get(name) for name in LISTEN[:2]):
        return found
    count = _number(environment.get("LISTEN_FDS", ""), MOST_SOCKETS)
    if count is None:
        log.warning("LISTEN_FDS is %s, expected a number of sockets from 0 to %d: it is ignored, "
                    "and all ports are opened anew",
                    on_one_line(repr(environment.get("LISTEN_FDS", "")), MOST_NAME),
                    MOST_SOCKETS)  # fmt: skip
        return found
    if environment.get("LISTEN_PID", "").strip() != str(os.getpid()):
        log.warning("LISTEN_PID is %s, and this is process %d: the sockets of LISTEN_FDS are "
                    "another process's and are left alone; all ports are opened anew (a wrapper "
                    "script has to start the gateway by exec)",
                    on_one_line(repr(environment.get("LISTEN_PID", "")), MOST_NAME),
                    os.getpid())  # fmt: skip
        return found
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    if names == [""]:
        names = [""] * count
    elif len(names) != count:
        log.warning("LISTEN_FDNAMES has %d names and LISTEN_FDS is %d: the names are ignored, and "
                    "the sockets' port numbers decide", len(names), count)  # fmt: skip
        names = [""] * count
    known = frozenset(settings)
    seen: dict[object, str] = {}
    for descriptor, name in enumerate(names, start=FIRST):
        shown = f"LISTEN_FDS: descriptor {descriptor}"
        if name:
            shown += f" ({on_one_line(name, MOST_NAME)})"
        flaw = _flaw(descriptor)
        if flaw is None:
            sock = socket.socket(fileno=descriptor)  # which also reads its family
            sock.set_inheritable(False)
            at = sock.getsockname()[:2]
            if at in seen:
                for each in (sock, *(given.sock for given in found)):
                    each.close()
                raise Contradiction(
                    f"{seen[at]} and {shown.removeprefix('LISTEN_FDS: ')} are both at {at[0]} port "
                    f"{at[1]}, expected one socket for each address and setting: remove a "
                    "ListenStream= from systemd's unit"
                )
            seen[at] = shown
            setting = _setting(name, known)
            if setting == TCP_PORTS and name.isdigit() and sock.getsockname()[1] != int(name):
                flaw, setting = f"it is at port {sock.getsockname()[1]}, not {name}", ""
                log.warning("%s: %s: the port number decides", shown, flaw)
            found.append(Given(sock, setting, True))
        else:
            log.warning("%s: %s: it is not used", shown, flaw)
    return found


def _setting(name: str, known: frozenset[str]) -> str:
    """The setting that a name means; "" if it is none of ours, as a unit's own name is none."""
    setting = name.upper().replace("-", "_")
    if setting in known:
        return setting
    number = _number(name, MAX_PORT)
    return TCP_PORTS if number else ""


def _flaw(descriptor: int) -> str | None:
    """Why a descriptor is no listening TCP socket; None if it is one."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return "a file or pipe came, expected a listening TCP socket"
    except OSError:
        return "it is not open, expected a listening TCP socket"
    sock = socket.socket(fileno=descriptor)
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            return "a socket of another kind came, expected a listening TCP socket"
        if sock.type != socket.SOCK_STREAM:
            return "a UDP socket came, expected a listening TCP socket (ListenStream=)"
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return "a connection came, expected a listening TCP socket (Accept=no)"
    finally:
        sock.detach()
    return None


def _number(text: str, most: int) -> int | None:
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) <= 9 and int(text) <= most:
        return int(text)
    return None
