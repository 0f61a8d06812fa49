"""The program's log as JSON, one object a line (LOG_FORMAT=json)."""

import json
import logging
from datetime import datetime, timezone

_encode = json.JSONEncoder(separators=(",", ":")).encode  # ASCII alone, so a line stays one line


class JsonLines(logging.Formatter):
    """``time`` is in UTC; ``logger`` is the part of the program; ``traceback`` is there after a
    bug."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, timezone.utc)
        entry = {
            "time": at.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return _encode(entry)
