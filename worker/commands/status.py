"""ps-status: the state of a live job, once or, with --watch, again and again.

--json      one JSON object per poll and job, each on one line
--watch     on a terminal one table that is redrawn in place; elsewhere a new table below the last one

A shard that does not answer is named, and the others are shown. With --watch the command goes on until it is back.

    exit code 0   every shard has answered, or the servers were stopped
    exit code 1   a shard does not answer (at the last poll), or no server has for a lease: the job is lost
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live

from torch_ps.common.errors import ConfigError, PsError, ServerStopped, Unreachable
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.status_config import StatusConfig
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.rpc.credentials import access_of
from torch_ps.worker.commands.job_view import JobView, MissingView, Poll
from torch_ps.worker.commands.status_table import render
from torch_ps.worker.runtime.access import jobs_of
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers
from torch_ps.worker.transport.wait_reasons import format_seconds

#: Characters per line where the output is not a terminal.
WIDE = 200
#: Seconds for which one call listens for the end of a job, and between two of them.
LISTEN_SECONDS, LISTEN_PAUSE_SECONDS = 3600.0, 1.0


@click.command(cls=Command)
@options_of(StatusConfig)
def main(status: StatusConfig) -> None:
    r"""Show a live job: its workers, their clocks and staleness, and who waits for whom and since when.

    \b
    ps-status --servers 127.0.0.1:50051
    ps-status --servers 127.0.0.1:50051 --watch
    """
    sys.exit(show(status))


def show(status: StatusConfig) -> int:
    """Do what ``status`` asks for. Returns the exit code.

    Raises:
        ConfigError: no servers are given, or none of that job.
        PsError: no server of a job answers at the first poll.
    """
    if not status.servers:
        raise ConfigError("no servers: give --servers HOST:PORT[,...] or $PS_SERVERS")
    access = access_of(status.tls_ca, status.tls_cert, status.tls_key, status.token_file, insecure=status.insecure)
    jobs = [job for job in jobs_of(status.servers) if status.job in ("", job.name)]
    if not jobs:
        raise ConfigError(f"job={status.job} is none of the jobs that servers lists")
    pollers = [
        Poller(job.name, [ShardServers(Link(servers[0], access), servers) for servers in job.shards], status.timeout)
        for job in jobs
    ]
    if status.watch:
        return watch(pollers, status)
    views = [poller.poll() for poller in pollers]
    if status.json:
        _write_json(views)
    else:
        console = _console()
        console.print(_render(views, console.width))
    return int(any(view.missing for view in views))


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
        self._threads = ThreadPoolExecutor(len(shards))  # so that those that are silent are waited for together
        self._answered = time.monotonic()
        self._listening = threading.Event()
        self.end = ""

    def poll(self) -> JobView:
        """Ask every shard once.

        Raises:
            PsError: no shard answers.
        """
        found = list(self._threads.map(self._ask, self._shards))
        errors = [each for each in found if isinstance(each, PsError)]
        if len(errors) == len(found):
            if self._last is None and isinstance(errors[0], Unreachable):
                raise Unreachable(f"{errors[0]}; check --servers, and that ps-serve runs there")
            raise errors[0]
        self._answered = time.monotonic()
        missing = [
            MissingView(shard=index, addresses=tuple(map(str, servers.servers)), reason=servers.link.reason(error))
            for index, (servers, error) in enumerate(zip(self._shards, found, strict=True))
            if isinstance(error, PsError)
        ]
        replies = [None if isinstance(each, PsError) else each for each in found]
        addresses = [str(servers.link.address) for servers in self._shards]
        self._last = Poll(addresses, replies, self._last, job=self._name, missing=missing)
        return self._last.view()

    def _ask(self, shard: ShardServers) -> pb.StatusReply | PsError:
        """The status of the server that serves a shard, or why there is none."""
        try:
            if len(shard.servers) > 1 and shard.find_serving() is None:
                return Unreachable(f"no server serves it: {shard.tried}")
            reply = shard.link.status(self._seconds)
        except PsError as error:
            return error
        shard.note_standby(reply.standby.configuration)
        if not shard.link.lease:
            with suppress(PsError):
                shard.link.describe_once(self._seconds)  # tells the lease
        return reply

    def listen(self) -> None:
        """Listen for the end of the job, on a thread of its own; ``end`` then says what the lead has said."""
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        self._listening.wait(self._seconds)

    def _listen(self) -> None:
        while not self.end:
            try:
                for _ in self._shards[0].link.rosters(LISTEN_SECONDS):
                    self._listening.set()
            except ServerStopped as stopped:
                self.end = str(stopped)
            except PsError:
                time.sleep(LISTEN_PAUSE_SECONDS)

    @property
    def silent_seconds(self) -> float:
        """Seconds since a server answered."""
        return time.monotonic() - self._answered

    @property
    def patience(self) -> float:
        """Seconds without an answer after which the job counts as lost: no worker waits for its servers for longer."""
        return max(shard.patience(shard.link.lease) for shard in self._shards)


def watch(jobs: Sequence[Poller], status: StatusConfig) -> int:
    """Poll and show until ``status.watch_seconds`` are over, a job has ended or is lost, or a signal comes.

    Returns:
        The exit code.

    Raises:
        PsError: the first poll fails. A later failure is reported, not raised.
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

    polls, code, said = 0, 0, ""
    with live or nullcontext():
        for _ in _ticks(stop, status.interval, status.watch_seconds):
            try:
                views = [job.poll() for job in jobs]
            except PsError as error:
                if not polls:
                    raise
                code = 1
                if end := next((job.end for job in jobs if job.end), ""):
                    code, said = 0, f"the job has ended: {end}"
                    break
                lost = next((job for job in jobs if job.silent_seconds > job.patience), None)
                if lost is not None:
                    waited = format_seconds(lost.silent_seconds)
                    said = f"the job is lost: no server has answered for {waited}, longer than workers wait: {error}"
                    break
                continue
            for job in jobs if not polls else ():
                job.listen()
            polls += 1
            code = int(any(view.missing for view in views))
            show(views)
    if said:
        click.echo(said, err=True)
    return code


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
