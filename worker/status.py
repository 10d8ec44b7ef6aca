"""ps-status: one look at a live job."""

from dataclasses import dataclass

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torch_ps.common import address, ballots, protection
from torch_ps.common.credentials import access_of
from torch_ps.common.errors import PsError
from torch_ps.common.options import Check, Command, option, options_of
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.worker.client import addresses_of
from torch_ps.worker.transport import Link
from torch_ps.worker.voter import Voter
from torch_ps.worker.waits import sentence, spoken_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    servers: str = option(
        "",
        "every shard of the job, shard 0 first",
        metavar="HOST:PORT,...",
        check=Check("", lambda text: not text or bool(address.parse_servers(text))),
        common=True,
    )
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()
    timeout: float = option(5.0, "longest wait for a server", unit="seconds", check=Check("> 0", lambda s: s > 0))


@click.command(cls=Command)
@options_of(StatusConfig)
def main(status: StatusConfig) -> None:
    r"""Show a live job: workers, clocks, staleness, who waits for whom and since when.

    \b
    ps-status --servers 127.0.0.1:50051
    """
    try:
        access = access_of(status.tls_ca, status.tls_cert, status.tls_key, status.token_file, insecure=status.insecure)
        shards = addresses_of(status.servers or None)
        voters = [Voter(Link(servers[0], access), servers) for servers in shards]
        for voter in voters:
            if len(voter.servers) > 1:
                voter.describe(status.timeout)
        links = [voter.link for voter in voters]
        replies = [link.status(status.timeout) for link in links]
    except PsError as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    lead = replies[0]
    what = "initialised" if lead.initialised else "no parameters yet"
    start = "" if lead.open else "; the first workers have not all joined"
    console.print(
        f"mode {lead.mode_details or lead.mode}, {what}, up {spoken_seconds(lead.uptime_seconds)}, "
        f"roster epoch {lead.epoch}{start}"
    )
    for advice in (advice for reply in replies for advice in reply.advice):
        console.print(f"[bold]warning[/bold]: {escape(advice)}", highlight=False)
    if lead.HasField("checkpoint"):
        console.print(escape(_checkpoint(lead.checkpoint)), highlight=False)
    console.print(_workers(lead, replies))
    console.print(_shards(links, replies))


def _checkpoint(kept: pb.CheckpointStatus) -> str:
    age = f", {spoken_seconds(kept.age_seconds)} ago" if kept.age_seconds else ""
    good = f"version {kept.version}{age}" if kept.version else "none yet"
    failed = f"; {kept.failures} failed, the last: {kept.error}" if kept.error else ""
    return f"last good checkpoint: {good}, in {kept.folder}{failed}"


def _workers(lead: pb.StatusReply, replies: list[pb.StatusReply]) -> Table:
    table = Table(title="workers", title_justify="left")
    for column in ("rank", "worker", "clock", "pushed", "pulled", "plane", "silent", "waits"):
        table.add_column(column, justify="left" if column in ("worker", "plane", "waits") else "right")
    for worker in lead.worker:
        views = [w for reply in replies for w in reply.worker if w.worker == worker.worker]
        table.add_row(
            str(worker.rank),
            worker.worker if worker.connected else f"{worker.worker} (not connected)",
            str(worker.clock),
            _bytes(sum(view.bytes_pushed for view in views)),
            _bytes(sum(view.bytes_pulled for view in views)),
            _plane(views),
            spoken_seconds(worker.silent_seconds),
            sentence(worker.worker, replies),
        )
    return table


def _shards(links: list[Link], replies: list[pb.StatusReply]) -> Table:
    table = Table(title="shards", title_justify="left")
    for column in (
        "shard",
        "address",
        "standby",
        "parameters",
        "buckets",
        "version",
        "staleness mean",
        "max",
        "late",
        "not finite",
    ):
        table.add_column(column, justify="left" if column in ("address", "standby") else "right")
    for link, reply in zip(links, replies, strict=True):
        count = sum(reply.staleness.values())
        mean = sum(k * n for k, n in reply.staleness.items()) / count if count else 0.0
        table.add_row(
            f"{reply.shard}/{reply.num_shards}",
            str(link.address),
            _standby(reply.standby),
            f"{reply.num_parameters:,}",
            str(reply.num_buckets),
            str(reply.version),
            f"{mean:.2f}",
            str(max(reply.staleness, default=0)),
            str(reply.late),
            str(reply.nonfinite),
        )
    return table


def _standby(standby: pb.StandbyStatus) -> str:
    """The server that would take over, how far it is behind, and the term."""
    configuration = standby.configuration
    if not configuration.term.number:
        return "-"
    if not configuration.standby:
        return f"none ({standby.role}, term {configuration.term.number})"
    where = ballots.address_of(configuration.standby)
    behind = f"{standby.lag_records} records, {standby.lag_seconds:.1f} s behind" if standby.lag_records else "has all"
    return f"{where} {behind} ({standby.role}, term {configuration.term.number})"


def _plane(views: list[pb.WorkerStatus]) -> str:
    """What carries this worker's buckets."""
    shares = {view.shares_memory for view in views}
    return "both" if len(shares) > 1 else "memory" if True in shares else "network"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
