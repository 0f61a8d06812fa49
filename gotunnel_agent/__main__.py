"""The start of `python gotunnel_agent`, `gotunnel-agent` and `gotunnel`, which are one program.

It imports the agent (run.py, and with other arguments than a file's name its command line, cli.py),
the visitor's helper (`forward`), the command `service`, `join` or `inspect`, or a quick command,
never two of them: ssh starts the helper for each of its connections, and importing YAML, which only
the agent needs, takes longer than the helper itself needs until it dials; and an agent that runs
needs nothing of the commands.
"""

import os
import sys

if not __package__:
    # For `python FOLDER` Python puts the folder itself on the path. There is no gotunnel.py in it,
    # and relative imports fail: the path must hold its parent instead.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

try:
    if sys.argv[1:2] == ["forward"]:
        from gotunnel_agent.forward import main
    elif sys.argv[1:2] == ["service"]:
        from gotunnel_agent.service import main
    elif sys.argv[1:2] == ["join"]:
        from gotunnel_agent.join import main
    elif sys.argv[1:2] == ["inspect"]:
        from gotunnel_agent.inspector.terminal import main
    elif sys.argv[1:2] in (["http"], ["tcp"], ["files"]):
        from gotunnel_agent.quick.commands import main
    elif sys.argv[1:-1] == ["-c"]:
        from gotunnel_agent.run import main
    else:
        from gotunnel_agent.cli import main
except (ImportError, AttributeError):  # a package is missing, or is too old to have such a name
    from gotunnel_agent.common.packages import AGENT, explain, faults

    if not (lacking := faults(AGENT)):
        raise
    print(f"gotunnel-agent: {explain(lacking)}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(main())
