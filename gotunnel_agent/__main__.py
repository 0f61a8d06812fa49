"""Makes `python gotunnel_agent` and `gotunnel-agent` work.

Which of the two programs it is, an agent or a visitor's helper, is decided here and by an import:
ssh starts the helper for each of its connections, and what an agent needs (YAML, JWT) would take
longer than all that the helper does until it has dialled.
"""

import os
import sys

if not __package__:
    # Run as a folder, Python has put the folder itself on the path, where `gotunnel` is not and
    # relative imports do not work: its parent is what belongs there.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if sys.argv[1:2] == ["forward"]:
    from gotunnel_agent.forward import main
else:
    from gotunnel_agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
