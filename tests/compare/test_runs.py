"""The list of runs: names, options, refusals, and the rule of the learning rate."""

import pytest

from torch_ps.common.errors import ConfigError
from torch_ps.common.slow import parse_slow
from torch_ps.compare.config import DEFAULT_RUNS, CompareConfig
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
        ("fast", "mode must be one of sync, async, ssp; got 'fast'"),
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


def test_sync_gets_the_base_rate_times_the_workers_and_async_the_base_rate() -> None:
    sync, asynchronous = parse_runs("sync,async")
    assert learning_rate(sync, 0.1, 8, scaled=True) == pytest.approx(0.8)
    assert learning_rate(asynchronous, 0.1, 8, scaled=True) == 0.1
    assert lr_rule(0.1, 8, scaled=True) == "async at learning rate 0.1, sync at 8 x 0.1 = 0.8"


def test_without_scaling_all_runs_get_the_base_rate() -> None:
    sync, _ = parse_runs("sync,async")
    assert learning_rate(sync, 0.1, 8, scaled=False) == 0.1
    assert lr_rule(0.1, 8, scaled=False) == "all runs at learning rate 0.1 (not scaled)"


def test_a_rate_given_to_one_run_is_left_alone() -> None:
    (sync,) = parse_runs("sync:lr=0.3")
    assert learning_rate(sync, 0.1, 8, scaled=True) == 0.3


def test_slow_workers_are_checked_against_the_number_of_workers() -> None:
    assert parse_slow(("w1:3x", "w0:1.5,w2:2")) == {1: 3.0, 0: 1.5, 2: 2.0}
    with pytest.raises(ConfigError, match="slow names w2; the workers of this job are w0 to w1"):
        CompareConfig(slow=("w2:3x",))
    with pytest.raises(ConfigError, match="slow names w1 twice"):
        CompareConfig(slow=("w1:3x", "w1:2x"))
    with pytest.raises(ConfigError, match="factor of at least 1"):
        CompareConfig(slow=("w1:0.5x",))
