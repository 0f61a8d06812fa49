"""Makes `python gotunnel_server` and `gotunnel-server` work."""

import os
import sys

if not __package__:
    # Run as a folder, Python has put the folder itself on the path, where `gotunnel` is not and
    # relative imports do not work: its parent is what belongs there.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

try:
    from gotunnel_server.cli import main
except ModuleNotFoundError as error:
    # The agent installs without what only a gateway needs.
    if error.name.partition(".")[0] not in ("cryptography", "dotenv"):
        raise
    sys.exit(
        f"gotunnel-server: the package {error.name} is missing; "
        "install what a gateway needs: pip install 'gotunnel[server]', "
        "or in a checkout pip install '.[server]'"
    )

if __name__ == "__main__":
    sys.exit(main())
