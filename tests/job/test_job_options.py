"""An option that is declared job-wide reaches everything that has to know it; another one does not."""

import json
from dataclasses import dataclass

import pytest

from torch_ps.common.errors import ConfigError
from torch_ps.common.options.fields import arguments_of, at_least, declared, job_wide, option, per_process
from torch_ps.common.options.mode_choices import DELAY_COMPENSATION, MODES, STALENESS_LR
from torch_ps.common.options.server_config import ServerConfig
from torch_ps.common.options.worker_config import WorkerConfig
from torch_ps.compare import runs
from torch_ps.ps.core.modes import POLICIES, Mode
from torch_ps.ps.job.job_options import dump_options, mode_of, take_over_options
from torch_ps.ps.server.multi_shard import shard_config
from torch_ps.worker.commands import run as ps_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Planted(ServerConfig):
    patience: int = option(3, "steps that a mode of the future waits", check=at_least(0), job_wide=True)
    nearby: int = option(3, "something of one process", check=at_least(0))
    seat: int = option(3, "something that a launcher chooses", check=at_least(0), per_process=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedMode(Mode):
    patience: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeOfOneProcess(Mode):
    nearby: int = 0


PLANTED = Planted(patience=5, nearby=6)


def test_a_planted_job_wide_option_is_in_the_mode_and_another_one_is_refused() -> None:
    mode = mode_of(PLANTED, PlantedMode)
    assert isinstance(mode, PlantedMode)
    assert mode.patience == 5
    with pytest.raises(TypeError, match=r"ModeOfOneProcess\.nearby is no job-wide option of Planted"):
        mode_of(PLANTED, ModeOfOneProcess)


def test_a_planted_job_wide_option_is_taken_over_by_a_standby_and_another_one_is_not() -> None:
    standby = take_over_options(Planted(standby_of="a:1"), json.loads(dump_options(PLANTED)))
    assert isinstance(standby, Planted)
    assert (standby.patience, standby.nearby) == (5, 3)


def test_a_planted_job_wide_option_reaches_the_shards_of_one_host() -> None:
    for index in range(2):
        config = shard_config(Planted(patience=5, shards=2), index, ["127.0.0.1:1"], "ready")
        assert "--patience=5" in arguments_of(config)


def test_a_planted_option_is_one_of_a_run_of_ps_compare_unless_the_launcher_chooses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "_CONFIGS", (Planted, WorkerConfig))
    (run,) = runs.parse_runs("sync:patience=5")
    assert run.name == "sync fp32 patience=5"
    with pytest.raises(ConfigError, match="seat is the same for all runs or set by the launcher"):
        runs.parse_runs("sync:seat=5")


def test_each_option_of_a_run_is_one_of_ps_run() -> None:
    assert set(runs.run_options()) <= {each.opts[0][2:] for each in ps_run.main.params if each.opts[0].startswith("--")}


def test_each_job_wide_option_of_a_server_is_one_of_ps_run_and_none_is_of_one_process() -> None:
    offered = {each.name for each in ps_run.main.params}
    assert set(job_wide(ServerConfig)) <= offered
    assert not set(job_wide(ServerConfig)) & set(per_process(ServerConfig))
    assert not set(per_process(ServerConfig)) & offered
    assert not job_wide(WorkerConfig)


def test_the_mode_has_what_the_options_say() -> None:
    config = ServerConfig(
        mode="ssp", slack=0, max_staleness=4, staleness_lr="inverse", delay_compensation="adaptive:1.5"
    )
    assert mode_of(config) == Mode(
        name="ssp",
        slack=0,
        max_staleness=4,
        staleness_lr="inverse",
        delay_compensation="adaptive",
        compensation_strength=1.5,
    )
    assert mode_of(ServerConfig(mode="ssp")).slack == 2
    assert mode_of(ServerConfig(backup_workers=1)).backup_workers == 1


def test_options_and_core_have_one_list_of_modes() -> None:
    assert tuple(POLICIES) == MODES
    assert declared(ServerConfig)["mode"].allowed() == MODES
    assert declared(ServerConfig)["staleness_lr"].allowed() == STALENESS_LR
    for form in DELAY_COMPENSATION:
        assert mode_of(ServerConfig(mode="async", delay_compensation=form)).delay_compensation == form
