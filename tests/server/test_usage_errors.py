"""A wrong option of ps-serve is a usage error that says what is wrong, before anything starts."""

import pytest
from click.testing import CliRunner

from torch_ps.ps.server import cli


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "eventual"], "'eventual'"),
        (["--workers", "0"], "workers must be >= 1; got 0"),
        (["--lease", "-1"], "lease must be > 0 seconds; got -1"),
        (["--bucket-size", "5"], "bucket_size must be > 0 and <= 4 MiB; got 5"),
        (["--listen", "nonsense"], "an address must be HOST:PORT"),
        (["--listen", "0.0.0.0:0"], "can be reached from other machines and nothing protects it"),
        (["--shard", "2/2"], "I below N"),
        (["--shard", "1/2"], "needs lead"),
        (["--models", "0"], "the number of models must be between 1 and 64; got 0"),
        (["--models", "gen,critic,gen"], "each model must have a name of its own; gen stands twice"),
        (["--models", "gen/../x"], "a job's name must be letters, digits, '.', '_' or '-'"),
        (["--models", "2", "--standby-of", "a:1"], "models=2 starts the servers of all models here and standby_of=a:1"),
        (["--models", "3", "--listen", "127.0.0.1:65534"], "of each of 3 models from port 65534 on would end above"),
        (["--ready-file", "/nope/x"], "ready_file /nope/x cannot be written: there is no folder /nope; make it first"),
        (
            ["--trace", "/proc/x.json"],
            "trace /proc/x.json cannot be written: No such file or directory",
        ),
        (["--ready-file", "/dev/null"], "ready_file /dev/null exists and is no regular file; give another one"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_option_is_a_usage_error_that_says_what_is_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
