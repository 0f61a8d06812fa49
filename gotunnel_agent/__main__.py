"""Makes `python gotunnel_agent` and `gotunnel-agent` work."""

import os
import sys

if not __package__:
    # Run as a folder, Python has put the folder itself on the path, where `gotunnel` is not and
    # relative imports do not work: its parent is what belongs there.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from gotunnel_agent.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
