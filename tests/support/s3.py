"""An S3 of our own: moto's server as a process, found by the variables that every S3 client reads."""

import contextlib
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.processes import Child

SECONDS = 60.0


@contextlib.contextmanager
def s3(folder: Path, bucket: str) -> Iterator[dict[str, str]]:
    """A running S3 with one empty ``bucket``; the environment in which clients use it."""
    ready = folder / "s3"
    process = Child(f"{serve.__module__}:{serve.__name__}", (str(ready),), folder / "s3.log")
    try:
        for _ in range(int(SECONDS / 0.02)):
            code = process.wait(0.02)
            assert code is None, process.output
            if ready.exists():
                break
        url = ready.read_text()
        request = urllib.request.Request(f"{url}/{bucket}", method="PUT")
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            assert answer.status == 200
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        process.kill()


def serve(ready: str) -> None:
    """In the child."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    part = Path(f"{ready}.part")
    part.write_text(f"http://{host}:{port}")
    part.rename(ready)
    signal.pause()
