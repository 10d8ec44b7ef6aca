"""What ps-run and ps-worker accept, and what each child of a job is told."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.run_config import RunConfig
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.slow_workers import parse_slow
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.worker.commands import run as ps_run
from torch_ps.worker.commands import status
from torch_ps.worker.commands import worker as cli
from torch_ps.worker.commands.run import JobSpec


def job(
    count: int = 2,
    *,
    run: RunConfig = RunConfig(),  # noqa: B008  # frozen
    worker: WorkerConfig = WorkerConfig(),  # noqa: B008
    script: tuple[str, ...] = (),
) -> JobSpec:
    return JobSpec(run, ServerConfig(), worker, script, count)


def test_slow_workers_are_read_from_one_text_or_several() -> None:
    assert parse_slow(("w1:3x", "w2:2")) == parse_slow(("w1:3x, w2:2.0x",)) == {1: 3.0, 2: 2.0}
    assert parse_slow(()) == {}


@pytest.mark.parametrize("text", ["w1", "1:3x", "w1:0.5x", "w1:x", "w1:3y", "w-1:3x"])
def test_a_slow_worker_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"such as w1:3x; got '{text}'"):
        RunConfig(slow=(text,))


def test_a_slow_worker_is_named_once_and_exists() -> None:
    with pytest.raises(ConfigError, match="slow names w1 twice"):
        parse_slow(("w1:3x", "w1:2x"))
    with pytest.raises(ConfigError, match="slow names w2; the workers of this job are w0 to w1"):
        job(run=RunConfig(slow=("w2:3x",)))


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_workers_is_one_or_more_or_auto(text: str) -> None:
    with pytest.raises(ConfigError, match="workers must be a whole number >= 1, or auto"):
        RunConfig(workers=text)


def test_a_worker_is_told_its_place_and_its_options() -> None:
    run, worker = RunConfig(slow=("w1:3x",), events="out"), WorkerConfig(task="gpt", lr=0.5)
    told = job(3, run=run, worker=worker).worker_environment(1, "127.0.0.1:1", {}, "127.0.0.1:2")
    assert told == {
        "PS_SERVERS": "127.0.0.1:1",
        "PS_NAME": "w1",
        "PS_RANK": "1",
        "PS_WORLD": "3",
        "PS_TASK": "gpt",
        "PS_LR": "0.5",
        "PS_SLOW": "3.0",
        "PS_EVENTS": str(Path("out", "w1.jsonl")),
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_WORLD_SIZE": "3",
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "ROLE_NAME": "default",
        "ROLE_RANK": "1",
        "ROLE_WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "2",
    }


def test_what_the_launcher_inherits_does_not_reach_its_children() -> None:
    inherited = {"PS_SLOW": "w1:3x", "PS_EVENTS": "out", "PS_CONFIG": "job.toml", "PS_LISTEN": "0.0.0.0:1", "RANK": "7"}
    told = job().worker_environment(0, "127.0.0.1:1", {**inherited, "HOME": "/home"}, "[::1]:2")
    assert (told["RANK"], told["HOME"], told["MASTER_ADDR"]) == ("0", "/home", "::1")
    assert not {"PS_SLOW", "PS_EVENTS", "PS_CONFIG"} & set(told)
    told = job(2).server_environment(Path("ready"), {**inherited, "PS_WORKERS": "auto"})
    assert (told["PS_LISTEN"], told["PS_WORKERS"], told["PS_READY_FILE"]) == ("127.0.0.1:0", "2", "ready")


def test_workers_on_hosts_of_their_own_are_the_first_of_each() -> None:
    told = job(3).worker_environment(2, "a:1", {}, "a:2", one_host=False)
    assert (told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"], told["GROUP_RANK"], told["RANK"]) == ("0", "1", "2", "2")


def test_the_shards_of_each_model_are_told_whose_they_are() -> None:
    server = ServerConfig(models="gen,critic", shards=2, checkpoint="kept")
    spec = JobSpec(RunConfig(), server, WorkerConfig(), (), 2)
    assert spec.models == ("gen", "critic")
    told = spec.shard_environment(1, ["127.0.0.1:3", "127.0.0.1:4"], 1)
    assert (told["PS_JOB"], told["PS_CHECKPOINT"], told["PS_SHARD"]) == ("critic", "kept/critic", "1/2")
    assert (told["PS_LISTEN"], told["PS_LEAD"], "PS_MODELS" in told) == ("127.0.0.1:4", "127.0.0.1:3", False)


def test_a_script_and_its_arguments_are_handed_on() -> None:
    assert job(script=("train.py", "--lr", "1")).worker_command()[-3:] == ["train.py", "--lr", "1"]


@pytest.mark.parametrize("command", [ps_run.main, cli.main])
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "nothing to train: give --task gpt"),
        (["--task=digits", "train.py"], "both task 'digits' and script 'train.py' are given; give one of them"),
        (["gone.py", "--epochs", "1"], "script 'gone.py' does not exist"),
        ([str(Path(__file__).parent)], "is a folder; give the file in it"),
        (["--task=gtp"], "there is no task 'gtp'; known are gpt, digits, digits:cnn, and module:function"),
        (["--task=gpt", "--data=gone"], "data 'gone' does not exist"),
        (["--task=digits", "--batch-size=-1"], "batch_size must be >= 0; got -1"),
        (["--task=digits", "--compress=zip"], "compress: codec 'zip' does not exist; choose one of none, fp16, bf16"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(command: object, arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(command, arguments)  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())


@pytest.mark.parametrize("command", [ps_run.main, cli.main])
def test_help_fits_a_screen(command: object) -> None:
    result = CliRunner().invoke(command, ["--help"], terminal_width=100)  # type: ignore[arg-type]
    assert result.exit_code == 0
    assert len(result.output.splitlines()) <= 40


@pytest.mark.parametrize(("command", "arguments"), [(cli.main, ["--task", "digits"]), (status.main, [])])
def test_a_ready_made_task_and_a_look_at_a_job_need_servers(command: object, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)  # type: ignore[arg-type]
    assert result.exit_code == 2
    assert "no servers: give --servers HOST:PORT" in " ".join(result.output.split())


def test_a_ready_made_task_has_one_model() -> None:
    result = CliRunner().invoke(ps_run.main, ["--task", "digits", "--models", "2"])
    assert result.exit_code == 2
    assert "models=2 is for scripts; task 'digits' trains one model" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("folder", "said"), [("/proc/nope", "cannot be made: No such file"), ("/proc/self", "cannot be written")]
)
def test_folder_of_events_that_cannot_be_written_is_refused_before_the_job_starts(folder: str, said: str) -> None:
    result = CliRunner().invoke(ps_run.main, ["-n1", "--task", "digits", "--events", folder])
    assert result.exit_code == 2
    assert f"events {folder} {said}" in " ".join(result.output.split())
