"""Commands of the documentation, run as they stand there but for addresses, and with fewer samples."""

import signal
from pathlib import Path

from safetensors.torch import load_file

from tests.docs.commands import ROOT, blocks
from tests.places.launched import free_port, started
from tests.support.jobs import until


def lines(page: str, *starts: str) -> list[str]:
    r"""For each beginning the first command of a page that has it; lines that a \ continues are one."""
    shown = [line.strip() for block in blocks(ROOT / page) for line in block.replace("\\\n", "").splitlines()]
    return [next(line for line in shown if " ".join(line.split()).startswith(start)) for start in starts]


def ends_well(folder: Path, command: str, **variables: str) -> str:
    """What it said."""
    with started(folder, command=(command, variables)) as (process,):
        assert process.wait() == 0, process.said
        return process.said


def test_certificates_of_the_security_page_serve_a_job_that_is_started_and_watched_by_hand(tmp_path: Path) -> None:
    page = "docs/security.md"
    (made,) = (block for block in blocks(ROOT / page) if "openssl req -x509" in block)
    ends_well(tmp_path, f"set -e\n{made}")
    shown = lines(page, "ps-serve --listen", "ps-worker --servers", "ps-status --servers")
    here = f"127.0.0.1:{free_port()}"
    serve, work, look = (each.replace("0.0.0.0:50051", here).replace("host0:50051", here) for each in shown)
    with started(tmp_path, server=(f"exec {serve}", {"PS_METRICS": "off"})) as (server,):
        until(lambda: "listens on" in server.said or not server.running, "the server listens")
        assert "validation: loss" in ends_well(tmp_path, work, PS_SAMPLES="640")
        assert "mode sync, initialised" in ends_well(tmp_path, look)
        server.send(signal.SIGTERM)
        assert server.wait() == 0
        assert "mutual TLS, with token" in server.said


def test_job_of_the_readme_is_stopped_goes_on_and_gives_a_file_for_plain_torch(tmp_path: Path) -> None:
    first, resumed, export = lines(
        "README.md",
        "ps-run -n 2 --task digits --checkpoint",
        "ps-run -n 2 --task digits --checkpoint runs/digits --checkpoint-every 500 --resume",
        "ps-export",
    )
    assert "is good" in ends_well(tmp_path, first, PS_SAMPLES="640")
    assert "goes on from version 10" in ends_well(tmp_path, resumed, PS_SAMPLES="1280")
    ends_well(tmp_path, export)
    assert load_file(tmp_path / "model.safetensors")
