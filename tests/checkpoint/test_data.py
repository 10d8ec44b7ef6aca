"""Leased samples and checkpoints: what was trained on at the version of a checkpoint, and nothing else, is done."""

import dataclasses
import hashlib
import json
import threading
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import torch_ps
from tests.checkpoint.test_resume import adamw, sgd
from tests.support.certificates import Authority, options
from tests.support.jobs import until
from tests.support.leased import EPOCHS, SIZE, train_leased
from tests.support.restart import shards
from tests.support.sample_counts import Trainer
from tests.support.threads import at_once
from tests.support.training import MakeOptimizer, same
from torch_ps.common.errors import ServerStopped
from torch_ps.ps.checkpoint import manifest as manifests

NEVER = 10**6
CASES: dict[str, tuple[MakeOptimizer, dict[str, Any]]] = {
    "sgd with momentum": (sgd, {}),
    "adamw": (adamw, {}),
    "adamw, fp16 pushes": (adamw, {"compress": "fp16"}),
}


@pytest.mark.parametrize(("stop", "kept", "num_shards"), [(6, 4, 1), (9, 8, 2)])
@pytest.mark.parametrize("case", CASES)
def test_killed_job_goes_on_with_the_samples_and_bits_of_one_that_was_not(
    case: str, stop: int, kept: int, num_shards: int, tmp_path: Path
) -> None:
    make, codec = CASES[case]
    with shards(num_shards, workers=2, bucket_size=0.002) as servers:
        undisturbed = train_leased(str(servers), make, NEVER, **codec)
    assert Counter(chain(*chain(*(told.samples for told in undisturbed)))) == {i: EPOCHS for i in range(SIZE)}
    with shards(num_shards, workers=2, bucket_size=0.002, checkpoint=str(tmp_path), checkpoint_every=kept) as servers:
        first = train_leased(str(servers), make, stop, **codec)
        until(lambda: servers.status().checkpoint.version == kept, f"the checkpoint of version {kept} is good")
        servers.kill()
        servers.start(resume=True)
        rest = train_leased(str(servers), make, NEVER, **codec)
    for before, after, whole in zip(first, rest, undisturbed, strict=True):
        assert before.samples == whole.samples[:stop]
        assert before.losses == whole.losses[:stop]
        assert after.samples == whole.samples[kept:]
        assert after.losses == whole.losses[kept:]
        assert same(after.model, whole.model)


def test_stopped_job_leaves_out_no_sample_and_repeats_none(tmp_path: Path) -> None:
    with shards(2, workers=2) as servers:
        undisturbed = train_leased(str(servers), adamw, NEVER)
    with shards(2, workers=2, checkpoint=str(tmp_path)) as servers:
        first = train_leased(str(servers), adamw, 5)
        servers.stop()
        servers.start(resume=True)
        rest = train_leased(str(servers), adamw, NEVER)
    for before, after, whole in zip(first, rest, undisturbed, strict=True):
        assert before.samples + after.samples == whole.samples
        assert same(after.model, whole.model)


def test_shards_with_certificates_and_token_keep_and_go_on_as_well(tmp_path: Path) -> None:
    token, tls = tmp_path / "token", Authority(tmp_path).issue("all")
    token.write_text("a-secret-of-the-job-0123456789\n")
    with shards(2, workers=2) as servers:
        undisturbed = train_leased(str(servers), adamw, NEVER)
    secured = {**options(tls), "token_file": str(token)}
    access: dict[str, Any] = {"tls": tls, "token_file": str(token)}
    with shards(2, workers=2, checkpoint=str(tmp_path / "kept"), checkpoint_every=4, **secured) as servers:
        train_leased(str(servers), adamw, 6, **access)
        until(lambda: servers.status().checkpoint.version == 4, "the checkpoint of version 4 is good")
        servers.kill()
        servers.start(resume=True)
        rest = train_leased(str(servers), adamw, NEVER, **access)
    for after, whole in zip(rest, undisturbed, strict=True):
        assert after.samples == whole.samples[4:]
        assert same(after.model, whole.model)


@pytest.mark.parametrize(("mode", "num_shards"), [("sync", 2), ("async", 1)])
def test_workers_that_live_on_train_on_every_sample_once_by_the_count_of_the_job(
    mode: str, num_shards: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size, names = 300, ("w0", "w1")
    with shards(num_shards, mode=mode, workers=2, checkpoint=str(tmp_path), checkpoint_every=4) as servers:
        at, go = {name: threading.Event() for name in names}, threading.Event()
        workers = {name: Trainer(str(servers), name, size) for name in names}

        def read(name: str) -> float:
            for number, _ in enumerate(workers[name].epochs(batch_size=3)):
                if number == 12:
                    at[name].set()
                    assert go.wait(60)
            return workers[name].optimizer.samples

        def fault() -> None:
            assert all(event.wait(60) for event in at.values())
            until(lambda: servers.status().checkpoint.version > 0, "a checkpoint is good")
            servers.kill()
            servers.start(resume=True)
            go.set()

        try:
            counts = at_once(*(lambda n=name: read(n) for name in names), fault)[:2]
            with torch_ps.Client(str(servers)) as observer:
                params = observer.pull().params["x"]
        finally:
            for trainer in workers.values():
                trainer.close()
    said = [record.getMessage() for record in caplog.records if "takes part again" in record.getMessage()]
    assert sorted(line.split()[1] for line in said) == list(names), said
    assert params.all()
    assert max(count for count in counts if count is not None) == size


def test_servers_that_die_before_the_first_checkpoint_are_not_taken_for_the_job_of_before(tmp_path: Path) -> None:
    with shards(1, workers=1, checkpoint=str(tmp_path), checkpoint_every=NEVER) as servers:
        worker = Trainer(str(servers), "w0", 40)
        trained = worker.epochs(batch_size=2)
        try:
            for _ in range(3):
                next(trained)
            servers.kill()
            servers.start(resume=True)
            with pytest.raises(ServerStopped, match="hold nothing of the job that this worker took part in"):
                list(trained)
        finally:
            worker.close()


def test_checkpoint_whose_sections_cannot_be_right_is_refused_by_name(tmp_path: Path) -> None:
    with shards(1, workers=1, checkpoint=str(tmp_path), checkpoint_every=4) as servers:
        worker = Trainer(str(servers), "w0", 12)
        assert sum(1 for _ in worker.epochs(batch_size=2)) == 6
        until(lambda: servers.status().checkpoint.version == 4, "the checkpoint of version 4 is good")
        worker.close()
        servers.kill()
        path = tmp_path / manifests.commit_name(4)
        right = path.read_bytes()
        whole = manifests.parse(manifests.body_of(right, "checkpoint", "x"), "x")
        data = json.loads(json.dumps(whole.sections["data"]))
        data["sets"][0]["size"] = 0.5
        text = manifests.dump(dataclasses.replace(whole, sections={**whole.sections, "data": data}))
        path.write_bytes(_with(text, b'"size":0.5', b'"size":1e400'))
        assert "the checkpoint of version 4 in " in (said := servers.refused(resume=True))
        assert "does not fit: OverflowError" in said
        path.write_bytes(right)
        servers.start(resume=True)


def _with(document: bytes, old: bytes, new: bytes) -> bytes:
    """A document with one piece replaced, and the size and digest that go with it."""
    line, _, body = document.partition(b"\n")
    body = body.replace(old, new)
    facts = {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    return json.dumps({**json.loads(line), **facts}).encode() + b"\n" + body
