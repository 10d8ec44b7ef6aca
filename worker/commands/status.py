"""ps-status: one look at a live job, or with --watch one after the other.

--json      one object a look, on a line of its own
--watch     a table that stays in its place on a terminal; elsewhere one below the other
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import click
from rich.console import Console
from rich.live import Live

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options import security_options as protection
from torch_ps.common.options.command_line import Check, Command, at_least, check_all, more_than, option, options_of
from torch_ps.common.rpc.credentials import access_of
from torch_ps.common.wire import address
from torch_ps.worker.commands.job_view import Facts, Look
from torch_ps.worker.commands.status_table import tables
from torch_ps.worker.runtime.access import addresses_of
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers

#: Characters of a line where there is no terminal.
WIDE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusConfig:
    servers: str = option(
        "",
        "every shard of the job, shard 0 first",
        metavar="HOST:PORT,...",
        check=Check("", lambda text: not text or bool(address.parse_servers(text))),
        common=True,
    )
    watch: bool = option(False, "look again and again, with rates, until the job ends or Ctrl-C", common=True)
    json: bool = option(False, "one JSON object a look, in place of tables", common=True)
    interval: float = option(1.0, "watch: time from one look to the next", unit="seconds", check=more_than(0))
    watch_seconds: float = option(0.0, "watch: end after so long; 0 does not", unit="seconds", check=at_least(0))
    tls_ca: str = protection.tls_ca()
    tls_cert: str = protection.tls_cert()
    tls_key: str = protection.tls_key()
    token_file: str = protection.token_file()
    insecure: bool = protection.insecure()
    timeout: float = option(5.0, "longest wait for a server", unit="seconds", check=Check("> 0", lambda s: s > 0))

    def __post_init__(self) -> None:
        check_all(self)
        if self.watch_seconds and not self.watch:
            raise ConfigError(f"watch_seconds={self.watch_seconds:g} is for watch")


@click.command(cls=Command)
@options_of(StatusConfig)
def main(status: StatusConfig) -> None:
    r"""Show a live job: workers, clocks, staleness, who waits for whom and since when.

    \b
    ps-status --servers 127.0.0.1:50051
    ps-status --servers 127.0.0.1:50051 --watch
    """
    access = access_of(status.tls_ca, status.tls_cert, status.tls_key, status.token_file, insecure=status.insecure)
    shards = addresses_of(status.servers or None)
    job = Watched([ShardServers(Link(servers[0], access), servers) for servers in shards], status.timeout)
    if status.watch:
        watch(job, status)
    elif status.json:
        _line(job.look())
    else:
        console = _console()
        console.print(tables(job.look(), console.width))


class Watched:
    """The servers of one job, asked again and again.

    Args:
        seconds: in which each has to answer.
    """

    def __init__(self, shards: list[ShardServers], seconds: float) -> None:
        self._shards, self._seconds = shards, seconds
        self._last: Look | None = None

    def look(self) -> Facts:
        """Ask every shard.

        Raises:
            PsError: one does not answer, nor its standby.
        """
        for shard_servers in self._shards:
            if len(shard_servers.servers) > 1:
                shard_servers.describe(self._seconds)  # has its link lead to the one that serves
        links = [shard_servers.link for shard_servers in self._shards]
        replies = [link.status(self._seconds) for link in links]
        self._last = Look([str(link.address) for link in links], replies, self._last)
        return self._last.facts()


def watch(job: Watched, status: StatusConfig) -> None:
    """Show look after look.

    Raises:
        PsError: the job cannot be seen at all. A job that was seen may end: that is said, and no error.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = _console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not status.json else None

    def show(facts: Facts) -> None:
        if status.json:
            _line(facts)
        elif live is not None:
            live.update(tables(facts, console.width, live=True), refresh=True)
        else:
            console.print(tables(facts, console.width, live=True))

    looks, end = 0, ""
    with live or nullcontext():
        for _ in _beats(stop, status.interval, status.watch_seconds):
            try:
                show(job.look())
                looks += 1
            except PsError as error:
                if not looks:
                    raise
                end = f"the job cannot be seen any more, it has ended or is out of reach: {error}"
                break
    if end:
        click.echo(end, err=True)


def _beats(stop: threading.Event, interval: float, seconds: float) -> Iterator[None]:
    """When to look: at once, then every ``interval`` until ``seconds`` are over (0: for ever) or ``stop`` is set."""
    begin = beat = time.monotonic()
    while not stop.is_set():
        yield
        beat = max(beat + interval, time.monotonic())
        if seconds and beat > begin + seconds:
            return
        stop.wait(beat - time.monotonic())


def _console() -> Console:
    """Where output is kept, lines may be long."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


def _line(facts: Facts) -> None:
    sys.stdout.write(json.dumps({"time": time.time(), **facts.json()}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
