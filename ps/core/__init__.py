"""The sans-IO core: calls go in, frozen effects come out, each with a sentence that says why.

Rules of this package
  1. Pure standard library and ``torch_ps.common.errors`` only: no gRPC, tensors, clock, random or environment.
  2. Time comes in as ``now``, in seconds of any steady clock. The caller serialises access: one call at a time.
  3. Check everything, then change something: a refused call (one that raises) leaves no trace.
  4. Nothing outside this package branches on the mode; inside it, only ``mode.py`` names one.

    Membership (lead only)  --Announce(roster)-->  Shard (every server)  --Apply, Release, ...-->  the shell
      join, renew, leave, tick                       push, pull, set_roster, disconnected

    effects.py   what the shell is told to do          roster.py        who takes part: roster, leases, sessions
    shard.py     admits calls, parks, delegates        policy.py        what a mode has to decide, for one bucket
    sync.py      a step closes when all have pushed    asynchronous.py  every push is applied at once
    ledger.py    what has been applied, exactly once   mode.py          the table of modes
    data.py      which samples are whose            ranges.py       positions of an epoch
    stability.py what learning rates are stable        divergence.py    whether a run is being lost
"""
