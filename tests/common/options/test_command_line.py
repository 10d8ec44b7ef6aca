"""Where an option's value comes from, what a refused one says, and what a child process is given."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from torch_ps.common.errors import ConfigError, Unreachable
from torch_ps.common.options.command_line import Command, options_of
from torch_ps.common.options.every_option import OF_COMMAND, check_variables
from torch_ps.common.options.fields import (
    arguments_of,
    at_least,
    check_all,
    declared,
    environment_of,
    from_environment,
    more_than,
    option,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    lease: float = option(15.0, "silence before a worker is dropped", unit="seconds", check=more_than(0), common=True)
    mode: str = option("sync", "when a gradient is applied", choices=("sync", "async"), common=True)
    insecure: bool = option(False, "allow anyone")
    threads: int = option(1, "CPU threads", check=at_least(1))

    def __post_init__(self) -> None:
        check_all(self)
        if self.mode == "async" and self.insecure:
            raise ConfigError("async and insecure do not go together")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    rank: int | None = option(None, "place of this worker", env="RANK", check=at_least(0))
    slow: tuple[str, ...] = option((), "workers to slow down", metavar="NAME")
    codec: str = option("none", "how gradients travel", choices=lambda: ["none", "fp16"])
    threads: int = option(1, "CPU threads", check=at_least(1))

    def __post_init__(self) -> None:
        check_all(self)


seen: dict[str, Any] = {}


@click.command(cls=Command, name="ps-serve")
@options_of(ServerConfig)
def serve(server: ServerConfig) -> None:
    r"""Serve one shard.

    \b
    ps-serve --lease 3
    ps-serve --mode async
    """
    seen["server"] = server


@click.command(cls=Command, name="ps-run")
@click.argument("script", required=False)
@options_of(ServerConfig, exclude=("lease",))
@options_of(WorkerConfig)
def run(server: ServerConfig, worker: WorkerConfig, script: str | None) -> None:
    seen.update(server=server, worker=worker, script=script)


@pytest.fixture(autouse=True)
def _nothing_seen() -> Iterator[None]:
    seen.clear()
    yield
    seen.clear()


def call(command: click.Command, *args: str, **env: str) -> Result:
    return CliRunner().invoke(command, args, env=env)


def server(*args: str, **env: str) -> ServerConfig:
    result = call(serve, *args, **env)
    assert result.exit_code == 0, result.output
    config = seen["server"]
    assert isinstance(config, ServerConfig)
    return config


def refusal(command: click.Command, *args: str, **env: str) -> str:
    """The line of a refused value, or the last one of a usage error; the command itself must not have run."""
    result = call(command, *args, **env)
    assert result.exit_code == 2, result.output
    assert seen == {}
    return result.output.splitlines()[-1]


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        path = tmp_path / "job.toml"
        path.write_text(text)
        return str(path)

    return write


def test_default_when_nothing_is_given() -> None:
    assert server() == ServerConfig()


def test_flag_beats_variable_beats_table_beats_top_level_beats_default(toml: Any) -> None:
    assert server("--config", toml("lease = 1")).lease == 1
    file = toml("lease = 1\n[server]\nlease = 2")
    assert server("--config", file).lease == 2
    assert server("--config", file, PS_LEASE="3").lease == 3
    assert server("--config", file, "--lease", "4", PS_LEASE="3").lease == 4


def test_precedence_holds_for_each_option_by_itself(toml: Any) -> None:
    config = server("--config", toml("lease = 2\nmode = 'async'\nthreads = 9"), "--threads", "3", PS_LEASE="5")
    assert config == ServerConfig(lease=5.0, mode="async", threads=3)


def test_flag_equal_to_the_default_beats_a_variable() -> None:
    assert server("--lease", "15", PS_LEASE="5").lease == 15.0
    assert server("--no-insecure", PS_INSECURE="1").insecure is False


def test_file_can_be_named_by_a_variable(toml: Any) -> None:
    assert server(PS_CONFIG=toml("threads = 4")).threads == 4


def test_empty_variable_counts_as_not_set() -> None:
    assert server(PS_LEASE="", PS_MODE="") == ServerConfig()


@pytest.mark.parametrize(("word", "value"), [("1", True), ("yes", True), ("TRUE", True), ("off", False), ("0", False)])
def test_boolean_variable(word: str, value: bool) -> None:
    assert server(PS_INSECURE=word).insecure is value


def test_further_variable_is_read_after_its_own() -> None:
    assert call(run, RANK="3").exit_code == 0
    assert seen["worker"].rank == 3
    call(run, RANK="3", PS_RANK="2")
    assert seen["worker"].rank == 2


def test_repeated_flag_and_list_and_comma_make_the_same_tuple(toml: Any) -> None:
    for args, env in (
        (("--slow", "a", "--slow", "b"), {}),
        ((), {"PS_SLOW": "a, b"}),
        (("--config", toml("slow = ['a', 'b']")), {}),
    ):
        assert call(run, *args, **env).exit_code == 0
        assert seen["worker"].slow == ("a", "b")


def test_stacked_classes_share_what_they_declare_identically() -> None:
    assert call(run, "--threads", "3", "--mode", "async", "train.py").exit_code == 0
    assert seen["server"] == ServerConfig(threads=3, mode="async")
    assert seen["worker"] == WorkerConfig(threads=3)
    assert seen["script"] == "train.py"
    assert call(run, "--help-all").output.count("--threads") == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    size: int | Literal["auto"] = option(0, "samples a step", check=at_least(0), common=True)

    def __post_init__(self) -> None:
        check_all(self)


@click.command(cls=Command, name="ps-size")
@options_of(JobConfig)
def sized(job: JobConfig) -> None:
    seen["size"] = job.size


@pytest.mark.parametrize(
    ("arguments", "text", "variable", "value"),
    [
        ((), "", "", 0),
        (("--size", "64"), "", "", 64),
        (("--size=auto",), "", "", "auto"),
        ((), "", "64", 64),
        ((), "", " auto ", "auto"),
        ((), "size = 64", "", 64),
        ((), 'size = "64"', "", 64),
        ((), 'size = "auto"', "", "auto"),
        (("--size", "8"), 'size = "auto"', "auto", 8),
    ],
)
def test_a_word_may_stand_in_the_place_of_a_number(
    toml: Any, arguments: tuple[str, ...], text: str, variable: str, value: int | str
) -> None:
    result = call(sized, *arguments, "--config", toml(text), PS_SIZE=variable)
    assert result.exit_code == 0, result.output
    assert seen["size"] == value
    assert type(seen["size"]) is type(value)


@pytest.mark.parametrize("value", [0, 64, "auto"])
def test_a_word_and_a_number_reach_a_child(value: Any) -> None:
    config = JobConfig(size=value)
    assert from_environment(JobConfig, environment_of(config, {})) == config
    assert arguments_of(config) == ([f"--size={value}"] if value else [])


def test_a_word_that_is_none_and_a_number_that_is_out_of_range_are_refused() -> None:
    assert refusal(sized, "--size", "big").endswith("size must be a whole number or auto; got 'big'")
    assert refusal(sized, "--size=-1").endswith("size must be >= 0; got -1")
    assert "--size N|auto" in call(sized, "--help").output
    with pytest.raises(ConfigError, match="size must be a whole number or auto; got None"):
        JobConfig(size=None)  # type: ignore[arg-type]


def test_shared_field_can_differ_in_the_tables_of_a_file(toml: Any) -> None:
    assert call(run, "--config", toml("[server]\nthreads = 2\n[worker]\nthreads = 4")).exit_code == 0
    assert (seen["server"].threads, seen["worker"].threads) == (2, 4)


def test_stacking_classes_that_disagree_about_a_name_is_a_mistake_of_the_program() -> None:
    @dataclass(frozen=True, kw_only=True)
    class OtherConfig:
        threads: int = option(2, "something else")

    def command(**_: Any) -> None: ...

    with pytest.raises(TypeError, match="threads is declared twice"):
        options_of(ServerConfig)(options_of(OtherConfig)(command))
    options_of(ServerConfig, exclude=("threads",))(options_of(OtherConfig)(command))


def test_excluding_an_unknown_name_is_a_mistake_of_the_program() -> None:
    with pytest.raises(TypeError, match="ServerConfig has no option leese"):
        options_of(ServerConfig, exclude=("leese",))


def test_excluded_option_is_neither_flag_nor_variable_nor_key(toml: Any) -> None:
    assert "No such option" in refusal(run, "--lease", "3")
    assert "lease of [server]" in refusal(run, "--config", toml("[server]\nlease = 3"))
    assert call(run, PS_LEASE="3").exit_code == 0
    assert seen["server"].lease == 15.0


@pytest.mark.parametrize(
    ("args", "env", "sentence"),
    [
        (("--lease", "0"), {}, "lease must be > 0 seconds; got 0.0"),
        (("--lease", "nan"), {}, "lease must be a number; got nan"),
        (("--lease", "inf"), {}, "lease must be > 0 seconds; got inf"),
        (("--lease", "soon"), {}, "lease must be a number; got 'soon'"),
        (("--threads", "1.5"), {}, "threads must be a whole number; got '1.5'"),
        (("--mode", "ssp"), {}, "mode must be one of sync, async; got 'ssp'"),
        (("--mode", "async", "--insecure"), {}, "async and insecure do not go together"),
        ((), {"PS_LEASE": "0"}, "lease must be > 0 seconds; got 0.0 (from $PS_LEASE)"),
        ((), {"PS_INSECURE": "maybe"}, "insecure must be true or false; got 'maybe' (from $PS_INSECURE)"),
    ],
)
def test_refused_value_is_one_sentence_and_the_command_does_not_run(
    args: tuple[str, ...], env: dict[str, str], sentence: str
) -> None:
    assert refusal(serve, *args, **env) == f"Error: {sentence}"


def test_choices_made_by_a_function_are_named_in_the_refusal() -> None:
    assert refusal(run, "--codec", "zip") == "Error: codec must be one of none, fp16; got 'zip'"


def test_refused_further_variable_is_named() -> None:
    assert refusal(run, RANK="-1") == "Error: rank must be >= 0; got -1 (from $RANK)"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lease = 'x'", "lease must be a number; got 'x' (from {file})"),
        ("threads = true", "threads must be a whole number; got True (from {file})"),
        ("mode = 3", "mode must be text; got 3 (from {file})"),
        ("insecure = 1", "insecure must be true or false; got 1 (from {file})"),
        ("leese = 3", "leese in {file} is not an option of ps-serve; did you mean lease?"),
        ("[server]\nport = 3", "port of [server] in {file} is not an option of ps-serve"),
        (
            "[sever]\nlease = 3",
            "[sever] in {file} must be one of [server], [worker], [run], [compare], [status], [export]; did you mean "
            "[server]?",
        ),
        ("[compare]\nsedes = 3", "sedes of [compare] in {file} is not an option of ps-compare; did you mean seeds?"),
    ],
)
def test_refused_file_is_one_sentence_that_names_it(toml: Any, text: str, sentence: str) -> None:
    file = toml(text)
    assert refusal(serve, "--config", file) == "Error: " + sentence.format(file=file)


def test_tables_of_other_commands_are_for_them(toml: Any) -> None:
    assert server("--config", toml("[worker]\ncompress = 'anything'\n[server]\nlease = 2")).lease == 2


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("PS_MOED", "$PS_MOED is no option of torch-ps; did you mean $PS_MODE?"),
        ("PS_CHECKPIONT", "$PS_CHECKPIONT is no option of torch-ps; did you mean $PS_CHECKPOINT?"),
        ("PS_PORT", "$PS_PORT is no option of torch-ps; did you mean $PS_REPORT?"),
        ("PS_XYZZY_42", "$PS_XYZZY_42 is no option of torch-ps; unset it, or rename it if it is not for torch-ps"),
    ],
)
def test_variable_that_no_command_knows_is_refused_with_the_nearest_name(variable: str, sentence: str) -> None:
    assert refusal(serve, **{variable: "1"}) == f"Error: {sentence}"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        check_variables({variable: "1"})


@pytest.mark.parametrize("program", OF_COMMAND)
def test_every_command_refuses_a_mistyped_variable_and_key(program: str, toml: Any) -> None:
    (installed,) = entry_points(group="console_scripts", name=program)
    command, operands = installed.load(), ("from", "to.safetensors") if program == "ps-export" else ()
    said = refusal(command, *operands, PS_LEESE="3")
    assert said == "Error: $PS_LEESE is no option of torch-ps; did you mean $PS_LEASE?"
    file = toml("[server]\nleese = 3")
    said = refusal(command, "--config", file, *operands)
    assert said.startswith(f"Error: leese of [server] in {file} is not an option of ")


def test_all_mistyped_variables_are_named_at_once() -> None:
    said = refusal(serve, PS_MOED="async", PS_LEESE="3")
    assert "$PS_LEASE? $PS_MOED is no option of torch-ps; did you mean $PS_MODE?" in said


def test_variables_of_other_commands_and_of_other_programs_are_let_through() -> None:
    kubernetes = {
        "PS_SERVICE_HOST": "10.0.0.1",
        "PS_SERVICE_PORT_GRPC": "1",
        "PS_PORT": "tcp://10.0.0.1:1",
        "PS_PORT_1_TCP_ADDR": "10.0.0.1",
        "PS_0_SERVICE_HOST": "10.0.0.2",
        "PS_0_PORT_1_TCP": "tcp://10.0.0.2:1",
    }
    assert server(PS_FORMAT="pid", PS_SERVERS="a:1", PS_MOED="", **kubernetes) == ServerConfig()


def test_file_that_is_missing_or_not_toml_is_refused(toml: Any, tmp_path: Path) -> None:
    assert "does not exist" in refusal(serve, "--config", str(tmp_path / "none.toml"))
    assert "is not a readable TOML file" in refusal(serve, "--config", toml("lease ="))


def test_file_may_begin_with_a_byte_order_mark_and_have_the_line_ends_of_another_system(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_bytes(b"\xef\xbb\xbf[server]\r\nlease = 7\r\n")
    assert server("--config", str(path)).lease == 7


def test_help_shows_common_options_first_and_fits_a_screen() -> None:
    short = call(serve, "--help", COLUMNS="100").output
    assert "--lease SECONDS" in short
    assert "silence before a worker is dropped; > 0  [15]" in short
    assert "--mode sync|async" in short
    assert "--threads" not in short
    assert "--help-all" in short
    assert max(len(line) for line in short.splitlines()) <= 100
    everything = call(serve, "--help-all").output
    assert everything.index("--lease") < everything.index("More options:") < everything.index("--threads")


def test_examples_in_a_raw_docstring_keep_their_lines() -> None:
    assert "\n  ps-serve --lease 3\n  ps-serve --mode async\n" in call(serve, "--help").output


def test_help_beats_a_refused_value() -> None:
    assert call(serve, "--lease", "0", "--help").exit_code == 0
    assert call(serve, "--lease", "0", "--help-all").exit_code == 0


@pytest.mark.parametrize(("error", "code"), [(ConfigError("bad task"), 2), (Unreachable("nobody at a:1"), 1)])
def test_error_of_the_command_itself_is_one_sentence(error: Exception, code: int) -> None:
    @click.command(cls=Command)
    @options_of(ServerConfig)
    def fail(server: ServerConfig) -> None:
        raise error

    result = call(fail)
    assert result.exit_code == code
    assert result.output.splitlines()[-1] == f"Error: {error}"
    assert "Traceback" not in result.output


configs = st.builds(
    ServerConfig,
    lease=st.floats(min_value=1e-3, max_value=1e9),
    mode=st.sampled_from(["sync", "async"]),
    threads=st.integers(1, 99),
)


@given(configs)
def test_arguments_give_the_config_back(config: ServerConfig) -> None:
    assert server(*arguments_of(config)) == config


@given(configs)
def test_environment_gives_the_config_back_whatever_was_inherited(config: ServerConfig) -> None:
    inherited = {"PS_LEASE": "3", "PS_THREADS": "bad", "PS_CONFIG": "/nowhere", "HOME": "/root"}
    environment = environment_of(config, inherited)
    assert environment["HOME"] == "/root"
    assert "PS_CONFIG" not in environment
    assert server(**environment) == config


def test_only_what_differs_from_the_default_is_handed_on() -> None:
    assert arguments_of(ServerConfig()) == []
    assert environment_of(ServerConfig(), {}) == {}
    assert arguments_of(ServerConfig(insecure=True, lease=2)) == ["--lease=2", "--insecure"]
    worker = WorkerConfig(rank=0, slow=("a", "b"))
    assert arguments_of(worker) == ["--rank=0", "--slow=a", "--slow=b"]
    assert environment_of(worker, {"RANK": "7"}) == {"PS_RANK": "0", "PS_SLOW": "a,b"}


def test_config_object_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="lease must be > 0 seconds; got -1"):
        ServerConfig(lease=-1)
    with pytest.raises(ConfigError, match="threads must be a whole number; got True"):
        ServerConfig(threads=True)


def test_option_of_an_unknown_type_is_a_mistake_of_the_program() -> None:
    @dataclass(frozen=True)
    class OddConfig:
        when: bytes = option(b"", "never")

    with pytest.raises(TypeError, match="an option is one of str, int, float, bool, tuple"):
        declared(OddConfig)
