"""Makes `python gotunnel_server` and `gotunnel-server` work."""

import os
import sys

if not __package__:
    # For `python gotunnel_server` Python puts the folder itself on the path, where `gotunnel` is
    # not found and relative imports fail: its parent takes the place.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

try:
    # A gateway that runs needs nothing of the commands.
    if not sys.argv[1:] or sys.argv[1:-1] == ["--env-file"]:
        from gotunnel_server.run import main
    else:
        from gotunnel_server.cli import main
except (ImportError, AttributeError):
    # An installation for the agent alone lacks packages, and old ones lack names that we import.
    from gotunnel_agent.common.packages import GATEWAY, explain, faults, of_gateway

    if not faults(GATEWAY):
        raise
    # Those that only orders of certificates need are named as well: most gateways order some.
    print(f"gotunnel-server: {explain(faults(of_gateway(orders=True)))}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
