"""What a standby is told, and what it takes over from its primary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_ps
from tests.support.certificates import Authority, options
from tests.support.jobs import SECONDS, until
from tests.support.replicated import replicated
from torch_ps.common.errors import ConfigError
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.ps.job.job_options import dump_options, take_over_options

PRIMARY = ServerConfig(mode="ssp", slack=3, lease=4.0, checkpoint="kept", checkpoint_every=7, shard="1/2", lead="a:1")
SPEC = torch_ps.OptimizerSpec("SGD", lr=1.0)


def taken(**given: Any) -> ServerConfig:
    return take_over_options(ServerConfig(standby_of="a:2", **given), json.loads(dump_options(PRIMARY)))


def test_options_of_the_job_are_taken_over_and_those_of_the_process_are_not() -> None:
    config = taken(listen="127.0.0.1:7", metrics="off")
    assert (config.mode, config.slack, config.lease, config.shard, config.lead) == ("ssp", 3, 4.0, "1/2", "a:1")
    assert (config.checkpoint, config.checkpoint_every) == (str(Path("kept").absolute()), 7)
    assert (config.listen, config.metrics, config.standby_of) == ("127.0.0.1:7", "off", "a:2")


def test_an_option_that_differs_is_refused_with_both_values_and_the_same_is_not() -> None:
    assert taken(lease=4.0).lease == 4.0
    with pytest.raises(ConfigError, match=r"lease=9.0 is not what the primary at a:2 has, which is 4.0; leave it out"):
        taken(lease=9.0)


def test_another_place_for_checkpoints_is_the_standbys_own() -> None:
    assert taken(checkpoint="s3://other").checkpoint == "s3://other"


def test_a_standby_with_another_place_for_checkpoints_says_where_they_go_and_when(tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("here", "there")}
    with replicated(checkpoint=places["here"], of_standbys={"checkpoint": places["there"]}) as servers:
        said = servers.standbys[0].process.output
        assert f"checkpoints of this shard go to {places['here']} while the primary at {servers} serves it" in said
        assert f"and to {places['there']} once this server does" in said


@pytest.mark.parametrize("more", [{"shards": 2}, {"checkpoint": "kept", "resume": True}])
def test_a_standby_is_one_server_that_goes_on_from_its_primary(more: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="standby_of=a:2 is for one server"):
        ServerConfig(standby_of="a:2", **more)


def test_a_standby_shows_certificate_and_token_and_serves_with_them(tmp_path: Path) -> None:
    token, tls = tmp_path / "token", Authority(tmp_path).issue("all")
    token.write_text("a-secret-of-the-job-0123456789\n")
    secured: dict[str, Any] = {**options(tls), "token_file": str(token)}
    with (
        replicated(workers=1, **secured) as servers,
        torch_ps.Client(str(servers), name="w0", tls=tls, token_file=str(token), timeout=SECONDS) as client,
    ):
        client.init({"x": torch.zeros(8)}, SPEC)
        servers.wait()
        client.push({"x": torch.ones(8)})
        servers.kill(0)
        assert client.push({"x": torch.ones(8)}).params["x"].tolist() == [-2.0] * 8
        until(lambda: servers.role(servers.standbys[0]) == "alone", "the standby serves")
