"""Files that one push and its answer cross, on the server and on the worker, counted by a trace of every call.

    python bench/call_path.py                # numbers, and the names behind them
    python bench/call_path.py --only memory

One process runs a server (one shard, one bucket, SGD with momentum, synchronous) and one worker of it, with default
options but for a long lease and gradients that leave at the step, until it is in the steady state. Then each
``optimizer.step()`` is traced on all threads. A file counts if a Python function of it begins to run between the start
of the step and ``AFTER`` seconds after its end, so what the server books once the answer has left is in. The thread
tells which half of the process a call is of. What happens by the clock (a heartbeat, the renewal of a lease) falls into
some of the steps only, so a file counts if every step crosses it. Not counted: the thread that looks at connections
every few milliseconds for no push, what only ran before (opening the stream), other packages, generated code, and what
has no Python frame (a dataclass's constructor, an attribute).

A count is of the side's own room, ps/ or worker/, and of common/ together. Rows: the planes; gradients travel in frames
over "network", and through shared memory over "memory". ARCHITECTURE.md says what each file on the server adds.
"""

import argparse
import asyncio
import sys
import threading
import time
import types
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

PLANES = ("network", "memory")
#: Steps before the trace, and steps that are traced.
WARM, TRACED = 10, 15
#: Seconds after a step in which what it has caused still counts.
AFTER = 0.05
DEADLINE = 60.0
#: File whose thread looks at connections all the time, for no push, and what the thread counts as.
WATCH, CLOCK = "ps/transport/stranger_watch.py", "clock"


class Tracer:
    """Which files' functions are called, by side: "ps" or "worker"."""

    def __init__(self) -> None:
        self.files: dict[str, set[str]] = {}
        self._tracing = False
        self._side = threading.local()
        self._names: dict[str, str] = {}  # file of a code object: its path below the root, "" if it does not count

    def run(self, side: str) -> None:
        """What this thread does from now on belongs to ``side``; so does what threads do that ``side`` has named."""
        self._side.name = side

    def step(self) -> None:
        """Begin to trace one step."""
        self.files, self._tracing = {"ps": set(), "worker": set()}, True

    def end(self) -> dict[str, set[str]]:
        """End it; its files by side."""
        self._tracing = False
        return self.files

    def __call__(self, frame: types.FrameType, event: str, argument: object) -> None:
        """The profile function of every thread."""
        if not self._tracing or event != "call":
            return
        name = self._name(frame.f_code.co_filename)
        if not name:
            return
        side = getattr(self._side, "name", "")
        if not side:  # a thread of a pool or of gRPC: it is of the side whose code it runs first
            if name.startswith("common"):
                return
            side = self._side.name = CLOCK if name == WATCH else name.partition("/")[0]
        if side != CLOCK:
            self.files[side].add(name)

    def _name(self, filename: str) -> str:
        if filename not in self._names:
            path = Path(filename).resolve()
            name = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else ""
            counts = name.startswith(("ps/", "worker/", "common/")) and not name.endswith("_pb2.py")
            self._names[filename] = name if counts else ""
        return self._names[filename]


def train(address: "Future[str]", plane: str, tracer: Tracer, steps: int) -> list[dict[str, set[str]]]:
    """A worker; gives the files of each traced step, by side."""
    import torch

    import torch_ps

    model = torch.nn.Linear(64, 64)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    inputs = torch.rand(8, 64)
    found = []
    with torch_ps.ParameterServerOptimizer(
        inner,
        model,
        address.result(DEADLINE),
        name="w0",
        plane=plane,
        overlap="off",  # "auto" would choose by the time that steps take
    ) as optimizer:
        for number in range(WARM + steps):
            if number >= WARM:
                tracer.step()
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
            model(inputs)  # where the forward pass waits for the parameters, they are there now
            if number >= WARM:
                time.sleep(AFTER)
                found.append(tracer.end())
    return found


async def job(plane: str, tracer: Tracer, steps: int) -> list[dict[str, set[str]]]:
    """A server on this thread and its worker on another; gives what the worker does."""
    from torch_ps.common.options.server_config import ServerConfig
    from torch_ps.ps.server.server import Ready, serve

    address, loop = Future[str](), asyncio.get_running_loop()
    result: asyncio.Future[list[dict[str, set[str]]]] = loop.create_future()

    def work() -> None:
        tracer.run("worker")
        try:
            found = train(address, plane, tracer, steps)
            loop.call_soon_threadsafe(result.set_result, found)
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            loop.call_soon_threadsafe(result.set_exception, error)

    def ready(where: Ready) -> None:
        address.set_result(str(where.server))

    config = ServerConfig(workers=1, listen="127.0.0.1:0", metrics="off", lease=600.0, log_level="warning")
    server = asyncio.create_task(serve(config, ready))
    threading.Thread(target=work, daemon=True).start()
    ends: set[asyncio.Future[Any]] = {server, result}
    await asyncio.wait(ends, timeout=DEADLINE, return_when=asyncio.FIRST_COMPLETED)
    if not result.done():
        raise SystemExit(f"the job did not end: {server}")
    return result.result()


def count(plane: str, steps: int = TRACED) -> dict[str, list[str]]:
    """The files that every step crosses, sorted, by side: "ps" or "worker"."""
    tracer = Tracer()
    tracer.run("ps")
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        found = asyncio.run(job(plane, tracer, steps))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    result = {}
    for side in ("ps", "worker"):
        result[side] = sorted(set.intersection(*(each[side] for each in found)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PLANES, help="one row")
    parser.add_argument("--quick", action="store_true", help="six steps, to see that it works")
    arguments = parser.parse_args()
    out = sys.stdout.write
    for plane in [arguments.only] if arguments.only else PLANES:
        for side, files in count(plane, 6 if arguments.quick else TRACED).items():
            common = sum(name.startswith("common/") for name in files)
            out(f"{plane} {side}: {len(files)} files, {common} of them in common/\n")
            out("".join(f"    {name}\n" for name in files))


if __name__ == "__main__":
    main()
