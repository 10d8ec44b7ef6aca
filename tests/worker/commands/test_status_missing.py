"""ps-status of a job some of whose servers are gone: shows the rest, names who is missing, says whether all is lost."""

import json
import signal
from pathlib import Path
from typing import Any

import torch

import torch_ps
from tests.support.jobs import job, until
from tests.support.processes import Child
from tests.support.replicated import replicated
from tests.support.restart import shards
from torch_ps.common.wire import address
from torch_ps.worker.commands.status import Poller
from torch_ps.worker.transport.link import Link
from torch_ps.worker.transport.shard_servers import ShardServers

SECONDS = 60.0
PROGRAM = "torch_ps.worker.commands.status:main"


def looks(child: Child) -> list[dict[str, Any]]:
    return [json.loads(line) for line in child.output.splitlines(keepends=True) if line.endswith("}\n")]


def started(servers: object, log: Path, *options: str) -> Child:
    return Child(PROGRAM, (["--servers", str(servers), *options],), log)


def poller(servers: str) -> Poller:
    places = [[address.parse(each)] for each in servers.split(",")]
    return Poller("", [ShardServers(Link(some[0]), some) for some in places], 5.0)


def test_one_of_three_shards_dead_is_named_the_others_are_shown_and_the_watch_goes_on_until_it_is_back(
    tmp_path: Path,
) -> None:
    with shards(3, lease=30.0) as servers:
        live = started(servers, tmp_path / "live", "--watch", "--json", "--interval", "0.05")
        until(lambda: servers.status().shard == 0 and bool(looks(live)), "a look")
        servers.kill(2)
        until(lambda: servers.status().shard == 0 and bool(looks(live)[-1]["missing"]), "a look without the dead")
        once = started(servers, tmp_path / "once")
        assert once.wait(SECONDS) == 1
        assert f"missing: shard 2 at {servers.addresses[2]}: nothing listens there" in once.output
        assert all(f"{shard}/3  {servers.addresses[shard]}" in once.output for shard in (0, 1))
        (missing,) = looks(live)[-1]["missing"]
        assert (missing["shard"], missing["addresses"]) == (2, [servers.addresses[2]])
        assert [each["shard"] for each in looks(live)[-1]["shards"]] == [0, 1]
        servers.start_alone(2)
        until(lambda: servers.status().shard == 0 and not looks(live)[-1]["missing"], "the dead shard is back")
        assert live.end(signal.SIGINT) == 0
        assert not any("Traceback" in each.output for each in (live, once))


def test_a_dead_lead_leaves_the_workers_as_the_other_shards_know_them() -> None:
    with shards(2, lease=30.0) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(8), "y": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        looking = poller(str(servers))
        assert [worker.name for worker in looking.poll().workers] == ["w0"]
        servers.kill(0)
        view = looking.poll()
        assert [worker.name for worker in view.workers] == ["w0"]
        assert [each.shard for each in view.missing] == [0]
        servers.kill()
        servers.start()


def test_a_watch_follows_a_takeover_though_it_was_given_the_primary_alone(tmp_path: Path) -> None:
    with replicated(lease=2.0) as servers, torch_ps.Client(str(servers), name="w0") as client:
        client.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))
        servers.wait()
        live = started(servers, tmp_path / "live", "--watch", "--json", "--interval", "0.05")
        until(lambda: servers.paired() and bool(looks(live)), "a look")
        servers.kill(0)
        client.push({"x": torch.ones(8)})
        standby = servers.standbys[0]

        def shown() -> bool:
            return servers.role(standby) == "alone" and looks(live)[-1]["shards"][0]["address"] == standby.address

        until(shown, "the watch shows the server that has taken over")
        assert live.end(signal.SIGINT) == 0


def test_a_watch_of_a_job_that_is_lost_ends_with_1_and_one_that_was_stopped_with_0(tmp_path: Path) -> None:
    with shards(lease=0.5) as servers:
        live = started(servers, tmp_path / "lost", "--watch", "--json", "--interval", "0.05")
        until(lambda: servers.status().shard == 0 and bool(looks(live)), "a look")
        servers.kill()
        assert live.wait(SECONDS) == 1
        assert "the job is lost: no server has answered for " in live.output
        servers.start()
    with job() as stopped:
        live = started(stopped, tmp_path / "stopped", "--watch", "--json", "--interval", "0.05")
        until(lambda: stopped.status().shard == 0 and bool(looks(live)), "a look")
    assert live.wait(SECONDS) == 0, live.output
    assert "the job has ended: shard 0 was stopped" in live.output
