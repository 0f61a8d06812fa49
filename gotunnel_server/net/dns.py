"""Where a hostname leads, and whether that is this machine. Asks the system's resolver, which may
take seconds; sends nothing by itself."""

import contextlib
import ipaddress
import socket

# For documentation (RFC 5737, RFC 3849): a UDP socket that is "connected" there sends nothing, and
# has the address that this machine would send from.
ELSEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


class NoAnswer(OSError):
    """The resolver cannot say now; it may be able to later."""


def is_always_here(hostname: str) -> bool:
    """Whether no resolver need be asked (RFC 6761 §6.3)."""
    return hostname == "localhost" or hostname.endswith(".localhost")


def resolve(hostname: str) -> list[str]:
    """The IP addresses of a hostname, sorted. Raises OSError, which may be NoAnswer; its text says
    why there are none."""
    try:
        found = socket.getaddrinfo(hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        kind = NoAnswer if getattr(error, "errno", None) == socket.EAI_AGAIN else OSError
        raise kind(getattr(error, "strerror", None) or str(error)) from None
    return sorted({address[0].partition("%")[0] for *_, address in found})


def is_own(address: str) -> bool:
    """Whether this machine has an IP address: only its own can be bound."""
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


def own_addresses() -> list[str]:
    """The addresses from which this machine would call others, one a family at most."""
    found = []
    for family, elsewhere in ELSEWHERE.items():
        with contextlib.suppress(OSError):  # no way out by this family
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.connect((elsewhere, 9))  # any port: nothing is sent
                found.append(sock.getsockname()[0])
    return found
