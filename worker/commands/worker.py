"""ps-worker: runs one worker of a job, with a ready-made task or a script of the user.

    --task gpt         prepare() --> train()
    script.py ARGS     sets $PS_... and sys.argv, then runs the script in this process as "python script.py ARGS"

Rules of this file
  1. An error of torch-ps is printed as one sentence; an error of the user's script as the script's own traceback.
  2. Ctrl-C unwinds the loop, so the worker leaves the job and nobody waits until its lease expires. SIGTERM does the
     same after the current step, and so does SIGHUP; see ``torch_ps.worker.runtime.graceful_shutdown``.
"""

import dataclasses
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

import click

from torch_ps.common import log, parent_death
from torch_ps.common.ending_signals import ending_signals
from torch_ps.common.errors import ConfigError, PsError
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.fields import environment_of
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker import tasks
from torch_ps.worker.commands.joined import check_joined
from torch_ps.worker.runtime import graceful_shutdown
from torch_ps.worker.training import tensorboard


@click.command(cls=Command, context_settings={"allow_interspersed_args": False})
@options_of(WorkerConfig)
@click.argument("script", nargs=-1, type=click.UNPROCESSED, metavar="[SCRIPT [ARGS]...]")
def main(worker: WorkerConfig, script: tuple[str, ...]) -> None:
    r"""Run one worker of a job: a ready-made task, or your script.

    \b
    ps-worker --servers 127.0.0.1:50051 --task digits
    ps-worker --servers 127.0.0.1:50051 train.py --epochs 3
    """
    parent_death.hold()
    for number in set(ending_signals()) - {signal.SIGINT}:
        signal.signal(number, graceful_shutdown.on_signal)
    check(worker, script)
    log.setup(f"worker {worker.name}".rstrip(), level=worker.log_level)
    try:
        if script:
            _run_script(worker, script)
        else:
            _run_task(worker)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def check(worker: WorkerConfig, script: tuple[str, ...]) -> None:
    """Check that the command line names one task or one script, and that all it names exists.

    Raises:
        ConfigError: names what is missing or given twice.
    """
    if worker.task and script:
        raise ConfigError(f"both task {worker.task!r} and script {script[0]!r} are given; give one of them")
    if not worker.task and not script:
        raise ConfigError("nothing to train: give --task gpt, --task digits, --task module:function, or a script")
    if script and not Path(script[0]).is_file():
        what = "is a folder; give the file in it" if Path(script[0]).is_dir() else "does not exist"
        raise ConfigError(f"script {script[0]!r} {what}")
    if worker.task:
        tasks.check(worker.task)
    tensorboard.check(worker.tensorboard)
    if worker.tensorboard and script:
        raise ConfigError(
            f"tensorboard={worker.tensorboard} works with ready-made tasks only; a script uses torch.utils.tensorboard"
        )
    if worker.data and not Path(worker.data).exists():
        raise ConfigError(f"data {worker.data!r} does not exist")


def _run_task(worker: WorkerConfig) -> None:
    if not worker.servers:
        raise ConfigError("no servers: give --servers HOST:PORT[,...] or $PS_SERVERS; ps-run starts servers of its own")
    import torch

    from torch_ps.worker.runtime.access import default_name
    from torch_ps.worker.runtime.device import local_rank
    from torch_ps.worker.training.loop import prepare, train

    torch.set_num_threads(worker.threads)
    if worker.insecure:
        os.environ["PS_INSECURE"] = "1"  # where the optimizer looks for it, as in a script
    named = dataclasses.replace(worker, name=worker.name or default_name(worker.rank))
    log.setup(f"worker {named.name}", level=worker.log_level)
    train(prepare(named, local_rank()))


def _run_script(worker: WorkerConfig, script: tuple[str, ...]) -> None:
    """Run ``script`` as Python itself would: as ``__main__``, its folder first in the path, its arguments in argv.

    torch is not imported here, so the script can set variables that torch reads when it is imported.
    """
    environment = {"OMP_NUM_THREADS": str(worker.threads), **environment_of(worker, os.environ)}
    if worker.rank is not None:
        environment["RANK"] = str(worker.rank)  # other libraries read it
    if worker.world:
        environment["WORLD_SIZE"] = str(worker.world)
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    path = script[0]
    sys.argv[:] = script
    sys.path[0] = str(Path(path).resolve().parent)
    try:
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        check_joined(worker)
    except PsError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except Exception as error:  # noqa: BLE001  # whatever the script raises is shown as Python would
        traceback.print_exception(type(error), error, _own_frames(error.__traceback__, path))
        sys.exit(1)


def _own_frames(trace: TracebackType | None, path: str) -> TracebackType | None:
    """The traceback from the script's first frame on; the whole one if the script never ran (a syntax error)."""
    part = trace
    while part is not None and part.tb_frame.f_code.co_filename != path:
        part = part.tb_next
    return part or trace


if __name__ == "__main__":
    main()
