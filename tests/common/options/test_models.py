"""--models: names, and the options of the servers of each model."""

import pytest

from torch_ps.common.options.models import names_of_models, options_of_model
from torch_ps.common.options.server_config import ServerConfig


def test_models_are_a_number_or_names() -> None:
    assert names_of_models("2") == ("model0", "model1")
    assert names_of_models("gen, critic") == ("gen", "critic")
    assert names_of_models("") == ("",)


def test_each_model_has_ports_checkpoints_trace_and_etcd_key_of_its_own() -> None:
    config = ServerConfig(
        models="gen,critic",
        shards=3,
        listen="127.0.0.1:5000",
        metrics="127.0.0.1:9000",
        checkpoint="s3://bucket/job/",
        trace="out/trace.json.gz",
        etcd="http://etcd:2379/job",
    )
    critic = options_of_model(config, 1)
    assert (critic.models, critic.job, critic.shards) == ("", "critic", 3)
    assert (critic.listen, critic.metrics) == ("127.0.0.1:5003", "127.0.0.1:9003")
    assert (critic.checkpoint, critic.trace) == ("s3://bucket/job/critic", "out/trace-critic.json.gz")
    assert critic.etcd == "http://etcd:2379/job-critic"
    assert options_of_model(config, 0).checkpoint == "s3://bucket/job/gen"


@pytest.mark.parametrize(
    ("given", "own"),
    [
        ("http://a:1", "http://a:1/torch-ps-gen"),
        ("http://a:1,http://b:1", "http://a:1,http://b:1/torch-ps-gen"),
        ("http://a:1/job,http://b:1", "http://a:1/job,http://b:1/job-gen"),
    ],
)
def test_an_etcd_key_is_that_of_the_job_with_the_name_of_the_model(given: str, own: str) -> None:
    assert options_of_model(ServerConfig(models="gen", etcd=given), 0).etcd == own


def test_free_ports_and_metrics_that_are_off_stay() -> None:
    critic = options_of_model(ServerConfig(models="2", listen="127.0.0.1:0", metrics="off"), 1)
    assert (critic.listen, critic.metrics) == ("127.0.0.1:0", "off")
