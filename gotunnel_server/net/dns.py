"""Resolves hostnames, and tells which addresses are this machine's. Only resolve() uses the
network, by the system's resolver; it may take seconds."""

import contextlib
import ipaddress
import socket

# Documentation addresses (RFC 5737, RFC 3849). Connecting a UDP socket to one sends nothing, and
# gives the socket the address that this machine would send from.
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


class NoAnswer(OSError):
    """The resolver has no answer for now (EAI_AGAIN); a later try may succeed."""


def is_always_here(hostname: str) -> bool:
    """Whether a hostname means this machine by definition (RFC 6761 §6.3)."""
    return hostname == "localhost" or hostname.endswith(".localhost")


def resolve(hostname: str) -> list[str]:
    """The IP addresses of a hostname, sorted. Raises OSError, or its subclass NoAnswer; the text
    says why."""
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        kind = NoAnswer if getattr(error, "errno", None) == socket.EAI_AGAIN else OSError
        raise kind(getattr(error, "strerror", None) or str(error)) from None
    # str(): a Python that was built without IPv6 gives IPv6 addresses as a number and bytes.
    return sorted({str(address[0]).partition("%")[0] for *_, address in found})


def is_own(address: str) -> bool:
    """Whether an IP address is this machine's: a socket can be bound to no other."""
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def own_addresses() -> list[str]:
    """The source addresses of this machine's outgoing connections, at most one per family."""
    found = []
    for family, elsewhere in ELSEWHERE.items():
        with contextlib.suppress(OSError):  # no route of this family
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((elsewhere, 9))  # any port: nothing is sent
                found.append(sock.getsockname()[0])
    return found
