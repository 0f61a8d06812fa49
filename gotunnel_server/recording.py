"""Decides which parts read the records of visits, and starts and stops them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from .config import OFF, Config
from .routes import Route
from .visitors import access_log
from .visitors.access_log import Line
from .visitors.counts import Count, Counts
from .visitors.forwarded import Proxies
from .visitors.log_file import LogFile
from .visitors.visit import Visit
from .visitors.visits import Subscriber, Visits

log = logging.getLogger("gotunnel.recording")

LAST_LINES = 1  # seconds to write the access log's last lines when the gateway stops


class Recording:
    """The readers of visits: call start(), then stop(). If __init__ raises, no file stays open."""

    def __init__(
        self,
        config: Config,
        proxies: Proxies,
        lookup: Callable[[str], Route | None],
        subscribers: Sequence[Subscriber],
    ):
        """``lookup``: see Counts. ``subscribers`` are those that the configuration does not name.
        Raises LogFileError."""
        self.log_file: LogFile | None = None
        # For those that show them: the metrics, and the dashboard behind its login.
        shown = config.metrics_port is not None or config.has_login
        self.counts = Counts(lookup) if shown else None
        readers = list(subscribers)
        if self.counts is not None:
            readers.append(self.counts)
        if config.access_log != OFF:
            self.log_file = LogFile("ACCESS_LOG", config.access_log, config.processes > 1)
            readers.append(_writer(self.log_file, access_log.FORMATS[config.log_format]))
        # For the ports; None: nothing reads records, so none are made.
        self.visits: Visits | None = None
        if readers:
            logs = self.log_file is not None
            self.visits = Visits(readers, proxies, ids=logs, detailed=logs or bool(subscribers))

    def count(self, hostname: str) -> Count:
        """The visits of a hostname, as far as they are counted."""
        self.settle()
        return Count() if self.counts is None else self.counts[hostname]

    def settle(self) -> None:
        """Return when all visits that have ended are counted."""
        if self.visits is not None:
            self.visits.settle()

    def start(self) -> None:
        """Raises NoThread."""
        if self.visits is not None:
            self.visits.start()
        if self.log_file is not None:
            self.log_file.start()

    def reopen(self) -> None:
        """Open the files anew. Any thread; waits for nothing."""
        if self.log_file is not None:
            self.log_file.reopen()

    def stop(self) -> None:
        if self.visits is not None:
            self.visits.stop()
        if self.log_file is not None:
            self.log_file.stop(LAST_LINES)


def _writer(log_file: LogFile, line: Line) -> Subscriber:
    def write(visits: Sequence[Visit]) -> None:
        try:
            lines = [line(visit) for visit in visits]
        except Exception:
            lines = []
            for visit in visits:  # one of them has no line; the others have
                try:
                    lines.append(line(visit))
                except Exception:
                    log.exception("a visit has no line in the access log (bug, traceback follows)")
        log_file.write_all(lines)

    return write
