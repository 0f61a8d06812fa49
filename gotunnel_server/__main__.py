"""Makes `python gotunnel_server` and `gotunnel-server` work."""

import os
import sys

if not __package__:
    # For `python gotunnel_server` Python puts the folder itself on the path, where `gotunnel` is
    # not found and relative imports fail: its parent takes the place.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

try:
    from gotunnel_server.cli import main
except ModuleNotFoundError as error:
    # An installation for the agent alone lacks these.
    if (error.name or "").partition(".")[0] not in ("cryptography", "dotenv", "jwt"):
        raise
    sys.exit(
        f"gotunnel-server: the package {error.name} is missing; "
        "install what a gateway needs: pip install 'gotunnel[server]', "
        "or in a checkout pip install '.[server]'"
    )

if __name__ == "__main__":
    sys.exit(main())
