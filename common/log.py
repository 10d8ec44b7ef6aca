"""Logging to stderr: one line per event, with the time and the process that logs it.

    2026-11-24T03:29:36.123Z server 0/2: worker w1 joined with rank 1
    2026-11-24T03:29:51.201Z server 0/2: warning: worker w1 was silent for 15 s and is dropped

Rules of this file
  1. An event is one line, whatever a peer writes into a name: control characters are escaped.
  2. A traceback follows its event, each line behind "    | ", so that a line without it always begins an event.
  3. Only the logger "torch_ps" is configured; the logging of a user's script stays as it is.

Source: RFC 3339 for the time, in UTC, so that the lines of several hosts sort together.
"""

import logging
import sys
import time
from typing import TextIO

_CONTROL = (*range(32), *range(127, 160), 0x2028, 0x2029)
_ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROL}


def setup(process: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send the events of this process to ``stream``; a second call replaces the first.

    Args:
        process: role and name of this process, such as "server 0/2" or "worker w1".
        level: least level that is written: debug, info, warning or error.
        stream: stream to write to; stderr if None.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Line(process))
    logger = logging.getLogger("torch_ps")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


class _Line(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self.process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{self.process}: {level}{record.getMessage()}".translate(_ESCAPES)
        line = f"{seconds}.{int(record.msecs):03d}Z {text}"
        if not record.exc_info:
            return line
        trace = self.formatException(record.exc_info).split("\n")
        return "\n".join((line, *("    | " + each.translate(_ESCAPES) for each in trace)))
