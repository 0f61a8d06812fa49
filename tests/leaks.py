"""A watch on all log lines of a test run, here and of the programs that tests start: none may show
a secret."""

import logging
import re

# What the tests' secrets and passwords begin with, and what any token, hash or key looks like.
SECRET = re.compile(
    r"only for tests|correct[- ]horse|visitor's password|own-secret|secret-of-one-alone"
    r"|of many, words|eyJ[\w-]{5,}\.[\w-]{5,}\.[\w-]{10,}|PRIVATE KEY"
    r"|\$scrypt\$ln=[0-9]+,r=[0-9]+,p=[0-9]+\$(?!SALT)[\w+/]"
    r"|gotunnel://[\w.~%-]*:(?!SECRET@)[\w.~%-]+@"
)
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")

found = []  # the lines that showed one


def look(text):
    if SECRET.search(text):
        found.append(text)


def look_at_output(line):
    """A line that a program has printed; what a command prints for its caller is no log."""
    if LOG_LINE.match(line):
        look(line)


class Watch(logging.Handler):
    def emit(self, record):
        look(self.format(record))
