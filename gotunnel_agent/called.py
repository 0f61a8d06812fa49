"""The name by which the user has called this program, for help texts and errors.

`gotunnel` and `gotunnel-agent` are one program with the same commands. Without a command,
`gotunnel` prints a help and `gotunnel-agent` runs the agent of its configuration.
"""

import os
import sys

SHORT, LONG = "gotunnel", "gotunnel-agent"


def name_of(path: str) -> str:
    """SHORT or LONG, for the path of the program (sys.argv[0])."""
    stem = os.path.basename(path.replace("\\", "/")).partition(".")[0]
    return SHORT if stem in (SHORT, f"{SHORT}-script") else LONG


def program() -> str:
    """SHORT or LONG, as this process was called."""
    return name_of(sys.argv[0] if sys.argv else "")
