"""The packages of other projects that the programs need, and whether the installed ones will do.

setup.py tells pip the same, and a test compares the two. But a program may also run from a
checkout, or on the packages of a Linux distribution, where no pip has looked. Without this module,
a package that is too old would be a traceback, at the start or days later.

Versions are read from the packages' metadata: nothing is imported that may be broken.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple


class Package(NamedTuple):
    name: str  # as pip knows it
    module: str  # as it is imported
    wanted: str  # its versions, as pip writes them: ">=4.1,<5"
    debian: str  # its package in Debian and Ubuntu


class Fault(NamedTuple):
    """A package that will not do. ``found`` is its version, None if there is none."""

    package: Package
    found: str | None

    def __str__(self) -> str:
        name, wanted = self.package.name, self.package.wanted
        if self.found is None:
            return f"{name} is missing, expected {wanted}"
        return f"{name} is {self.found}, expected {wanted}"


AGENT = (
    Package("PyJWT", "jwt", ">=2.4,!=2.10.0", "python3-jwt"),
    Package("PyYAML", "yaml", ">=6.0", "python3-yaml"),
)
GATEWAY = (
    *AGENT,
    Package("cryptography", "cryptography", ">=38", "python3-cryptography"),
    Package("python-dotenv", "dotenv", ">=0.19.1", "python3-dotenv"),
)
ORDERS = (  # of a gateway that orders certificates
    Package("acme", "acme", ">=2.1,<6", "python3-acme"),
    Package("josepy", "josepy", ">=1.13,<3", "python3-josepy"),
    Package("requests", "requests", ">=2.28", "python3-requests"),
    Package("urllib3", "urllib3", ">=1.26", "python3-urllib3"),
)
H2 = Package("h2", "h2", ">=4.3,<5", "python3-h2")  # for targets that speak HTTP/2
HPACK = Package("hpack", "hpack", ">=4.1,<5", "python3-hpack")  # for visitors that do
REDIS = Package("redis", "redis", ">=6,<9", "python3-redis")  # of one of several gateways


def of_gateway(*, orders: bool) -> tuple[Package, ...]:
    """What a gateway needs. ``orders``: it orders certificates."""
    return GATEWAY + ORDERS if orders else GATEWAY


def faults(packages: Iterable[Package]) -> list[Fault]:
    """Those of the packages that will not do."""
    return list(filter(None, map(fault, packages)))


def fault(package: Package) -> Fault | None:
    """What is wrong with a package; None if nothing is. A copy without metadata counts as new
    enough: an operator has put it there by hand."""
    # Loaded here because it takes 20 ms, which `status` and others need not wait for.
    metadata = import_module("importlib.metadata")
    try:
        found: str = metadata.version(package.name)
    except metadata.PackageNotFoundError:
        return None if find_spec(package.module) is not None else Fault(package, None)
    return None if fits(found, package.wanted) else Fault(package, found)


def fits(found: str, wanted: str) -> bool:
    """Whether a version is among those wanted. What follows its numbers is left out: 4.1rc1 counts
    as 4.1. A version without a number fits."""
    numbers = _numbers(found)
    for relation, bound in re.findall(r"([<>=!]+)([0-9.]+)", wanted):
        limit = _numbers(bound)
        length = max(len(numbers), len(limit))
        one, other = (each + (0,) * (length - len(each)) for each in (numbers, limit))
        if numbers and not {">=": one >= other, "<": one < other, "!=": one != other}[relation]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"(?:[0-9]+!)?([0-9]+(?:\.[0-9]+)*)", text)
    return tuple(map(int, found[1].split("."))) if found else ()


def advice(found: Iterable[Fault]) -> str:
    """How to get what is missing or too old, for this Python."""
    packages = [each.package for each in found]
    names = " ".join(f"'{package.name}{package.wanted}'" for package in packages)
    if not _belongs_to_the_system():
        return f"to install it: {sys.executable} -m pip install {names}"
    debian = " ".join(package.debian for package in packages)
    return (
        f"install it from the system (in Debian: apt install {debian}), or, if the system has no "
        f"such version, run gotunnel in a virtual environment, with pip install {names}"
    )


def _belongs_to_the_system() -> bool:
    """Whether pip refuses to install into this Python (PEP 668)."""
    if sys.prefix != sys.base_prefix:
        return False  # a virtual environment
    return os.path.exists(os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED"))


def explain(found: list[Fault]) -> str:
    """One line: each of them, and what to do."""
    return f"{'; '.join(map(str, found))}; {advice(found)}"
