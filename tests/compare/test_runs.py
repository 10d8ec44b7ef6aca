"""The list of runs: names, options, refusals, and the rule of the learning rate."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.compare_config import DEFAULT_RUNS, CompareConfig
from torch_ps.common.options.slow_workers import parse_slow
from torch_ps.compare.run_process import PlannedRun, arguments
from torch_ps.compare.runs import learning_rate, lr_rule, parse_runs, run_options


def names(text: str) -> list[str]:
    return [run.name for run in parse_runs(text)]


def test_the_default_is_sync_and_async_each_with_fp32_and_fp16() -> None:
    assert names(DEFAULT_RUNS) == ["sync fp32", "sync fp16", "async fp32", "async fp16"]


def test_options_are_named_in_the_order_in_which_they_were_said() -> None:
    text = "sync:shards=2:compress=bf16, async:compress_pull=fp16:--lr=0.1"
    assert names(text) == ["sync bf16 shards=2", "async fp32 pull=fp16 lr=0.1"]


def test_a_part_without_equals_sign_belongs_to_the_value_before() -> None:
    assert names("sync:compress=topk:0.01,async:codec=randk:0.1:lr=0.1") == ["sync topk:0.01", "async randk:0.1 lr=0.1"]


def test_every_option_of_a_run_is_one_of_ps_run_and_none_of_the_shared_ones() -> None:
    known = run_options()
    assert {"compress", "compress-pull", "lr", "shards", "lease", "accumulate"} <= set(known)
    assert not {"samples", "seed", "workers", "task", "events", "mode", "rank"} & set(known)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no run"),
        (" , ", "names no run"),
        ("fast", "mode must be one of sync, async, ssp, local; got 'fast'"),
        ("local", "run 'local': local needs the steps between two pushes, 2 or more, as in local:8"),
        ("local:1", "local needs the steps"),
        ("local:compress=fp16", "local needs the steps"),
        ("local:8:local-steps=4", "gives local-steps twice"),
        ("local:8:mode=fast", "mode must be one of sync, async, ssp; got 'fast'"),
        ("async:local-steps=8", "local steps are written local:8, then :mode=async"),
        ("sync:mode=async", "mode is the same for all runs"),
        ("sync:slack=2", "run 'sync:slack=2': slack=2 is for mode ssp; the mode is sync"),
        ("sync:staleness-lr=inverse", "staleness_lr=inverse is for modes async and ssp"),
        ("local:8:slack=2", "slack=2 is for mode ssp; the mode is sync"),
        ("sync:compress-warmup=9", "compress_warmup is for topk and randk"),
        ("sync:compres=fp16", r"unknown option 'compres'; did you mean compress\? \(known: .*compress.*shards"),
        ("sync:compress=zip", "run 'sync:compress=zip': compress: codec 'zip' does not exist"),
        ("sync:codec=topk:2", "run 'sync:codec=topk:2': compress: a density must be > 0 and <= 1"),
        ("sync:compress=fp16:codec=fp16", "gives compress twice"),
        ("sync:shards=0", "shards must be between 1 and 1024; got 0"),
        ("sync:8", "holds '8'; an option is written name=value"),
        ("sync:seed=3", "seed is the same for all runs"),
        ("sync:lr=1:lr=2", "gives lr twice"),
        ("sync,async,sync", "holds 'sync fp32' twice"),
    ],
)
def test_a_wrong_list_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_runs(text)


EVERY_KIND = (
    "sync,async,ssp:slack=2,async:staleness-lr=inverse,sync:codec=topk:0.01,local:8,"
    "local:4:compress=fp16:mode=async:outer-lr=1,sync:codec=sign"
)


def test_every_mode_and_codec_is_a_run() -> None:
    assert names(EVERY_KIND) == [
        "sync fp32",
        "async fp32",
        "ssp fp32 slack=2",
        "async fp32 staleness-lr=inverse",
        "sync topk:0.01",
        "local 8 fp32",
        "local 4 fp16 mode=async outer-lr=1",
        "sync sign",
    ]


def test_local_steps_are_an_option_of_ps_run_and_a_mode_of_the_report() -> None:
    plain, other = parse_runs("local:8,local:4:mode=async:outer-lr=1")
    assert (plain.mode, plain.job_mode, plain.slug) == ("local", "sync", "local-8-fp32")
    assert (other.mode, other.job_mode) == ("local", "async")
    config = CompareConfig(task="digits", lr=0.1, samples=64)
    flags = arguments(PlannedRun(plain, 0.1, Path("x")), config)
    assert flags.count("--mode=sync") == flags.count("--local-steps=8") == flags.count("--lr=0.1") == 1
    flags = arguments(PlannedRun(other, 0.1, Path("x")), config)
    assert [flag for flag in flags if flag.startswith("--mode")] == ["--mode=async"]
    assert {"--local-steps=4", "--outer-lr=1"} <= set(flags)


def test_ps_run_reads_the_command_line_of_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ps_run = pytest.importorskip("torch_ps.worker.commands.run")
    told: list[Any] = []

    def note(job: Any) -> int:
        told.append(job)
        return 0

    monkeypatch.setattr(ps_run, "run_job", note)
    config = CompareConfig(task="digits", lr=0.1, samples=64, device="cpu")
    for run in parse_runs(EVERY_KIND):
        result = CliRunner().invoke(ps_run.main, arguments(PlannedRun(run, 0.1, Path("x")), config))
        assert result.exit_code == 0, result.output
    assert [job._server.mode for job in told] == ["sync", "async", "ssp", "async", "sync", "sync", "async", "sync"]
    assert [job._worker.local_steps for job in told] == [1, 1, 1, 1, 1, 8, 4, 1]
    assert [job._worker.compress for job in told][4:] == ["topk:0.01", "none", "fp16", "sign"]


@pytest.mark.parametrize(
    ("run", "rate"),
    [
        ("sync", 0.8),
        ("sync:codec=sign", 0.8),
        ("sync:backup-workers=2", 0.6),
        ("async", 0.1),
        ("async:staleness-lr=inverse", 0.1),
        ("ssp", 0.1),
        ("ssp:slack=3", 0.1),
        ("ssp:slack=0", 0.8),
        ("local:8", 0.1),
        ("local:8:mode=async", 0.1),
        ("sync:lr=0.3", 0.3),
        ("local:8:lr=0.3", 0.3),
    ],
)
def test_a_run_gets_the_base_rate_times_the_gradients_that_are_averaged(run: str, rate: float) -> None:
    assert learning_rate(parse_runs(run)[0], 0.1, 8, scaled=True) == pytest.approx(rate)


def test_without_scaling_all_runs_get_the_base_rate() -> None:
    assert [learning_rate(run, 0.1, 8, scaled=False) for run in parse_runs("sync,async,local:8")] == [0.1] * 3


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ("sync,async", "async at learning rate 0.1, sync at 8 x 0.1 = 0.8"),
        ("sync,sync:codec=int8", "sync at learning rate 8 x 0.1 = 0.8"),
        ("async,ssp", "async and ssp at learning rate 0.1"),
        (
            "sync,async,ssp:slack=2,local:8",
            "async, ssp and each worker's local steps at learning rate 0.1, sync at 8 x 0.1 = 0.8",
        ),
        (
            "sync,sync:backup-workers=2,ssp:slack=0",
            "sync backup-workers=2 at learning rate 6 x 0.1 = 0.6, sync and ssp slack=0 at 8 x 0.1 = 0.8",
        ),
        ("sync,async:lr=0.3", "sync at learning rate 8 x 0.1 = 0.8, async fp32 lr=0.3 at its own"),
        ("sync:lr=1,async:lr=0.3", "sync fp32 lr=1 at its own, async fp32 lr=0.3 at its own"),
        ("sync:lr=1,sync:lr=2,sync:lr=3,sync:lr=4", "4 runs at the learning rate in their name"),
    ],
)
def test_the_rule_of_the_rates_is_said_for_any_mixture(runs: str, words: str) -> None:
    assert lr_rule(parse_runs(runs), 0.1, 8, scaled=True) == words


def test_the_rule_is_said_without_scaling_and_without_a_rate() -> None:
    runs = parse_runs("sync,async")
    assert lr_rule(runs, 0.1, 8, scaled=False) == "all runs at learning rate 0.1 (not scaled)"
    assert lr_rule(runs, 0.0, 8, scaled=True) == "all runs at the task's own rate"
    with_own = parse_runs("sync,async:lr=0.3")
    words = "the others at learning rate 0.1 (not scaled), async fp32 lr=0.3 at its own"
    assert lr_rule(with_own, 0.1, 8, scaled=False) == words


def test_slow_workers_are_checked_against_the_number_of_workers() -> None:
    assert parse_slow(("w1:3x", "w0:1.5,w2:2")) == {1: 3.0, 0: 1.5, 2: 2.0}
    with pytest.raises(ConfigError, match="slow names w2; the workers of this job are w0 to w1"):
        CompareConfig(slow=("w2:3x",))
    with pytest.raises(ConfigError, match="slow names w1 twice"):
        CompareConfig(slow=("w1:3x", "w1:2x"))
    with pytest.raises(ConfigError, match="factor of at least 1"):
        CompareConfig(slow=("w1:0.5x",))
