"""The objects that one shard consists of, as the composition root makes them."""

from dataclasses import dataclass

from torch_ps.ps.checkpoint.checkpointer import Checkpointer
from torch_ps.ps.cluster.lead_client import LeadClient
from torch_ps.ps.cluster.registration import Registrar
from torch_ps.ps.failover.etcd_lease import EtcdLease
from torch_ps.ps.failover.fencing import Fence
from torch_ps.ps.failover.primary import Replication
from torch_ps.ps.failover.standby import Standby
from torch_ps.ps.job.connections import Connections
from torch_ps.ps.job.job import Job
from torch_ps.ps.job.replication_status import ReplicationStatus
from torch_ps.ps.job.seat_driver import SeatDriver
from torch_ps.ps.job.seed_receiver import SeedReceiver
from torch_ps.ps.job.status import StatusReporter


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """One shard.

    Attributes:
        job: Members, engine and roster.
        driver: Driver of the seat that decides whether this server serves.
        connections: Opens streams and renews leases.
        seeds: Receives the first parameters.
        registrar: Gives other shards their places, on the lead.
        replication: This server as a primary.
        standby: This server as a standby; None if it was started as a primary.
        replication_status: What both sides report.
        fence: Ends this server when another one serves in its place.
        lease: The lease of the seat; None without etcd.
        lead: The lead, as another shard calls it; None on the lead.
        checkpointer: Writes checkpoints; None without --checkpoint.
        status: Figures for ps-status and /metrics.
    """

    job: Job
    driver: SeatDriver
    connections: Connections
    seeds: SeedReceiver
    registrar: Registrar
    replication: Replication
    standby: Standby | None
    replication_status: ReplicationStatus
    fence: Fence
    lease: EtcdLease | None
    lead: LeadClient | None
    checkpointer: Checkpointer | None
    status: StatusReporter
