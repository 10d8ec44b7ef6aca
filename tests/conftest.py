"""Settings of every test run: its tier, one thread of torch, a fixed seed, no option from the caller's environment."""

import fcntl
import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import torch_ps.worker  # noqa: F401  # as in a user's process, before gRPC is loaded
from tests.support.tiers import Tier, processes_so_far, spread, tier, tier_of

# How long an example takes tells how busy the machine is.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# For child processes too: on two cores, two processes must not each start a thread per core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

for _name in [name for name in os.environ if name.startswith("PS_")]:
    del os.environ[_name]

#: What the processes that this one had started were after the last test.
STARTED = pytest.StashKey[tuple[int, int]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    names = [each.name.lower() for each in Tier]
    parser.addoption("--tier", choices=names, default="all", help="what to run, see tests/support/tiers.py")


def pytest_configure(config: pytest.Config) -> None:
    """In the background of a shell or under nohup these signals are ignored, also by the processes that tests start."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    config.addinivalue_line("markers", "tier(name): the lowest tier that runs this test, where imports do not tell")
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "whole_gpu: fills a GPU, so no other test uses it at the same time")


def _asked(config: pytest.Config) -> Tier:
    return tier(config.getoption("--tier"))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A module of a higher tier is not even imported."""
    is_test = collection_path.suffix == ".py" and collection_path.name.startswith("test_")
    return True if is_test and tier_of(collection_path) > _asked(config) else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """No test of the tier quick starts a process, nor do its fixtures."""
    yield
    if _asked(item.config) is Tier.QUICK:
        before = item.config.stash[STARTED]
        item.config.stash[STARTED] = processes_so_far()
        assert item.config.stash[STARTED] == before, "started a process, which the tier quick must not"


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = processes_so_far()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if _tier(item) > _asked(config)])
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if _tier(item) <= _asked(config):
            modules.setdefault(item.path, []).append(item)
    sizes = {path: (max(map(_tier, each)), len(each)) for path, each in modules.items()}
    num_runners = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [item for path in spread(sizes, num_runners) for item in modules[path]]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))


def _tier(item: pytest.Item) -> Tier:
    return max([tier_of(item.path), *(tier(mark.args[0]) for mark in item.iter_markers("tier"))])


@pytest.fixture(scope="session")
def schedule_share(request: pytest.FixtureRequest) -> float:
    """The share of its random schedules that a simulation runs: every one, or a fifth in a lower tier than all."""
    return 1.0 if _asked(request.config) is Tier.ALL else 0.2


@pytest.fixture(autouse=True)
def _memory_of_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests of several runners share a GPU, but for one that fills it."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    whole = request.node.get_closest_marker("whole_gpu") is not None
    with Path(tempfile.gettempdir(), f"torch-ps-tests-gpu-{os.getuid()}").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if whole else fcntl.LOCK_SH)
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """A command that a test runs in this process sets the log up for itself, not for the tests after it."""
    logger = logging.getLogger("torch_ps")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
