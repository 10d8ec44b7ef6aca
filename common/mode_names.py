"""Names of the modes and of what varies within them: the single list that options, servers and reports share.

``ps/core/modes.py`` gives each name its meaning; a test proves that it has exactly these. ``options/config.py`` checks
which option goes with which mode.
"""

#: Values of ``--mode``.
MODES = ("sync", "async", "ssp")
#: Values of ``--staleness-lr``: the learning rate of a stale push as it is, or divided by 1 + staleness.
STALENESS_LR = ("constant", "inverse")
#: Forms of ``--delay-compensation`` that correct a stale gradient, each with its strength where none is given.
COMPENSATIONS = {"constant": 0.04, "adaptive": 2.0}
#: All forms of ``--delay-compensation``.
DELAY_COMPENSATION = ("off", *COMPENSATIONS)
