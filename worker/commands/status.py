"""ps-status: the state of a live job, once or, with --watch, again and again.

--json      one JSON object per poll and job, each on one line
--watch     on a terminal one table that is redrawn in place; elsewhere a new table below the last one
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live

from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.status_config import StatusConfig
from torch_ps.common.rpc.credentials import access_of
from torch_ps.worker.commands.job_view import JobView, Poll
from torch_ps.worker.commands.status_table import render
from torch_ps.worker.runtime.access import jobs_of
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers

#: Characters per line where the output is not a terminal.
WIDE = 200


@click.command(cls=Command)
@options_of(StatusConfig)
def main(status: StatusConfig) -> None:
    r"""Show a live job: its workers, their clocks and staleness, and who waits for whom and since when.

    \b
    ps-status --servers 127.0.0.1:50051
    ps-status --servers 127.0.0.1:50051 --watch
    """
    access = access_of(status.tls_ca, status.tls_cert, status.tls_key, status.token_file, insecure=status.insecure)
    jobs = [job for job in jobs_of(status.servers or None) if status.job in ("", job.name)]
    if not jobs:
        raise ConfigError(f"job={status.job} is none of the jobs that servers lists")
    pollers = [
        Poller(job.name, [ShardServers(Link(servers[0], access), servers) for servers in job.shards], status.timeout)
        for job in jobs
    ]
    if status.watch:
        watch(pollers, status)
    elif status.json:
        _write_json([poller.poll() for poller in pollers])
    else:
        console = _console()
        console.print(_render([poller.poll() for poller in pollers], console.width))


class Poller:
    """Asks every shard of a job for its status, as often as ``poll`` is called.

    Args:
        name: name of the job; "" if it has none.
        shards: servers of each shard, shard 0 first.
        seconds: longest wait for one answer.
    """

    def __init__(self, name: str, shards: list[ShardServers], seconds: float) -> None:
        self._name, self._shards, self._seconds = name, shards, seconds
        self._last: Poll | None = None

    def poll(self) -> JobView:
        """Ask every shard once.

        Raises:
            PsError: a shard does not answer, and neither does its standby.
        """
        for shard_servers in self._shards:
            if len(shard_servers.servers) > 1:
                shard_servers.describe(self._seconds)  # points the link at the server that is primary now
        links = [shard_servers.link for shard_servers in self._shards]
        replies = [link.status(self._seconds) for link in links]
        self._last = Poll([str(link.address) for link in links], replies, self._last, job=self._name)
        return self._last.view()


def watch(jobs: Sequence[Poller], status: StatusConfig) -> None:
    """Poll and show until ``status.watch_seconds`` are over, a job ends, or a signal comes.

    Raises:
        PsError: the first poll fails. A later failure means that the job has ended: it is reported, not raised.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    console = _console()
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not status.json else None

    def show(views: Sequence[JobView]) -> None:
        if status.json:
            _write_json(views)
        elif live is not None:
            live.update(_render(views, console.width, live=True), refresh=True)
        else:
            console.print(_render(views, console.width, live=True))

    polls, end = 0, ""
    with live or nullcontext():
        for _ in _ticks(stop, status.interval, status.watch_seconds):
            try:
                show([job.poll() for job in jobs])
                polls += 1
            except PsError as error:
                if not polls:
                    raise
                end = f"the job no longer answers: it has ended or cannot be reached: {error}"
                break
    if end:
        click.echo(end, err=True)


def _ticks(stop: threading.Event, interval: float, seconds: float) -> Iterator[None]:
    """Yield at once, then every ``interval`` until ``seconds`` are over (0: for ever) or ``stop`` is set."""
    begin = beat = time.monotonic()
    while not stop.is_set():
        yield
        beat = max(beat + interval, time.monotonic())
        if seconds and beat > begin + seconds:
            return
        stop.wait(beat - time.monotonic())


def _console() -> Console:
    """A console as wide as the terminal; output to a file or pipe gets long lines."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=WIDE)


def _render(views: Sequence[JobView], width: int, *, live: bool = False) -> RenderableType:
    return Group(*(render(view, width, live=live) for view in views))


def _write_json(views: Sequence[JobView]) -> None:
    for view in views:
        sys.stdout.write(json.dumps({"time": time.time(), **view.json()}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
