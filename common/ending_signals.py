"""Signals that end a command: SIGINT, SIGTERM, and SIGHUP unless whoever started it has it ignored, as ``nohup`` does.

Source: nohup(1).
"""

import signal


def ending_signals() -> tuple[signal.Signals, ...]:
    """Signals at which a command ends in order. Call it before any handler of SIGHUP is set."""
    always = (signal.SIGINT, signal.SIGTERM)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)
