"""Two jobs and one checkpoint folder; places that vanish, refuse or do not answer; and the exit code that says so."""

import json
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.checkpoint_folder import write_checkpoints
from tests.support.commands import run
from tests.support.jobs import ready, until
from tests.support.processes import Child
from tests.support.replicated import replicated
from tests.support.restart import Shards, shards
from torch_ps.common.errors import CheckpointError, ModelMismatch
from torch_ps.common.options.command_line import arguments_of
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.wire.frames import Buffer
from torch_ps.ps.checkpoint import ownership, storage
from torch_ps.ps.checkpoint.ownership import NAME, Ownership
from torch_ps.ps.checkpoint.repository import Checkpoints
from torch_ps.ps.checkpoint.storage import FileFact, Storage

SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)


def push(servers: Shards, times: int, name: str = "w0") -> None:
    with torch_ps.Client(str(servers), name=name) as client:
        client.init({"x": torch.zeros(8)}, SPEC)
        for _ in range(times):
            client.push({"x": torch.ones(8)})


def owner(folder: Path, incarnation: int, *, address: str = "127.0.0.1:1", job: str = "") -> Ownership:
    return Ownership(Storage(str(folder)), incarnation=incarnation, job=job, address=address)


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / NAME).read_text())
    return found


def record(folder: Path, **changes: object) -> None:
    """Change the record of a folder, as its owner's death or another machine would have it."""
    part = folder / "changed"
    part.write_text(json.dumps(record_of(folder) | changes))
    part.rename(folder / NAME)


