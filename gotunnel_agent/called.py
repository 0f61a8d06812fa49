"""The name by which the user has called this program, for help texts and errors; and the errors
about its arguments.

`gotunnel` and `gotunnel-agent` are one program with the same commands. Without a command,
`gotunnel` prints a help and `gotunnel-agent` runs the agent of its configuration.
"""

import os
import re
import sys
from typing import NoReturn

from .common.arguments import OneLineParser
from .common.one_line import without_secrets

SHORT, LONG = "gotunnel", "gotunnel-agent"


def name_of(path: str) -> str:
    """SHORT or LONG, for the path of the program (sys.argv[0])."""
    stem = os.path.basename(path.replace("\\", "/")).partition(".")[0]
    return SHORT if stem in (SHORT, f"{SHORT}-script") else LONG


def program() -> str:
    """SHORT or LONG, as this process was called."""
    return name_of(sys.argv[0] if sys.argv else "")


# The value of an option in the words of argparse: it may be a secret.
_VALUE = re.compile(r"((?<=[ '])--?[a-zA-Z][\w-]*=)[^\s']+", re.ASCII)


class Parser(OneLineParser):
    """A parser whose errors show no secret that was typed as an argument."""

    def error(self, message: str) -> NoReturn:
        super().error(_VALUE.sub(r"\1...", without_secrets(message)))
