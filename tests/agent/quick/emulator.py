"""A terminal in a few lines: it knows what the status screen writes, and fails on anything else."""

import codecs
import re

from gotunnel_agent.common.cells import width

SEQUENCE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


class Emulator:
    """``lines`` are all that were ever on it, those that have scrolled away, too. ``top`` is the
    first that is to be seen."""

    def __init__(self, columns=80, rows=24):
        self.columns, self.rows = columns, rows
        self.lines, self.top = [""], 0
        self.row = self.column = 0  # of the cursor; the row counts from lines[0]
        self.wraps = True
        self.colours = set()
        self._unread = ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def feed(self, data: bytes):
        text = self._unread + self._decode(data)
        self._unread, at = "", 0
        while at < len(text):
            if text[at] == "\x1b":
                match = SEQUENCE.match(text, at)
                if not match:
                    self._unread = text[at:]
                    return
                self._act(*match.groups())
                at = match.end()
            else:
                self._print(text[at])
                at += 1

    def _act(self, parameters, letter):
        count = int(parameters) if parameters.isdigit() else 1
        assert count > 0 or letter not in "AB", "a count of 0 moves by 1"
        if letter == "A":
            self.row = max(self.top, self.row - count)
        elif letter == "B":
            self.row = min(self.top + self.rows - 1, self.row + count)
            self._grow()
        elif letter == "K":
            self.lines[self.row] = self._before()
        elif letter == "J" and parameters == "2":
            self.lines[self.top :] = [""]
            self._grow()
        elif letter == "J":
            self.lines[self.row] = self._before()
            del self.lines[self.row + 1 :]
        elif letter == "H" and not parameters:
            self.row, self.column = self.top, 0
        elif letter == "m":
            self.colours.add(parameters)
        elif (parameters, letter) in (("?7", "l"), ("?7", "h")):
            self.wraps = letter == "h"
        else:
            raise AssertionError(f"unknown sequence {parameters}{letter}")

    def _before(self):
        line = self.lines[self.row]
        cells = 0
        for at, character in enumerate(line):
            if cells >= self.column:
                return line[:at]
            cells += width(character)
        return line

    def _grow(self):
        while len(self.lines) <= self.row:
            self.lines.append("")
        self.top = max(self.top, self.row - self.rows + 1)

    def _print(self, character):
        if character == "\r":
            self.column = 0
            return
        if character == "\n":
            self.row += 1
            return self._grow()
        assert character.isprintable() or not width(character), f"control character {character!r}"
        cells = width(character)
        if self.column + cells > self.columns:
            if not self.wraps:
                return
            self.row, self.column = self.row + 1, 0
            self._grow()
        line = self.lines[self.row]
        before = self._before()
        before += " " * (self.column - width(before))
        after = line[len(before) + 1 :] if len(line) > len(before) else ""
        self.lines[self.row] = before + character + after
        self.column += cells

    def shown(self):
        """The lines on it, without empty ones at the end."""
        lines = [line.rstrip() for line in self.lines[self.top :]]
        while lines and not lines[-1]:
            lines.pop()
        return lines
