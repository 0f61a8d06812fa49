"""Several gateways on the same ports (PROCESSES): loads what that needs only where it is set.

A process is one of three: a gateway that runs alone, the supervisor of several, or one of those,
which the supervisor has started with VARIABLE in its environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from .config import Config

VARIABLE = "GOTUNNEL_PROCESS"  # the descriptor of a child's channel to its supervisor


def find_child(environment: Mapping[str, str]) -> Any:
    """This process as a processes.child.Child; None if no supervisor has started it."""
    text = environment.get(VARIABLE, "")
    if not text:
        return None
    return import_module(f"{__package__}.processes.child").connect(text)


def tells_facts(child: Any) -> bool:
    """Whether this process logs what is open and where. ``child``: as find_child() gives it."""
    return child is None or bool(child.tells_facts)


def together_of(child: Any) -> Any:
    """The child's processes.together.Together; None if it is alone."""
    return None if child is None else child.together


def opener(child: Any, listen: Callable[[int, Any], Any]) -> Callable[[int, Any], Any]:
    """``listen``, which opens an agent's port; one that asks the other processes first."""
    if child is None:
        return listen
    opened: Callable[[int, Any], Any]
    opened = import_module(f"{__package__}.processes.shared_ports").opener(listen, child)
    return opened


def life_of(child: Any) -> Any:
    """A processes.child_life.ChildLife, which takes the place of a Life."""
    return import_module(f"{__package__}.processes.child_life").ChildLife(child)


def supervise(config: Config, env_file: str | None, environment: Mapping[str, str]) -> int:
    """Be the supervisor of ``config.processes`` gateways; the exit status. Raises PortError,
    Contradiction."""
    supervisor = import_module(f"{__package__}.processes.supervisor")
    status: int = supervisor.Supervisor(config, env_file, environment).run()
    return status
