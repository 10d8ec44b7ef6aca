"""results.json: written and read back, and refused where it is not what it should be; table and sentences."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from tests.compare.golden import golden
from torch_ps.common.errors import ConfigError
from torch_ps.compare.headline import bytes_sentence, headline
from torch_ps.compare.results import Bytes, Range, Results, RunResult, Spread, from_json, to_json
from torch_ps.compare.terminal_table import COLUMNS, best_runs, table


def test_what_is_written_is_read_back_equal() -> None:
    results = golden()
    assert from_json(to_json(results)) == results


def test_numbers_that_do_not_exist_are_null() -> None:
    first = replace(golden().runs[0], validation_loss=float("nan"), seconds_to_target=float("inf"))
    record = json.loads(to_json(replace(golden(), runs=[first])))
    assert record["runs"][0]["validation_loss"] is None
    assert record["runs"][0]["seconds_to_target"] is None


def test_unknown_fields_are_skipped() -> None:
    record = json.loads(to_json(golden()))
    record["weather"] = record["runs"][0]["mood"] = "fine"
    assert from_json(json.dumps(record)) == golden()


def test_a_file_that_is_not_a_result_is_refused_with_the_place() -> None:
    record = json.loads(to_json(golden()))
    record["runs"][1]["staleness"]["max"] = "two"
    with pytest.raises(ConfigError, match=r"runs\[1\]: staleness: max should be int, not str"):
        from_json(json.dumps(record))
    del record["runs"][0]["curve"]
    with pytest.raises(ConfigError, match=r"runs\[0\] lacks 'curve'"):
        from_json(json.dumps(record))
    with pytest.raises(ConfigError, match="version 2; this ps-compare reads version 1"):
        from_json('{"version": 2}')
    with pytest.raises(ConfigError, match="is not JSON"):
        from_json("{")
    with pytest.raises(ConfigError, match="version None"):
        from_json("[]")


def test_the_table_fits_80_columns_and_says_what_makes_the_rows_comparable() -> None:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(table(golden()))
    text = captured.get()
    for run in golden().runs:
        assert f" {run.name} " in text
    assert "accuracy" not in text
    flat = " ".join(text.split())
    assert "task gpt (1,200,000 parameters); 2 workers; 1,024 samples per run; async at learning rate 0.0003" in flat
    assert "sync at 2 x 0.0003 = 0.0006; slowed: w1:3x" in flat


def test_best_is_what_nothing_beats_by_half_a_percent() -> None:
    runs = [replace(golden().runs[0], name=str(rate), samples_per_second=rate) for rate in (99.0, 99.6, 100.0)]
    (column,) = [column for column in COLUMNS if column.title.startswith("samples")]
    assert best_runs(column, runs) == runs[1:]
    assert best_runs(column, runs[1:]) == []


def with_times(**seconds: float | None) -> Results:
    """Runs named mode_codec with a time to the target; all end at loss 2."""
    template = golden().runs[0]
    runs: list[RunResult] = []
    for name, each in seconds.items():
        mode, codec = name.split("_")
        compress = {"fp32": "none"}.get(codec, codec)
        run = replace(template, name=f"{mode} {codec}", mode=mode, compress=compress, validation_loss=2.0)
        runs.append(replace(run, seconds_to_target=each))
    return replace(golden(), runs=runs, target_loss=2.1)


def test_headline_compares_the_first_run_with_the_other_mode() -> None:
    results = with_times(sync_fp32=30.0, sync_fp16=24.0, async_fp16=12.0)
    assert headline(results) == (
        "async fp16 reached loss 2.1 first, after 12.0 s: 2.0 times as fast as sync fp16, "
        "and it ended with the lowest loss."
    )


def test_headline_says_what_speed_cost_in_loss() -> None:
    results = with_times(sync_fp32=30.0, async_fp32=20.0)
    slow, fast = results.runs
    results = replace(results, runs=[slow, replace(fast, validation_loss=2.04)])
    assert headline(results).endswith("1.5 times as fast as sync fp32, at a final loss 0.04 (2.0 %) above the lowest.")


@pytest.mark.parametrize(("apart", "says"), [(0.02, "by less than the seeds differ."), (0.5, "with the lowest loss.")])
def test_headline_says_when_a_difference_is_less_than_the_seeds_differ(apart: float, says: str) -> None:
    def spread(loss: float) -> Spread:
        return Spread(validation_loss=Range(low=loss - 0.05, high=loss + 0.05))

    base = golden()
    first, other = base.runs[2], base.runs[0]
    better = replace(first, validation_loss=2.0, spread=spread(2.0), seconds_to_target=1.0)
    worse = replace(other, validation_loss=2.0 + apart, spread=spread(2.0 + apart), seconds_to_target=2.0)
    assert headline(replace(base, runs=[better, worse])).endswith(says)
    slower = replace(base, runs=[replace(better, seconds_to_target=3.0), worse])
    assert headline(slower).endswith(", less than the seeds differ.") == (apart < 0.1)


def test_headline_does_not_call_a_small_difference_a_victory() -> None:
    results = with_times(sync_fp32=20.3, async_fp32=20.0)
    assert "about the same as sync fp32" in headline(results)


@pytest.mark.parametrize("first", [0.0, 1e-7, 0.002])
def test_headline_has_no_ratio_to_a_time_near_0(first: float) -> None:
    said = headline(with_times(sync_fp32=42.0, async_fp32=first))
    assert said.startswith("async fp32 reached loss 2.1 first, after 0.00 s; sync fp32 after 42.0 s")
    assert "times" not in said


def test_headline_says_that_a_target_was_reached_before_training() -> None:
    results = with_times(sync_fp32=0.0, async_fp32=0.0)
    assert headline(replace(results, target_loss=99.0)) == (
        "sync fp32 had loss 99 before it trained, so that target does not tell the runs apart; give a lower --target."
    )


def test_sentences_about_bytes_have_no_ratio_to_nothing() -> None:
    results = with_times(sync_fp32=30.0, sync_fp16=24.0, sync_topk=1.0, sync_int8=2.0)
    none = replace(results.runs[0].bytes, pushed_per_worker=0, pulled_per_worker=0)
    assert (
        bytes_sentence(replace(results, runs=[results.runs[0], *(replace(r, bytes=none) for r in results.runs[1:])]))
        == ""
    )


def test_headline_with_nothing_to_compare() -> None:
    assert headline(with_times()) == "No run finished."
    assert headline(with_times(sync_fp32=None)) == "No run reached the target loss 2.1."
    assert headline(with_times(sync_fp32=9.0)) == "sync fp32 reached loss 2.1 after 9.00 s."
    assert headline(with_times(sync_fp32=9.0, async_fp32=None)).startswith("sync fp32 is the only run that reached")
    assert headline(replace(golden(), target_loss=None)).startswith("No run learned anything")


def test_bytes_are_compared_between_runs_that_differ_in_the_codec_only() -> None:
    assert bytes_sentence(with_times(sync_fp32=1.0, async_fp16=1.0)) == ""
    other = [replace(golden().runs[0], name="sync fp32 shards=2"), golden().runs[1]]
    assert bytes_sentence(replace(golden(), runs=other)) == "", "two things differ"
    sentence = bytes_sentence(golden())
    assert sentence.startswith("fp16 gradients push 154 instead of 307 MB per worker in sync mode (2.0 times less)")


def thrifty(**runs: tuple[float | None, float, int]) -> str:
    """The last sentence about runs given as accuracy, loss and megabytes."""
    template = golden().runs[0]
    made = [
        replace(
            template,
            name=f"sync {codec}",
            compress={"fp32": "none"}.get(codec, codec),
            validation_accuracy=accuracy,
            validation_loss=loss,
            bytes=Bytes(pushed_per_worker=size * 400_000, pulled_per_worker=size * 600_000),
        )
        for codec, (accuracy, loss, size) in runs.items()
    ]
    return bytes_sentence(replace(golden(), runs=made))


def test_the_most_thrifty_of_the_good_runs_is_named() -> None:
    sentence = thrifty(fp32=(0.962, 0.170, 40), int8=(0.960, 0.171, 20), sign=(0.958, 0.173, 10), topk=(0.9, 0.3, 5))
    assert sentence.endswith(
        "Of the runs within half a point of the best accuracy (96.2 %, sync fp32, 40 MB pushed and pulled), "
        "sync sign moved the least: 10 MB, 4.0 times less."
    )
    sentence = thrifty(fp32=(None, 1.700, 40), int8=(None, 1.701, 20), sign=(None, 1.75, 10))
    assert sentence.endswith(
        "Of the runs within 0.5 % of the lowest loss (1.7, sync fp32, 40 MB pushed and pulled), "
        "sync int8 moved the least: 20 MB, 2.0 times less."
    )


def test_thrift_is_no_news_where_the_best_run_is_the_smallest_or_two_codecs_are_compared() -> None:
    assert "Of the runs" not in thrifty(fp32=(0.9, 0.3, 40), int8=(0.9, 0.3, 20), sign=(0.97, 0.1, 10))
    assert "Of the runs" not in thrifty(fp32=(0.9, 0.3, 40), sign=(0.9, 0.3, 10))


def test_local_steps_are_thrifty_without_a_codec() -> None:
    sync = replace(golden().runs[0], validation_accuracy=0.96)
    few = Bytes(pushed_per_worker=1_000_000, pulled_per_worker=1_000_000)
    local = replace(sync, name="local 8 fp32", mode="local", bytes=few)
    assert bytes_sentence(replace(golden(), runs=[sync, local])).endswith(
        "local 8 fp32 moved the least: 2 MB, 307.2 times less."
    )


def test_long_names_are_broken_between_words() -> None:
    runs = [
        replace(golden().runs[0], name=name, validation_accuracy=0.96)
        for name in ("async fp32 staleness-lr=inverse", "sync topk:0.01", "local 8 fp32 mode=async outer-lr=1")
    ]
    console = Console(width=80, file=io.StringIO())
    with console.capture() as captured:
        console.print(table(replace(golden(), runs=runs)))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.count("pulled") for line in lines].count(1) == 1, "no column is cut off"
    words = " ".join(lines)
    for name in runs:
        assert all(f" {word} " in words for word in name.name.split(" "))
