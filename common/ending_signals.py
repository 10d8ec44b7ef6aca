"""Signals that end a command: SIGINT, SIGTERM, and SIGHUP unless whoever started it has it ignored, as ``nohup`` does.

Source: nohup(1).
"""

import signal


def ending_signals() -> tuple[signal.Signals, ...]:
    """Signals at which a command ends in order. Call it before any handler of SIGHUP is set."""
    always = (signal.SIGINT, signal.SIGTERM)
    return always if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*always, signal.SIGHUP)


def ignore_ending_signals() -> None:
    """At the end of a command: let another such signal, as ``ps-run`` sends one, not replace a good exit code.

    The interpreter restores the default handlers before it has ended, so that the signal would kill it.
    """
    for number in ending_signals():
        signal.signal(number, signal.SIG_IGN)
