"""The parser of both programs' command lines: an error is one line, and says where the help is.

argparse prints its usage in front of an error: with a dozen options these are ten lines, and the
line that matters comes last.
"""

import argparse
from typing import NoReturn

HELP = "--help"


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser that prints no usage in front of an error."""

    def error(self, message: str) -> NoReturn:
        advised = HELP in message or "; " in message  # our own messages say what to do
        more = "" if advised else f"; `{self.prog} {HELP}` explains the arguments"
        self.exit(2, f"{self.prog}: error: {message}{more}\n")
