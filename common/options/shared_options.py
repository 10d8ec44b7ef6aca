"""Options that servers and workers both have, each declared once."""

import re
from typing import Any

from torch_ps.common.options.fields import option

LEVELS = ("debug", "info", "warning", "error")
#: A device by the name that torch gives it.
DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?", re.ASCII)


def codec_modules() -> Any:
    """Declare the option ``codecs``."""
    return option("", "modules to import that register your own codecs", metavar="MODULE[,...]")


def log_level() -> Any:
    """Declare the option ``log_level``."""
    return option("info", "least level of the log lines on stderr", choices=LEVELS, metavar="LEVEL")
