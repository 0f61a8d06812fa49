"""The parser of the agent's commands."""

import re
from typing import NoReturn

from .common.arguments import OneLineParser
from .common.one_line import without_secrets

# The value of an option in the words of argparse: it may be a secret.
_VALUE = re.compile(r"((?<=[ '])--?[a-zA-Z][\w-]*=)[^\s']+", re.ASCII)


class Parser(OneLineParser):
    """A parser whose errors show no secret that was typed as an argument."""

    def error(self, message: str) -> NoReturn:
        super().error(_VALUE.sub(r"\1...", without_secrets(message)))
