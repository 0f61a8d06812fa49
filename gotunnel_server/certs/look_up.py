"""Whether a CA can find us by a hostname at all: asked before the CA is, to spare its limits."""

import logging

from ..net.dns import NoAnswer, is_always_here, is_own, own_addresses, resolve
from .acme_errors import HOST, LATER, CaError

log = logging.getLogger("gotunnel.look_up")

RESOLVE_AGAIN = 300  # seconds after a hostname's resolver, or ours, gave no answer


def look_up(hostname: str) -> None:
    """Ask the system's resolver, which may take seconds. Raises CaError for a hostname that has no
    address; only warns of one that has none of ours, because a router may stand between."""
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
        log.warning("%s leads to %s, and this machine is %s: unless a router passes that on, the "
                    "CA asks another machine and refuses the certificate",
                    hostname, ", ".join(found), ", ".join(own_addresses()))  # fmt: skip
