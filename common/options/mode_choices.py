"""Values of the options that choose how workers are synchronised: the one list, for options, core and comparison.

Source: Ho et al., NeurIPS 2013, for bounded staleness (ssp); Zheng et al., arXiv:1609.08326, for delay compensation.
"""

#: Modes, the default first: bulk synchronous, asynchronous, stale synchronous.
MODES = ("sync", "async", "ssp")
#: Steps that the fastest worker of mode ssp may lead the slowest by, where ``slack`` is not given.
DEFAULT_SLACK = 2
#: Learning rate of an asynchronous push as a function of its staleness.
STALENESS_LR = ("constant", "inverse")
#: Forms of delay compensation, each with its strength (lambda) where none is given.
COMPENSATION_STRENGTHS = {"constant": 0.04, "adaptive": 2.0}
DELAY_COMPENSATION = ("off", *COMPENSATION_STRENGTHS)
