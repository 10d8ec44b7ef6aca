"""--trace: one file of what all processes did in some steps, on one clock, whose parts add up to the steps."""

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import torch_ps
from tests.support.jobs import SECONDS, Servers, job
from tests.support.threads import at_once
from tests.support.training import backward, mlp, seeded
from torch_ps.common import trace
from torch_ps.common.errors import ConfigError, CorruptFrame, ProtocolError, UnknownWorker
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.trace_options import parse_steps
from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.trace import RoundTrip, Span, Trace, estimate_offset
from torch_ps.ps.observability.perfetto import PARTS

TRACED = (2, 3, 4)
STEPS = 7
Event = dict[str, Any]


def train(servers: Servers, name: str, **options: Any) -> None:
    import torch

    model = seeded(mlp)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch_ps.ParameterServerOptimizer(inner, model, str(servers), name=name, **options) as optimizer:
        assert optimizer.world == 2
        for step in range(STEPS * options.get("accumulate", 1)):
            backward(model, step)
            optimizer.step()
            optimizer.zero_grad()


def load(path: Path) -> list[Event]:
    """The events of a file, whose times are whole microseconds: any reader can add them."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    assert all(type(event.get(name, 0)) is int for event in events for name in ("ts", "dur"))
    return events


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """Two workers and two shards: w0 shares memory, w1 uses the network and accumulates two passes for each push."""
    path = tmp_path_factory.mktemp("trace") / "trace.json.gz"
    with job(workers=2, shards=2, bucket_size=0.001, trace=str(path), trace_steps="2:5") as servers:
        at_once(
            lambda: train(servers, "w0"),
            lambda: train(servers, "w1", plane="network", accumulate=2, compress="fp16"),
        )
    return load(path)


def names(events: Sequence[Event]) -> dict[int, str]:
    """Processes by number."""
    return {e["pid"]: e["args"]["name"].split(" (")[0] for e in events if e["name"] == "process_name"}


def spans(events: Sequence[Event], process: str, name: str) -> list[Event]:
    found = names(events)
    return [e for e in events if e["ph"] == "X" and e["name"] == name and found[e["pid"]].startswith(process)]


def end(event: Event) -> int:
    found: int = event["ts"] + event["dur"]
    return found


def test_every_process_has_a_part(events: list[Event]) -> None:
    assert sorted(names(events).values()) == ["shard 0", "shard 1", "worker w0", "worker w1"]


def test_what_one_thread_did_is_nested(events: list[Event]) -> None:
    threads = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    assert len(threads) > 6
    for done in threads.values():
        around: list[Event] = []
        for event in sorted(done, key=lambda event: (event["ts"], -event["dur"])):
            while around and end(around[-1]) <= event["ts"]:
                around.pop()
            assert not around or end(event) <= end(around[-1]), (event, around[-1])
            around.append(event)


@pytest.mark.parametrize(("worker", "passes"), [("w0", 1), ("w1", 2)])
def test_parts_of_a_step_add_up_to_it(events: list[Event], worker: str, passes: int) -> None:
    steps = spans(events, f"worker {worker}", "step")
    assert [step["args"]["step"] for step in steps] == sorted(TRACED * passes)
    parts = [part for name in PARTS for part in spans(events, f"worker {worker}", name)]
    for step in steps:
        inside = sorted((p for p in parts if step["ts"] <= p["ts"] < end(step)), key=lambda part: part["ts"])
        assert [part["name"] for part in inside] == list(PARTS)
        assert sum(part["dur"] for part in inside) == step["dur"]
    for before, after in pairwise(steps):  # and the steps to what the loop took
        assert end(before) == after["ts"]


def test_every_bucket_is_followed_through_all_processes(events: list[Event]) -> None:
    per_shard = {shard: {e["args"]["bucket"] for e in spans(events, f"shard {shard}", "apply")} for shard in (0, 1)}
    assert per_shard[0]
    assert per_shard[1]
    buckets = per_shard[0] | per_shard[1]
    once = Counter((step, bucket) for step in TRACED for bucket in buckets)

    def counted(process: str, name: str) -> Counter[tuple[int, int]]:
        return Counter((e["args"]["step"], e["args"]["bucket"]) for e in spans(events, process, name))

    for worker in ("worker w0", "worker w1"):
        for name in ("push", "encode", "send", "receive", "write"):
            assert counted(worker, name) == once, (worker, name)
    assert not spans(events, "worker w0", "decode")  # the server has written where it reads
    assert counted("worker w1", "decode") == once
    assert counted("shard", "apply") == counted("shard", "mean") == counted("shard", "optimizer") == once
    assert counted("shard", "receive") == counted("shard", "encode") == once + once  # of both workers
    held = [e for e in events if e["ph"] == "b"]
    assert Counter((e["args"]["step"], e["args"]["bucket"]) for e in held) == once + once
    assert {e["id"] for e in held} == {e["id"] for e in events if e["ph"] == "e"}


def test_clocks_of_all_processes_agree(events: list[Event]) -> None:
    def by_push(process: str, name: str, worker: str = "") -> dict[tuple[int, int], Event]:
        found = spans(events, process, name)
        return {(e["args"]["step"], e["args"]["bucket"]): e for e in found if e["args"].get("worker", "") == worker}

    applied = by_push("shard", "apply")
    for worker in ("w0", "w1"):
        sent, back = by_push(f"worker {worker}", "send"), by_push(f"worker {worker}", "receive")
        there = by_push("shard", "receive", worker)
        for push, apply in applied.items():
            assert sent[push]["ts"] < there[push]["ts"] <= apply["ts"] < end(apply) <= back[push]["ts"]


def test_an_arrow_leads_from_a_push_to_its_answer(events: list[Event]) -> None:
    arrows = defaultdict(list)
    for event in events:
        if event["cat" if "cat" in event else "name"] == "bucket":
            arrows[event["id"]].append(event)
    assert len(arrows) == len(spans(events, "worker", "send"))
    for arrow in arrows.values():
        assert [e["ph"] for e in sorted(arrow, key=lambda e: e["ts"])] == ["s", "t", "t", "f"]


def test_a_worker_whose_clock_is_another_is_on_the_same_time(tmp_path: Path) -> None:
    """Its process is in a time namespace that is 1000 s ahead, as a machine that was started earlier is."""
    elsewhere = ["unshare", "--time", "--monotonic", "1000"]
    if subprocess.run([*elsewhere, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make a time namespace here")
    path, program = tmp_path / "trace.json", tmp_path / "worker.py"
    program.write_text(
        "import sys, torch, torch_ps\n"
        "with torch_ps.Client(sys.argv[1], name='far') as client:\n"
        "    client.init({'x': torch.ones(3)}, torch_ps.OptimizerSpec('SGD', lr=0.1))\n"
        "    for _ in range(6):\n"
        "        client.pull()\n"
        "        client.push({'x': torch.ones(3)})\n"
    )
    with job(trace=str(path), trace_steps="2:5") as servers:
        subprocess.run(
            [*elsewhere, sys.executable, str(program), str(servers)], timeout=SECONDS, env=os.environ, check=True
        )
    found = load(path)
    error = max(json.loads(path.read_text())["otherData"]["clock_error_us"].values())
    assert 0 < error < 1e5  # half a round trip; no reading of another clock is exact
    for name in ("send", "receive"):
        assert [e["args"]["step"] for e in spans(found, "worker far", name)] == list(TRACED)
    pairs = zip(spans(found, "worker far", "send"), spans(found, "shard 0", "apply"), strict=True)
    for sent, applied in pairs:
        assert -error - 1 <= applied["ts"] - sent["ts"] < 1e7  # both are rounded
    for applied, back in zip(spans(found, "shard 0", "apply"), spans(found, "worker far", "receive"), strict=True):
        assert back["ts"] - end(applied) >= -error - 1


def test_the_offset_of_a_clock_is_wrong_by_no_more_than_it_says() -> None:
    chance = random.Random(1)
    for _ in range(200):
        offset, now, trips = chance.randrange(-(10**12), 10**12), 0, []
        for _ in range(8):
            there, back = chance.randrange(10**6), chance.randrange(10**6)
            trips.append(RoundTrip(now, now + there + offset, now + there + back))
            now += there + back
        found, error = estimate_offset(trips)
        assert abs(found - offset) <= error == (min(t.received - t.sent for t in trips) + 1) // 2


def test_without_trace_nothing_is_recorded_and_no_hook_is_there() -> None:
    import torch

    model = seeded(mlp)
    with job() as servers:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(inner, model, str(servers)) as optimizer:
            for step in range(3):
                backward(model, step)
                optimizer.step()
            assert optimizer.session.trace.spans == []
            assert not model._forward_hooks
            assert not model._forward_pre_hooks


def test_hooks_leave_the_model_after_the_last_traced_step(tmp_path: Path) -> None:
    import torch

    model = seeded(mlp)
    with job(trace=str(tmp_path / "t"), trace_steps="1:2") as servers:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with torch_ps.ParameterServerOptimizer(inner, model, str(servers)) as optimizer:
            for step in range(2):
                assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
                backward(model, step)
                optimizer.step()
            assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0


def test_a_trace_is_bounded_and_says_what_was_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOST", 10)
    recorded = Trace(range(3, 4))
    for _ in range(12):
        with recorded.span("encode", 3, 0):
            pass
        with recorded.span("encode", 4, 0):
            pass
    part = recorded.part()
    assert (len(part.span), part.dropped) == (10, 2)
    assert [each.name for each in trace.spans_of(part)] == ["encode"] * 10


def test_a_job_that_ends_before_the_first_traced_step_says_so(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with job(trace=str(path)) as servers:
        assert servers.processes[0].end() == 0
        assert f"no worker has come to step 10, so there is no trace in {path}" in servers.log
    assert not path.exists()


def part(*spans: Span, **more: Any) -> pb.TracePart:
    recorded = Trace(range(100))
    recorded.spans += spans
    made = recorded.part()
    made.MergeFrom(pb.TracePart(**more))
    return made


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Servers, torch_ps.Client]]:
    import torch

    path = str(tmp_path_factory.mktemp("trace") / "t.json")
    with job(trace=path, trace_steps="2:5", shards=2) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.ones(3)}, torch_ps.OptimizerSpec("SGD", lr=0.1))
        yield servers, client


SPAN = Span("send", 2, 0, 1, "MainThread")


@pytest.mark.parametrize(
    ("shard", "worker", "sent", "error"),
    [
        (0, "w1", part(SPAN), UnknownWorker),
        (1, "w0", part(SPAN), ProtocolError),
        (0, "w0", part(SPAN._replace(step=9)), CorruptFrame),
        (0, "w0", pb.TracePart(span=[pb.TraceSpan(name=1, step=2)], word=["a"]), CorruptFrame),
        (0, "w0", part(SPAN, word=["a" * 201]), ProtocolError),
    ],
    ids=["a stranger", "not the lead", "another step", "no such word", "a long word"],
)
def test_a_part_that_cannot_be_right_is_refused(
    traced: tuple[Servers, torch_ps.Client], shard: int, worker: str, sent: pb.TracePart, error: type[Exception]
) -> None:
    servers, client = traced
    session = client._session.number
    request = pb.TraceRequest(worker=worker, session=session, part=sent, incarnation=servers.incarnation)
    request.secret = client._session.identity.secret
    with servers._link(shard) as link, pytest.raises(error):
        link.trace(request, SECONDS)


@pytest.mark.parametrize("text", ["10", "3:3", "5:3", "a:b", "0:2000", "-1:3", "1:2:3"])
def test_steps_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="FIRST:STOP"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trace_steps": "3:4"}, "trace_steps=3:4 needs trace"),
        ({"trace": "t", "trace_steps": ""}, "needs trace_steps"),
        ({"trace": "t", "shard": "1/2", "lead": "127.0.0.1:1"}, "is for shard 0"),
        ({"trace": "t", "standby_of": "127.0.0.1:1"}, "starts the job"),
    ],
)
def test_options_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**given)
