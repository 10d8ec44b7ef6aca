"""A server that is started anew while the connections to the former one hang: found by new connections."""

from pathlib import Path

import pytest
import torch

import torch_ps
from tests.support.jobs import until
from tests.support.proxy import Proxy
from tests.support.restart import shards
from torch_ps.worker.session import heartbeat


def test_worker_finds_a_server_started_anew_though_its_former_host_vanished_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "ALONE_SECONDS", 3.0)
    with (
        shards(checkpoint=str(tmp_path / "kept"), checkpoint_every=1, lease=3.0) as servers,
        Proxy(str(servers)) as proxy,
        torch_ps.Client(proxy.address, name="w0", plane="network", timeout=45.0) as client,
    ):
        client.init({"x": torch.zeros(8)}, torch_ps.OptimizerSpec("SGD", lr=1.0))

        def kept() -> bool:
            client.push({"x": torch.ones(8)})
            return servers.status().checkpoint.version > 0

        until(kept, "a checkpoint is good")
        proxy.vanish()
        servers.kill()
        servers.start(resume=True)
        with pytest.raises(torch_ps.Restarted):  # at once would be Unreachable, and never would be WaitTimeout
            client.push({"x": torch.ones(8)})
        assert client.pull().version > 0
