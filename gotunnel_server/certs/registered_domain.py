"""Which registered domain a hostname belongs to: a CA counts certificates by it.

A CA looks it up in the Public Suffix List (https://publicsuffix.org/), which has ten thousand lines
and changes every week. Here it is the last two labels, or three if the last two are in SUFFIXES. If
a suffix is missing there, several domains count as one: then fewer certificates are ordered than
the CA allows, never more.
"""

from __future__ import annotations

# Second labels under which anybody can register a domain, by the top label: large countries' only.
_BELOW = {
    "ac co go or web": "id", "ac co gov muni org": "il", "ac co firm gen gov ind net org": "in",
    "ac ad co ed go gr lg ne or": "jp", "ac co go ne or re": "kr", "ac co go in or": "th",
    "ac co gov ltd me net nhs org plc sch": "uk", "ac co gov law net nom org school web": "za",
    "ac co geek gen govt iwi maori net org school": "nz", "ac co go me ne or": "ke",
    "asn com edu gov id net org": "au", "com edu gov net org": (
        "ar bd bo br cn co do ec eg gh gt hk kw lb mt mx my ng np pa pe ph pk pr pt py qa sa sg sv "
        "tr tw ua uy ve vn"),
    "com edu net org": "pl", "com nom org": "es", "co gv or": "at",
}  # fmt: skip
SUFFIXES = frozenset(
    f"{second}.{top}"
    for seconds, tops in _BELOW.items()
    for second in seconds.split()
    for top in tops.split()
)


def registered_domain(hostname: str) -> str:
    """The registered domain of a hostname in lower case; the hostname itself if it has no more
    labels."""
    labels = hostname.split(".")
    count = 3 if ".".join(labels[-2:]) in SUFFIXES else 2
    return ".".join(labels[-count:])
