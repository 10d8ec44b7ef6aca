"""The text that names the servers of one job or of several."""

import pytest

from torch_ps.common.errors import ConfigError
from torch_ps.common.wire.address import Address
from torch_ps.common.wire.job_servers import JobServers, format_jobs, parse_jobs

A1, A2, B1 = Address("a", 1), Address("a", 2), Address("b", 1)


@pytest.mark.parametrize(
    ("text", "jobs"),
    [
        ("a:1", (JobServers("", ((A1,),)),)),
        ("a:1|b:1,a:2", (JobServers("", ((A1, B1), (A2,))),)),
        ("gen=a:1", (JobServers("gen", ((A1,),)),)),
        ("gen=a:1,a:2;critic=b:1", (JobServers("gen", ((A1,), (A2,))), JobServers("critic", ((B1,),)))),
    ],
)
def test_servers_of_jobs_are_read_and_written_back(text: str, jobs: tuple[JobServers, ...]) -> None:
    assert parse_jobs(text) == jobs
    assert format_jobs(jobs) == text


def test_jobs_without_names_are_those_of_the_models_in_their_order() -> None:
    assert [job.name for job in parse_jobs("a:1; b:1 ;")] == ["model0", "model1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gen=a:1;gen=b:1", "must name each job once; gen stands twice"),
        ("gen=a:1;critic=a:1", "a:1 stands twice"),
        ("a b=a:1", "a job's name must be letters"),
        ("=a:1", "a job's name must be letters"),
        ("gen=", "a list of servers must be"),
        ("", "a list of servers must be"),
        ("gen=a", "an address must be HOST:PORT"),
    ],
)
def test_a_malformed_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_jobs(text)
