"""The sans-IO core of the server: calls go in, frozen effects come out, each with a sentence that says why.

This is the contract for whoever drives the core: the server (``ps/engine``, ``ps/job``), the simulator of the tests
(``tests/sim/world.py``), or a shell of your own.

Machines
    =================  ===============================  ======================================================
    ``Shard``          every server                     admits pushes and pulls, follows the roster
    ``Membership``     the lead (shard 0)               sessions, leases, roster epochs
    ``SampleAssigner`` the lead, inside its ``Shard``   which samples are whose
    ``CutPlanner``     the lead, with checkpoints       at which version all shards copy their state
    ``Incarnation``    every server                     which joint start of the servers a call belongs to
    ``MeanNorms``      every server, in its ``Shard``   from whose gradients the norm of a step's mean is taken
    ``SeederChoice``   the lead                         whose parameters the job begins with
    ``Seat``           a server with a standby or etcd  who may serve; see ``torch_ps.ps.core.failover``
    =================  ===============================  ======================================================

Calls in
    A worker joins                 ``Membership.join``, on the lead
    A sign of life, or a goodbye   ``Membership.renew``, ``Membership.leave``, on the lead
    A gradient of one bucket       ``Shard.push``
    A wish for parameters          ``Shard.pull``; with ``worker=None`` from somebody who only looks
    A stream broke                 ``Shard.disconnected``, before anything that arrives on the next stream
    A new roster                   ``Shard.set_roster``: from ``Announce`` on the lead, from the lead elsewhere
    A question for a norm          ``Shard.ask_norm``; ``Shard.norms_due`` after pushes and rosters
    A wish for samples             ``Shard.request_samples``, ``Shard.return_samples``, on the lead
    Time passes                    see "Who ticks"

Effects out
    ``Apply``     one optimizer step on one bucket        ``Discard``   forget a payload
    ``Release``   answer a push or a pull                 ``Evict``     end the streams of a session
    ``Wait``      the answer comes later (``Shard.holds``)   ``Announce``  there is a new roster

Order
    1. One call at a time, for all machines of a process together: the core has no locks. The server makes every call on
       its event loop.
    2. When ``push`` returns, hold the payload under (worker, session, bucket, step); if one is held there already, the
       push is a repeat and the first payload stays. Then obey the effects in the order in which they were returned,
       before the next call.
    3. Obeying may mean queueing. ``Apply`` takes its payloads out of hold when it is queued, not when it runs. Per
       bucket, ``Apply`` and ``Release`` run first in, first out, so an answer holds at least the version that it names.
       Buckets are independent of each other. The core decides ahead of the work and is never told that it is done.
    4. Every payload ends in exactly one ``Apply`` or ``Discard``.
    5. Every answer carries the newest roster epoch that the shard knows; a worker puts the newest one that it has seen
       into its pushes. A shard parks a push of an epoch that it does not know yet: no push is judged by an old roster.
    6. ``Announce`` goes to the lead's own shard first, then to the other shards, in any order and as late as it may be.
    7. An ``Evict`` may come twice, from the membership and from the shard; the second one finds nothing to end.

Who ticks
    The lead calls ``Membership.tick`` every ``tick_seconds(lease)`` (an eighth of the lease, at most 1 s) and then
    ``CutPlanner.due``. If the process itself stood still, ``Membership.stood_still`` comes first: it is not the workers
    that were silent. ``Shard`` needs no tick: ``now`` is only noted, to say since when an answer is held.
    Every ``now`` is in seconds of one steady clock.

What may be repeated
    Everything that a broken connection may repeat: ``push`` (counted once, answered each time), ``pull``, ``renew``,
    ``leave``, ``disconnected``, ``request_samples``, ``CutPlanner.reported``, ``Incarnation.enter``, and a roster that
    is not newer than the known one. A second ``join`` with the same digest is a repeat, too; with another one it ends
    the session that the name had and begins another.

What a refused call leaves
    A call that raises an error of ``torch_ps.common.errors`` has changed nothing, and there is no payload to hold.

State
    Checkpoint: a roster with ``cut=V`` makes each bucket's ``Apply`` of version V carry a ``record``, its part of the
    checkpoint; with the last bucket ``Shard.cut.taken`` has the sections (``export`` of what else belongs to it).
    ``Shard.restore`` takes the records before the first roster, ``Membership.restore`` and ``SampleAssigner.restore``
    their exports. Samples that were held and not done are free again; members are expected until they are heard of.
    Standby: after ``Shard.replicate(bucket)`` every ``Apply`` of the bucket carries its ``progress``; ``hand_over`` and
    ``take_over`` of the lead's machines lose nothing. All of it is plain JSON data.

A shell in full, with numbers for gradients and SGD for the optimizer:

    >>> from torch_ps.ps.core.effects import Announce, Apply, Discard, Evict, Release, Wait
    >>> from torch_ps.ps.core.membership import Membership
    >>> from torch_ps.ps.core.modes import Mode
    >>> from torch_ps.ps.core.policy import Push
    >>> from torch_ps.ps.core.shard import Shard
    >>> lead, core = Membership(quorum=2, lease=15.0), Shard(buckets=1, mode=Mode(name="sync"))
    >>> held, parameters, sessions = {}, [10.0], {}

    >>> def obey(effects):
    ...     for effect in effects:
    ...         match effect:
    ...             case Announce():
    ...                 obey(core.set_roster(effect.roster))
    ...             case Apply(bucket=bucket):
    ...                 total = weight = 0.0
    ...                 for c in effect.contributions:
    ...                     total += c.weight * held.pop((c.worker, c.session, bucket, c.step))
    ...                     weight += c.weight
    ...                 if weight:
    ...                     parameters[bucket] -= 0.5 * effect.lr_scale * total / weight
    ...             case Release():
    ...                 print(f"{effect.worker} goes on with {parameters[effect.bucket]}: {effect.reason}")
    ...             case Wait():
    ...                 print(f"{effect.worker} waits: {core.holds(effect.worker, effect.session)[0].reason}")
    ...             case Discard():
    ...                 del held[effect.worker, effect.session, effect.bucket, effect.step]
    ...             case Evict():
    ...                 print(f"the streams of {effect.worker} end: {effect.reason}")

    >>> def join(worker, now):
    ...     member, effects = lead.join(worker, None, now, core.clock)
    ...     sessions[worker] = member.session
    ...     obey(effects)

    >>> def push(worker, step, gradient, samples, now):
    ...     session = sessions[worker]
    ...     effects = core.push(Push(worker, session, step, 0, step, samples, core.roster.epoch), now)
    ...     held.setdefault((worker, session, 0, step), gradient)
    ...     obey(effects)

    >>> join("w0", 0.0); join("w1", 0.0)
    >>> push("w0", step=0, gradient=4.0, samples=1, now=1.0)
    w0 waits: step 0 waits for w1
    >>> push("w0", step=0, gradient=4.0, samples=1, now=1.0)  # a repeat: its connection broke
    w0 waits: step 0 waits for w1
    >>> push("w1", step=0, gradient=8.0, samples=3, now=2.0)
    w0 goes on with 6.5: step 0 closed with 2 of 2 pushes
    w1 goes on with 6.5: step 0 closed with 2 of 2 pushes

A refused call leaves nothing, and a worker that is silent for longer than its lease holds nobody up:

    >>> push("w1", step=5, gradient=8.0, samples=3, now=2.0)
    Traceback (most recent call last):
    torch_ps.common.errors.StepConflict: worker 'w1' pushed step 5 of bucket 0; step 1 is open
    >>> push("w0", step=1, gradient=4.0, samples=1, now=10.0)
    w0 waits: step 1 waits for w1
    >>> lead.renew("w0", sessions["w0"], now=10.0)
    >>> obey(lead.tick(now=16.0, open_step=core.clock))
    the streams of w1 end: no sign of life from w1 for 16.0 s (lease 15 s)
    w0 goes on with 4.5: step 1 closed with 1 of 1 pushes
    the streams of w1 end: session 2 of worker 'w1' is not in roster epoch 3; join again
    >>> held
    {}

Rules of this package
    1. Pure standard library, ``torch_ps.common.errors`` and value types of ``torch_ps.common`` only: no gRPC, tensors,
       clock, random numbers or environment. Time comes in as ``now``.
    2. Check everything, then change something.
    3. In the server, only ``modes.py`` and the options know the names of modes; everything else asks a ``Mode``.
    4. What a message costs does not grow with the number of buckets or datasets of the shard.
"""
