"""The agent: the private side of the tunnel.

`from gotunnel_agent import Agent` gives a program an agent of its own. For one tunnel alone
gotunnel.forward() is shorter (embedded.py).
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .agent import Agent as Agent
    from .config import Config as Config
    from .config import ConfigError as ConfigError
    from .config import load as load
    from .trust import CannotTrust as CannotTrust
else:
    # Found on first use (PEP 562): ssh starts `gotunnel-agent forward` for each connection, which
    # has no use for what an agent imports.
    MODULES = {
        "Agent": "agent",
        "CannotTrust": "trust",
        "Config": "config",
        "ConfigError": "config",
        "load": "config",
    }

    def __getattr__(name):
        if name not in MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
