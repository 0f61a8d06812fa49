"""Whether a hostname leads to this machine: checked before a first order, because a failed
validation counts against the CA's rate limits."""

import logging

from gotunnel_agent.common.one_line import some

from ..net.dns import NoAnswer, is_always_here, is_own, own_addresses, resolve
from .acme_errors import HOST, LATER, CaError

log = logging.getLogger("gotunnel.look_up")

RESOLVE_AGAIN = 300  # seconds until the next try after no resolver answered


def look_up(hostname: str) -> None:
    """Ask the system's resolver, which may take seconds. Raises CaError if the hostname has no
    address. If it has only foreign addresses, that is a warning: a router may pass them on (NAT).
    """
    if is_always_here(hostname):
        return
    try:
        found = resolve(hostname)
    except NoAnswer as error:
        raise CaError(
            LATER, "DNS", f"no resolver answers for {hostname} ({error}): check this machine's "
            "resolvers", retry_after=RESOLVE_AGAIN
        ) from None  # fmt: skip
    except OSError as error:
        raise CaError(
            HOST, "DNS", f"{hostname} does not resolve ({error}), expected an A or AAAA record "
            "that leads to this machine"
        ) from None  # fmt: skip
    if not any(map(is_own, found)):  # NAT, or a mistake: the validation will tell
        log.warning("%s leads to %s, but this machine has %s. If no router forwards that address "
                    "here, the CA will ask another machine and refuse: correct the DNS record",
                    hostname, some(found), some(own_addresses()))  # fmt: skip
