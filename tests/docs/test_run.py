"""Commands of the documentation, run as they stand there but for addresses, and with fewer samples."""

import json
import shlex
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import torch_ps
from tests.deploy.launched import ends_well, free_port, started
from tests.docs.commands import ROOT, blocks, shown
from tests.support.jobs import SECONDS, until
from tests.support.processes import Child


def test_three_terminals_of_the_quick_start_train(tmp_path: Path) -> None:
    serve, work = shown("docs/index.md", "ps-serve --mode sync", "ps-worker --servers 127.0.0.1:50051 --task digits")
    here = f"127.0.0.1:{free_port()}"
    serving = [*shlex.split(serve, comments=True)[1:], "--listen", here, "--metrics", "off"]
    working = [*shlex.split(work.replace("127.0.0.1:50051", here), comments=True)[1:], "--samples", "640"]
    server = Child("torch_ps.ps.server.cli:main", (serving,), tmp_path / "server")
    workers = [
        Child("torch_ps.worker.commands.worker:main", ([*working, "--name", name],), tmp_path / name)
        for name in ("one", "other")
    ]
    try:
        assert [worker.wait(SECONDS) for worker in workers] == [0, 0], [worker.output for worker in workers]
        assert sorted("validation: loss" in worker.output for worker in workers) == [False, True]  # of rank 0
        assert server.end() == 0
    finally:
        for child in (server, *workers):
            child.kill()


def test_gpt_of_the_page_learns_its_text_and_leaves_a_timeline(tmp_path: Path) -> None:
    (command,) = shown(
        "docs/observability.md", "ps-run -n 2 --task gpt --samples 400 --trace trace.json --trace-steps 10:13"
    )
    said = ends_well(tmp_path, command.replace("--samples 400", "--samples 224"), PS_EVALUATIONS="2")
    assert "trace of worker w0: " in said
    assert float(said.split("validation: loss ")[1].split()[0].rstrip(",;")) < 5  # ln 256 = 5.5 is where it began
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sorted({event["args"]["step"] for event in events if event.get("name") == "step"}) == [10, 11, 12]


def test_certificates_of_the_security_page_serve_a_job_that_is_started_and_watched_by_hand(tmp_path: Path) -> None:
    page = "docs/security.md"
    (made,) = (block for block in blocks(ROOT / page) if "openssl req -x509" in block)
    ends_well(tmp_path, f"set -e\n{made}")
    found = shown(page, "ps-serve --listen", "ps-worker --servers", "ps-status --servers")
    here = f"127.0.0.1:{free_port()}"
    serve, work, look = (each.replace("0.0.0.0:50051", here).replace("host0:50051", here) for each in found)
    with started(tmp_path, server=(f"exec {serve}", {"PS_METRICS": "off"})) as (server,):
        until(lambda: "listens on" in server.said or not server.running, "the server listens")
        assert "validation: loss" in ends_well(tmp_path, work, PS_SAMPLES="640")
        assert "mode sync, initialised" in ends_well(tmp_path, look)
        with pytest.raises(torch_ps.Refused, match="speaks TLS only"), torch_ps.Client(here):
            pass
        until(lambda: "a TLS handshake failed: the peer does not speak TLS" in server.said, "the server says so")
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert "mutual TLS, with token" in server.said


def test_job_of_the_checkpointing_page_is_stopped_goes_on_and_gives_a_file_for_plain_torch(tmp_path: Path) -> None:
    first, resumed, export = shown(
        "docs/checkpointing.md",
        "ps-run -n 2 --task digits --checkpoint",
        "ps-run -n 2 --task digits --checkpoint runs/digits --checkpoint-every 500 --resume",
        "ps-export",
    )
    assert "is good" in ends_well(tmp_path, first, PS_SAMPLES="640")
    assert "goes on from version 10" in ends_well(tmp_path, resumed, PS_SAMPLES="1280")
    ends_well(tmp_path, export)
    assert load_file(tmp_path / "model.safetensors")
