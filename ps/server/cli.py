"""ps-serve: one shard, with --shards N or --models NAMES the parent of several, with a command the parent of both.

The options are declared in ``common/options/server_config.py``.
"""

import asyncio
import signal
import sys
from pathlib import Path

import click

from torch_ps.common import log, parent_death
from torch_ps.common.ending_signals import ignore_ending_signals
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.output_files import check_output
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.server.open_files import allow_open_files
from torch_ps.ps.server.ready_file import write_ready


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@options_of(ServerConfig)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- COMMAND [ARGS]...]")
def main(server: ServerConfig, command: tuple[str, ...]) -> None:
    r"""Serve the parameters of one training job, with a command for as long as that runs.

    \b
    ps-serve --mode sync --workers 2
    ps-serve --mode async --shards 4
    ps-serve --models generator,critic --workers 2
    ps-serve --workers 2 -- torchrun --nproc-per-node 2 train.py
    """
    parent_death.hold()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # until there is something to end in order
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    check_output("ready_file", server.ready_file)
    check_output("trace", server.trace)
    if server.ready_file:
        Path(server.ready_file).unlink(missing_ok=True)  # of servers before these: nobody is to take their addresses
    allow_open_files(server.workers)
    if command:
        log.setup("ps-serve", level=server.log_level)
        from torch_ps.ps.server.with_command import serve_during

        sys.exit(serve_during(server, command))
    if server.shards == 1 and not server.models:
        from torch_ps.ps.observability import grpc_log

        grpc_log.listen()
    log.setup(" ".join(filter(None, ("server", server.job, server.shard))), level=server.log_level)
    if server.models or server.shards > 1:
        if server.device != "cpu":  # a GPU that is not there is refused before the shards start
            from torch_ps.common.devices import choose

            choose(server.device)
        if server.models:
            from torch_ps.ps.server.multi_model import serve_models

            code = serve_models(server)
        else:
            from torch_ps.ps.server.multi_shard import serve_all

            code = serve_all(server)
        ignore_ending_signals()
        sys.exit(code)
    from torch_ps.ps.server.server import Ready, serve  # torch is loaded only when the options are sound

    def on_ready(ready: Ready) -> None:
        if server.ready_file:
            write_ready(server.ready_file, [str(ready.server)], [str(ready.metrics)] if ready.metrics else [])

    asyncio.run(serve(server, on_ready))


if __name__ == "__main__":
    main()
