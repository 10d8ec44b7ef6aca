"""Failover: the state machines that decide which server of a shard may serve, and what it may acknowledge.

Each server of a shard has one ``Seat``. A *record* is whatever changes the shard's state: a step, a roster, an
electorate. The primary numbers its records and sends them to its standby in order, so the standby's state is the
primary's at some record, and training can go on from there. This is the contract for whoever drives a seat; the
server does so in ``ps/job/seat_driver.py``.

Machines
    ``ElectedSeat``   a majority of the workers lets a server go on alone: two rounds of votes, as in Paxos
    ``LeasedSeat``    a key in etcd, written by transactions and held under a lease

Calls in, on a primary
    ``record``                         a record was made: send it, then obey
    ``attach``                         a standby has the state of some record and gets all that come after it
    ``receipt``                        the standby has all records up to a number; also its sign of life
    ``lost``                           the standby is gone, or silent for too long
    ``set_roster``                     the workers that vote have changed
    ``met``                            a worker knows where the standby is
Calls in, on a standby
    ``begin_at``                       the state of a record has been transferred
    ``received``                       a record has come
    ``asked``                          a worker cannot reach the primary and asks this server to take over
Calls in, on both
    ``voted``, ``accepted``, ``promised``   workers answer ``RequestVotes`` and ``Declare`` (elected)
    ``observed``, ``decided``               etcd was looked at; a transaction is done (leased)
    ``refused``                             somebody says that another configuration is in force
    ``tick``                                time passes

Decisions out
    ``Acknowledge(n)``    whatever waits for records up to n may go out: answers, rosters, norms
    ``ConfigChange``      send it to the standby as a record, in order with the others
    ``Introduce``         tell every worker where the standby is, also those that connect later
    ``Append(n)``         keep and apply the record that has come; without it, drop the record
    ``Receipt(n)``        tell the primary that all records up to n are here
    ``Refuse``            tell the sender of a record that nothing is taken from it any more
    ``RequestVotes``      ask every elector for its vote; keep asking those that connect later
    ``Declare``           tell every worker a configuration: in force, or to be accepted
    ``Transact``          write the key in etcd if it is as it was
    ``Serve``             the standby is the primary now: build the job from the records taken, then listen
    ``StepDown``          another server serves: stop

Order
    1. One call at a time. Obey the decisions in the order in which they were returned, before the next call.
    2. Records, ``ConfigChange`` among them, reach the standby in the order of their numbers. Nothing that depends on a
       record goes out before an ``Acknowledge`` of its number or a higher one.
    3. A leased seat is told the time before each call, ``seat.at(now).record()``, in seconds of a clock that also runs
       while the machine is suspended.

Who ticks
    The shell calls ``tick`` every half second: what has not been answered is asked again. With etcd it looks at the key
    several times within a lease, each time after it has renewed the lease, and calls ``observed``.

What may be repeated, lost, delayed or reordered
    Every message between servers and workers. Each names its server or its term, and what is of another is ignored.

What a refused call leaves
    ``ProtocolError`` (a call that does not fit the role) and ``NameTaken`` (somebody else has the seat) change nothing
    about who serves.

State
    None is exported: a server that is started again has another name, and nothing that was promised to its earlier life
    counts for it. What a worker has promised is in its ``Acceptor`` (``worker/transport/paxos_acceptor.py``).

A primary and its standby, with one worker that votes:

    >>> from torch_ps.common.wire.terms import Configuration, Vote
    >>> from torch_ps.ps.core.failover.elected import ElectedSeat
    >>> worker = ("w0", 1)
    >>> primary = ElectedSeat("P", patience=10.0)
    >>> primary.set_roster([worker])
    ()
    >>> standby = ElectedSeat("S", "P", patience=10.0)
    >>> primary.attach("S")
    (Introduce(standby='S'),)
    >>> (change,) = primary.met(worker, "S")
    >>> standby.received("P", change.number, change)
    (Append(number=1), Receipt(number=1))
    >>> primary.receipt("S", 1)[0]
    Acknowledge(number=1)

From now on nothing is acknowledged that the standby does not have:

    >>> primary.record()
    (2, ())
    >>> standby.received("P", 2)
    (Append(number=2), Receipt(number=2))
    >>> primary.receipt("S", 2)
    (Acknowledge(number=2),)

The primary dies. The worker asks the standby to take over, votes for it, and accepts it:

    >>> (request,) = standby.asked(worker, now=0.0)
    >>> (declare,) = standby.voted(worker, Vote(request.term, True, request.term, Configuration()))
    >>> declare.serving
    False
    >>> serve, declare, acknowledge = standby.accepted(worker, declare.configuration.term)
    >>> print(serve.configuration, "-", serve.reason)
    S alone - 1 of 1 workers have given it the seat

If the old primary lives after all, it is told so with the next record that it sends, and steps down:

    >>> (refuse,) = standby.received("P", 3)
    >>> (step_down,) = primary.refused(refuse.configuration, serving=refuse.serving)
    >>> print(step_down.reason)
    term 2 of S is in force: S alone serves

Source: Vertical Paxos (Lamport, Malkhi, Zhou, PODC 2009); docs/failover.md for operators.
"""