@pytest.fixture
def owned(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process owns."""
    folder = tmp_path / "ck"
    folder.mkdir()
    first = owner(folder, 1)
    first.claim()
    yield folder
    first.release()


def test_second_job_is_refused_at_its_start_and_costs_the_first_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    with shards(checkpoint=str(folder), checkpoint_every=2, resume=True) as first:
        push(first, 2)
        said = first.refused(checkpoint=str(folder), resume=True, listen="127.0.0.1:0")
        pid = first.processes[0].pid
        assert f"{folder} is the checkpoint folder of another job (server {first}, process {pid} on host" in said
        assert "give this job another --checkpoint, or end that one first; if it has taken over from this" in said
        assert said.rstrip().endswith(f"--standby-of {first}")
        push(first, 2, "w1")
        first.kill()
        first.start(resume=True)  # a crash locks nobody out
        assert first.status().version >= 2
        first.stop()
        first.addresses.clear()
        first.start(resume=True)  # nor does another port keep a restarted job out
        push(first, 1, "w2")


def test_folder_is_given_to_one_of_two_and_back_to_the_job_itself(owned: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"another job \(server 127\.0\.0\.1:1, process {os.getpid()} on"):
        owner(owned, 2, address="127.0.0.1:2").claim()
    standby = owner(owned, 1, address="127.0.0.1:3")
    standby.check_place()
    standby.claim()
    standby.check()
    standby.release()
    owner(owned, 2).claim()


def test_standby_that_takes_over_owns_the_folder_and_writes_there(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    with replicated(checkpoint=str(folder), checkpoint_every=2, lease=2.0) as servers:
        standby = servers.standbys[0]
        with torch_ps.Client(str(servers), name="w0") as client:
            client.init({"x": torch.zeros(8)}, SPEC)
            servers.wait()
            for _ in range(2):
                client.push({"x": torch.ones(8)})

            def kept() -> bool:
                client.push({"x": torch.ones(8)})
                return servers.status(standby).checkpoint.version > 2

            with Storage(str(folder)).exclusive():  # the job does not wait for the folder
                servers.kill(0)
                until(kept, "a checkpoint of the standby is good")
        until(lambda: f'"address": "{standby.address}"' in (folder / NAME).read_text(), "the standby owns the folder")
        servers.stop(standby)
        assert '"ended": true' in (folder / NAME).read_text()


def test_owner_that_was_taken_for_dead_writes_no_more(tmp_path: Path) -> None:
    first, second = owner(tmp_path, 1), owner(tmp_path, 2, address="127.0.0.1:2")
    first.claim()
    record(tmp_path, pid=2**22 + 1)
    second.claim()
    with pytest.raises(CheckpointError, match=r"belongs to another server now \(server 127\.0\.0\.1:2"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_owner_on_another_machine_is_watched(owned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "RENEW_SECONDS", 0.05)
    record(owned, machine="another", host="another", token="another", beat=5)
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 60.0)
    alive = threading.Timer(0.2, record, (owned,), {"beat": 6})
    alive.start()
    with pytest.raises(CheckpointError, match="is the checkpoint folder of another job"):
        owner(owned, 2).claim()
    alive.join()
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 0.3)
    owner(owned, 3).claim()


class Failing(Storage):
    """A store whose package raises an error of its own at so many writes."""

    failures = 0

    def write(self, name: str, parts: Iterable[Buffer]) -> FileFact:
        if self.failures:
            self.failures -= 1
            raise EOFError("the store is away")
        return super().write(name, parts)


def test_store_that_fails_is_one_line_at_the_start_and_later_costs_only_a_renewal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "RENEW_SECONDS", 0.02)
    store = Failing(str(tmp_path))
    first = Ownership(store, incarnation=1, job="", address="127.0.0.1:1")
    store.failures = 1
    with pytest.raises(CheckpointError, match=r"owner\.json cannot be written: the store is away"):
        first.claim()
    first.claim()
    store.failures = 2

    def renewed() -> bool:
        return not store.failures and record_of(tmp_path)["beat"] > 2

    until(renewed, "the record is renewed after two failures")
    first.release()


def test_claim_that_fails_after_a_takeover_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "RENEW_SECONDS", 0.02)
    store = Failing(str(tmp_path))
    store.failures = 3
    standby = Ownership(store, incarnation=1, job="", address="127.0.0.1:3")
    standby.start_claiming()
    until(lambda: (tmp_path / NAME).exists() and record_of(tmp_path)["beat"] > 1, "it owns the folder and renews")
    assert record_of(tmp_path)["address"] == "127.0.0.1:3"
    standby.release()
    assert record_of(tmp_path)["ended"]
    assert caplog.text.count("is not this server's yet, so another job may take it") == 1


def test_folder_that_another_process_locks_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LOCK_SECONDS", 0.1)
    with Storage(str(tmp_path)).exclusive(), pytest.raises(CheckpointError, match="locked by another process"):
        owner(tmp_path, 1).claim()


def test_owner_whose_process_nothing_tells_of_is_watched(owned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 0.1)
    record(owned, ticks=0, pid=2**22 + 1, host="another", token="another")
    owner(owned, 2).claim()


def test_folder_of_a_job_with_another_name_is_refused_also_after_its_end(tmp_path: Path) -> None:
    first = owner(tmp_path, 1, job="gen")
    first.claim()
    first.release()
    with pytest.raises(CheckpointError, match=r"another job \(job 'gen', server"):
        owner(tmp_path, 2, job="critic").claim()
    owner(tmp_path, 3, job="gen").claim()


def test_shard_that_sees_another_folder_than_the_lead_is_refused(tmp_path: Path) -> None:
    with shards(2, checkpoint=str(tmp_path / "ck")) as servers:
        servers.processes[1].end()
        said = servers.refused(1, checkpoint=str(tmp_path / "other"))
        assert f"{tmp_path / 'other'} is not where the lead of this job writes its checkpoints" in said
        servers.start_alone(1)


def test_folder_that_vanished_is_not_made_anew_and_the_exit_code_says_what_is_lost(tmp_path: Path) -> None:
    folder, aside = tmp_path / "ck", tmp_path / "aside"
    with shards(checkpoint=str(folder), checkpoint_every=2) as servers:
        push(servers, 2)
        until(lambda: servers.status().checkpoint.version == 2, "a checkpoint is good")
        folder.rename(aside)
        push(servers, 2, "w1")
        until(lambda: servers.status().checkpoint.failures == 1, "there is no folder")
        assert f"{folder} has no owner.json any more" in servers.log
        assert not folder.exists()
        aside.rename(folder)
        push(servers, 2, "w2")
        until(lambda: servers.status().checkpoint.version == 6, "the folder is back")
        shutil.rmtree(folder)
        push(servers, 1, "w3")
        assert servers.processes[0].end(signal.SIGTERM) == 1
        assert "Error: shard 0 has ended, and the last checkpoint in" in servers.log
        assert "has failed, the last good one is of version 6:" in servers.log
        assert not folder.exists()
        servers.processes.clear()


def test_disk_that_stands_still_does_not_keep_a_server_that_was_told_to_end(tmp_path: Path) -> None:
    ready_file, stuck = tmp_path / "ready", tmp_path / "stuck"
    config = ServerConfig(
        listen="127.0.0.1:0", ready_file=str(ready_file), checkpoint="memory://ck", checkpoint_every=100
    )
    arguments = (arguments_of(config),)
    server = Child("tests.support.stuck:main", arguments, tmp_path / "log", environment={"STUCK": str(stuck)})
    try:
        with torch_ps.Client(ready(server, ready_file)["servers"][0], name="w0") as client:
            client.init({"x": torch.zeros(8)}, SPEC)
            client.push({"x": torch.ones(8)})
        stuck.touch()
        assert server.end() == 1
        assert "Error: shard 0 has ended, and the last checkpoint in memory://ck has failed" in server.output
        assert "the job has ended, and nothing was written for 0.5 s" in server.output
    finally:
        server.kill()


def test_last_checkpoint_may_take_as_long_as_something_is_written(tmp_path: Path) -> None:
    ready_file = tmp_path / "ready"
    config = ServerConfig(
        listen="127.0.0.1:0",
        ready_file=str(ready_file),
        checkpoint="memory://ck",
        checkpoint_every=100,
        bucket_size=1 / 256,
    )
    environment = {"STUCK": str(tmp_path / "stuck"), "SLOW": "0.2"}
    server = Child("tests.support.stuck:main", (arguments_of(config),), tmp_path / "log", environment=environment)
    try:
        with torch_ps.Client(ready(server, ready_file)["servers"][0], name="w0") as client:
            client.init({"x": torch.zeros(4096)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
            client.push({"x": torch.ones(4096)})
        before = ready_file.stat().st_mtime_ns
        assert server.end() == 0
        assert "checkpoint of version 1 is good: memory://ck" in server.output
        assert ready_file.stat().st_mtime_ns > before  # those who wait for it look there
    finally:
        server.kill()


@pytest.mark.parametrize("command", ["ps-serve", "ps-export"])
def test_place_that_cannot_be_used_is_one_line_at_the_start(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("/proc/nope", str(tmp_path / "file" / "below")):
        arguments = (place, str(tmp_path / "x.safetensors")) if command == "ps-export" else ("--checkpoint", place)
        done = run(command, *arguments)
        assert done.exit_code == 1
        (line,) = [each for each in done.stderr.splitlines() if "Error" in each]
        assert place in line
        assert "Traceback" not in done.stderr


@contextmanager
def refusing() -> Iterator[str]:
    """A store that knows nobody's key; its URL."""

    class Refuse(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            self.send_response(403)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_PUT = do_HEAD = do_POST = handle_any

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_object_store_that_is_dead_silent_or_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = f"http://127.0.0.1:{closed.getsockname()[1]}"
    with refusing() as refuses, socket.create_server(("127.0.0.1", 0)) as silent:
        causes = {
            dead: "Could not connect to the endpoint URL",
            refuses: "Forbidden",
            f"http://127.0.0.1:{silent.getsockname()[1]}": "timeout",
        }
        for url, cause in causes.items():
            monkeypatch.setenv("AWS_ENDPOINT_URL", url)
            for command, arguments in (
                ("ps-serve", ("--checkpoint", "s3://bucket/job")),
                ("ps-export", ("s3://bucket/job", str(tmp_path / "x.safetensors"))),
            ):
                done = run(command, *arguments)
                assert done.exit_code == 1
                (line,) = done.stderr.splitlines()
                assert "at s3://bucket/job: " in line
                assert cause.lower() in line.lower()


@pytest.mark.parametrize("name", ["checkpoint.json", "shard-0-of-1.json", "shard-0-of-1.safetensors", NAME])
def test_fifo_in_the_place_of_a_file_is_refused_in_words(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    write_checkpoints(folder, num_shards=1, count=1)
    (version,) = Checkpoints(str(folder)).versions()
    file = folder / NAME if name == NAME else folder / f"v{version:012}" / name
    file.unlink()
    os.mkfifo(file)
    done = run("ps-serve", "--listen", "127.0.0.1:0", "--checkpoint", str(folder), "--resume")
    assert done.exit_code == 1
    assert f"{file} is no file but a FIFO" in done.stderr
    if name != NAME:
        exported = run("ps-export", str(folder), str(tmp_path / "x.safetensors"))
        assert f"{file} is no file but a FIFO" in exported.stderr


def test_export_writes_what_the_name_says_into_a_regular_file_or_refuses(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    for name, said in (("x.pt", "give a name that ends in .safetensors"), ("x.safetensors", "is no regular file")):
        done = run("ps-export", str(tmp_path), str(tmp_path / name))
        assert done.exit_code == 2
        assert said in done.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def test_model_with_a_layer_more_is_told_of_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "ck"
    with shards(checkpoint=str(folder)) as servers:
        push(servers, 1)
        servers.stop()
        servers.start(resume=True)
        with torch_ps.Client(str(servers), name="w1") as client, pytest.raises(ModelMismatch) as refused:
            client.init({"x": torch.zeros(8), "more.weight": torch.zeros(2)}, SPEC)
        assert "only worker 'w1' has tensor 'more.weight'" in str(refused.value)
        assert f"the model of version 1 of the checkpoint in {folder}" in str(refused.value)
