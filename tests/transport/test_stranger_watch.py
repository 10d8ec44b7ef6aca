"""The watch of connections: it closes those of strangers, and outlives a process that has no descriptor left."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

WATCH = """
import asyncio, contextlib, resource
from torch_ps.ps.observability.shard_metrics import Metrics
from torch_ps.ps.transport.stranger_watch import StrangerWatch
from torch_ps.ps.transport.strangers import MAX_BYTES

async def read(reader, writer):
    with contextlib.suppress(OSError):
        while await reader.read(65536):
            pass
    writer.close()

async def closed(reader, writer):
    with contextlib.suppress(ConnectionError):
        writer.write(bytes(MAX_BYTES + 1))
        return await reader.read() == b""
    return True

async def main():
    server = await asyncio.start_server(read, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    watch = StrangerWatch(Metrics())
    task = asyncio.create_task(watch.run(port))
    known = await asyncio.open_connection("127.0.0.1", port)
    watch.accepted("ipv4:127.0.0.1:%d" % known[1].get_extra_info("sockname")[1])
    stranger = await asyncio.open_connection("127.0.0.1", port)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    done, _ = await asyncio.wait({task}, timeout=0.5)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print("the watch has ended" if done else "the watch goes on")
    print("the stranger is closed" if await closed(*stranger) else "the stranger stays")
    known[1].write(bytes(MAX_BYTES + 1))
    await known[1].drain()
    end = asyncio.create_task(known[0].read())
    done, _ = await asyncio.wait({end}, timeout=0.5)
    print("the known one is closed" if done else "the known one stays")

asyncio.run(main())
"""


def test_watch_outlives_a_process_without_free_descriptors_and_closes_strangers_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCH], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.splitlines() == ["the watch goes on", "the stranger is closed", "the known one stays"], done
    assert "new connections are not watched: Too many open files" in done.stderr or "Errno 24" in done.stderr
